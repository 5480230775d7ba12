"""`ovlfs ls IMAGE:/PATH`: list a directory of an image, without mounting it."""

import argparse
import os
import stat
import sys
import time

from ovlfs.cli.main import Parser
from ovlfs.errors import printable


def parser() -> Parser:
    """The command line."""
    found = Parser("ovlfs ls", description="Lists what is in a directory of an image.")
    found.add_argument("place", metavar="IMAGE[:TAG][:/PATH]", type=os.fsencode)
    found.add_argument("-l", "--long", action="store_true", help="modes, owners, sizes, times")
    found.add_argument("-d", "--directory", action="store_true", help="the directory itself, not what is in it")
    found.add_argument("-0", "--raw", action="store_true", help="names as they are, each ended by a NUL")
    found.add_argument("--platform", metavar="OS/ARCH", default="", help="which of the image's platforms")
    return found


def run(args: argparse.Namespace) -> int:
    """List."""
    from ovlfs.cli.browse import opened  # noqa: PLC0415  # heavy
    from ovlfs.image.reference import split_path  # noqa: PLC0415

    reference, path = split_path(args.place)
    with opened(reference, args.platform) as tree:
        node = tree.resolve(path, follow=not args.long)
        listed = tree.children(node) if node.is_dir and not args.directory else [node]
        for one in listed:
            name = os.path.basename(one.path) or b"/"
            if one is node:
                name = path
            line = ""
            target = b""
            if args.long:
                attr = tree.attr(one)
                line = _long(attr.mode, attr.nlink, attr.uid, attr.gid, attr.rdev, attr.size, attr.mtime_ns)
                target = tree.readlink(one) if stat.S_ISLNK(attr.mode) else b""
            if args.raw:
                sys.stdout.buffer.write(os.fsencode(line) + name + (b" -> " + target if target else b"") + b"\0")
            else:
                print(line + printable(name) + (f" -> {printable(target)}" if target else ""))
    return 0


def _long(mode: int, nlink: int, uid: int, gid: int, rdev: int, size: int, mtime_ns: int) -> str:
    """As `ls -ln` has it, with the time in UTC."""
    shown = f"{os.major(rdev)},{os.minor(rdev)}" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else str(size)
    try:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(mtime_ns // 1_000_000_000))
    except (OverflowError, OSError, ValueError):  # a year that no calendar has
        when = f"@{mtime_ns // 1_000_000_000}"
    return f"{stat.filemode(mode)} {nlink:>3} {uid:>5} {gid:>5} {shown:>10} {when} "
