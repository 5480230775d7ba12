"""How often was each request answered in Python, how long did it take, and what does a mount cost?

`Meter.note` is called at the boundary of every handler (operations.py), `stats` is what `ovlfs stats` shows.  The
lane counts for itself what it reads and what it answers (native/lane.h, lane_trace.h); here the two are put together.

Latencies are histograms with four buckets to a power of two, as in lane_trace.c: a percentile is right to an eighth,
and a mount that runs for a year needs no more memory than one of a minute.

Kernel: none; the numbers of /proc/self/mountstats are the nearest thing.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ovlfs.fuse.opcodes import handlers_of, name_of, request_of
from ovlfs.overlay.stack import Stack

Watcher = Callable[[str, Sequence[object], int, int], None]
"""Is told of a request: the handler's name, its arguments, how many ns it took, the errno or 0."""

Histogram = list[tuple[int, int]]
"""(ns, how many) of the buckets that are not empty, shortest first."""

_STEPS = 4


class Lane(Protocol):
    """What the lane counts (_native.Lane)."""

    def stats(self) -> tuple[dict[int, tuple[int, int, int]], dict[str, int]]:
        """({opcode: (forwarded, extra, answered)}, {what: number})."""

    @property
    def open_files(self) -> int:
        """How many files it has open for clients."""


class Trace(Protocol):
    """What is told of native answers (_native.Trace): latencies always, records between start and stop."""

    def latencies(self) -> dict[int, Histogram]:
        """By opcode."""

    def counts(self) -> tuple[dict[str, int], int]:
        """({decision: how often}, bytes that were copied up), natively."""

    def start(self, capacity: int, /) -> None:
        """Begin to record."""

    def stop(self) -> None:
        """Record no more."""

    def merged(self, nodeid: int, names: int, layers: bytes, began_ns: int, /) -> None:
        """A directory was merged."""

    def drain(self) -> tuple[list[tuple[int, int, int, int, int, int, int, int, bool, bytes]], int]:
        """([(kind, opcode, at_ns, took_ns, nodeid, number, error, layer, by_starter, name)], how many were dropped)."""


class Meter:
    """Counts of the handlers of one mount.

    Attributes:
        watcher: who wants to know of each request, or None.
    """

    def __init__(self) -> None:
        self.watcher: Watcher | None = None
        self._latencies: dict[str, Counter[int]] = {}
        self._errors: Counter[str] = Counter()

    def note(self, handler: str, args: Sequence[object], seconds: float, code: int) -> None:
        """A handler has answered."""
        ns = int(seconds * 1e9)
        latencies = self._latencies.get(handler)
        if latencies is None:
            latencies = self._latencies[handler] = Counter()
        latencies[bucket(ns)] += 1
        if code:
            self._errors[handler] += 1
        if self.watcher is not None:
            self.watcher(handler, args, ns, code)

    @property
    def handlers(self) -> list[str]:
        """The handlers that have answered something."""
        return list(self._latencies)

    def latencies(self, handlers: Sequence[str]) -> Histogram:
        """The latencies of some handlers, taken together."""
        both: Counter[int] = sum((self._latencies[name] for name in handlers if name in self._latencies), Counter())
        return [((bucket_ns(at) + bucket_ns(at + 1)) // 2, count) for at, count in sorted(both.items())]

    def errors(self, handlers: Sequence[str]) -> int:
        """How many requests the handlers have answered with an error."""
        return sum(self._errors[name] for name in handlers)


def bucket(ns: int) -> int:
    """The bucket of a duration (lane_trace.c: ovl_trace_bucket)."""
    if ns < _STEPS:
        return max(ns, 0)
    power = ns.bit_length() - 1
    return (power - 1) * _STEPS + (ns >> (power - 2) & (_STEPS - 1))


def bucket_ns(number: int) -> int:
    """The shortest duration in a bucket."""
    if number < _STEPS:
        return number
    return (_STEPS + number % _STEPS) << (number // _STEPS - 1)


def percentile(histogram: Histogram, share: float) -> int | None:
    """The duration, in ns, that `share` of all do not exceed; None: there are none."""
    total = sum(count for _, count in histogram)
    left = share * total
    for ns, count in histogram:
        left -= count
        if left <= 0:
            return ns
    return None


# ---- what `ovlfs stats` shows ----------------------------------------------------------------------------------------


def stats(stack: Stack, meter: Meter, lane: Lane | None, trace: Trace, open_files: int) -> dict[str, Any]:
    """All numbers of a mount, as `ovlfs stats --json` prints them (documented in cli/stats.py)."""
    counts = _counts(meter, lane)
    native = {name_of(opcode): histogram for opcode, histogram in trace.latencies().items()}
    operations = {}
    for name, (natively, extra, forwarded) in sorted(counts.items()):
        handlers = handlers_of(name)
        operations[name] = {
            "requests": natively + extra + forwarded,
            "native": natively,
            "extra": extra,
            "forwarded": forwarded,
            "python_errors": meter.errors(handlers),
            "native_us": _percentiles(native.get(name, [])),
            "python_us": _percentiles(meter.latencies(handlers)),
        }
    inodes, merged, names = stack.tree.counts()
    decided, copied_bytes = trace.counts()
    decisions = stack.events.counts + Counter(decided)  # without those of 0
    return {
        "lane": lane is not None,
        "requests": {
            kind: sum(one[kind] for one in operations.values()) for kind in ("requests", "native", "extra", "forwarded")
        },
        "operations": operations,
        "replies": {} if lane is None else lane.stats()[1],
        "caches": {
            "inodes": inodes,
            "merged_directories": merged,
            "names": names,
            "open_files": open_files + (0 if lane is None else lane.open_files),
        },
        "memory": _memory(),
        "decisions": dict(sorted(decisions.items())),
        "copied_up_bytes": stack.events.copied_bytes + copied_bytes,
    }


def _counts(meter: Meter, lane: Lane | None) -> dict[str, tuple[int, int, int]]:
    """(answered natively, extra, forwarded to pyfuse3) by request; without a lane, what the handlers have seen."""
    if lane is not None:
        return {
            name_of(opcode): (answered, extra, forwarded)
            for opcode, (forwarded, extra, answered) in lane.stats()[0].items()
        }
    return {
        request_of(handler): (0, 0, sum(count for _, count in meter.latencies([handler]))) for handler in meter.handlers
    }


def _percentiles(histogram: Histogram) -> dict[str, float] | None:
    p50, p99 = percentile(histogram, 0.5), percentile(histogram, 0.99)
    if p50 is None or p99 is None:
        return None
    return {"p50": round(p50 / 1000, 1), "p99": round(p99 / 1000, 1)}


def _memory() -> dict[str, int]:
    """Of this process, in bytes: resident now, and at most so far."""
    found = {"resident_bytes": 0, "peak_bytes": 0}
    with open("/proc/self/status", "rb") as file:
        for line in file:
            key, _, rest = line.partition(b":")
            if key in (b"VmRSS", b"VmHWM"):
                found["resident_bytes" if key == b"VmRSS" else "peak_bytes"] = int(rest.split()[0]) * 1024
    return found
