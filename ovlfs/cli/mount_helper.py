"""`mount.ovlfs`, `mount.fuse.ovlfs`: what mount(8) runs for `mount -t ovlfs SOURCE MOUNTPOINT` and for fstab.

    none            /mnt/root  ovlfs  lowerdir=/l1:/l2,upperdir=/u,workdir=/w  0 0
    /img/app.tar    /mnt/app   ovlfs  ro,nofail                                0 0
    /img/app.tar:v2 /mnt/app2  ovlfs  upperdir=/u,workdir=/w,platform=arm64    0 0

mount(8) passes its own words, too (rw, nofail, x-systemd.automount, ...).  With `lowerdir` the source is a mere name.

Exit codes are those of mount(8): 1 wrong usage, 32 the mount failed.
"""

import argparse
import os
import sys

from ovlfs.cli import start
from ovlfs.cli.main import Parser, guarded
from ovlfs.errors import UsageError
from ovlfs.overlay.params import MountFlags, Params, parse_mount_options, split_words

_USAGE_ERROR = 1
_MOUNT_FAILED = 32


def main(argv: list[str] | None = None) -> int:
    """The programs `mount.ovlfs` and `mount.fuse.ovlfs`."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded("mount.ovlfs", lambda: run(parser().parse_args(argv)), usage=_USAGE_ERROR, failure=_MOUNT_FAILED)


def parser() -> Parser:
    """The command line that mount(8) calls helpers with."""
    found = Parser("mount.ovlfs", description="Called by mount(8); `ovlfs mount` is for people.")
    found.add_argument("source", metavar="SOURCE")
    found.add_argument("mountpoint", metavar="MOUNTPOINT")
    found.add_argument("-o", dest="options", metavar="OPTS", action="append", default=[], help="mount options")
    found.add_argument("-s", dest="sloppy", action="store_true", help="ignore unknown options")
    found.add_argument("-f", dest="fake", action="store_true", help="check the options, mount nothing")
    found.add_argument("-n", dest="no_mtab", action="store_true", help="without effect: there is no mtab to write")
    found.add_argument("-v", dest="verbose", action="store_true", help="say what was mounted")
    found.add_argument("-t", dest="fstype", metavar="TYPE", help="the type as typed: ovlfs or fuse.ovlfs")
    found.add_argument("-N", dest="namespace", metavar="NS", help="not supported")
    return found


def run(args: argparse.Namespace) -> int:
    """Mount as mount(8) asks."""
    if args.namespace is not None:
        raise UsageError("-N is not supported; use nsenter(1)")
    options = ",".join(args.options)
    params, flags = _parse(options, sloppy=args.sloppy)
    if args.fake:
        return 0
    said = start.mount(
        start.Request(
            mountpoint=os.fsencode(args.mountpoint),
            image=None if params.lowerdirs else args.source,
            source=args.source,
            params=params,
            flags=flags,
            options=options,
        )
    )
    if args.verbose:
        start.say(said)
    return 0


def _parse(options: str, *, sloppy: bool) -> tuple[Params, MountFlags]:
    if not sloppy:
        return parse_mount_options(options)
    known: list[str] = []
    for word in split_words(options):
        try:
            parse_mount_options(",".join([*known, word]))
        except UsageError as error:
            print(f"mount.ovlfs: ignored (-s): {error}", file=sys.stderr)
        else:
            known.append(word)
    return parse_mount_options(",".join(known))


if __name__ == "__main__":
    sys.exit(main())
