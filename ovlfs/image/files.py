"""How is a file of an image opened, and is it still the file that was checked?

A file is opened one component at a time below a root the user named, and no component below that root may be a
symlink: a layout's blob that is a link to /etc/shadow is refused, and so is a fifo or a device, without waiting
on it.  What was verified once is remembered by `FileIdentity`; when any part of it differs, the file is verified
again.  Reads that end early are errors, never zeros.
"""

import errno
import os
import stat
import time
from dataclasses import dataclass

from ovlfs.errors import ImageError, printable

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY

_SETTLE_NS = 100_000_000
"""A file changed less than this before it was read could be changed again within the same tick of its clock."""

Where = str
"""What an error message calls a thing: a file as the user named it, and what is in it."""


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells one content of one file from another without reading it: st_dev, st_ino, size and times in ns."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, fd: int) -> "FileIdentity":
        """The identity of an open file."""
        found = os.fstat(fd)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def settled(self) -> bool:
        """False if the file changed so recently that its next change might show the same ctime."""
        return time.time_ns() - self.ctime_ns > _SETTLE_NS

    def same_content(self, now: "FileIdentity") -> bool:
        """Whether an open file is unchanged: a rename, a new link or an unlink changes ctime and is no change."""
        return (self.dev, self.ino, self.size, self.mtime_ns) == (now.dev, now.ino, now.size, now.mtime_ns)


def open_file(root: bytes, parts: tuple[bytes, ...], where: Where) -> int:
    """A descriptor of the regular file `parts` below `root`; with no parts, of `root` itself.

    Symlinks are followed only in `root`, which the user typed.  Raises ImageError.
    """
    flags = _FLAGS | (os.O_DIRECTORY if parts else 0)
    try:
        fd = os.open(root, flags)
        for number, part in enumerate(parts):
            flags = _FLAGS | os.O_NOFOLLOW | (os.O_DIRECTORY if number < len(parts) - 1 else 0)
            parent = fd
            try:
                fd = os.open(part, flags, dir_fd=parent)
            finally:
                os.close(parent)
    except OSError as error:
        raise ImageError(f"{where}: {_reason(error)}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(f"{where}: should be a regular file")
    return fd


def _reason(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "is a symlink, which may not be followed inside an image"
    if error.errno == errno.ENOTDIR:
        return "a component of the path is no directory (or a symlink, which may not be followed inside an image)"
    if error.errno == errno.ENXIO:
        return "should be a regular file"
    return os.strerror(error.errno or 0)


def read_exactly(fd: int, offset: int, length: int, where: Where) -> bytes:
    """`length` bytes at `offset`, or ImageError if the file is shorter."""
    pieces = []
    while length > 0:
        try:
            piece = os.pread(fd, length, offset)
        except OSError as error:
            raise ImageError(f"{where} at byte {offset}: {os.strerror(error.errno or 0)}") from error
        if not piece:
            raise ImageError(f"{where} at byte {offset}: the file ends, {length} more bytes should follow")
        pieces.append(piece)
        offset += len(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def clean_name(name: bytes) -> bytes:
    """A member's name as a path relative to the archive's root, or b"" for the root itself.

    `./manifest.json`, `/manifest.json` and `a/../manifest.json` are one name; `..` never leads out.
    """
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in {b"", b"."}:
            parts.append(part)
    return b"/".join(parts)


def shown(path: bytes) -> Where:
    """A path for a message."""
    return printable(path)
