"""How is a file below a hostile root read, and how is a place for a mount made there?

A root is whatever an image says: /etc/passwd may be a fifo, a device or a link to the host's, /proc a link to /etc, a
volume's path `/../../etc`.  So nothing below a root is opened by name: a file is read through openat2(2) with
RESOLVE_IN_ROOT, without waiting, if it is a regular file of bounded size; a place is found component by component, as
a process chrooted there would find it, also through links whose target is still to be made.

What was made for a mount to stand on ("stubs": empty directories and files) can be taken away again, so that running a
command does not change the tree by itself.  BuildKit does the same (executor/stubs.go).
"""

import contextlib
import errno
import os
import stat
from dataclasses import dataclass

from ovlfs.errors import ImageError, printable
from ovlfs.layer import sys

_MAX_LINKS = 40
"""Kernel: MAXSYMLINKS."""

_MAX_PATH_BYTES = 4096
"""Kernel: PATH_MAX."""

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW


def open_root(path: bytes) -> int:
    """A descriptor of a root, for the functions here; the caller closes it."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def read_file(rootfd: int, path: bytes, limit: int) -> bytes | None:
    """What a file has that a process in the root calls `path`; None: there is none.

    Raises:
        ImageError: it is no regular file, or has more than `limit` bytes.
    """
    where = f"{printable(path)} in the image"
    try:
        # Found first, and only opened if it is a regular file: to open a device can do something.
        found = sys.open_in_root(rootfd, path, os.O_PATH)
        try:
            if not stat.S_ISREG(os.fstat(found).st_mode):
                raise ImageError(f"{where}: should be a regular file")
            fd = os.open(sys.fd_path(found), _READ & ~os.O_NOFOLLOW | os.O_CLOEXEC)
        finally:
            os.close(found)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ImageError(f"{where}: {error.strerror}") from error
    with open(fd, "rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ImageError(f"{where}: is larger than {limit} bytes, the limit for this file")
    return raw


@dataclass(frozen=True, slots=True)
class Stub:
    """Something that was made: its path below the root, without symlinks, and its parent's times before."""

    path: bytes
    directory: bool
    parent_times_ns: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a path leads below a root.

    Attributes:
        path: relative to the root, without symlinks and `..`; b"" is the root itself.
        stubs: what had to be made, in that order.
    """

    path: bytes
    stubs: tuple[Stub, ...] = ()

    @property
    def absolute(self) -> bytes:
        """The path as a process in the root says it."""
        return b"/" + self.path


def find(rootfd: int, path: bytes, *, make: str = "") -> Place:
    """Where `path` leads, as a process chrooted to `rootfd` resolves it.

    Args:
        rootfd: from open_root().
        path: of a directory (or file); relative ones start at the root.
        make: "directory" or "file": make what is missing, the last component as that, those before as directories.

    Raises:
        ImageError: it is not there (and not to be made), is of the other kind, or a component is no directory.
    """
    if b"\0" in path:
        raise ImageError(f"path {printable(path[:200])}: holds a NUL byte")
    if len(path) >= _MAX_PATH_BYTES:
        raise ImageError(f"path {printable(path[:200])}...: {os.strerror(errno.ENAMETOOLONG)}")
    waiting = [part for part in path.split(b"/") if part not in {b"", b"."}][::-1]
    at: list[bytes] = []
    stubs: list[Stub] = []
    links = 0
    try:
        while waiting:
            part = waiting.pop()
            if part == b".":
                continue
            if part == b"..":
                del at[-1:]
                continue
            last = not waiting
            kind, target = _look(rootfd, at, part)
            if kind == stat.S_IFLNK:
                links = _counted(links)
                if target.startswith(b"/"):
                    at.clear()
                waiting += [one for one in target.split(b"/") if one not in {b"", b"."}][::-1]
                continue
            at.append(part)
            if kind == 0:
                if not make:
                    raise ImageError(f"{printable(path)} in the image: {os.strerror(errno.ENOENT)}")
                stubs.append(_make(rootfd, b"/".join(at), directory=not last or make == "directory"))
        found = Place(b"/".join(at), tuple(stubs))
        if make:
            _check_kind(rootfd, found.path, make)
    except OSError as error:
        remove_stubs(rootfd, tuple(stubs))
        raise ImageError(f"{printable(path)} in the image: {error.strerror}") from error
    return found


def lexical(path: bytes) -> bytes:
    """`path` relative to the root, by its words alone."""
    return os.path.normpath(b"/" + path.lstrip(b"/")).lstrip(b"/")


def is_below(path: bytes, directory: bytes) -> bool:
    """Whether `path` is `directory` or below it, both as `Place.path` and lexical() give them."""
    return not directory or path == directory or path.startswith(directory + b"/")


def _look(rootfd: int, at: list[bytes], part: bytes) -> tuple[int, bytes]:
    """The type of a name in the directory `at` (0: there is none), and a symlink's target."""
    try:
        fd = sys.open_beneath(rootfd, b"/".join((*at, part)), os.O_PATH | os.O_NOFOLLOW)
    except FileNotFoundError:
        return 0, b""
    try:
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        return kind, os.readlink(b"", dir_fd=fd) if kind == stat.S_IFLNK else b""
    finally:
        os.close(fd)


def _counted(links: int) -> int:
    if links == _MAX_LINKS:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return links + 1


def _check_kind(rootfd: int, path: bytes, wanted: str) -> None:
    fd = sys.open_beneath(rootfd, path, os.O_PATH | os.O_NOFOLLOW)
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode) != (wanted == "directory"):
            raise OSError(0, f"should be a {wanted}")
    finally:
        os.close(fd)


def _make(rootfd: int, path: bytes, *, directory: bool) -> Stub:
    parent, _, name = path.rpartition(b"/")
    fd = sys.open_beneath(rootfd, parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        before = os.fstat(fd)
        if directory:
            os.mkdir(name, 0o755, dir_fd=fd)
        else:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=fd))
        os.chmod(name, 0o755 if directory else 0o644, dir_fd=fd)  # whatever the umask is
    finally:
        os.close(fd)
    return Stub(path, directory, (before.st_atime_ns, before.st_mtime_ns))


def remove_stubs(rootfd: int, stubs: tuple[Stub, ...]) -> None:
    """Take away what `find` made, where it is still as it was made; the parents get their times back."""
    for stub in reversed(stubs):
        parent, _, name = stub.path.rpartition(b"/")
        with contextlib.suppress(OSError):  # moved, filled or removed by the command: then it is the command's
            fd = sys.open_beneath(rootfd, parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if stub.directory:
                    os.rmdir(name, dir_fd=fd)
                elif os.stat(name, dir_fd=fd, follow_symlinks=False).st_size == 0:
                    os.unlink(name, dir_fd=fd)
                else:
                    continue
                os.utime(fd, ns=stub.parent_times_ns)
            finally:
                os.close(fd)
