"""How far shall ovlfs reach, and does it?

Two limits a row: with everything pinned to one CPU the ratio to kernel overlayfs, where the price of a message is
constant; else the ratio to fuse-overlayfs, which pays for messages, too.
"""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmark.peers import FUSE_OVERLAYFS, KERNEL, Peer

LIMITS: dict[str, tuple[float, float]] = {
    "walk cold": (1.1, 0.5),
    "walk warm": (1.0, 0.4),
    "read every file cold": (1.2, 0.5),
    "read every file warm": (1.5, 0.6),
    "5000 missing names cold": (1.4, 0.6),
    "5000 missing names warm": (1.0, 1.0),
    "40 x chroot ls -lR + cat": (0.9, 0.2),
    "untar 8000 files": (3.0, 0.5),
    "rm -rf 8000 files": (3.0, 0.5),
    "chmod 750 lower files": (0.6, 0.3),
    "append to 750 lower files": (1.5, 0.4),
    "rename 750 chmodded files": (2.2, 0.5),
    "unlink 750 appended files": (2.0, 0.5),
    "rename 750 lower files": (2.2, 0.5),
    "unlink 750 lower files": (2.0, 0.5),
    "write 512 MiB + fsync": (1.05, 0.5),
    "read 512 MiB cold": (1.05, 0.5),
    "read 512 MiB warm": (1.05, 1.0),
    "random 4 KiB write": (1.05, 0.2),
    "random 4 KiB read": (1.05, 1.0),
    "mmap read-write": (1.05, 0.3),
    "create + write 2000": (2.2, 0.5),
    "create + write + fsync 200": (2.2, 0.5),
    "4 parallel finds cold": (1.2, 0.4),
    "4 parallel untars": (3.0, 0.4),
    "git clone": (1.5, 0.6),
    "gcc of 100 files": (1.5, 0.6),
    "apt-get install": (1.5, 0.6),
}
"""Row -> (pinned: to the kernel, at most; unpinned: to fuse-overlayfs, at most)."""


@dataclass(slots=True)
class Results:
    """What was measured: seconds[row][peer], one for each round."""

    peers: list[Peer]
    pinned: bool
    title: str
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, row: str, peer: str, seconds: float) -> None:
        """One more round."""
        self.seconds.setdefault(row, {}).setdefault(peer, []).append(seconds)

    def median(self, row: str, peer: str) -> float | None:
        """None: it was not measured."""
        found = self.seconds.get(row, {}).get(peer)
        return statistics.median(found) if found else None

    def ratio(self, row: str, peer: str, to: str) -> float | None:
        """Of two medians; None where one is missing."""
        one, other = self.median(row, peer), self.median(row, to)
        return None if one is None or not other else one / other

    def limit(self, row: str) -> tuple[str, float] | None:
        """Whom the row is compared with, and the ratio that is allowed."""
        if row not in LIMITS:
            return None
        return (KERNEL.name, LIMITS[row][0]) if self.pinned else (FUSE_OVERLAYFS.name, LIMITS[row][1])

    def mark(self, row: str, peer: Peer) -> str:
        """The words ok or miss; nothing where it cannot be said."""
        limit = self.limit(row)
        if not peer.judged or limit is None:
            return ""
        ratio = self.ratio(row, peer.name, limit[0])
        return "" if ratio is None else "ok" if round(ratio, 2) <= limit[1] else "miss"


def table(results: Results) -> Iterable[str]:
    """The lines of a Markdown table: milliseconds, then the ratios to kernel overlayfs and fuse-overlayfs."""
    names = [peer.name for peer in results.peers]
    yield "| " + " | ".join(["workload", *names, "reach"]) + " |"
    yield "|---|" + "---:|" * len(names) + "---|"
    for row in results.seconds:
        cells = [row]
        for peer in results.peers:
            median = results.median(row, peer.name)
            if median is None:
                cells.append("-")
                continue
            ratios = [results.ratio(row, peer.name, to) for to in (KERNEL.name, FUSE_OVERLAYFS.name)]
            shown = " ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
            mark = results.mark(row, peer)
            cells.append(
                f"{_milliseconds(median)} ({shown})" + (f" **{mark}**" if mark == "miss" else f" {mark}").rstrip()
            )
        limit = results.limit(row)
        cells.append("" if limit is None else f"{limit[1]} x {limit[0]}")
        yield "| " + " | ".join(cells) + " |"
    marks = [results.mark(row, peer) for row in results.seconds for peer in results.peers]
    yield ""
    said = f"{marks.count('ok')} ok, {marks.count('miss')} missed"
    yield f"Milliseconds, median (ratio to kernel, ratio to fuse-overlayfs); {said}."


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def save(results: Results, path: Path) -> None:
    """All that was measured, as JSON: seconds by row and peer, and what follows from them."""
    rows = {
        row: {
            peer.name: {
                "seconds": results.seconds[row].get(peer.name, []),
                "median": results.median(row, peer.name),
                "to_kernel": results.ratio(row, peer.name, KERNEL.name),
                "to_fuse_overlayfs": results.ratio(row, peer.name, FUSE_OVERLAYFS.name),
                "reach": results.mark(row, peer) or None,
            }
            for peer in results.peers
        }
        for row in results.seconds
    }
    document = {"title": results.title, "pinned": results.pinned, "limits": LIMITS, "rows": rows}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
