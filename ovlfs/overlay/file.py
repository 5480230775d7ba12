"""Where do the bytes of an open file come from, and where do they go?

A handle is opened on the object that serves the inode now: the upper file, or a lower file's extents.  When the inode
is copied up later, a handle that was opened before goes over to the upper file at its next read, so that it sees what
others write (kernel: file.c: ovl_real_fdget(), since 4.19).
"""

import errno
import os
from bisect import bisect_right

from ovlfs.layer.base import Extent
from ovlfs.layer.tree import Inode
from ovlfs.overlay import copy_up
from ovlfs.overlay.stack import Stack

_KEPT = os.O_ACCMODE | os.O_SYNC | os.O_DSYNC
"""Open flags that the real file gets.  Not O_APPEND: the kernel gives every write its offset; not O_DIRECT: it asks for
aligned memory, which Python's buffers are not."""


class Handle:
    """One open regular file.

    Attributes:
        fd: the real descriptor, ours to close.
        extents: None when `fd` is a plain file, else where its bytes are in `fd`, in order; the rest is holes.
    """

    def __init__(self, stack: Stack, inode: Inode, flags: int) -> None:
        self._stack, self._inode = stack, inode
        self.flags = flags & _KEPT
        self.extents: list[Extent] | None = None
        self._on_upper = False
        self.fd = -1
        self._open()

    def _open(self) -> None:
        inode = self._inode
        if inode.upper and not inode.metacopy:
            with self._stack.object(inode) as path:
                self.fd = os.open(path, self.flags | os.O_CLOEXEC | os.O_NOCTTY)
            self.extents, self._on_upper = None, True
            return
        layer, source = copy_up.data_source(self._stack, inode)
        self.fd, self.extents = layer.extents(source.ref)
        self._starts = [extent.logical for extent in self.extents]

    def _follow_copy_up(self) -> None:
        if not self._on_upper and self._inode.upper and not self._inode.metacopy:
            old = self.fd
            self._open()
            os.close(old)

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; fewer only at the end of the file.  Raises EIO for a shrunk lower file."""
        self._follow_copy_up()
        if self.extents is None:
            return os.pread(self.fd, length, offset)
        size = self._inode.attr.size
        end = min(offset + length, size)
        if offset >= end:
            return b""
        first = max(0, bisect_right(self._starts, offset) - 1)
        if self.extents and self.extents[first].logical <= offset and end <= _end(self.extents[first]):
            extent = self.extents[first]
            return self._pread(end - offset, extent.physical + offset - extent.logical)
        out = bytearray(end - offset)
        for extent in self.extents[first:]:
            if extent.logical >= end:
                break
            start, stop = max(extent.logical, offset), min(_end(extent), end)
            if start < stop:
                piece = self._pread(stop - start, extent.physical + start - extent.logical)
                out[start - offset : stop - offset] = piece
        return bytes(out)

    def _pread(self, length: int, physical: int) -> bytes:
        data = os.pread(self.fd, length, physical)
        while len(data) < length:
            more = os.pread(self.fd, length - len(data), physical + len(data))
            if not more:
                raise OSError(errno.EIO, "the layer is shorter than it was")
            data += more
        return data

    def write(self, offset: int, data: bytes) -> int:
        """Write at `offset`; the number of bytes written.  Raises as pwrite(2)."""
        written = os.pwrite(self.fd, data, offset)
        self._stack.refresh(self._inode.nodeid)
        return written

    def sync(self, *, data_only: bool) -> None:
        """fsync(2) or fdatasync(2); nothing for lower files and volatile mounts.  Blocking; any thread."""
        if self._on_upper and not self._stack.volatile:
            if data_only:
                os.fdatasync(self.fd)
            else:
                os.fsync(self.fd)

    def close(self) -> None:
        """Give the descriptor back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _end(extent: Extent) -> int:
    return extent.logical + extent.length
