"""`ovlfs umount`: unmount, and wait until every change is on disk."""

import argparse
import os
import sys

from ovlfs.cli.main import Parser
from ovlfs.errors import MountError, printable
from ovlfs.fuse import mounting

_PATIENCE_SECONDS = 10.0
"""After which a user wants to know why it takes so long."""
_MAX_HOLDERS = 3


def parser() -> Parser:
    """The command line."""
    found = Parser("ovlfs umount", description="Unmounts, and returns when every change is on disk.")
    found.add_argument("mountpoints", nargs="+", metavar="MOUNTPOINT")
    found.add_argument(
        "-l", "--lazy", action="store_true", help="take it away even if it is in use; what is open stays usable"
    )
    return found


def run(args: argparse.Namespace) -> int:
    """Unmount all of them; a failure does not keep the others."""
    failures = []
    for mountpoint in args.mountpoints:
        try:
            unmount(os.fsencode(mountpoint), lazy=args.lazy)
        except MountError as error:
            failures.append(str(error))
    if failures:
        raise MountError("; ".join(failures))
    return 0


def unmount(path: bytes, *, lazy: bool) -> None:
    """Unmount one, and wait for its daemon.  Raises MountError."""
    entry = mounting.find_mount(path)
    if entry is None:
        raise MountError(f"{printable(path)}: is not mounted")
    if entry.fstype != mounting.FSTYPE:
        raise MountError(f"{printable(path)}: is not a mount of ovlfs, but {printable(entry.fstype)}")
    mounted = next((found for found in mounting.mounts() if found.entry == entry), None)
    record = mounted.record if mounted is not None else None
    with mounting.watching(record) as pidfd:
        mounting.unmount(entry.mountpoint, lazy=lazy)
        if lazy or pidfd is None or record is None:
            return
        if not mounting.wait_for_end(pidfd, _PATIENCE_SECONDS):
            print(f"ovlfs: {printable(path)}: {_waiting_for(record, entry.device)}", file=sys.stderr, flush=True)
            mounting.wait_for_end(pidfd)
    after = mounting.reread(record)
    if after is not None and after.failed:
        raise MountError(f"{printable(path)}: not everything is on disk: {after.failed} (log: {after.log})")


def _waiting_for(record: mounting.Record, device: str) -> str:
    """Why the daemon of what is unmounted goes on."""
    what = f"is unmounted here; waiting for its daemon, process {record.pid}"
    held = mounting.holders(device)
    if not held:
        return f"{what}, which may still be writing to disk"
    more = [f"{len(held) - _MAX_HOLDERS} more"] if len(held) > _MAX_HOLDERS else []
    return f"{what}, since it is still mounted elsewhere: {'; '.join(held[:_MAX_HOLDERS] + more)}"
