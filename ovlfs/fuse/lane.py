"""What happens with the requests that pyfuse3 does not bind, and how does the lane come to a mounted /dev/fuse?

The lane (native/lane.h) reads /dev/fuse, gives most requests to pyfuse3 over a socket, and keeps for us what is EXTRA:
fallocate, lseek, copy_file_range, O_TMPFILE, ioctl, syncfs; SETXATTR, whose flags pyfuse3 keeps to itself; and READ and
WRITE, whose data would not fit the socket.  Plain READDIR, which pyfuse3 does not bind either, comes here when the lane
cannot answer it from the live tree.
`UnboundOperations` are the handlers, beside those of Operations and with the same boundary; `serve_extra` decodes and
encodes; `open_and_mount` gives the descriptor.

Kernel: include/uapi/linux/fuse.h; fs/fuse/file.c: fuse_file_fallocate(), fuse_lseek(), __fuse_copy_file_range();
dir.c: fuse_tmpfile(); inode.c: fuse_sync_fs().  After a fallocate or a copy the kernel asks for the attributes anew;
we only have to have them right by then.

Locks: as in operations.py (see locks.py).  fallocate and copy_file_range change a file that is open for writing, so its
copy-up is over; they need no inode lock, as write needs none.
"""

import array
import ctypes
import errno
import logging
import os
import socket
import stat
import struct
import subprocess
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from types import coroutine
from typing import Any, TypeVar, cast

import pyfuse3
import trio

from ovlfs._native import Lane
from ovlfs.errors import MountError, printable
from ovlfs.fuse.operations import TIMEOUT_S, Operations, _handler
from ovlfs.layer import sys
from ovlfs.layer.base import Attr
from ovlfs.overlay import copy_up, xattr
from ovlfs.overlay import dir as directory_ops
from ovlfs.overlay.owner import NewObject

log = logging.getLogger("ovlfs.fuse")

READ = 15
WRITE = 16
SETXATTR = 21
READDIR = 28
IOCTL = 39
FALLOCATE = 43
LSEEK = 46
COPY_FILE_RANGE = 47
SYNCFS = 50
TMPFILE = 51
COPY_FILE_RANGE_64 = 53

MAX_WRITE_BYTES = 1 << 20
"""Of one READ or WRITE; the kernel takes no more than fs.fuse.max_pages_limit, 1 MiB by default."""

_READDIR_BYTES = 1 << 16

_LONG_BYTES = 1 << 20
"""A longer fallocate is done in a thread, so that others need not wait for the disk."""

_T = TypeVar("_T")

# ---- handlers --------------------------------------------------------------------------------------------------------


class UnboundOperations(Operations):
    """The handlers of one mounted stack, with those that pyfuse3 has no name for."""

    dont_mask = True

    @_handler
    async def fallocate(self: Operations, nodeid: int, fh: int, offset: int, length: int, mode: int) -> None:  # noqa: ARG002
        """FUSE_FALLOCATE.  Errors: as fallocate(2) on the upper file."""
        handle = self._handles[fh]
        try:
            if length > _LONG_BYTES:
                await trio.to_thread.run_sync(handle.allocate, mode, offset, length)
            else:
                handle.allocate(mode, offset, length)
        finally:
            handle.refresh()  # also what failed half way has changed it

    @_handler
    async def lseek(self: Operations, nodeid: int, fh: int, offset: int, whence: int) -> int:  # noqa: ARG002
        """FUSE_LSEEK, for SEEK_DATA and SEEK_HOLE.  Errors: ENXIO, EINVAL."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self._handles[fh].seek(offset, whence)

    @_handler
    async def copy_file_range(
        self: Operations,
        nodeid: int,  # noqa: ARG002
        fh: int,
        offset: int,
        target_fh: int,
        target_offset: int,
        length: int,
    ) -> int:
        """FUSE_COPY_FILE_RANGE: the number of bytes copied.  Errors: as copy_file_range(2) or write(2)."""
        target = self._handles[target_fh]
        copy = self._handles[fh].copying_to(target, offset, target_offset, length)
        try:
            return await trio.to_thread.run_sync(copy)
        finally:
            target.refresh()

    @_handler
    async def tmpfile(
        self: Operations, parent_nodeid: int, flags: int, mode: int, umask: int, uid: int, gid: int
    ) -> tuple[int, Attr, int]:
        """FUSE_TMPFILE: (nodeid, which counts as one lookup; attributes; fh).  Errors: as dir.create_nameless()."""
        owner = self._ids.users.stored(uid), self._ids.groups.stored(gid)
        new = NewObject(stat.S_IFREG | stat.S_IMODE(mode), *owner, umask=umask)
        inode = directory_ops.create_nameless(self._stack, self._get(parent_nodeid), new)
        try:
            opened = self._open(inode, flags & ~(os.O_EXCL | os.O_CREAT | os.O_TMPFILE))
        except BaseException:
            self._tree.forget(inode.nodeid, 1)
            raise
        return inode.nodeid, self._shown(inode.attr), opened.fh

    @_handler
    async def setxattr_with_flags(self: Operations, nodeid: int, name: bytes, value: bytes, flags: int) -> None:
        """FUSE_SETXATTR with XATTR_CREATE or XATTR_REPLACE, atomically.  Errors: as overlay.xattr.set_()."""
        target = self._get(nodeid)
        async with self._locks.holding(target.nodeid):
            await self._bring_data(target, wanted=copy_up.need_data(self._stack, target))
            xattr.set_(self._stack, target, name, value, flags)

    @_handler
    async def readdir_plain(self: Operations, nodeid: int, offset: int, size: int) -> bytes:
        """FUSE_READDIR: struct fuse_dirent one after the other, as many as fit; as readdir, but nothing is counted."""
        directory = self._get(nodeid)
        reply = bytearray()
        dots = ((1, b".", directory.nodeid), (2, b"..", self._parent_of(directory)))
        for cookie, name, child in (
            *(dot for dot in dots if offset < dot[0]),
            *(
                (cookie + 2, name, child)
                for cookie, name, child in self._tree.list(directory.nodeid, offset - 2, size // 24)
            ),
        ):
            inode = self._tree.get(child)
            entry = _DIRENT.pack(inode.ino, cookie, len(name), stat.S_IFMT(inode.attr.mode) >> 12) + name
            entry += bytes(-len(entry) % 8)
            if len(reply) + len(entry) > size:
                break
            reply += entry
        return bytes(reply)

    @_handler
    async def ioctl(self: Operations, nodeid: int, command: int) -> None:  # noqa: ARG002
        """FUSE_IOCTL: no ioctl is known.  Errors: ENOTTY."""
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    @_handler
    async def syncfs(self: Operations, nodeid: int) -> None:  # noqa: ARG002
        """FUSE_SYNCFS: everything that was written is on disk, unless the mount is volatile."""
        upper = self._stack.upper
        if upper is not None and not self._stack.volatile:
            await trio.to_thread.run_sync(sys.syncfs, upper.layer.fd)


# ---- the wire --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """One EXTRA request: its header, the body after it, and for WRITE what is to be written."""

    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    body: bytes
    payload: bytes


_READ = struct.Struct("=QQIIQII")  # fh, offset, size, read_flags, lock_owner, flags, padding; WRITE is the same
_SETXATTR = struct.Struct("=II")  # size, flags; the name, NUL, the value follow
_FALLOCATE = struct.Struct("=QQQII")  # fh, offset, length, mode, padding
_LSEEK = struct.Struct("=QQII")  # fh, offset, whence, padding
_COPY = struct.Struct("=QQQQQQQ")  # fh_in, off_in, nodeid_out, fh_out, off_out, len, flags
_CREATE = struct.Struct("=IIII")  # flags, mode, umask, open_flags; a name follows
_IOCTL = struct.Struct("=QIIQII")  # fh, flags, cmd, arg, in_size, out_size
_WROTE = struct.Struct("=II")  # size, padding
_NUMBER = struct.Struct("=Q")
_DIRENT = struct.Struct("=QQII")  # ino, offset of the next, length of the name, type; the name follows, padded to 8
_ENTRY = struct.Struct("=QQQQII")  # nodeid, generation, entry_valid, attr_valid, their nanoseconds
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_OPENED = struct.Struct("=QIi")  # fh, open_flags, backing_id
_FOPEN_KEEP_CACHE = 2
_U64 = (1 << 64) - 1


def _encode_attr(nodeid: int, attr: Attr) -> bytes:
    """A struct fuse_attr; seconds before 1970 are two's complement."""
    seconds, rest = zip(*(divmod(time, 10**9) for time in (attr.atime_ns, attr.mtime_ns, attr.ctime_ns)), strict=True)
    return _ATTR.pack(
        nodeid, attr.size, attr.blocks, *(number & _U64 for number in seconds), *rest,
        attr.mode, attr.nlink, attr.uid, attr.gid, attr.rdev & 0xFFFFFFFF, 4096, 0,
    )  # fmt: skip


async def _read(operations: UnboundOperations, request: Request) -> bytes:
    fh, offset, size, *_ = _READ.unpack_from(request.body)
    if not operations.opens_itself:
        return await operations.read_unopened(pyfuse3.InodeT(request.nodeid), offset, size)
    return await operations.read(fh, offset, size)


async def _write(operations: UnboundOperations, request: Request) -> bytes:
    fh, offset, size, *_ = _READ.unpack_from(request.body)
    if size != len(request.payload):
        raise pyfuse3.FUSEError(errno.EIO)
    return _WROTE.pack(await operations.write(fh, offset, request.payload), 0)


async def _setxattr(operations: UnboundOperations, request: Request) -> bytes:
    size, flags = _SETXATTR.unpack_from(request.body)
    name, _, value = request.body[_SETXATTR.size :].partition(b"\0")
    if size != len(value):
        raise pyfuse3.FUSEError(errno.EIO)
    await operations.setxattr_with_flags(request.nodeid, name, value, flags)
    return b""


async def _fallocate(operations: UnboundOperations, request: Request) -> bytes:
    fh, offset, length, mode, _ = _FALLOCATE.unpack_from(request.body)
    await operations.fallocate(request.nodeid, fh, offset, length, mode)
    return b""


async def _lseek(operations: UnboundOperations, request: Request) -> bytes:
    fh, offset, whence, _ = _LSEEK.unpack_from(request.body)
    return _NUMBER.pack(await operations.lseek(request.nodeid, fh, offset, whence))


async def _copy(operations: UnboundOperations, request: Request) -> bytes:
    fh, offset, _, target_fh, target_offset, length, flags = _COPY.unpack_from(request.body)
    if flags:
        raise pyfuse3.FUSEError(errno.EINVAL)
    copied = await operations.copy_file_range(request.nodeid, fh, offset, target_fh, target_offset, length)
    return _NUMBER.pack(copied) if request.opcode == COPY_FILE_RANGE_64 else _WROTE.pack(copied, 0)


async def _tmpfile(operations: UnboundOperations, request: Request) -> bytes:
    flags, mode, umask, _ = _CREATE.unpack_from(request.body)
    nodeid, attr, fh = await operations.tmpfile(request.nodeid, flags, mode, umask, request.uid, request.gid)
    valid = int(TIMEOUT_S)
    return b"".join(
        (
            _ENTRY.pack(nodeid, 0, valid, valid, 0, 0),
            _encode_attr(nodeid, attr),
            _OPENED.pack(fh, _FOPEN_KEEP_CACHE, 0),
        )
    )


async def _readdir(operations: UnboundOperations, request: Request) -> bytes:
    _, offset, size, *_ = _READ.unpack_from(request.body)
    return await operations.readdir_plain(request.nodeid, offset, min(size, _READDIR_BYTES))


async def _ioctl(operations: UnboundOperations, request: Request) -> bytes:
    _, _, command, *_ = _IOCTL.unpack_from(request.body)
    await operations.ioctl(request.nodeid, command)
    return b""


async def _syncfs(operations: UnboundOperations, request: Request) -> bytes:
    await operations.syncfs(request.nodeid)
    return b""


_HANDLERS: dict[int, Callable[[UnboundOperations, Request], Coroutine[Any, Any, bytes]]] = {
    READ: _read,
    WRITE: _write,
    SETXATTR: _setxattr,
    READDIR: _readdir,
    IOCTL: _ioctl,
    FALLOCATE: _fallocate,
    LSEEK: _lseek,
    COPY_FILE_RANGE: _copy,
    COPY_FILE_RANGE_64: _copy,
    SYNCFS: _syncfs,
    TMPFILE: _tmpfile,
}


# ---- the server ------------------------------------------------------------------------------------------------------

_MAX_WORKERS = 64
_YIELD_EVERY = 16
"""After so many requests in a row other tasks get their turn."""


@coroutine
def _noticing_wait(work: Coroutine[Any, Any, _T], waits: Callable[[], None]) -> Generator[Any, Any, _T]:
    """Await `work`; call `waits` when, and only if, it has to wait for something."""
    try:
        trap = work.send(None)
    except StopIteration as done:
        return cast("_T", done.value)
    waits()
    while True:
        sent, thrown = None, None
        try:
            sent = yield trap
        except BaseException as error:
            thrown = error
        try:
            trap = work.send(sent) if thrown is None else work.throw(thrown)
        except StopIteration as done:
            return cast("_T", done.value)


class ExtraServer:
    """Answers what the lane keeps for us.

    One task at a time receives.  As long as handlers need not wait it does everything itself, without a task switch;
    when one waits (for a lock, for a thread), another task takes over the receiving.  At _MAX_WORKERS nobody receives
    until one is done; the lane's queue then fills up, and its reader waits.
    """

    def __init__(self, lane: Lane, operations: UnboundOperations) -> None:
        self._lane, self._operations = lane, operations
        self._workers = 0
        self._receiver: object = None
        """Whose turn it is to receive: the token of a worker, None while all are waiting."""

    async def run(self) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            self._start_receiver(nursery)

    async def ended(self) -> None:
        """Return when no request will come any more: unmounted, or aborted."""
        await trio.lowlevel.wait_readable(self._lane.ended_fd)

    def _start_receiver(self, nursery: trio.Nursery) -> None:
        self._workers += 1
        self._receiver = token = object()
        nursery.start_soon(self._work, nursery, token)

    async def _work(self, nursery: trio.Nursery, token: object) -> None:
        def hand_over() -> None:
            self._receiver = None
            if self._workers < _MAX_WORKERS:
                self._start_receiver(nursery)

        in_a_row = 0
        while self._receiver is token:
            received = self._lane.receive()
            if received is None:
                in_a_row = 0
                await trio.lowlevel.wait_readable(self._lane.extra_fd)
                continue
            await _noticing_wait(self._answer(Request(*received)), hand_over)
            if self._receiver is None:
                self._receiver = token
            in_a_row += 1
            if in_a_row % _YIELD_EVERY == 0:
                await trio.lowlevel.checkpoint()
        self._workers -= 1

    async def _answer(self, request: Request) -> None:
        code, out = errno.ENOSYS, b""
        try:
            handler = _HANDLERS.get(request.opcode)
            if handler is not None:
                out = await handler(self._operations, request)
                code = 0
        except pyfuse3.FUSEError as error:
            code = error.errno
        except Exception:
            # Operations' own boundary lets only FUSEError through; this is a request that could not be decoded.
            code = errno.EIO
            log.exception("opcode %d could not be decoded; answered EIO", request.opcode)
        except BaseException:
            self._lane.reply(request.unique, errno.EIO)  # cancelled: the session ends, somebody may still wait
            raise
        self._lane.reply(request.unique, code, out)


# ---- mounting --------------------------------------------------------------------------------------------------------

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_SYNCHRONOUS, _MS_DIRSYNC, _MS_NOATIME, _MS_NODIRATIME = 16, 128, 1024, 2048
_MS_RELATIME, _MS_STRICTATIME, _MS_LAZYTIME = 1 << 21, 1 << 24, 1 << 25
_FLAG_WORDS: dict[str, tuple[int, int]] = {
    # word: (flags set, flags cleared)
    "ro": (_MS_RDONLY, 0),
    "rw": (0, _MS_RDONLY),
    "nosuid": (_MS_NOSUID, 0),
    "suid": (0, _MS_NOSUID),
    "nodev": (_MS_NODEV, 0),
    "dev": (0, _MS_NODEV),
    "noexec": (_MS_NOEXEC, 0),
    "exec": (0, _MS_NOEXEC),
    "sync": (_MS_SYNCHRONOUS, 0),
    "async": (0, _MS_SYNCHRONOUS),
    "dirsync": (_MS_DIRSYNC, 0),
    "noatime": (_MS_NOATIME, 0),
    "atime": (0, _MS_NOATIME),
    "nodiratime": (_MS_NODIRATIME, 0),
    "diratime": (0, _MS_NODIRATIME),
    "relatime": (_MS_RELATIME, _MS_NOATIME),
    "norelatime": (0, _MS_RELATIME),
    "strictatime": (_MS_STRICTATIME, _MS_NOATIME),
    "lazytime": (_MS_LAZYTIME, 0),
    "nolazytime": (0, _MS_LAZYTIME),
}
_PASSED_ON = frozenset(("context", "fscontext", "defcontext", "rootcontext", "max_read"))
"""Words with a value that the kernel takes as they are (SELinux's, and fs/fuse/inode.c: fuse_fs_parameters)."""
_CAP_SYS_ADMIN = 21
_UNPRIVILEGED = frozenset((errno.EPERM, errno.EACCES))


@dataclass(frozen=True, slots=True)
class MountRequest:
    """What open_and_mount is asked for; see session.MountOptions, of which this is the plain form."""

    mountpoint: bytes
    source: str
    allow_other: bool
    read_only: bool
    flags: tuple[str, ...]


def open_and_mount(request: MountRequest) -> int:
    """Open /dev/fuse and mount it, as root by mount(2), otherwise by fusermount3.

    Returns:
        The descriptor of the connection, ours to close.  The kernel's INIT waits in it.

    Raises:
        MountError: with one line that says what is missing.
    """
    if _may_mount():
        fd = _mount_directly(request)
        if fd is not None:
            return fd
    return _mount_by_helper(request)


def _may_mount() -> bool:
    """Whether this process has CAP_SYS_ADMIN (in its user namespace, which may be enough)."""
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return False


def _mount_directly(request: MountRequest) -> int | None:
    """mount(2).  None: it is not allowed here, though we have the capability (another user namespace's mount)."""
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOATIME
    passed_on: list[str] = []
    for word in (*request.flags, *(("ro",) if request.read_only else ())):
        name, _, value = word.partition("=")
        if name in _PASSED_ON:
            value = value.replace("\\,", ",")
            passed_on.append(f'{name}="{value}"' if "," in value else word)  # as security_sb_eat_lsm_opts() reads it
            continue
        if word not in _FLAG_WORDS:
            raise MountError(f"mount option {printable(word)} is not known")
        flags = (flags & ~_FLAG_WORDS[word][1]) | _FLAG_WORDS[word][0]
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _no_device(error) from error
    words = f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},default_permissions"
    if request.allow_other:
        words += ",allow_other"
    words = ",".join([words, *passed_on])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
    source = os.fsencode(request.source)
    if libc.mount(source, request.mountpoint, b"fuse.ovlfs", flags, words.encode()) == 0:
        return fd
    code = ctypes.get_errno()
    os.close(fd)
    if code in _UNPRIVILEGED:
        return None
    if code == errno.ENODEV:
        raise MountError("this kernel has no FUSE (modprobe fuse)")
    raise MountError(f"{printable(request.mountpoint)}: cannot be mounted: {os.strerror(code)}")


def _no_device(error: OSError) -> MountError:
    if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return MountError("/dev/fuse is missing (modprobe fuse; in a container: --device /dev/fuse)")
    return MountError(f"/dev/fuse: {error.strerror}")


def _mount_by_helper(request: MountRequest) -> int:
    """fusermount3, which is setuid root, mounts and sends the descriptor back over a socket."""
    source = request.source.replace("\\", "\\\\").replace(",", "\\,")
    words = [f"fsname={source}", "subtype=ovlfs", "default_permissions", "noatime", *request.flags]
    if request.allow_other:
        words.append("allow_other")
    if request.read_only:
        words.append("ro")
    if not os.path.exists("/dev/fuse"):
        raise _no_device(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            try:
                result = subprocess.run(
                    ["fusermount3", "-o", ",".join(words), "--", request.mountpoint],
                    env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    check=False,
                )
            except FileNotFoundError:
                raise MountError(
                    "fusermount3 is missing, and only root can mount without it (Debian: apt-get install fuse3)"
                ) from None
        fd = _receive_descriptor(ours) if result.returncode == 0 else None
    if fd is None:
        said = result.stderr.decode(errors="replace").strip().rpartition("\n")[2].removeprefix("fusermount3: ")
        raise MountError(printable(said) or f"fusermount3 ended with {result.returncode}")
    return fd


def _receive_descriptor(sock: socket.socket) -> int | None:
    fds = array.array("i")
    _, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return fds[0] if fds else None
