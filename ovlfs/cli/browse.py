"""Looking into an image without mounting it: what `ls`, `cat` and `inspect` share.

The merged tree is that of layer/merge.py, the same rules by which a mount answers.  Symlinks are followed inside the
image's root, as chroot(2) would: an absolute target starts at the root, and `..` never leaves it.
"""

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ovlfs.cli.progress import Progress
from ovlfs.errors import OvlfsError, printable
from ovlfs.ids import Name
from ovlfs.image.image import Image, open_image
from ovlfs.image.platform import parse_platform
from ovlfs.image.reference import Reference
from ovlfs.image.store import Store
from ovlfs.layer import merge
from ovlfs.layer.base import Attr, Layer
from ovlfs.layer.directory import TRUSTED, USER, DirLayer, InoMap
from ovlfs.layer.open import open_layers

MAX_SYMLINKS = 40
"""Kernel: MAXSYMLINKS."""


@dataclass(frozen=True, slots=True)
class Node:
    """One inode of the merged tree."""

    found: merge.Found
    path: bytes

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return self.found.is_dir


class Browser:
    """The merged tree of an image."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        """`layers`: top first."""
        self.layers: list[Layer | None] = [None, *layers]

    def root(self) -> Node:
        """The root directory."""
        sources = tuple(merge.roots(self.layers, 1))
        return Node(merge.Found(True, sources, sources[0]), b"/")

    def attr(self, node: Node) -> Attr:
        """The attributes that a mount would show."""
        number, ref = node.found.attributes
        layer = self.layers[number]
        assert layer is not None
        return layer.attr(ref)

    def readlink(self, node: Node) -> bytes:
        """A symlink's target."""
        number, ref = node.found.attributes
        layer = self.layers[number]
        assert layer is not None
        return layer.readlink(ref)

    def child(self, node: Node, name: bytes) -> Node | None:
        """The name in the directory `node`, or None."""
        found = merge.lookup(self.layers, node.found.sources, Name(name))
        return None if found is None else Node(found, os.path.join(node.path, name))

    def children(self, node: Node) -> list[Node]:
        """All names in the directory `node`, sorted."""
        names = sorted(merge.names(self.layers, node.found.sources))
        return [child for name in names if (child := self.child(node, name)) is not None]

    def resolve(self, path: bytes, *, follow: bool = True) -> Node:
        """The inode that `path` leads to.

        Args:
            path: from the image's root.
            follow: whether a symlink at the very end is followed.

        Raises:
            OSError: ENOENT, ENOTDIR, ELOOP, ENAMETOOLONG, as open(2).
        """
        trail = [self.root()]
        todo = path.split(b"/")[::-1]
        links = 0
        while todo:
            name = todo.pop()
            if name in (b"", b"."):
                continue
            if not trail[-1].is_dir:
                raise _error(errno.ENOTDIR, path)
            if name == b"..":
                del trail[max(1, len(trail) - 1) :]
                continue
            if len(name) > 255:
                raise _error(errno.ENAMETOOLONG, path)
            node = self.child(trail[-1], name)
            if node is None:
                raise _error(errno.ENOENT, path)
            if stat.S_ISLNK(self.attr(node).mode) and (follow or any(todo)):
                links += 1
                if links > MAX_SYMLINKS:
                    raise _error(errno.ELOOP, path)
                target = self.readlink(node)
                if target.startswith(b"/"):
                    del trail[1:]
                todo += target.split(b"/")[::-1]
                continue
            trail.append(node)
        if path.endswith(b"/") and not trail[-1].is_dir:
            raise _error(errno.ENOTDIR, path)
        return trail[-1]

    def read(self, node: Node) -> Iterator[bytes]:
        """A regular file's bytes, in pieces; holes are zeros."""
        number, ref = node.found.sources[-1]
        layer = self.layers[number]
        assert layer is not None
        size = self.attr(node).size
        fd, extents = layer.extents(ref)
        try:
            at = 0
            for extent in extents:
                yield from _zeros(extent.logical - at)
                yield from _piece(fd, extent.physical, extent.length, node.path)
                at = extent.logical + extent.length
            yield from _zeros(size - at)
        finally:
            os.close(fd)


_PIECE_BYTES = 1 << 20


def _zeros(length: int) -> Iterator[bytes]:
    while length > 0:
        yield bytes(min(length, _PIECE_BYTES))
        length -= _PIECE_BYTES


def _piece(fd: int, offset: int, length: int, path: bytes) -> Iterator[bytes]:
    while length > 0:
        piece = os.pread(fd, min(length, _PIECE_BYTES), offset)
        if not piece:
            raise _error(errno.EIO, path)  # the image became shorter
        yield piece
        offset += len(piece)
        length -= len(piece)


def _error(code: int, path: bytes) -> OSError:
    return OSError(code, os.strerror(code), path)


@contextlib.contextmanager
def opened(reference: Reference, platform: str) -> Iterator[Browser]:
    """The merged tree of the image that is named."""
    store = Store()
    with Progress(sys.stderr if sys.stderr.isatty() else None) as progress:
        image = open_image(
            reference, platform=parse_platform(platform) if platform else None, progress=progress, store=store
        )
        layers = list(_layers(image, store, progress))
    try:
        yield Browser(layers)
    finally:
        for layer in layers:
            layer.close()  # type: ignore[attr-defined]


def _layers(image: Image, store: Store, progress: Progress) -> Iterator[Layer]:
    """Top first, as far down as the root is not opaque."""
    if image.directory is not None:
        yield DirLayer(image.directory, InoMap(), prefixes=(TRUSTED, USER))
        return
    layers = open_layers(image, store, progress=progress)[::-1]
    if not layers:
        raise OvlfsError(f"{printable(image.path)}: has no layers, so there is nothing in it")
    for number, layer in enumerate(layers):
        yield layer
        if layer.root_entry().opaque:
            for hidden in layers[number + 1 :]:
                hidden.close()
            return
