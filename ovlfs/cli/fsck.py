"""`ovlfs fsck`: what is wrong with an upperdir, and repair it."""

import argparse
import errno
import fcntl
import os
from typing import TYPE_CHECKING

from ovlfs.cli.main import Parser
from ovlfs.errors import MountError, printable

if TYPE_CHECKING:
    from ovlfs.cli.changed import Place

_DESCRIPTION = """\
Checks an upperdir that is not mounted, and its workdir: one line for each thing that is wrong, with its path, the
rule that it breaks, and what --repair would do.  Nothing that a user has written is ever removed; what cannot be put
right without that is only told.

Exit code: 0 nothing is wrong (or all of it was repaired), 1 something is.

rules: stale-temp, volatile-mark, whiteout-without-lower, whiteout-in-opaque, bad-override, bad-redirect,
broken-redirect, broken-metacopy, wh-name, unreadable (explained in ovlfs/overlay/fsck.py)
"""


def parser() -> Parser:
    """The command line."""
    found = Parser("ovlfs fsck", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("upper", metavar="UPPER", type=os.fsencode)
    found.add_argument("--repair", action="store_true", help="put right what can be put right")
    found.add_argument("--work", metavar="DIR", type=os.fsencode, help="its workdir (default: where mount puts it)")
    found.add_argument("--image", metavar="IMAGE[:TAG]", help="the image below it, where it is not known or was moved")
    found.add_argument("--platform", metavar="OS/ARCH", default="", help="which of the image's platforms")
    return found


def run(args: argparse.Namespace) -> int:
    """Check, and repair."""
    from ovlfs.cli import changed, uppers  # noqa: PLC0415  # heavy
    from ovlfs.overlay import fsck  # noqa: PLC0415

    place = changed.find(args.upper, args.image)
    _refuse_mounted(place)
    workdir = uppers.workdir_of(place.upperdir) if args.work is None else args.work
    left = 0
    with uppers.claimed(uppers.Place(place.upperdir, workdir)), changed.opened(place, args.platform) as found:
        work_fd = fsck.open_work(workdir)
        try:
            if work_fd is not None:
                _claim_work(work_fd, workdir)
            for finding in fsck.check(found.upper, found.lowers, work_fd):
                root = (
                    os.path.join(workdir, b"work")
                    if finding.rule in ("stale-temp", "volatile-mark")
                    else place.upperdir
                )
                end = ""
                if finding.repair is None:
                    left += 1
                elif args.repair:
                    try:
                        finding.repair()
                        end = f"; {finding.remedy}"
                    except OSError as error:  # the others are none the worse for it
                        left += 1
                        end = f"; could not be {finding.remedy}: {error.strerror}"
                else:
                    left += 1
                    end = f"; would be {finding.remedy} (--repair)"
                print(f"{printable(os.path.join(root, finding.path))}: {finding.rule}: {finding.text}{end}")
        finally:
            if work_fd is not None:
                os.close(work_fd)
    return 1 if left else 0


def _refuse_mounted(place: "Place") -> None:
    """EBUSY while somebody has it mounted, ovlfs or the kernel."""
    from ovlfs.fuse import mounting  # noqa: PLC0415

    mounted = place.mounted
    mountpoint = mounted.entry.mountpoint if mounted is not None and mounted.alive else None
    if mountpoint is None:
        mountpoint = mounting.kernel_overlay_of(place.upperdir)
    if mountpoint is not None:
        busy = f"{printable(place.upperdir)}: {os.strerror(errno.EBUSY)}"
        raise MountError(f"{busy}: it is mounted on {printable(mountpoint)}, unmount it first")


def _claim_work(work_fd: int, workdir: bytes) -> None:
    try:
        fcntl.flock(work_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise MountError(f"workdir {printable(workdir)}: {os.strerror(errno.EBUSY)}: it is in use by a mount") from None
