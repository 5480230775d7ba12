"""`ovlfs mounts`: what is mounted, by which process, where the changes and the logs are."""

import argparse
import json
import os
import time
from typing import Any

from ovlfs.cli.main import Parser
from ovlfs.errors import printable
from ovlfs.fuse import mounting


def parser() -> Parser:
    """The command line."""
    found = Parser("ovlfs mounts", description="Lists what is mounted.")
    found.add_argument("--json", action="store_true", help="for programs")
    return found


def run(args: argparse.Namespace) -> int:
    """List."""
    found = [_described(mounted) for mounted in mounting.mounts()]
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    for one in found:
        state = "" if one["alive"] else "  (dead: its daemon is gone; `ovlfs umount` removes it)"
        print(f"{printable(one['source'])} on {printable(one['mountpoint'])}{state}")
        for what in ("upper", "log"):
            if one[what] is not None:
                print(f"  {what:<6} {printable(one[what])}")
        if one["ephemeral"]:
            print("  changes are dropped at unmount")
        if one["pid"] is not None:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["since"]))
            print(f"  pid    {one['pid']}, since {since}")
    return 0


def _described(mounted: mounting.Mounted) -> dict[str, Any]:
    entry, record = mounted.entry, mounted.record
    return {
        "mountpoint": os.fsdecode(entry.mountpoint),
        "source": os.fsdecode(entry.source) if record is None else record.source,
        "alive": mounted.alive,
        "pid": None if record is None else record.pid,
        "upper": None if record is None else record.upper,
        "work": None if record is None else record.work,
        "ephemeral": record is not None and record.ephemeral,
        "log": None if record is None else record.log,
        "options": "" if record is None else record.options,
        "mount_options": entry.options,
        "since": None if record is None else record.since,
    }
