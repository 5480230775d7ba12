"""Who looks at a running mount, and what do they see?

`Watch` holds what there is to look at (the stack, the handlers' meter, the lane) and answers on the control socket:
`stats` with numbers, `trace` with every decision as it is made.

A trace has two sources: what Python answers and decides comes from the handlers' boundary (meter.py) and the event
stream (events.py); what the lane answers, and which directories were merged, from a ring in C (native/lane_trace.h).
Both are collected a few times a second, put in order by time, and given to each who listens.  All on the way is
bounded; what does not fit is dropped, and the number of it told.  When nobody listens, there is no ring and no
listener.

Locks: none; all of it runs in the mount's trio thread, and nothing awaits but sleeping and sending.
"""

import contextlib
import errno
import time
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from ovlfs.errors import OvlfsError, printable
from ovlfs.events import Event
from ovlfs.fuse.control import Control, Message, Send, Verb, answering
from ovlfs.fuse.meter import Lane, Trace, stats
from ovlfs.fuse.opcodes import name_of, request_of
from ovlfs.ids import Name, NodeId
from ovlfs.layer.tree import ABSENT, Inode
from ovlfs.overlay.stack import Stack

if TYPE_CHECKING:
    from ovlfs.fuse.operations import Operations

_RING_RECORDS = 16384
"""5 MiB, while somebody listens."""
_PENDING_MAX = 16384
_KNOWN_MAX = 65536
"""Paths of inodes that were seen: one that is forgotten has none any more."""
_QUEUE_MAX = 16384
_EVERY_S = 0.05
_LAST_S = 1.0
"""For what happened last to be taken, when the mount ends."""
_BATCH = 256

_MERGE = 1
_DECISIONS = {2: "copy-up", 3: "whiteout", 4: "opaque", 5: "rename"}
"""Kinds of records (native/lane_trace.h: enum ovl_trace_kind)."""
_BY_HANDLE = frozenset(("read", "write", "fsync", "release"))
_BY_NAME = frozenset(("lookup", "mknod", "mkdir", "symlink", "unlink", "rmdir", "create"))
_XATTR = frozenset(("setxattr", "setxattr_with_flags", "getxattr", "removexattr"))


class Watch:
    """What can be seen of one mount.  `operations` and `lane` are set by the session, before it runs."""

    operations: "Operations"
    lane: Lane | None = None

    def __init__(self, stack: Stack, control: Control | None, verbs: Mapping[str, Verb], trace: Trace) -> None:
        self.trace = trace
        self._stack = stack
        self._control = control
        self._verbs = verbs
        self._tracing = _Tracing(self)
        stack.tree.tell_merged(self.trace)

    @property
    def stack(self) -> Stack:
        """The mount's layers and tree."""
        return self._stack

    async def run(self) -> None:
        """Answer those who ask, until cancelled."""
        if self._control is not None:
            await self._control.serve(
                {"stats": answering(self._stats), "trace": self._tracing.answer, **self._verbs},
            )

    def _stats(self, request: Message) -> object:  # noqa: ARG002
        operations = self.operations
        numbers = stats(self._stack, operations.meter, self.lane, self.trace, operations.open_files)
        return numbers | {"listeners": self._tracing.listeners}


# ---- trace -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Filter:
    """Which events somebody wants.

    Attributes:
        operations: their names, in lower case; empty: all.
        paths: they and what is below; empty: all.
    """

    operations: frozenset[str] = frozenset()
    paths: tuple[str, ...] = ()

    @classmethod
    def of(cls, request: Message) -> "Filter":
        """From a request.  Raises OvlfsError."""
        operations, paths = request.get("operations", []), request.get("paths", [])
        for given in (operations, paths):
            if not isinstance(given, list) or len(given) > 100 or not all(isinstance(one, str) for one in given):
                raise OvlfsError("'operations' and 'paths' are lists of strings, of 100 at most")
        return cls(frozenset(operations), tuple(path.rstrip("/") for path in paths))

    def wants(self, event: Message) -> bool:
        """Whether an event is among them."""
        if self.operations and event["op"].lower() not in self.operations:
            return False
        path = event["path"]
        return not self.paths or any(path == wanted or path.startswith(wanted + "/") for wanted in self.paths)


@dataclass(eq=False, slots=True)
class _Listener:
    """One who listens: what is to be sent, at most _QUEUE_MAX, and how many did not fit."""

    wanted: Filter
    queue: deque[Message] = field(default_factory=deque)
    dropped: int = 0

    def put(self, event: Message) -> None:
        if not self.wanted.wants(event):
            return
        if len(self.queue) < _QUEUE_MAX:
            self.queue.append(event)
        else:
            self.dropped += 1

    def take(self) -> Message | None:
        """The next message, or None when there is nothing to say."""
        batch = [self.queue.popleft() for _ in range(min(_BATCH, len(self.queue)))]
        dropped, self.dropped = self.dropped, 0
        return {"events": batch, "dropped": dropped} if batch or dropped else None


class _Tracing:
    """All who listen, and what is collected for them."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._listeners: list[_Listener] = []
        self._pending: list[tuple[int, Message]] = []  # (time.monotonic_ns, event)
        self._dropped = 0
        self._known: dict[int, str] = {}  # by nodeid; while somebody listens
        self._offset_ns = 0  # from the clock that goes evenly to that of the day, once: times stay in order

    @property
    def listeners(self) -> int:
        """How many listen."""
        return len(self._listeners)

    async def answer(self, request: Message, send: Send) -> None:
        """The verb `trace`: send events until the other side goes away."""
        listener = _Listener(Filter.of(request))
        if not self._listeners:
            self._begin()
        self._listeners.append(listener)
        try:
            await send({"events": [], "dropped": 0})  # from here on nothing is missed
            while True:
                try:
                    await trio.sleep(_EVERY_S)
                except trio.Cancelled:  # the mount ends (or the client is gone): the last moment is told, too
                    with trio.move_on_after(_LAST_S, shield=True), contextlib.suppress(trio.BrokenResourceError):
                        await self._tell(listener, send)
                    raise
                await self._tell(listener, send)
        finally:
            self._listeners.remove(listener)
            if not self._listeners:
                self._end()

    async def _tell(self, listener: _Listener, send: Send) -> None:
        self._collect()
        while (message := listener.take()) is not None:
            await send(message)

    def _begin(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._watch.trace.start(_RING_RECORDS)
        self._watch.operations.meter.watcher = self._requested
        self._watch.stack.events.listeners.append(self._decided)

    def _end(self) -> None:
        self._watch.stack.events.listeners.remove(self._decided)
        self._watch.operations.meter.watcher = None
        self._watch.trace.stop()
        self._pending.clear()
        self._known.clear()
        self._dropped = 0

    def _collect(self) -> None:
        """Give each listener what has happened since the last time, in order."""
        found, self._pending = self._pending, []
        dropped, self._dropped = self._dropped, 0
        for _ in range(_RING_RECORDS // 1024 + 1):  # bounded: others go on filling it
            records, lost = self._watch.trace.drain()
            dropped += lost
            found += [(record[2], self._recorded(*record)) for record in records]
            if not records:
                break
        for at_ns, event in sorted(found, key=lambda one: one[0]):
            event["at"] = (at_ns + self._offset_ns) / 1e9
            for listener in self._listeners:
                listener.put(event)
        for listener in self._listeners:
            listener.dropped += dropped

    def _note(self, event: Message) -> None:
        if len(self._pending) < _PENDING_MAX:
            self._pending.append((time.monotonic_ns(), event))
        else:
            self._dropped += 1

    # ---- what Python answers and decides

    def _decided(self, event: Event) -> None:
        self._note(_event("python", event.what, "/" + printable(event.path), event.detail, event.took_ns, 0))

    def _requested(self, handler: str, args: Sequence[object], took_ns: int, code: int) -> None:
        if len(self._pending) >= _PENDING_MAX:
            self._dropped += 1
            return
        path, detail = self._about(handler, args)
        if handler == "lookup" and not code:
            detail = self._found(args)
        request = "RENAME2" if handler == "rename" and args[4] else request_of(handler)
        self._note(_event("python", request, path, detail, took_ns, code))

    def _about(self, handler: str, args: Sequence[object]) -> tuple[str, str]:
        """(path, detail) of a request, from the arguments of its handler."""
        first = args[0] if args else None
        if not isinstance(first, int):
            return "/", ""
        if handler in _BY_HANDLE:
            return self._path(self._watch.operations.nodeid_of(first)), ""
        named = [printable(arg) for arg in args[1:4] if isinstance(arg, bytes) and len(arg) <= 255]
        if handler in _BY_NAME and named:
            return _join(self._path(first), named[0]), "to " + named[1] if handler == "symlink" and named[1:] else ""
        if handler in _XATTR and named:
            return self._path(first), named[0]
        if handler == "rename" and len(named) == 2 and isinstance(args[2], int):
            return _join(self._path(first), named[0]), "to " + _join(self._path(args[2]), named[1])
        if handler == "link" and named and isinstance(args[1], int):
            return self._path(first), "as " + _join(self._path(args[1]), named[0])
        return self._path(first), ""

    def _found(self, args: Sequence[object]) -> str:
        parent, name = args[0], args[1]
        assert isinstance(parent, int)
        assert isinstance(name, bytes)
        try:
            nodeid = self._watch.stack.tree.lookup(NodeId(parent), Name(name))  # from memory: it was just answered
            return self._served(nodeid)
        except OSError as error:
            return error.strerror or ""

    # ---- what the lane answered

    def _recorded(
        self,
        kind: int,
        opcode: int,
        at_ns: int,  # noqa: ARG002
        took_ns: int,
        nodeid: int,
        number: int,
        error: int,
        layer: int,
        by_python: bool,
        name: bytes,
    ) -> Message:
        """A record of the ring as an event.  Its path is that of now, a moment later; the layers are of then."""
        path = self._path(nodeid)
        if kind == _MERGE:
            by = "python" if by_python else "lane"
            layers = [self._watch.stack.name_of(layer) for layer in array("H", name)]
            return _event(by, "merge", path, f"{number} names of {', '.join(layers)}", took_ns, 0)
        if kind in _DECISIONS:
            return self._native_decision(_DECISIONS[kind], path, number, name, took_ns)
        operation, detail = name_of(opcode), ""
        if name and operation.lower() in _XATTR:
            detail = printable(name)
        elif name:
            path = _join(path, printable(name))
        if operation == "BATCH_FORGET":
            path, detail = "", f"{number} inodes"
        if operation == "LOOKUP" and not error:
            if number:
                self._remember(number, path)
            detail = self._served(number) if layer < 0 else self._watch.stack.name_of(layer)
        return _event("lane", operation, path, detail, took_ns, error)

    def _native_decision(self, decision: str, path: str, number: int, name: bytes, took_ns: int) -> Message:
        if decision == "copy-up":
            return _event("lane", decision, path, printable(name) or f"{number} bytes", took_ns, 0)
        old, _, new = name.partition(b"\0")
        path = _join(path, printable(old))
        detail = "a new directory" if decision == "opaque" else ""
        if decision == "rename":
            detail = "to " + _join(self._path(number), printable(new))
        return _event("lane", decision, path, detail, took_ns, 0)

    def _path(self, nodeid: int | None) -> str:
        try:
            path = None if nodeid is None else self._watch.stack.tree.path(NodeId(nodeid))
        except OSError:
            path = None
        if nodeid is None:
            return "?"
        return self._known.get(nodeid, f"#{nodeid}") if path is None else self._remember(nodeid, "/" + printable(path))

    def _remember(self, nodeid: int, path: str) -> str:
        if len(self._known) >= _KNOWN_MAX:
            self._known.clear()
        self._known[nodeid] = path
        return path

    def _inode(self, nodeid: int) -> Inode | None:
        try:
            return self._watch.stack.tree.get(NodeId(nodeid))
        except OSError:
            return None  # ESTALE: forgotten meanwhile

    def _served(self, nodeid: int) -> str:
        """Which layer serves an inode."""
        if nodeid == ABSENT:
            return "absent"
        inode = self._inode(nodeid)
        if inode is None:
            return ""
        return "upper" if inode.upper else self._watch.stack.name_of(inode.lower[0].layer) if inode.lower else ""


def _event(by: str, operation: str, path: str, detail: str, took_ns: int, code: int) -> dict[str, Any]:
    return {
        "at": 0.0,
        "by": by,
        "op": operation,
        "path": path,
        "detail": detail,
        "us": round(took_ns / 1000, 1) if took_ns else None,
        "error": errno.errorcode.get(code, str(code)) if code else None,
    }


def _join(directory: str, name: str) -> str:
    return f"{directory.rstrip('/')}/{name}"
