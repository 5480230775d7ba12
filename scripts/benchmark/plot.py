"""How does it look?  Bars of the ratio to kernel overlayfs, on a logarithmic scale, as SVG: left of the line is
faster.
"""

import itertools
import math
from pathlib import Path
from xml.sax.saxutils import escape

from benchmark.peers import KERNEL
from benchmark.reach import Results

_COLORS = {
    "fuse-overlayfs": "#9aa5b1", "unionfs-fuse": "#c9b458", "ovlfs": "#1f77b4", "ovlfs --no-lane": "#9ecae1",
    "ovlfs archive": "#2ca02c",
}  # fmt: skip
_VARIANTS = ("#d62728", "#9467bd", "#8c564b")
"""Of those that are not in _COLORS, in turn."""
_LEFT, _WIDTH, _RIGHT = 210, 620, 60
_BAR, _GAP, _TOP = 9, 9, 64


def draw(results: Results, path: Path) -> None:
    """Write the picture."""
    peers = [peer for peer in results.peers if peer.name != KERNEL.name]
    rows = [
        (row, [(peer.name, results.ratio(row, peer.name, KERNEL.name)) for peer in peers]) for row in results.seconds
    ]
    ratios = [ratio for _, bars in rows for _, ratio in bars if ratio is not None] or [1.0]
    low, high = _floor(min([0.5, *ratios]) * 0.8), _ceiling(max([2.0, *ratios]) * 1.2)

    def x(ratio: float) -> float:
        return _LEFT + _WIDTH * math.log(ratio / low) / math.log(high / low)

    height_of_row = _BAR * len(peers) + _GAP
    bottom = _TOP + height_of_row * len(rows)
    out = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + _RIGHT}" height="{bottom + 24}" '
            'font-family="sans-serif" font-size="11">'
        ),
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="18" font-size="13" font-weight="bold">{escape(results.title)}</text>',
    ]
    offset = 8
    others = itertools.cycle(_VARIANTS)
    colors = [_COLORS.get(peer.name) or next(others) for peer in peers]
    for peer, color in zip(peers, colors, strict=True):
        out.append(f'<rect x="{offset}" y="30" width="11" height="11" fill="{color}"/>')
        out.append(f'<text x="{offset + 16}" y="40">{escape(peer.name)}</text>')
        offset += 34 + 7 * len(peer.name)
    out.append(f'<text x="{offset}" y="40" fill="#555">time to kernel overlayfs; dashed: the reach</text>')
    for tick in _ticks(low, high):
        style = 'stroke="#222"' if tick == 1 else 'stroke="#ddd"'
        out.append(f'<line x1="{x(tick):.1f}" y1="{_TOP - 6}" x2="{x(tick):.1f}" y2="{bottom}" {style}/>')
        out.append(f'<text x="{x(tick):.1f}" y="{bottom + 14}" text-anchor="middle" fill="#555">{tick:g}</text>')
    for number, (row, bars) in enumerate(rows):
        top = _TOP + number * height_of_row
        out.append(
            f'<text x="{_LEFT - 8}" y="{top + (height_of_row - _GAP) / 2 + 4:.1f}" text-anchor="end">'
            f"{escape(row)}</text>"
        )
        for place, ((_, ratio), color) in enumerate(zip(bars, colors, strict=True)):
            y = top + place * _BAR
            if ratio is None:
                out.append(f'<text x="{x(1) + 3:.1f}" y="{y + _BAR - 1}" font-size="9" fill="#999">-</text>')
                continue
            start, end = sorted((x(1), x(ratio)))
            out.append(
                f'<rect x="{start:.1f}" y="{y}" width="{max(end - start, 1):.1f}" height="{_BAR - 1}" fill="{color}"/>'
            )
            side, anchor = (end + 3, "start") if ratio >= 1 else (start - 3, "end")
            out.append(
                f'<text x="{side:.1f}" y="{y + _BAR - 1}" font-size="9" text-anchor="{anchor}">{ratio:.2f}</text>'
            )
        limit = results.limit(row)
        reference = 1.0 if limit is None or limit[0] == KERNEL.name else results.ratio(row, limit[0], KERNEL.name)
        if limit is not None and reference is not None:
            at = x(min(max(limit[1] * reference, low), high))
            out.append(
                f'<line x1="{at:.1f}" y1="{top - 2}" x2="{at:.1f}" y2="{top + height_of_row - _GAP + 1}" '
                'stroke="#d62728" stroke-dasharray="2 2"/>'
            )
    out.append("</svg>")
    path.write_text("\n".join(out) + "\n", encoding="utf-8")


def _floor(ratio: float) -> float:
    return max(value for value in _steps() if value <= ratio)


def _ceiling(ratio: float) -> float:
    return min(value for value in _steps() if value >= ratio)


def _ticks(low: float, high: float) -> list[float]:
    return [value for value in _steps() if low <= value <= high]


def _steps() -> list[float]:
    return [digit * 10.0**power for power in range(-4, 6) for digit in (1, 2, 5)]
