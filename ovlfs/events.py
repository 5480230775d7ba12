"""What was decided, told by the code that decides.

A decision (a copy-up, a whiteout, an opaque mark, a redirect) is told once, where it is made, as one `Event`.
Whoever wants to show it (`--debug`, `ovlfs trace`) listens; when nobody does, telling costs one addition and one
comparison.  What a lookup asks of each layer is told the same way, by layer/merge.py, to those who replay it
(`ovlfs explain`).
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ovlfs.errors import printable


@dataclass(frozen=True, slots=True)
class Event:
    """One decision about one path (relative to the mount's root, b"" for the root itself).

    Attributes:
        took_ns: how long it took to carry out, 0: not measured.
    """

    what: str
    path: bytes
    detail: str = ""
    took_ns: int = 0

    def __str__(self) -> str:
        line = f"{self.what} /{printable(self.path)}"
        return f"{line} ({self.detail})" if self.detail else line


Listener = Callable[[Event], None]


@dataclass(slots=True)
class Events:
    """Where decisions are told.

    Attributes:
        counts: how often each was told.
        copied_bytes: how much data was copied up.
    """

    listeners: list[Listener] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    copied_bytes: int = 0

    def tell(self, what: str, path: bytes, detail: str = "", *, began_ns: int = 0, copied_bytes: int = 0) -> None:
        """Tell every listener of a decision.

        Args:
            what: which one.
            path: about what.
            detail: in words.
            began_ns: when carrying it out began (time.monotonic_ns), 0: it is not measured.
            copied_bytes: how much data was copied for it.
        """
        self.counts[what] += 1
        self.copied_bytes += copied_bytes
        if self.listeners:
            event = Event(what, path, detail, time.monotonic_ns() - began_ns if began_ns else 0)
            for listener in self.listeners:
                listener(event)
