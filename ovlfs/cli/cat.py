"""`ovlfs cat IMAGE:/PATH`: print a file of an image, without mounting it."""

import argparse
import errno
import os
import stat
import sys

from ovlfs.cli.main import Parser
from ovlfs.errors import OvlfsError, UsageError, printable


def parser() -> Parser:
    """The command line."""
    found = Parser("ovlfs cat", description="Prints files of an image, byte for byte.")
    found.add_argument("places", nargs="+", metavar="IMAGE[:TAG]:/PATH", type=os.fsencode)
    found.add_argument("--platform", metavar="OS/ARCH", default="", help="which of the image's platforms")
    return found


def run(args: argparse.Namespace) -> int:
    """Print."""
    from ovlfs.cli.browse import opened  # noqa: PLC0415  # heavy
    from ovlfs.image.reference import split_path  # noqa: PLC0415

    for place in args.places:
        reference, path = split_path(place)
        if path == b"/":
            raise UsageError(f"{printable(place)}: which file of the image? IMAGE:/PATH")
        with opened(reference, args.platform) as tree:
            node = tree.resolve(path)
            if node.is_dir:
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            if not stat.S_ISREG(tree.attr(node).mode):
                raise OvlfsError(f"{printable(path)}: is no regular file")
            for piece in tree.read(node):
                sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
    return 0
