"""How does what an upperdir changed become one OCI layer on top of the layers below it?

The two trees, with the upperdir and without, are compared (overlay/changes.py), and what differs is stored: every path
that was added or changed, whole, with all directories above it; a whiteout for what is gone; `.wh..wh..opq` where a
directory shows nothing of what was below it, and then everything in it.  So a renamed lower directory
(overlay.redirect) comes out as a whiteout of the old name and a full copy under the new one, and a metacopy gets its
data from below: an OCI layer has neither.  The names of one file are stored together, one of them as a file and the
others as hard links to it, also those that nobody touched; else unpacking would make two files of them.

What no layer can hold: sockets (left out and reported, as docker does); names that begin with `.wh.`, and the
deletion of names of more than 251 bytes (LayerError); labels of this machine (`security.selinux`).

Spec: image-spec layer.md.  Docker: moby pkg/archive/archive.go (tarAppender), changes.go (ExportChanges).
"""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ovlfs.ids import ChainId
from ovlfs.image import layer_tar
from ovlfs.image.blob import Blob
from ovlfs.image.blob_writer import MEDIA_TYPES, BlobWriter
from ovlfs.image.digest import next_chain_id
from ovlfs.image.files import FileIdentity, shown
from ovlfs.image.image import LayerBlob
from ovlfs.layer.base import Attr, Extent, Layer, What
from ovlfs.layer.merge import Found, Layers, Source
from ovlfs.overlay import changes
from ovlfs.overlay.copy_up import lower_paths

_NANO = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Exported:
    """A layer that was written.

    Attributes:
        layer: what open_layer() and write_image() take.
        entries: how many entries its tar has; 0: nothing was changed.
        plain_size: bytes of the tar.
        skipped: paths that no layer can hold (sockets).
    """

    layer: LayerBlob
    entries: int
    plain_size: int
    skipped: tuple[bytes, ...]


def write_layer(
    path: bytes,
    now: Layers,
    before: Layers,
    *,
    below: ChainId | None,
    compression: str = "none",
    epoch: int | None = None,
    sparse: bool = False,
    created_by: str = "",
) -> Exported:
    """Write the layer that turns the tree of `before` into that of `now` into the new file `path`.

    With an upperdir as a layer (upperdir.open_layer()) over the layers of an image, top first:

        write_layer(path, [upper, *lowers], [None, *lowers], below=image.layers[-1].chain_id, compression="gzip")

    Args:
        path: must not exist; it is removed again on an error, and not synced.
        now: layers as in layer.merge.Layers; only read, and not closed.
        before: the same without what was added on top; empty for a first layer.
        below: the chain_id of the topmost layer below; None for a first layer.
        compression: one of blob_writer.COMPRESSIONS.
        epoch: no time in the layer is later than this many seconds since 1970 (SOURCE_DATE_EPOCH).
        sparse: write holes as holes (GNU.sparse 1.0), not as zeros.  Everything unpacks it; but docker and containerd
            cannot put a layer that has them together again, so what docker loads it cannot save or push.
        created_by: for the LayerBlob.

    Raises:
        LayerError: the tree has what an OCI layer cannot hold.
        OSError: of damaged layers; ENOSPC and the like for `path`.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        content = entries(now, before, epoch=epoch, sparse=sparse)
        writer = BlobWriter(fd, compression)
        layer_tar.write(content.entries, writer.write)
        writer.finish()
        identity = FileIdentity.of(fd)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)
    layer = LayerBlob(
        blob=Blob(shown(path), os.path.abspath(path), (), 0, writer.size, writer.digest, identity),
        diff_id=writer.diff_id,
        chain_id=next_chain_id(below, writer.diff_id),
        digest=writer.digest,
        size=writer.size,
        media_type=MEDIA_TYPES[compression],
        created_by=created_by,
    )
    return Exported(layer, len(content.entries), writer.plain_size, tuple(content.skipped))


@dataclass(slots=True)
class Content:
    """The entries of a layer, in the order in which they are written, and what had to be left out."""

    entries: list[layer_tar.Entry]
    skipped: list[bytes]


def entries(now: Layers, before: Layers, *, epoch: int | None = None, sparse: bool = False) -> Content:
    """The entries of the layer that turns the tree of `before` into that of `now`.  Raises as write_layer()."""
    return _Export(now, before, None if epoch is None else epoch * _NANO, sparse=sparse).content()


_Key = tuple[int, int]
"""Tells files apart: the layer, and the inode number there."""


class _Export:
    """One export: first which paths are stored, then as what."""

    def __init__(self, now: Layers, before: Layers, latest_ns: int | None, *, sparse: bool) -> None:
        self.sparse = sparse
        self.now = now
        self.before = before
        self.latest_ns = latest_ns
        self.stored: dict[bytes, Found] = {}
        self.special: list[layer_tar.Entry] = []  # whiteouts and opaque marks
        self.skipped: list[bytes] = []

    def content(self) -> Content:
        self._choose()
        self._add_other_names()
        self._add_parents()
        found = self.special + list(self._described())
        found.sort(key=layer_tar.sort_key)
        return Content(found, sorted(self.skipped))

    def _choose(self) -> None:
        linked: dict[_Key, list[changes.Change]] = {}
        for change in changes.compare(self.now, self.before, as_layer=True):
            if change.now is None:
                if not change.covered:
                    self.special.append(layer_tar.whiteout(change.path))
                continue
            if change.kind is not None or change.covered or change.opaque:
                self.stored[change.path] = change.now
            if change.opaque:
                self.special.append(layer_tar.opaque(change.path))
            if not change.now.is_dir:
                linked.setdefault(self._key(change.now), []).append(change)
        for names in linked.values():
            # All names of a file are stored, or none; none only if they were names of one file before, too.
            if any(change.path in self.stored for change in names) or len({self._was(change) for change in names}) > 1:
                self.stored |= {change.path: change.now for change in names if change.now is not None}

    def _key(self, found: Found) -> _Key:
        return _key(self.now, found.sources[0])

    def _was(self, change: changes.Change) -> _Key | None:
        return None if change.before is None else _key(self.before, change.before.sources[0])

    def _add_other_names(self) -> None:
        """The other names of lower files that are stored: of those in a directory that was renamed."""
        asked: set[_Key] = set()
        for found in list(self.stored.values()):
            layer = self.now[found.sources[0].layer]
            if found.is_dir or layer is None or found.sources[0].layer == changes.top(self.now):
                continue
            key = self._key(found)
            if key in asked:
                continue
            asked.add(key)
            for path in lower_paths(self.now, layer, found.sources[0].ref):
                other = None if path in self.stored else changes.resolve(self.now, path)
                if other is not None and not other.is_dir and self._key(other) == key:
                    self.stored[path] = other

    def _add_parents(self) -> None:
        """Every directory above an entry: without it, unpacking would invent its owner and mode."""
        for path in [*self.stored, *(entry.path for entry in self.special)]:
            parent = path
            while b"/" in parent:
                parent = parent.rpartition(b"/")[0]
                if parent in self.stored:
                    break
                found = changes.resolve(self.now, parent)
                assert found is not None
                self.stored[parent] = found

    def _described(self) -> Iterator[layer_tar.Entry]:
        first: dict[_Key, bytes] = {}
        for path in sorted(self.stored):
            layer_tar.check_path(path)
            found = self.stored[path]
            attr = changes.attr_of(self.now, found)
            if stat.S_ISSOCK(attr.mode):
                self.skipped.append(path)
                if changes.resolve(self.before, path) is not None:
                    yield layer_tar.whiteout(path)
                continue
            if not found.is_dir:
                leader = first.setdefault(self._key(found), path)
                if leader != path:
                    yield layer_tar.Entry(path, attr.mode, attr.uid, attr.gid, self._time(attr), link_to=leader)
                    continue
            yield self._entry(path, found, attr)

    def _time(self, attr: Attr) -> int:
        return attr.mtime_ns if self.latest_ns is None else min(attr.mtime_ns, self.latest_ns)

    def _entry(self, path: bytes, found: Found, attr: Attr) -> layer_tar.Entry:
        entry = layer_tar.Entry(
            path,
            attr.mode,
            attr.uid,
            attr.gid,
            self._time(attr),
            rdev=attr.rdev,
            target=changes.readlink(self.now, found) if stat.S_ISLNK(attr.mode) else b"",
            xattrs=changes.xattrs_of(self.now, found),
        )
        if not stat.S_ISREG(attr.mode) or attr.size == 0:
            return entry
        return replace(entry, size=attr.size, content=self._content(path, found, attr.size))

    def _content(self, path: bytes, found: Found, size: int) -> layer_tar.Content:
        """Opened only when it is read, one file at a time; where the holes are is asked now."""
        ranges: tuple[layer_tar.Range, ...] = ((0, size),)
        if self.sparse:
            fd, extents = changes.data_of(self.now, found, size)
            os.close(fd)
            ranges = tuple((extent.logical, extent.length) for extent in extents)

        def read(offset: int, length: int) -> Iterator[bytes]:
            source_fd, again = changes.data_of(self.now, found, size)
            try:
                yield from _read_range(source_fd, again, offset, length, path)
            finally:
                os.close(source_fd)

        return layer_tar.Content(ranges, read)


def _key(layers: Layers, source: Source) -> _Key:
    layer = layers[source.layer]
    assert layer is not None
    return len(layers) - source.layer, layer.ino(source.ref)


def _read_range(fd: int, extents: list[Extent], offset: int, length: int, path: bytes) -> Iterator[bytes]:
    """`length` bytes of a file at `offset`, holes as zeros, in pieces."""
    end = offset + length
    at = offset
    for extent in extents:
        start, stop = max(extent.logical, at), min(extent.logical + extent.length, end)
        if start < stop:
            yield from changes.zeros(start - at)
            part = Extent(start, stop - start, extent.physical + start - extent.logical)
            yield from changes.read_extent(fd, part, path)
            at = stop
    yield from changes.zeros(end - at)


def write_directories(
    directory: bytes,
    lowers: Sequence[Layer],
    *,
    compression: str = "none",
    epoch: int | None = None,
    sparse: bool = False,
) -> list[LayerBlob]:
    """Write directories that are stacked (top first) as the layers of an image, bottom first, into `directory`."""
    layers: list[LayerBlob] = []
    for number in reversed(range(len(lowers))):
        if lowers[number].data_only:
            continue  # only the data of files above it
        exported = write_layer(
            os.path.join(directory, b"lower%d" % number),
            [None, *lowers[number:]],
            [None, *lowers[number + 1 :]],
            below=layers[-1].chain_id if layers else None,
            compression=compression,
            epoch=epoch,
            sparse=sparse,
        )
        layers.append(exported.layer)
    return layers


def check_whiteout_names(blobs: Sequence[LayerBlob], layers: Sequence[Layer]) -> None:
    """Raise LayerError for a root file system that has a `.wh.` name: as an image's layer it would mean a deletion.

    Args:
        blobs: bottom first.
        layers: the same, top first.
    """
    for blob, layer in zip(blobs, reversed(layers), strict=True):
        todo = [] if blob.whiteouts else [(b"", layer.root)]
        while todo:
            path, directory = todo.pop()
            for name, what in layer.list(directory):
                layer_tar.check_path(path + name)
                if what is What.DIRECTORY:
                    entry = layer.lookup(directory, name)
                    assert entry is not None
                    todo.append((path + name + b"/", entry.ref))
