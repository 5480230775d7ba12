"""In what do two merged trees differ?  So: what did an upperdir change, and in what is one image not another?

Both trees are walked together, by the one lookup that mounts use (layer/merge.py); whiteouts, opaque directories,
redirects and metacopies are therefore never looked at here.  Where a directory is made of the same objects of the same
layers in both trees, nothing below it can differ, and it is not entered; where only some upper layers differ, only the
names that those mention are compared.  A path is added, changed or deleted as `docker diff` has it: a directory
in which something changed counts as changed, what was below a deleted one is not listed.

Docker: moby pkg/archive/changes.go: ChangesDirs(), addChanges(), statDifferent().
Differences, on purpose: files that have the same attributes are compared byte for byte, and xattrs and symlink targets
are compared too; the mtime of a directory alone is no change to show (as there), but it is one to store.
"""

import enum
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ovlfs.ids import Name
from ovlfs.image.layer_tar import is_portable_xattr
from ovlfs.layer import merge
from ovlfs.layer.base import Attr, Extent, Layer
from ovlfs.layer.merge import Found, Layers, Source
from ovlfs.overlay.copy_up import extents_of

PIECE_BYTES = 1 << 20
_TIMES = "times"


class Kind(enum.Enum):
    """What happened to a path; the value is `docker diff`'s letter."""

    ADDED = "A"
    CHANGED = "C"
    DELETED = "D"


@dataclass(frozen=True, slots=True)
class Change:
    """One path that differs, or that a layer has to hold all the same (`kind` None).

    Attributes:
        path: from the root, b"" for the root itself.
        kind: None: nothing differs.
        now, before: what the path is and was; None: nothing.
        aspects: in what a path that is in both trees differs: type, content, target, device, mode, owner, times,
            xattrs; empty for a directory in which only something else changed.
        opaque: a directory of which nothing that was below shows any more.
        covered: it is below an opaque directory.
    """

    path: bytes
    kind: Kind | None
    now: Found | None
    before: Found | None
    aspects: tuple[str, ...] = ()
    opaque: bool = False
    covered: bool = False

    @property
    def is_shown(self) -> bool:
        """Whether `docker diff` would tell of it."""
        return self.kind is not None and not (
            self.now is not None and self.now.is_dir and self.kind is Kind.CHANGED and self.aspects == (_TIMES,)
        )


def changes(now: Layers, before: Layers) -> list[Change]:
    """What `docker diff` lists, in order: a directory before what is in it."""
    found = {change.path: change for change in compare(now, before) if change.is_shown}
    for path in list(found):
        parent = path
        while parent:
            parent = parent.rpartition(b"/")[0]
            if not parent or parent in found:
                break
            found[parent] = Change(parent, Kind.CHANGED, resolve(now, parent), resolve(before, parent))
    found.pop(b"", None)  # docker shows no line for the root
    return [found[path] for path in sorted(found, key=lambda path: path.split(b"/"))]


def compare(now: Layers, before: Layers, *, as_layer: bool = False) -> Iterator[Change]:
    """Every path that differs, in no particular order; parents are not listed for their children's sake.

    Args:
        now: the layers of a tree (see merge.Layers).
        before: those of the other; empty: there was nothing.
        as_layer: also what a layer on top of `before` has to hold for `now` to come out: everything in an opaque
            directory, and the hard links of the topmost layer.

    Raises:
        OSError: EUCLEAN, EIO and others, of damaged layers.
    """
    comparison = _Comparison(now, before, as_layer=as_layer)
    todo = [_Pair(b"", root(now), root(before), covered=False)]
    while todo:
        pair = todo.pop()
        change = comparison.judge(pair)
        if change is not None:
            yield change
        todo += comparison.below(pair)


@dataclass(frozen=True, slots=True)
class _Pair:
    """One path in both trees."""

    path: bytes
    now: Found | None
    before: Found | None
    covered: bool


class _Comparison:
    """Two stacks of layers; their bottommost layers may be the same."""

    def __init__(self, now: Layers, before: Layers, *, as_layer: bool) -> None:
        self.now = now
        self.before = before
        self.as_layer = as_layer
        # How many layers, counted from the bottom, are the same ones: below them no lookup can tell the two apart.
        self._shared = 0
        for one, other in zip(reversed(now), reversed(before), strict=False):
            if one is None or one is not other:
                break
            self._shared += 1

    def _same(self, one: Source, other: Source) -> bool:
        """Whether a source of `now` and one of `before` are the same object of the same layer."""
        height = len(self.now) - one.layer
        return height <= self._shared and height == len(self.before) - other.layer and one.ref == other.ref

    def _common(self, pair: _Pair) -> int:
        """How many of the bottommost sources of a path are the same in both trees."""
        if pair.now is None or pair.before is None:
            return 0
        count = 0
        for one, other in zip(reversed(pair.now.sources), reversed(pair.before.sources), strict=False):
            if not self._same(one, other):
                break
            count += 1
        return count

    def _is_same(self, pair: _Pair) -> bool:
        """Whether a path is made of the same objects in both trees."""
        assert pair.now is not None
        assert pair.before is not None
        return len(pair.now.sources) == len(pair.before.sources) == self._common(pair)

    def _is_opaque(self, pair: _Pair) -> bool:
        """Whether a directory shows nothing of the directory that was there, or not what it showed."""
        now, before = pair.now, pair.before
        if not self.as_layer or now is None or before is None or not (now.is_dir and before.is_dir):
            return False
        return self._common(pair) < len(before.sources)

    def judge(self, pair: _Pair) -> Change | None:
        """What is to be said about the path itself."""
        now, before = pair.now, pair.before
        if now is None:
            return None if before is None else Change(pair.path, Kind.DELETED, None, before, covered=pair.covered)
        if before is None:
            return Change(pair.path, Kind.ADDED, now, None, covered=pair.covered)
        aspects = () if self._is_same(pair) else self._aspects(now, before)
        opaque = self._is_opaque(pair)
        if aspects:
            return Change(pair.path, Kind.CHANGED, now, before, aspects, opaque, pair.covered)
        if opaque or (self.as_layer and (pair.covered or self._is_linked_on_top(now))):
            return Change(pair.path, None, now, before, (), opaque, pair.covered)
        return None

    def _is_linked_on_top(self, now: Found) -> bool:
        """Whether it is one of several names of a file of the topmost layer: they are stored together or not at all."""
        source = now.sources[0]
        return not now.is_dir and source.layer == top(self.now) and _layer(self.now, source).attr(source.ref).nlink > 1

    def below(self, pair: _Pair) -> Iterator[_Pair]:
        """The names in a directory that can differ."""
        now, before = pair.now, pair.before
        if now is None or not now.is_dir:
            return
        covered = pair.covered or self._is_opaque(pair)
        was = before.sources if before is not None and before.is_dir else ()
        if covered or not was:
            names = set(merge.names(self.now, now.sources)) | set(merge.names(self.before, was))
        else:
            common = self._common(pair)
            names = set(_mentioned(self.now, now.sources[: len(now.sources) - common]))
            names |= set(_mentioned(self.before, was[: len(was) - common]))
        for name in names:
            yield _Pair(
                pair.path + b"/" + name if pair.path else name,
                merge.lookup(self.now, now.sources, name),
                merge.lookup(self.before, was, name) if was else None,
                covered,
            )

    def _aspects(self, now: Found, before: Found) -> tuple[str, ...]:
        is_, was = attr_of(self.now, now), attr_of(self.before, before)
        if stat.S_IFMT(is_.mode) != stat.S_IFMT(was.mode):
            return ("type",)
        aspects = [
            what
            for what, differs in (
                ("mode", is_.mode != was.mode),
                ("owner", (is_.uid, is_.gid) != (was.uid, was.gid)),
                (_TIMES, is_.mtime_ns != was.mtime_ns),
                ("device", _is_device(is_.mode) and is_.rdev != was.rdev),
                ("xattrs", xattrs_of(self.now, now) != xattrs_of(self.before, before)),
                ("target", stat.S_ISLNK(is_.mode) and readlink(self.now, now) != readlink(self.before, before)),
                ("content", stat.S_ISREG(is_.mode) and self._content_differs((now, is_), (before, was))),
            )
            if differs
        ]
        return tuple(aspects)

    def _content_differs(self, now: tuple[Found, Attr], before: tuple[Found, Attr]) -> bool:
        if now[1].size != before[1].size:
            return True
        if now[1].size == 0 or self._same(now[0].sources[-1], before[0].sources[-1]):
            return False
        return not _equal(_pieces(self.now, *now), _pieces(self.before, *before))


def content_bytes(layers: Layers, found: Found | None) -> int:
    """How many bytes the regular files at a path and below it have; names of one file count once each."""
    total = 0
    todo = [found]
    while todo:
        at = todo.pop()
        if at is None:
            continue
        if at.is_dir:
            todo += [merge.lookup(layers, at.sources, name) for name in merge.names(layers, at.sources)]
        else:
            attr = attr_of(layers, at)
            total += attr.size if stat.S_ISREG(attr.mode) else 0
    return total


# ---- what a tree says about one path ---------------------------------------------------------------------------------


def root(layers: Layers) -> Found | None:
    """The root directory; None of a stack that has no layer to be listed."""
    return merge.root(layers) if merge.roots(layers, 0) else None


def resolve(layers: Layers, path: bytes) -> Found | None:
    """What a path (symlinks not followed) is in a tree."""
    found = root(layers)
    return found if found is None or not path else merge.resolve(layers, found.sources, path)


def attr_of(layers: Layers, found: Found) -> Attr:
    """The attributes that a mount would show.  Raises OSError (EUCLEAN) for a damaged override_stat."""
    attr = _layer(layers, found.attributes).attr(found.attributes.ref)
    if found.is_dir != stat.S_ISDIR(attr.mode):
        raise OSError(errno.EUCLEAN, "override_stat says of a directory that it is none, or the other way round")
    return attr


def xattrs_of(layers: Layers, found: Found) -> dict[bytes, bytes]:
    """The xattrs that belong to the tree, not to this machine."""
    xattrs = _layer(layers, found.attributes).xattrs(found.attributes.ref)
    return {name: value for name, value in xattrs.items() if is_portable_xattr(name)}


def readlink(layers: Layers, found: Found) -> bytes:
    """A symlink's target."""
    return _layer(layers, found.attributes).readlink(found.attributes.ref)


def data_of(layers: Layers, found: Found, size: int) -> tuple[int, list[Extent]]:
    """(a new descriptor, the extents below `size`) of a regular file's data, wherever it is; holes are left out."""
    source = found.sources[-1]
    fd, extents = extents_of(_layer(layers, source), source.ref)
    cut = [
        replace(extent, length=min(extent.length, size - extent.logical)) for extent in extents if extent.logical < size
    ]
    return fd, cut


def read_extent(fd: int, extent: Extent, path: bytes) -> Iterator[bytes]:
    """The bytes of an extent, in pieces.  Raises OSError (EIO) where the file has become shorter."""
    done = 0
    while done < extent.length:
        piece = os.pread(fd, min(PIECE_BYTES, extent.length - done), extent.physical + done)
        if not piece:
            raise OSError(errno.EIO, "the file became shorter while it was read", path)
        yield piece
        done += len(piece)


def _pieces(layers: Layers, found: Found, attr: Attr) -> Iterator[bytes]:
    """All bytes of a regular file, holes as zeros."""
    fd, extents = data_of(layers, found, attr.size)
    try:
        at = 0
        for extent in extents:
            yield from zeros(extent.logical - at)
            yield from read_extent(fd, extent, b"")
            at = extent.logical + extent.length
        yield from zeros(attr.size - at)
    finally:
        os.close(fd)


def zeros(length: int) -> Iterator[bytes]:
    """`length` zeros, in pieces."""
    while length > 0:
        yield bytes(min(length, PIECE_BYTES))
        length -= PIECE_BYTES


def _equal(one: Iterator[bytes], other: Iterator[bytes]) -> bool:
    """Whether two streams of the same length have the same bytes, however they are cut into pieces."""
    left = right = b""
    while True:
        left = left or next(one, b"")
        right = right or next(other, b"")
        length = min(len(left), len(right))
        if length == 0:
            return not left and not right
        if left[:length] != right[:length]:
            return False
        left, right = left[length:], right[length:]


def _is_device(mode: int) -> bool:
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def _layer(layers: Layers, source: Source) -> Layer:
    layer = layers[source.layer]
    assert layer is not None
    return layer


def top(layers: Layers) -> int:
    """The index of the topmost layer."""
    return next(number for number, layer in enumerate(layers) if layer is not None)


def _mentioned(layers: Layers, sources: tuple[Source, ...]) -> Iterator[Name]:
    """Every name about which one of the sources says something, deletions too."""
    for source in sources:
        for name, _ in _layer(layers, source).list(source.ref):
            yield name
