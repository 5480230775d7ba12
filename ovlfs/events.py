"""What was decided, told by the code that decides.

A decision (a copy-up, a whiteout, an opaque mark, a redirect) is told once, where it is made, as one `Event`.
Whoever wants to show it (`--debug`, the demo, later trace and explain) listens; when nobody does, telling costs
one comparison.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from ovlfs.errors import printable


@dataclass(frozen=True, slots=True)
class Event:
    """One decision about one path (relative to the mount's root, b"" for the root itself)."""

    what: str
    path: bytes
    detail: str = ""

    def __str__(self) -> str:
        line = f"{self.what} /{printable(self.path)}"
        return f"{line} ({self.detail})" if self.detail else line


@dataclass(slots=True)
class Events:
    """Where decisions are told."""

    listeners: list[Callable[[Event], None]] = field(default_factory=list)

    def tell(self, what: str, path: bytes, detail: str = "") -> None:
        """Tell every listener of a decision."""
        if self.listeners:
            event = Event(what, path, detail)
            for listener in self.listeners:
                listener(event)
