"""Where do the bytes of an open file come from, and where do they go?

A handle is opened on the object that serves the inode now: the upper file, or a lower file's extents.  When the inode
is copied up later, a handle that was opened before goes over to the upper file at its next read, so that it sees what
others write (kernel: file.c: ovl_real_fdget(), since 4.19).
"""

import errno
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence

from ovlfs.ids import NodeId
from ovlfs.layer import sys
from ovlfs.layer.base import Extent
from ovlfs.layer.directory import DirLayer, getxattr
from ovlfs.layer.tree import Inode
from ovlfs.overlay import copy_up
from ovlfs.overlay.stack import Stack

_CAPABILITY = b"security.capability"
_KEPT = os.O_ACCMODE | os.O_SYNC | os.O_DSYNC
"""Open flags that the real file gets.  Not O_APPEND: the kernel gives every write its offset; not O_DIRECT: it asks for
aligned memory, which Python's buffers are not."""

_PIECE_BYTES = 1 << 20
COPY_MAX_BYTES = 64 << 20
"""What one copy_file_range does at most; the caller asks again for the rest."""
_NOT_IN_KERNEL = frozenset((errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSYS))
"""copy_file_range answers that mean "not between these two": copy by reading and writing."""


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
        self._sparse_fd = False
        self.fd = -1
        self._open()

    @property
    def nodeid(self) -> NodeId:
        """Whose file it is."""
        return self._inode.nodeid

    def _open(self) -> None:
        inode = self._inode
        if inode.upper and not inode.metacopy:
            with self._stack.object(inode) as path:
                self.fd = os.open(path, self.flags | os.O_CLOEXEC | os.O_NOCTTY)
            self.extents, self._on_upper, self._sparse_fd = None, True, True
            return
        layer, source = copy_up.data_source(self._stack, inode)
        self.fd, self.extents = layer.extents(source.ref)
        self._starts = [extent.logical for extent in self.extents]
        self._sparse_fd = isinstance(layer, DirLayer)  # the descriptor is the file itself, and knows its holes

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
        """Write at `offset`; the number of bytes written.  Raises as pwrite(2).

        Kernel: file capabilities are taken away by whoever calls write(2), before the request comes here; not by what
        comes from a mapping.  So they must survive our own write.
        """
        capabilities = getxattr(sys.fd_path(self.fd), _CAPABILITY, follow=True)
        try:
            written = os.pwrite(self.fd, data, offset)
        finally:
            if capabilities is not None:
                os.setxattr(self.fd, _CAPABILITY, capabilities)
        self._stack.refresh(self._inode.nodeid)
        return written

    def seek(self, offset: int, whence: int) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE.  Raises ENXIO beyond the end, or when there is no data any more."""
        self._follow_copy_up()
        if self._sparse_fd:
            return os.lseek(self.fd, offset, whence)
        size = self._inode.attr.size
        if not 0 <= offset < size:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        for extent in self.extents or ():
            if _end(extent) <= offset:
                continue
            if whence == os.SEEK_DATA:
                return max(offset, extent.logical)
            if extent.logical > offset:
                return offset
            offset = _end(extent)
        if whence == os.SEEK_DATA:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return min(offset, size)

    def allocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2); then the caller calls refresh().  Any thread."""
        if not self._on_upper:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        sys.fallocate(self.fd, mode, offset, length)

    def refresh(self) -> None:
        """Take the attributes anew, after the file was changed."""
        self._stack.refresh(self._inode.nodeid)

    def copying_to(self, target: "Handle", offset: int, target_offset: int, length: int) -> Callable[[], int]:
        """What copies up to `length` bytes to another file, for any thread to call once; the caller refreshes `target`.

        It returns how many bytes were copied, at most COPY_MAX_BYTES, 0 at the end of this file.
        """
        self._follow_copy_up()
        size = os.fstat(self.fd).st_size if self.extents is None else self._inode.attr.size
        length = min(length, COPY_MAX_BYTES, max(0, size - offset))
        pieces = [(offset, length)] if self.extents is None else _pieces(self.extents, offset, length)
        source_fd = os.dup(self.fd)  # a copy-up meanwhile closes ours

        def copy() -> int:
            try:
                return _copy_pieces(source_fd, pieces, target.fd, target_offset)
            finally:
                os.close(source_fd)

        return copy

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


def _pieces(extents: list[Extent], offset: int, length: int) -> list[tuple[int | None, int]]:
    """Where `length` bytes at `offset` come from, in order: (physical, or None for a hole; length)."""
    pieces: list[tuple[int | None, int]] = []
    end = offset + length
    for extent in extents:
        start, stop = max(extent.logical, offset), min(_end(extent), end)
        if start < stop:
            if start > offset:
                pieces.append((None, start - offset))
            pieces.append((extent.physical + start - extent.logical, stop - start))
            offset = stop
    if offset < end:
        pieces.append((None, end - offset))
    return pieces


def _copy_pieces(source_fd: int, pieces: Sequence[tuple[int | None, int]], target_fd: int, at: int) -> int:
    """Copy; the number of bytes.  An error after the first byte ends it with what was copied, as with write(2)."""
    began = at
    in_kernel = True
    for physical, length in pieces:
        done = 0
        while done < length:
            wanted = length - done
            try:
                if physical is not None and in_kernel:
                    try:
                        copied = os.copy_file_range(source_fd, target_fd, wanted, physical + done, at)
                    except OSError as error:
                        if error.errno not in _NOT_IN_KERNEL:
                            raise
                        in_kernel = False
                        continue
                else:
                    wanted = min(wanted, _PIECE_BYTES)
                    data = bytes(wanted) if physical is None else os.pread(source_fd, wanted, physical + done)
                    copied = os.pwrite(target_fd, data, at) if data else 0
            except OSError:
                if at > began:
                    return at - began
                raise
            if copied == 0:
                return at - began
            done += copied
            at += copied
    return at - began
