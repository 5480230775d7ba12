"""Side by side: the same work on the same layers, on kernel overlayfs, fuse-overlayfs, unionfs-fuse and ovlfs.

  scripts/bench                              all of it, on tmpfs, 5 rounds: some 25 minutes
  scripts/bench --pin 0                      everything on one CPU, daemons too: what a message costs is then constant
  scripts/bench --only walk,untar --rounds 3 --peers kernel,ovlfs
  scripts/bench --variant uring=io_uring     one more ovlfs, mounted with -o io_uring
  scripts/bench --messages                   not times, but the FUSE messages that one operation takes

Prints a Markdown table: the median of the rounds in ms, its ratio to kernel overlayfs and to fuse-overlayfs, and
whether the reach is met: pinned the ratio to the kernel, else the one to fuse-overlayfs.  The peers take turns in
every round.
What a row does, and what cold and warm mean: scripts/benchmark/work.py.  The layers: scripts/benchmark/layers.py.
"""

import argparse
import os
import sys
from pathlib import Path

from benchmark import compare, messages
from benchmark.peers import BenchError, unmount_when_terminated


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("layers")
    what.add_argument("--image", type=Path, metavar="X.tar", help="the layers of this docker-archive, not a Debian's")
    what.add_argument("--lower", type=lambda text: [Path(path).resolve() for path in text.split(":")], default=[],
                      metavar="L1:L2:...", help="these directories, topmost first")  # fmt: skip
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--tmpfs", type=Path, metavar="DIR", help="mount a tmpfs for layers and uppers below DIR (default: /tmp)"
    )
    where.add_argument("--disk", type=Path, metavar="DIR", help="layers and uppers lie below DIR, on its file system")
    how = parser.add_argument_group("measuring")
    how.add_argument("--rounds", type=int, default=5)
    how.add_argument("--pin", type=int, metavar="CPU", help="keep everything on one CPU")
    how.add_argument("--only", default="", metavar="WORKLOAD,...", help="rows with one of these in their name")
    how.add_argument("--peers", default="", metavar="PEER,...", help="only these")
    how.add_argument(
        "--variant", action="append", default=[], metavar="NAME=OPTIONS", help="one more ovlfs, with mount options"
    )
    how.add_argument(
        "--archive", action="store_true", help="one more ovlfs, that mounts the layers from a docker-archive"
    )
    how.add_argument("--scale", type=float, default=1, help="do this part of the counts (to try the script)")
    how.add_argument("--json", type=Path, metavar="OUT.json", help="write all that was measured")
    how.add_argument("--plot", type=Path, metavar="OUT.svg", help="draw the ratios to kernel overlayfs")
    counted = parser.add_argument_group("messages")
    counted.add_argument("--messages", action="store_true", help="count messages by operation")
    counted.add_argument("--count", choices=("kernel", "stats"), default="kernel",
                         help="by the kernel's tracepoint (default), or by `ovlfs stats`")  # fmt: skip
    args = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("kernel overlayfs needs root")
    if args.rounds < 1 or args.scale <= 0:
        parser.error("--rounds and --scale should be positive")
    unmount_when_terminated()
    try:
        return messages.main(args) if args.messages else compare.main(args)
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
