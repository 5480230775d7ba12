"""The Linux calls that Python's os module lacks, and the one way to open a path below a directory.

Every access below a layer, an upperdir or a workdir goes through `open_beneath`: neither a symlink nor `..` nor a
magic link can lead out of it, whoever planted it, also if it is swapped in while we look (openat2(2) checks in the
kernel).  Sources: openat2(2), renameat2(2), open_by_handle_at(2), include/uapi/linux/openat2.h.
"""

import ctypes
import errno
import os
import struct

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_SYMLINK_FOLLOW = 0x400

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

_SYS_OPENAT2 = 437  # the same number on every architecture (added after the tables were unified)
_CHUNK_BYTES = 3500
"""openat2 takes at most PATH_MAX (4096) bytes; deeper paths are walked in pieces of whole components."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.syscall.restype = ctypes.c_long
_libc.name_to_handle_at.argtypes = [
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_int),
    ctypes.c_int,
]
_libc.open_by_handle_at.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
_libc.syncfs.argtypes = [ctypes.c_int]
_libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _fail(path: bytes = b"") -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), os.fsdecode(path))


_BENEATH = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS


def _openat2(dirfd: int, path: bytes, flags: int, mode: int, resolve: int = _BENEATH) -> int:
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)
    while True:
        fd = int(_libc.syscall(_SYS_OPENAT2, dirfd, path, how, ctypes.c_size_t(len(how))))
        if fd >= 0:
            return fd
        # EAGAIN: a rename raced with the check of "beneath"; the kernel asks for another try (openat2(2)).
        if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            raise _fail(path)


def open_beneath(dirfd: int, path: bytes, flags: int, mode: int = 0) -> int:
    """Open `path` (relative, b"" is the directory itself) below `dirfd` without following any symlink.

    Returns:
        A new descriptor, close-on-exec.  With O_PATH | O_NOFOLLOW also one of a symlink itself.

    Raises:
        OSError: as openat2(2); ELOOP for a symlink on the way, EXDEV for an escape.
    """
    path = path or b"."
    if len(path) <= _CHUNK_BYTES:
        return _openat2(dirfd, path, flags, mode)
    at = os.dup(dirfd)
    try:
        while len(path) > _CHUNK_BYTES:
            cut = path.rindex(b"/", 0, _CHUNK_BYTES)
            deeper = _openat2(at, path[:cut], os.O_PATH | os.O_DIRECTORY, 0)
            os.close(at)
            at, path = deeper, path[cut + 1 :]
        return _openat2(at, path, flags, mode)
    finally:
        os.close(at)


def open_in_root(rootfd: int, path: bytes, flags: int) -> int:
    """Open `path` as a process would whose root is `rootfd`: symlinks and `..` are followed, and never lead out.

    Raises:
        OSError: as openat2(2); ELOOP also for a magic link (/proc/PID/root, /proc/PID/fd/N).
    """
    return _openat2(rootfd, path, flags, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)


def fd_path(fd: int, name: bytes = b"") -> bytes:
    """A path for calls that take no descriptor: `name` in the directory `fd`, or the object `fd` itself."""
    return b"/proc/self/fd/%d/%s" % (fd, name) if name else b"/proc/self/fd/%d" % fd


def renameat2(old_dirfd: int, old: bytes, new_dirfd: int, new: bytes, flags: int = 0) -> None:
    """renameat2(2)."""
    if _libc.renameat2(old_dirfd, old, new_dirfd, new, flags) != 0:
        raise _fail(old)


def syncfs(fd: int) -> None:
    """syncfs(2): everything on the file system of `fd` is on disk when this returns."""
    if _libc.syncfs(fd) != 0:
        raise _fail()


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its modes, which os.posix_fallocate() lacks."""
    while _libc.fallocate64(fd, mode, offset, length) != 0:
        if ctypes.get_errno() != errno.EINTR:
            raise _fail()


def name_to_handle(dirfd: int, name: bytes, flags: int = 0) -> tuple[int, bytes]:
    """(handle type, handle bytes) of an inode.  Raises OSError(EOPNOTSUPP) where the file system has none."""
    buf = ctypes.create_string_buffer(8 + 128)
    struct.pack_into("=Ii", buf, 0, 128, 0)
    mount_id = ctypes.c_int()
    if _libc.name_to_handle_at(dirfd, name, buf, ctypes.byref(mount_id), flags) != 0:
        raise _fail(name)
    length, kind = struct.unpack_from("=Ii", buf, 0)
    return kind, buf.raw[8 : 8 + length]


def open_by_handle(mount_fd: int, kind: int, handle: bytes, flags: int) -> int:
    """open_by_handle_at(2).  Needs CAP_DAC_READ_SEARCH (EPERM); ESTALE when the inode is gone."""
    buf = ctypes.create_string_buffer(struct.pack("=Ii", len(handle), kind) + handle)
    fd = int(_libc.open_by_handle_at(mount_fd, buf, flags | os.O_CLOEXEC))
    if fd < 0:
        raise _fail()
    return fd
