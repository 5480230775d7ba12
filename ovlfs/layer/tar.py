"""What does a layer tar say about one name?

A tar is read once, from end to end, and its index is kept (`scan`); afterwards the index answers for names and
attributes (`TarLayer`), and the tar itself is only read where file data is asked for.  Nothing is unpacked.
The index may come from a cache that was damaged: every answer is checked, and damage is EUCLEAN, never a wrong
access.

Kernel: there is no counterpart; a mounted squashfs or erofs lower layer does the same job.

May be used from any thread; nothing here waits for anything but the disk.

Differences from `overlay.xattr`'s rules for directory layers: none are needed, the scanner has dropped overlay.*
xattrs already, and `.wh.` names have become whiteouts and opaque directories.
"""

import errno
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ovlfs import _native
from ovlfs.errors import LayerError, printable
from ovlfs.ids import Ino, Name
from ovlfs.layer.base import Attr, Entry, Extent, Ref, What

if TYPE_CHECKING:
    from typing_extensions import Buffer

INO_BASE = 0x8000
"""Tar layer n numbers its inodes from (INO_BASE + n) << INO_SHIFT."""
INO_SHIFT = 40
LAYERS_MAX = 1 << 22
"""So that every st_ino is below 2^63."""

READ_BYTES = 64 * 1024
"""One read of `scan`: about the size at which reading a file's data costs as much as another system call."""


class TarLayer:
    """A layer that lies in a tar, seen through its index (`ovlfs.layer.base.Layer`).

    Immutable.  `index` is for the live tree in C; it keeps the index's buffer alive.
    """

    def __init__(self, index_buffer: "Buffer", fd: int, *, base_offset: int, layer_number: int) -> None:
        """A layer whose tar begins at `base_offset` in `fd`.

        `fd` is borrowed: it must stay open as long as the layer is used; -1: nobody will ask for file data.
        `layer_number` makes st_ino unique in the stack; it must be the same at every mount.

        Raises:
            OSError: EUCLEAN, the index is damaged.
        """
        if not 0 <= layer_number < LAYERS_MAX:
            raise ValueError(f"layer_number {layer_number} is not from 0 to {LAYERS_MAX - 1}")
        try:
            self.index = _native.Index(index_buffer)
        except ValueError as error:
            raise damaged(error) from error
        self.fd = fd
        self.base_offset = base_offset
        self._links_below: list[tuple[bytes, bytes]] | None = None
        self._ino_first = ((INO_BASE + layer_number) << INO_SHIFT) + 1

    @property
    def root(self) -> Ref:
        """The layer's root directory."""
        return 0

    def identity(self) -> tuple[int, int, int, int]:
        """(st_dev, st_ino, size, mtime in ns) of the file that the tar lies in: other numbers, and it was changed."""
        if self.fd < 0:
            return 0, 0, 0, 0
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def lookup(self, directory: Ref, name: Name) -> Entry | None:
        """What the layer says about `name`; None: nothing.

        For a LINK_BELOW, a `ref` other than 0 is what this layer itself put at `target` after the link: to
        be used if no layer below has it (a hard link that stands before its target in the tar).

        Raises:
            NotADirectoryError: `directory` is something else.
        """
        try:
            found = self.index.lookup(ordinal(directory), name)
        except ValueError as error:
            raise damaged(error) from error
        if found is None:
            return None
        what, ref, flags, target = found
        if what == What.LINK_BELOW:
            return Entry(What.LINK_BELOW, ref, target=target)
        return Entry(
            What(what),
            ref,
            opaque=bool(flags & _native.INDEX_OPAQUE),
            implied=bool(flags & _native.INDEX_IMPLIED),
        )

    def root_entry(self) -> Entry:
        """The root as `lookup` would give it, if it had a name: whether it is opaque, whether the tar describes it."""
        try:
            flags = self.index.flags(0)
        except ValueError as error:
            raise damaged(error) from error
        return Entry(
            What.DIRECTORY,
            0,
            opaque=bool(flags & _native.INDEX_OPAQUE),
            implied=bool(flags & _native.INDEX_IMPLIED),
        )

    data_only = False

    @property
    def root_opaque(self) -> bool:
        """Whether the tar has `.wh..wh..opq` at its root."""
        return self.root_entry().opaque

    def is_implied(self, ref: Ref) -> bool:
        """Whether the tar mentions the directory in paths only, and never describes it."""
        try:
            return bool(self.index.flags(ordinal(ref)) & _native.INDEX_IMPLIED)
        except ValueError as error:
            raise damaged(error) from error

    def attr(self, ref: Ref) -> Attr:
        """The inode's attributes.  A tar has one time for a file: atime and ctime are mtime."""
        try:
            return Attr(*self.index.attr(ordinal(ref)))
        except ValueError as error:
            raise damaged(error) from error

    def ino(self, ref: Ref) -> Ino:
        """The st_ino to show: layer and ordinal, so it is unique in the stack and the same at every mount."""
        return Ino(self._ino_first + ordinal(ref))

    def readlink(self, ref: Ref) -> bytes:
        """A symlink's target.  Raises OSError(EINVAL) for anything else."""
        try:
            return self.index.readlink(ordinal(ref))
        except ValueError as error:
            raise damaged(error) from error

    def xattrs(self, ref: Ref) -> dict[bytes, bytes]:
        """The inode's extended attributes."""
        try:
            return self.index.xattrs(ordinal(ref))
        except ValueError as error:
            raise damaged(error) from error

    def links(self, ref: Ref) -> list[bytes]:
        """All paths of the inode in this layer, relative to the root, whose own is b""."""
        try:
            return self.index.links(ordinal(ref))
        except ValueError as error:
            raise damaged(error) from error

    def links_below(self) -> list[tuple[bytes, bytes]]:
        """(path, target) of every hard link that leads to the layers below.  Walks over the index the first time."""
        if self._links_below is None:
            found: list[tuple[bytes, bytes]] = []
            todo: list[tuple[bytes, Ref]] = [(b"", self.root)]
            while todo and self.index.link_count:  # several names may share a link: it says whether there are any
                path, directory = todo.pop()
                for name, what in self.list(directory):
                    if what not in (What.DIRECTORY, What.LINK_BELOW):
                        continue
                    entry = self.lookup(directory, name)
                    assert entry is not None
                    if what is What.DIRECTORY:
                        todo.append((path + name + b"/", entry.ref))
                    else:
                        found.append((path + name, entry.target))
            self._links_below = found
        return self._links_below

    def extents(self, ref: Ref) -> tuple[int, list[Extent]]:
        """Where a regular file's bytes are: a new descriptor that the caller closes, and the extents in order.

        Raises:
            OSError: EINVAL, no regular file; EMFILE.
        """
        try:
            found = self.index.extents(ordinal(ref))
        except ValueError as error:
            raise damaged(error) from error
        extents = [Extent(logical, length, physical + self.base_offset) for logical, length, physical in found]
        return os.dup(self.fd), extents

    def list(self, directory: Ref) -> Iterator[tuple[Name, What]]:
        """Every name in the directory, once each, in byte order."""
        try:
            names = self.index.list(ordinal(directory))
        except ValueError as error:
            raise damaged(error) from error
        return ((Name(name), What(what)) for name, what in names)


def ordinal(ref: Ref) -> int:
    """A tar layer's refs are ordinals; a path is another layer's."""
    if not isinstance(ref, int):
        raise TypeError(f"{ref!r} is no inode of a tar layer")
    return ref


def damaged(error: ValueError) -> OSError:
    """EUCLEAN ("structure needs cleaning") is what kernel filesystems say of a damaged store."""
    return OSError(errno.EUCLEAN, str(error))


def scan(fd: int, offset: int, length: int, *, whiteouts: bool, where: str) -> bytes:
    """Index the tar that lies at `offset` in `fd`, `length` bytes long.

    Reads with pread, so that a file that somebody cuts short meanwhile is an error and not a SIGBUS, and seeks over
    file data.  `whiteouts` is False for a plain root filesystem tar.

    Args:
        fd: the file, borrowed.
        offset: where the tar begins, in bytes.
        length: how many bytes it has.
        whiteouts: whether `.wh.` names are whiteouts.
        where: what to call the tar in an error.

    Raises:
        LayerError: the tar breaks a rule, or the file is shorter than that.
    """
    scanner = _native.TarScanner(whiteouts=whiteouts)
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_size < offset + length:
        raise LayerError(where, f"the file must hold {offset + length} bytes, it has {status.st_size}")
    buffer = memoryview(bytearray(READ_BYTES))
    at = 0
    try:
        while at < length and not scanner.ended:
            skip = min(scanner.skippable, length - at)
            if skip > 0:
                scanner.skip(skip)
                at += skip
                continue
            got = os.preadv(fd, [buffer[: min(READ_BYTES, length - at)]], offset + at)
            if got == 0:
                raise LayerError(where, "the file must not become shorter while it is read", at)
            scanner.feed(buffer[:got])
            at += got
        return scanner.finish()
    except _native.TarError as error:
        raise layer_error(where, error) from error


def layer_error(where: str, error: _native.TarError) -> LayerError:
    """The scanner's error as one line for the user: which tar, which entry, where, and what should hold."""
    if error.name:
        where = f"{where}: entry '{printable(error.name)}'"
    return LayerError(where, error.rule, error.offset)
