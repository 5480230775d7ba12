"""What did each layer of an image bring, and how much of it can nobody see any more?

The rule: a layer is compared with the tree that the layers below it make.  A name that only the new tree has was
added, one that only the old tree has was deleted, one that leads to another inode was changed; a directory that merges
with the one below is none of these.  Bytes are wasted when no name of the whole merged tree leads to them any more:
each layer was a file system once, and the image still carries what a later layer deleted or replaced.

Nothing here decides what hides what.  Both trees are asked of layer/merge.py, name by name; the layers of the whole
stack stand behind `_Heard`, which writes down what merge asked them and what they said, so that a page can show where
a lookup went and where it stopped.  Work is linear in the names of all layers, times the layers that share a directory:
a name that is deleted is no longer there to be deleted again.

Kernel: as overlayfs shows it, fs/overlayfs/namei.c: ovl_lookup(); spec: image-spec layer.md, "Change Types".
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ovlfs.errors import OvlfsError
from ovlfs.ids import Name
from ovlfs.layer import merge
from ovlfs.layer.base import Attr, Entry, Layer, Ref, What
from ovlfs.layer.merge import Found, Source

MAX_NAMES = 2_000_000
"""More names than that, in all layers together, are refused: each takes about a kilobyte of memory here."""

_DAMAGED = frozenset((errno.EIO, errno.EUCLEAN))
"""What merge says of one name that a mount could not show either (a hard link to nothing): the others are fine."""


@dataclass(frozen=True, slots=True)
class Made:
    """Where a layer comes from: what its image says about it."""

    diff_id: str = ""
    created_by: str = ""
    stored_bytes: int = 0


@dataclass(slots=True)
class LayerFacts:
    """What one layer brought.

    Attributes:
        number: from 1, the bottom layer.
        bytes: what its files hold, each inode once, without holes.
        files: names of anything but directories.
        added, changed, deleted: names, against the tree that the layers below make.
        wasted_bytes: of `bytes`, what no name of the merged tree leads to.
    """

    number: int
    made: Made
    bytes: int = 0
    files: int = 0
    directories: int = 0
    whiteouts: int = 0
    opaque: int = 0
    added: int = 0
    changed: int = 0
    deleted: int = 0
    wasted_bytes: int = 0


@dataclass(slots=True)
class Say:
    """What one layer says about one path.

    Attributes:
        layer: its number.
        kind: "directory", "opaque directory", "whiteout", "hard link below", or the type of file.
        bytes: what the inode holds.
        counts: whether the bytes are counted at this name; an inode with several names is counted at one.
        wasted: whether nothing in the merged tree leads to these bytes.
    """

    layer: int
    kind: str
    bytes: int = 0
    counts: bool = False
    wasted: bool = False


Events = tuple[tuple[int, str], ...]


@dataclass(slots=True, eq=False)
class Path:
    """One path that any layer mentions.

    Attributes:
        says: what the layers say, top first; those that say nothing are left out.
        asked: the layers that a lookup in the merged tree asked, top first; empty when it never came here, since the
            directory above is gone or none.
        sources: the layers that serve it in the merged tree; empty: there is no such name.
        events: (layer, "added", "changed" or "deleted"), bottom first.
        damage: why a lookup fails, "" when it does not.
    """

    name: bytes
    parent: "Path | None"
    says: list[Say] = field(default_factory=list)
    asked: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()
    kind: str = ""
    target: bytes = b""
    events: Events = ()
    damage: str = ""
    children: "dict[bytes, Path]" = field(default_factory=dict)

    def path(self) -> bytes:
        """The whole path, from the root."""
        parts: list[bytes] = []
        at: Path | None = self
        while at is not None and at.parent is not None:
            parts.append(at.name)
            at = at.parent
        return b"/" + b"/".join(reversed(parts))

    def walk(self) -> "Iterator[Path]":
        """The path itself and all below it, directories before what is in them, sorted by name."""
        todo = [self]
        while todo:
            at = todo.pop()
            yield at
            todo.extend(at.children[name] for name in sorted(at.children, reverse=True))


@dataclass(slots=True)
class Facts:
    """All layers, bottom first, and all paths."""

    layers: list[LayerFacts]
    root: Path

    def describe(self) -> list[dict[str, Any]]:
        """The layers, for JSON."""
        described = []
        for layer in self.layers:
            fields = asdict(layer)
            described.append({"number": fields.pop("number"), **fields.pop("made"), **fields})
        return described


def instruction(created_by: str) -> str:
    """A history line as its Dockerfile had it: without the words in which docker's old builder wraps it."""
    shell, nothing = "/bin/sh -c ", "#(nop) "
    if not created_by.startswith(shell):
        return created_by
    rest = created_by.removeprefix(shell)
    return rest.removeprefix(nothing).lstrip() if rest.startswith(nothing) else f"RUN {rest.lstrip()}"


Asked = tuple[int, Ref, Name, What | None]
"""What merge asked: the layer's number, the directory and the name; and what the layer said."""


class _Heard:
    """A layer that writes down what it is asked and how it answers; all else is the layer's own."""

    def __init__(self, layer: Layer, number: int, log: "list[Asked]") -> None:
        self._layer = layer
        self._number = number
        self._log = log

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._layer, attribute)

    def lookup(self, directory: Ref, name: Name) -> Entry | None:
        entry = self._layer.lookup(directory, name)
        self._log.append((self._number, directory, name, None if entry is None else entry.what))
        return entry


def gather(layers: Sequence[Layer], made: Sequence[Made]) -> Facts:
    """The facts of a stack of lower layers, given top first; `made` is in the same order.

    Raises:
        OvlfsError: more than MAX_NAMES names.
        OSError: what the layers raise.
    """
    stack: list[Layer | None] = [None, *layers]
    count = len(layers)
    facts = [LayerFacts(count - index, one) for index, one in enumerate(made)]
    root = Path(b"", None, kind="directory")
    held = _read(stack, facts, root)
    seen = _merge(stack, root)
    for source, (size, names) in held.items():
        wasted = source not in seen
        facts[source.layer - 1].wasted_bytes += size if wasted else 0
        for _, say in names:
            say.wasted = wasted
        next((say for path, say in names if say.layer in path.sources), names[0][1]).counts = True
    shared: dict[Events, Events] = {}
    for index in range(count, 0, -1):
        _compare(stack, index, facts[index - 1], root, shared)
    return Facts(facts[::-1], root)


# ---- what each layer says by itself ----------------------------------------------------------------------------------


def _read(
    stack: Sequence[Layer | None], facts: list[LayerFacts], root: Path
) -> dict[Source, tuple[int, list[tuple[Path, Say]]]]:
    """Enter every name of every layer below `root`.  Returns of each regular file what it holds, and its names."""
    held: dict[Source, tuple[int, list[tuple[Path, Say]]]] = {}
    names = 0
    for index, layer in enumerate(stack):
        if layer is None:
            continue
        fact = facts[index - 1]
        kind = "opaque directory" if layer.root_opaque else "directory"
        fact.opaque += layer.root_opaque
        root.says.append(Say(fact.number, kind))
        todo: list[tuple[Path, Ref]] = [(root, layer.root)]
        while todo:
            directory, ref = todo.pop()
            for name, _ in layer.list(ref):
                names += 1
                if names > MAX_NAMES:
                    raise OvlfsError(f"layer {fact.number}: more than {MAX_NAMES} names are in the layers above and it")
                entry = layer.lookup(ref, name)
                if entry is None:
                    continue  # a directory's listing may be older than a lookup in it
                path = directory.children.get(name)
                if path is None:
                    path = directory.children[name] = Path(name, directory)
                say = Say(fact.number, "")
                path.says.append(say)
                match entry.what:
                    case What.WHITEOUT:
                        say.kind = "whiteout"
                        fact.whiteouts += 1
                    case What.DIRECTORY:
                        say.kind = "opaque directory" if entry.opaque else "directory"
                        fact.directories += 1
                        fact.opaque += entry.opaque
                        todo.append((path, entry.ref))
                    case What.LINK_BELOW:
                        say.kind = "hard link below"
                        fact.files += 1
                    case What.OTHER:
                        fact.files += 1
                        attr = layer.attr(entry.ref)
                        say.kind = kind_of(attr.mode)
                        if stat.S_ISREG(attr.mode):
                            source = Source(index, entry.ref)
                            if source not in held:
                                held[source] = (_held(attr), [])
                                fact.bytes += held[source][0]
                            say.bytes = held[source][0]
                            held[source][1].append((path, say))
    return held


def _held(attr: Attr) -> int:
    return max(0, min(attr.size, attr.blocks * 512))


def kind_of(mode: int) -> str:
    """The type of a file, in a word or two."""
    kinds = {
        stat.S_IFREG: "file",
        stat.S_IFDIR: "directory",
        stat.S_IFLNK: "symlink",
        stat.S_IFCHR: "character device",
        stat.S_IFBLK: "block device",
        stat.S_IFIFO: "fifo",
        stat.S_IFSOCK: "socket",
    }
    return kinds.get(stat.S_IFMT(mode), "file of an unknown type")


# ---- the merged tree, and how merge came to it -----------------------------------------------------------------------


def _merge(stack: Sequence[Layer | None], root: Path) -> set[Source]:
    """Look every name up in the whole stack.  Returns the inodes of the layers that the merged tree shows."""
    log: list[Asked] = []
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}  # few are different, and each path has two
    heard: list[Layer | None] = [
        None if layer is None else _Heard(layer, len(stack) - index, log) for index, layer in enumerate(stack)
    ]
    number = [len(stack) - index for index in range(len(stack))]
    seen: set[Source] = set()
    top = merge.root(heard)
    root.asked = root.sources = tuple(number[source.layer] for source in top.sources)
    todo: list[tuple[Path, tuple[Source, ...]]] = [(root, top.sources)]
    while todo:
        directory, sources = todo.pop()
        directories = {(number[source.layer], source.ref) for source in sources}
        for path in directory.children.values():
            log.clear()
            name = Name(path.name)
            try:
                found = merge.lookup(heard, sources, name)
            except OSError as error:
                if error.errno not in _DAMAGED:
                    raise
                path.damage = error.strerror or os.strerror(error.errno or 0)
                found = None
            asked = _asked(log, name, directories)
            path.asked = shared.setdefault(asked, asked)
            if found is None:
                continue
            seen.update(found.sources)
            serving = tuple(number[source.layer] for source in found.sources)
            path.sources = shared.setdefault(serving, serving)
            if found.is_dir:
                path.kind = "directory"
                todo.append((path, found.sources))
                continue
            layer = stack[found.attributes.layer]
            assert layer is not None
            path.kind = kind_of(layer.attr(found.attributes.ref).mode)
            if path.kind == "symlink":
                path.target = layer.readlink(found.attributes.ref)
    return seen


def _asked(log: Sequence[Asked], name: Name, directories: set[tuple[int, Ref]]) -> tuple[int, ...]:
    """The layers that were asked for the name itself; where a hard link leads further down is another lookup."""
    layers: list[int] = []
    for layer, ref, asked, what in log:
        if asked == name and (layer, ref) in directories:
            layers.append(layer)
        if what is What.LINK_BELOW:
            break
    return tuple(layers)


# ---- one layer against those below -----------------------------------------------------------------------------------


def _compare(
    stack: Sequence[Layer | None], index: int, fact: LayerFacts, root: Path, shared: "dict[Events, Events]"
) -> None:
    """Compare the tree that layer `index` and those below it make with the tree without it."""
    now = tuple(merge.roots(stack, index))
    todo: list[tuple[Path, tuple[Source, ...], tuple[Source, ...]]] = [
        (root, now, tuple(merge.roots(stack, index + 1)))
    ]
    while todo:
        directory, now, before = todo.pop()
        for name in _may_differ(stack, index, now, before):
            path = directory.children.get(name)
            if path is None:
                continue  # somebody made it just now, in a directory
            new, old = _look(stack, now, name), _look(stack, before, name)
            event = _event(new, old)
            if event:
                events = (*path.events, (fact.number, event))
                path.events = shared.setdefault(events, events)
                setattr(fact, event, getattr(fact, event) + 1)
            new_sources = new.sources if new is not None and new.is_dir else ()
            old_sources = old.sources if old is not None and old.is_dir else ()
            if new_sources != old_sources:
                todo.append((path, new_sources, old_sources))


def _may_differ(
    stack: Sequence[Layer | None], index: int, now: Sequence[Source], before: Sequence[Source]
) -> Iterator[Name]:
    """The names of a directory about which the two trees may differ: the layer's own, and all where it hides some."""
    layer = stack[index]
    assert layer is not None
    own: set[Name] = set()
    if now and now[0].layer == index:
        own.update(name for name, _ in layer.list(now[0].ref))
    yield from own
    if not set(before) <= set(now):
        yield from (name for name in merge.names(stack, before) if name not in own)


def _look(stack: Sequence[Layer | None], sources: Sequence[Source], name: Name) -> Found | None:
    if not sources:
        return None
    try:
        return merge.lookup(stack, sources, name)
    except OSError as error:
        if error.errno not in _DAMAGED:
            raise
        return None


def _event(new: Found | None, old: Found | None) -> str:
    if new is None:
        return "" if old is None else "deleted"
    if old is None:
        return "added"
    if new.is_dir and old.is_dir:
        return ""
    return "" if new.sources == old.sources else "changed"
