"""How far is it?  One line on a terminal, and only when something takes longer than half a second."""

import threading
import time
from typing import Self, TextIO

from ovlfs.errors import printable

PATIENCE_SECONDS = 0.5
_INTERVAL_SECONDS = 0.1
_CLEAR = "\r\x1b[K"


class Progress:
    """Called with what is being done, the bytes done and the bytes in all, from any thread.

    `terminal` None: silent.
    """

    def __init__(self, terminal: TextIO | None) -> None:
        self._terminal = terminal
        self._lock = threading.Lock()
        self._next = time.monotonic() + PATIENCE_SECONDS  # protected by _lock
        self._shown = False  # protected by _lock

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show it, unless it is too early or was shown just now."""
        if self._terminal is None:
            return
        with self._lock:
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + _INTERVAL_SECONDS
            self._shown = True
            share = f" {100 * done // total} %" if total > 0 else ""
            self._terminal.write(f"{_CLEAR}{printable(what)[-100:]}{share}")
            self._terminal.flush()

    def close(self) -> None:
        """Clear the line."""
        with self._lock:
            if self._shown and self._terminal is not None:
                self._terminal.write(_CLEAR)
                self._terminal.flush()
            self._terminal = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
