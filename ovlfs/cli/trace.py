"""`ovlfs trace MOUNT`: every decision of a running mount, as it is made, until interrupted.

One line each: when, who answered (the lane in C, or Python), what, how long it took, and about which path.  A request's
line comes after those of the decisions that it led to (a copy-up, a whiteout), and its time includes theirs.  `-` is a
time that is not measured apart.  Requests have the kernel's names (LOOKUP, RENAME2, ...), decisions small letters:
merge, copy-up, "copy-up data" (of a metacopy), whiteout, opaque, redirect, rename, forget.  What the lane answered is
shown under the name that the file has when the line is printed, a moment later.

When nobody looks, the mount does no more than count.  A reader that is too slow loses lines, and is told how many.
"""

import argparse
import json
import os
from datetime import UTC, datetime
from typing import Any

from ovlfs.cli.main import Parser
from ovlfs.errors import UsageError, printable


def parser() -> Parser:
    """The command line."""
    found = Parser("ovlfs trace", description="Shows every decision of a running mount as it is made.")
    found.add_argument("mount", metavar="MOUNT", type=os.fsencode)
    found.add_argument(
        "--filter",
        metavar="op=...,path=...",
        action="append",
        default=[],
        help="only these: op=lookup,op=copy-up,path=/etc (a path means what is below, too)",
    )
    found.add_argument("--json", action="store_true", help="one JSON object a line")
    return found


def run(args: argparse.Namespace) -> int:
    """Print what comes, until the mount ends or somebody has seen enough."""
    from ovlfs.fuse import client  # noqa: PLC0415

    operations, paths = _filter(args.filter)
    mounted = client.find(args.mount)
    with client.connected(mounted, "trace", operations=operations, paths=paths) as messages:
        for message in messages:
            with client.understanding(mounted):
                lines = [json.dumps(event) if args.json else _line(event) for event in message.get("events", ())]
            for line in lines:
                print(line)
            if lost := message.get("dropped"):
                print(json.dumps({"dropped": lost}) if args.json else f"... {lost} lines were lost: too many, too fast")
            print(end="", flush=True)
    return 0


def _filter(given: list[str]) -> tuple[list[str], list[str]]:
    """(operations, paths) of all --filter options."""
    operations, paths = [], []
    for words in given:
        for word in words.split(","):
            key, equals, value = word.partition("=")
            if key == "op" and equals and value:
                operations.append(value.lower())
            elif key == "path" and value.startswith("/"):
                paths.append(printable(value))
            else:
                raise UsageError(f"--filter: '{printable(word)}' should be op=NAME or path=/PATH")
    return operations, paths


def _line(event: dict[str, Any]) -> str:
    clock = datetime.fromtimestamp(event["at"], tz=UTC).astimezone().strftime("%H:%M:%S.%f")
    took = "-" if event["us"] is None else f"{event['us']:.0f} us"
    words = "  ".join(filter(None, (event["path"], event["detail"], event["error"])))
    return f"{clock} {event['by']:<6} {event['op']:<12} {took:>9}  {words}"
