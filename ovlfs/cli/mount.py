"""`ovlfs mount`: mount an image, or a stack of directories."""

import argparse
import os

from ovlfs.cli import start
from ovlfs.cli.main import Parser
from ovlfs.errors import UsageError
from ovlfs.overlay.params import parse_mount_options

_DESCRIPTION = """\
Mounts a container image (a docker or OCI archive, an OCI layout, a root file system in a tar or a directory) or a
stack of directories.  Returns when the mount answers.

  ovlfs mount image.tar /mnt/root                 writable; the changes are kept, and found again by the next mount
  ovlfs mount --ephemeral image.tar /mnt/root     the changes are dropped at unmount
  ovlfs mount --upper DIR image.tar:app:v2 /mnt/root
  ovlfs mount -o lowerdir=l1:l2,upperdir=u,workdir=w /mnt/root
"""


def parser() -> Parser:
    """The command line."""
    found = Parser("ovlfs mount", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("places", nargs="*", metavar="[SOURCE] MOUNTPOINT", help="SOURCE is PATH, PATH:TAG or PATH:@N")
    how = found.add_mutually_exclusive_group()
    how.add_argument("--ro", "--read-only", dest="read_only", action="store_true", help="nothing can be changed")
    how.add_argument("--ephemeral", action="store_true", help="drop the changes at unmount")
    how.add_argument("--upper", metavar="DIR", type=os.fsencode, help="keep the changes in DIR")
    found.add_argument("--work", metavar="DIR", type=os.fsencode, help="the workdir of --upper (default: DIR.work)")
    found.add_argument("--platform", metavar="OS/ARCH", default="", help="which of an image's platforms")
    found.add_argument("-o", dest="options", metavar="OPTS", action="append", default=[], help="mount options")
    found.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground, log to stderr")
    found.add_argument("--debug", action="store_true", help="log every request and its answer")
    found.add_argument("--no-lane", action="store_true", help="answer every request in Python (for debugging)")
    found.add_argument("--allow-other", action="store_true", help="let other users in")
    return found


def run(args: argparse.Namespace) -> int:
    """Mount."""
    if not 1 <= len(args.places) <= 2:
        raise UsageError("mount: [SOURCE] MOUNTPOINT should be given (see `ovlfs mount --help`)")
    *source, mountpoint = args.places
    words = list(args.options)
    words += [
        word
        for word, wanted in (
            ("ro", args.read_only),
            ("ephemeral", args.ephemeral),
            ("debug", args.debug),
            ("allow_other", args.allow_other),
            ("no_lane", args.no_lane),
        )
        if wanted
    ]
    words += [f"platform={args.platform}"] if args.platform else []  # the registry shall know it
    options = ",".join(words)
    params, flags = parse_mount_options(options)
    start.say(
        start.mount(
            start.Request(
                mountpoint=os.fsencode(mountpoint),
                image=source[0] if source else None,
                params=params,
                flags=flags,
                upper=args.upper,
                work=args.work,
                foreground=args.foreground,
                options=options,
            )
        )
    )
    return 0
