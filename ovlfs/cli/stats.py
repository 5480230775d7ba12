"""`ovlfs stats MOUNT`: what a mount was asked, who answered, how long it took, and what it costs.

`--json` prints one object.  Its keys are stable; there may be more of them one day:

    mountpoint, source, pid, since     as `ovlfs mounts --json` has them
    lane             whether there is a lane; without one `native` and `extra` are 0, `forwarded` is what pyfuse3 had
                     answered, and INIT, FORGET and BATCH_FORGET are not counted
    requests         {requests, native, extra, forwarded}: the sums of
                     What the kernel does by itself, from its caches or by FUSE passthrough, never comes here.
    operations       {NAME: {...}}, NAME as in the kernel's fuse.h without FUSE_ (LOOKUP, BATCH_FORGET, INIT, ...):
        requests     how many were read from the kernel, = native + extra + forwarded
        native       answered by the lane; a BATCH_FORGET that the lane cuts counts here, too
        extra        answered in Python, beside pyfuse3
        forwarded    given to pyfuse3
        native_us    {p50, p99} of native answers in microseconds, or null: there were none
        python_us    {p50, p99} of the handlers in Python (RENAME and RENAME2 share one), or null
        python_errors  how many of those ended with an error
    replies          what was written to the kernel: {replies, interrupted, refused, undeliverable, notifications,
                     dropped}
    caches           {inodes, merged_directories, names, open_files}: what is in memory now
    memory           {resident_bytes, peak_bytes} of the daemon
    decisions        {"copy-up": 3, "whiteout": 1, ...}: how often each was made
    copied_up_bytes  of file data, holes left out
    listeners        how many `ovlfs trace` look at it
"""

import argparse
import json
import os
from typing import Any

from ovlfs.cli.main import Parser
from ovlfs.errors import printable


def parser() -> Parser:
    """The command line."""
    found = Parser("ovlfs stats", description="Shows what a mount was asked, who answered, and what it costs.")
    found.add_argument("mount", metavar="MOUNT", type=os.fsencode)
    found.add_argument("--json", action="store_true", help="for programs; the keys are stable")
    return found


def run(args: argparse.Namespace) -> int:
    """Ask the daemon, and print."""
    from ovlfs.fuse import client  # noqa: PLC0415

    mounted = client.find(args.mount)
    record = mounted.record
    assert record is not None
    about = {"mountpoint": record.mountpoint, "source": record.source, "pid": record.pid, "since": record.since}
    with client.understanding(mounted):
        numbers = about | client.ask(mounted, "stats")
        shown = json.dumps(numbers, indent=2) if args.json else _text(numbers)
    print(shown)
    return 0


def _text(stats: dict[str, Any]) -> str:
    lines = [
        f"{printable(stats['source'])} on {printable(stats['mountpoint'])}, pid {stats['pid']}",
        f"{'request':<16} {'all':>9} {'lane':>9} {'Python':>9}   {'lane p50/p99 us':>17} {'Python p50/p99 us':>19}",
    ]
    everything = ("all", stats["requests"])
    for name, one in [*sorted(stats["operations"].items(), key=lambda item: -item[1]["requests"]), everything]:
        python = one["extra"] + one["forwarded"]
        lines.append(
            f"{name:<16} {one['requests']:>9} {one['native']:>9} {python:>9}   "
            f"{_pair(one.get('native_us')):>17} {_pair(one.get('python_us')):>19}".rstrip()
        )
    caches, memory = stats["caches"], stats["memory"]
    decisions = ", ".join(f"{count} x {what}" for what, count in stats["decisions"].items())
    lines.append(
        f"caches   {caches['inodes']} inodes, {caches['merged_directories']} merged directories with "
        f"{caches['names']} names, {caches['open_files']} open files"
    )
    lines.append(
        f"memory   {memory['resident_bytes'] / 2**20:.1f} MiB resident, {memory['peak_bytes'] / 2**20:.1f} MiB at most"
    )
    lines.append(f"decided  {decisions or 'nothing so far'}")
    lines.append(f"copied   {stats['copied_up_bytes']} bytes up")
    return "\n".join(lines)


def _pair(percentiles: dict[str, float] | None) -> str:
    return "" if percentiles is None else f"{percentiles['p50']:g} / {percentiles['p99']:g}"
