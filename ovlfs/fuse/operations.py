"""What happens with a FUSE request?

A protocol adapter, and nothing else: each handler converts the arguments, takes the locks (see locks.py), calls one
function of overlay/, and converts the answer.  What overlayfs means is decided there.

Errors: an OSError of overlay/ becomes its errno.  Anything unforeseen is logged with its traceback and answered EIO,
and the mount lives on: pyfuse3 would end the session on any exception but FUSEError.

Caching: ovlfs is the only writer of its layers and upperdir, so the kernel may keep entries, attributes and negative
entries for ever (TIMEOUT_S).  What a request changes beside the inode that it names, the kernel invalidates itself.

Not answered on purpose, so that pyfuse3 says ENOSYS and the kernel stops asking: flush, access.
"""

import errno
import functools
import logging
import os
import stat
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio

from ovlfs.errors import printable
from ovlfs.fuse.idmap import IdMapping
from ovlfs.fuse.locks import InodeLocks
from ovlfs.fuse.meter import Meter
from ovlfs.ids import NodeId
from ovlfs.layer.base import Attr
from ovlfs.layer.tree import Inode
from ovlfs.overlay import attr, copy_up, namei, xattr
from ovlfs.overlay import dir as directory_ops
from ovlfs.overlay.file import Handle
from ovlfs.overlay.owner import NewObject
from ovlfs.overlay.stack import Stack

if TYPE_CHECKING:
    from pyfuse3 import FileHandleT, FileNameT, InodeT, ModeT, XAttrNameT

log = logging.getLogger("ovlfs.fuse")
requests = logging.getLogger("ovlfs.requests")

TIMEOUT_S = 86400.0
LARGE_BYTES = 1 << 20
"""Work on more bytes than this is done in a thread, so that others need not wait for the disk."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _handler(
    function: Callable[Concatenate["Operations", _P], Coroutine[Any, Any, _R]],
) -> Callable[Concatenate["Operations", _P], Coroutine[Any, Any, _R]]:
    """The boundary of every request: errors become errnos, unforeseen ones EIO; with --debug one line a request."""
    name = function.__name__

    @functools.wraps(function)
    async def run(self: "Operations", /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        started = time.perf_counter()
        code = 0
        try:
            return await function(self, *args, **kwargs)
        except pyfuse3.FUSEError as error:
            code = error.errno
            raise
        except OSError as error:
            code = error.errno or errno.EIO
            if error.errno is None:
                log.exception("%s: an OSError without errno", name)
            raise pyfuse3.FUSEError(code) from error
        except Exception:
            code = errno.EIO
            log.exception("%s%s failed unforeseen; answered EIO", name, args)
            raise pyfuse3.FUSEError(code) from None
        finally:
            self.meter.note(name, args, time.perf_counter() - started, code)
            if requests.isEnabledFor(logging.DEBUG):
                took_us = (time.perf_counter() - started) * 1e6
                reply = errno.errorcode.get(code, str(code)) if code else "ok"
                requests.debug("%s %s -> %s (%.0f us)", name, self.describe(args), reply, took_us)

    return run


class Operations(pyfuse3.Operations):
    """The handlers of one mounted stack."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    dont_mask = False
    """Whether modes arrive as the caller gave them (FUSE_DONT_MASK, set by the lane): the umask is ours to apply."""

    opens_itself = True
    """Whether open files are ours.  Otherwise the lane opens what we copied up or made, when our reply comes by."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.enable_acl = stack.params.acl
        self._stack = stack
        self._tree = stack.tree
        self._locks = InodeLocks()
        self._ids = IdMapping(stack.params)
        self._handles: dict[int, Handle] = {}
        self._next_handle = 1
        self.meter = Meter()
        if requests.isEnabledFor(logging.DEBUG):
            stack.events.listeners.append(lambda event: requests.debug("  %s", event))

    @property
    def shows_ids_as_stored(self) -> bool:
        """Whether the owners in the tree are those to show (see idmap.py)."""
        return self._ids.is_identity

    def nodeid_of(self, fh: int) -> NodeId | None:
        """Whose file a handle is open on; None: it was closed."""
        handle = self._handles.get(fh)
        return None if handle is None else handle.nodeid

    @property
    def open_files(self) -> int:
        """How many files are open."""
        return len(self._handles)

    def close(self) -> None:
        """Close what clients left open (after a forced unmount)."""
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()

    def describe(self, args: Sequence[object]) -> str:
        """The arguments of a request for --debug: paths instead of nodeids, no data."""
        words: list[str] = []
        for index, arg in enumerate(args):
            if index == 0 and isinstance(arg, int):
                words.append(self._path_text(arg))
            elif isinstance(arg, bytes):
                words.append(printable(arg) if len(arg) < 256 else f"{len(arg)} bytes")
            elif isinstance(arg, int):
                words.append(str(arg))
        return " ".join(words)

    def _path_text(self, nodeid: int) -> str:
        try:
            path = self._tree.path(NodeId(nodeid))
        except OSError:
            return f"#{nodeid}"
        return f"#{nodeid}" if path is None else "/" + printable(path)

    # ---- names ---------------------------------------------------------------------------------------------------

    def _get(self, nodeid: int) -> Inode:
        return self._tree.get(NodeId(nodeid))

    def _entry(self, inode: Inode) -> pyfuse3.EntryAttributes:
        """The attributes of an inode as pyfuse3 wants them."""
        entry = _attributes(self._shown(inode.attr))
        entry.st_ino = pyfuse3.InodeT(inode.nodeid)
        return entry

    def _shown(self, attr_: Attr) -> Attr:
        """Attributes with the owner under which they are shown."""
        if self._ids.is_identity:
            return attr_
        return replace(attr_, uid=self._ids.users.shown(attr_.uid), gid=self._ids.groups.shown(attr_.gid))

    def _counted_entry(self, inode: Inode) -> pyfuse3.EntryAttributes:
        """An answer that the kernel counts as a lookup."""
        entry = self._entry(inode)
        self._tree.ref(inode.nodeid)
        return entry

    @_handler
    async def lookup(
        self,
        parent_inode: "InodeT",
        name: "FileNameT",
        ctx: pyfuse3.RequestContext,  # noqa: ARG002
    ) -> pyfuse3.EntryAttributes:
        """FUSE_LOOKUP: a name (one lookup more), or a negative entry.  Errors: ENAMETOOLONG, ENOTDIR, the layers'."""
        parent = self._get(parent_inode)
        inode = namei.lookup(self._stack, parent, name)
        if inode is None:
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = pyfuse3.InodeT(0)  # a negative entry: the kernel remembers that there is nothing
            entry.entry_timeout = TIMEOUT_S
            return entry
        return self._counted_entry(inode)

    async def forget(self, inode_list: "Sequence[tuple[InodeT, int]]") -> None:
        """No reply, and so nobody to tell of an error."""
        for nodeid, nlookup in inode_list:
            try:
                if self._stack.events.listeners:
                    self._stack.tell_forget(NodeId(nodeid))
                self._tree.forget(NodeId(nodeid), nlookup)
            except Exception:
                log.exception("forget %d failed unforeseen", nodeid)

    @_handler
    async def getattr(self, inode: "InodeT", ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:  # noqa: ARG002
        """FUSE_GETATTR, from the tree."""
        return self._entry(self._get(inode))

    @_handler
    async def readlink(self, inode: "InodeT", ctx: pyfuse3.RequestContext) -> "FileNameT":  # noqa: ARG002
        """FUSE_READLINK.  Errors: EINVAL."""
        return pyfuse3.FileNameT(namei.readlink(self._stack, self._get(inode)))

    def _umask(self, ctx: pyfuse3.RequestContext) -> int:
        return int(ctx.umask) if self.dont_mask else 0

    def _make(
        self,
        parent_nodeid: int,
        name: bytes,
        mode: int,
        ctx: pyfuse3.RequestContext,
        *,
        rdev: int = 0,
        target: bytes = b"",
    ) -> pyfuse3.EntryAttributes:
        owner = self._ids.users.stored(ctx.uid), self._ids.groups.stored(ctx.gid)
        new = NewObject(mode, *owner, rdev, target, self._umask(ctx))
        return self._counted_entry(
            directory_ops.create(self._stack, self._get(parent_nodeid), namei.check_name(name), new)
        )

    @_handler
    async def mknod(
        self, parent_inode: "InodeT", name: "FileNameT", mode: "ModeT", rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """FUSE_MKNOD: also plain files.  Errors: as overlay.dir.create()."""
        return self._make(parent_inode, name, mode, ctx, rdev=rdev)

    @_handler
    async def mkdir(
        self, parent_inode: "InodeT", name: "FileNameT", mode: "ModeT", ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """FUSE_MKDIR.  Errors: as overlay.dir.create()."""
        return self._make(parent_inode, name, mode, ctx)

    @_handler
    async def symlink(
        self, parent_inode: "InodeT", name: "FileNameT", target: "FileNameT", ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """FUSE_SYMLINK.  Errors: as overlay.dir.create()."""
        return self._make(parent_inode, name, stat.S_IFLNK | 0o777, ctx, target=target)

    @_handler
    async def link(
        self,
        inode: "InodeT",
        new_parent_inode: "InodeT",
        new_name: "FileNameT",
        ctx: pyfuse3.RequestContext,  # noqa: ARG002
    ) -> pyfuse3.EntryAttributes:
        """FUSE_LINK.  Errors: as overlay.dir.link()."""
        linked = self._get(inode)
        async with self._locks.holding(linked.nodeid):
            namei.need_absent(self._stack, self._get(new_parent_inode), new_name)
            await self._bring_data(linked, wanted=copy_up.need_data(self._stack, linked))
            directory_ops.link(self._stack, linked, self._get(new_parent_inode), new_name)
            return self._counted_entry(linked)

    @_handler
    async def unlink(self, parent_inode: "InodeT", name: "FileNameT", ctx: pyfuse3.RequestContext) -> None:  # noqa: ARG002
        """FUSE_UNLINK.  Errors: as overlay.dir.unlink()."""
        directory_ops.unlink(self._stack, self._get(parent_inode), name)

    @_handler
    async def rmdir(self, parent_inode: "InodeT", name: "FileNameT", ctx: pyfuse3.RequestContext) -> None:  # noqa: ARG002
        """FUSE_RMDIR.  Errors: as overlay.dir.rmdir()."""
        directory_ops.rmdir(self._stack, self._get(parent_inode), name)

    @_handler
    async def rename(
        self,
        parent_inode_old: "InodeT",
        name_old: "FileNameT",
        parent_inode_new: "InodeT",
        name_new: "FileNameT",
        flags: int,
        ctx: pyfuse3.RequestContext,  # noqa: ARG002
    ) -> None:
        """FUSE_RENAME2.  Errors: as overlay.dir.rename(); EINVAL for RENAME_WHITEOUT, as the kernel's overlay says."""
        if flags & ~(pyfuse3.RENAME_NOREPLACE | pyfuse3.RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        noreplace, exchange = bool(flags & pyfuse3.RENAME_NOREPLACE), bool(flags & pyfuse3.RENAME_EXCHANGE)
        while True:
            parent, new_parent = self._get(parent_inode_old), self._get(parent_inode_new)
            inode = namei.get(self._stack, parent, name_old)
            other = namei.lookup(self._stack, new_parent, name_new)
            moved = [inode, other] if exchange and other is not None else [inode]
            async with self._locks.holding(*(one.nodeid for one in moved)):
                for one in moved:
                    await self._bring_data(one, wanted=copy_up.need_data(self._stack, one))
                # Waiting for a lock or for data, somebody else may have renamed: then start again.
                again = namei.lookup(self._stack, parent, name_old), namei.lookup(self._stack, new_parent, name_new)
                if [one and one.nodeid for one in again] != [inode.nodeid, other and other.nodeid]:
                    continue
                directory_ops.rename(
                    self._stack, parent, name_old, new_parent, name_new, noreplace=noreplace, exchange=exchange
                )
                return

    # ---- directories ---------------------------------------------------------------------------------------------

    @_handler
    async def opendir(self, inode: "InodeT", ctx: pyfuse3.RequestContext) -> "FileHandleT":  # noqa: ARG002
        """FUSE_OPENDIR."""
        return pyfuse3.FileHandleT(inode)  # listing keeps no state: its offsets are the tree's cookies

    @_handler
    async def readdir(self, fh: "FileHandleT", start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """FUSE_READDIRPLUS.  Each entry but "." and ".." counts a lookup, if it fits the reply."""
        directory = self._get(fh)
        # "." and ".." are the offsets 1 and 2; the kernel neither counts nor forgets them.
        for offset, name in ((1, b"."), (2, b"..")):
            if start_id < offset:
                nodeid = directory.nodeid if offset == 1 else self._parent_of(directory)
                entry = self._entry(self._tree.get(nodeid))
                if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), entry, offset):
                    return
        after = max(0, start_id - 2)
        while True:
            children = self._tree.list(directory.nodeid, after, 256)
            if not children:
                return
            for cookie, name, nodeid in children:
                entry = self._entry(self._tree.get(nodeid))
                if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), entry, cookie + 2):
                    return
                self._tree.ref(nodeid)
                after = cookie

    def _parent_of(self, directory: Inode) -> NodeId:
        names = self._tree.names(directory.nodeid)
        return names[0][0] if names else directory.nodeid

    @_handler
    async def releasedir(self, fh: "FileHandleT") -> None:
        """Nothing was opened."""

    @_handler
    async def fsyncdir(self, fh: "FileHandleT", datasync: bool) -> None:  # noqa: ARG002
        """FUSE_FSYNCDIR, in a thread."""
        fd = attr.open_for_sync(self._stack, self._get(fh))
        if fd is not None:
            try:
                await trio.to_thread.run_sync(os.fsync, fd)
            finally:
                os.close(fd)

    # ---- attributes ----------------------------------------------------------------------------------------------

    async def _bring_data(self, inode: Inode, *, wanted: bool = True, truncate: bool = False) -> None:
        """Have a file's data in the upperdir; the copying runs in a thread.  Precondition: the inode's lock is held."""
        if not wanted or not stat.S_ISREG(inode.attr.mode):
            return
        copy = copy_up.begin(self._stack, inode, truncate=truncate)
        if copy is None:
            return
        try:
            if copy.size:
                await trio.to_thread.run_sync(copy.run)
        except BaseException:
            copy.abort()
            raise
        copy.finish()

    @_handler
    async def setattr(
        self,
        inode: "InodeT",
        attributes: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: "FileHandleT | None",
        ctx: pyfuse3.RequestContext,  # noqa: ARG002
    ) -> pyfuse3.EntryAttributes:
        """FUSE_SETATTR.  Errors: as overlay.attr.set_()."""
        target = self._get(inode)
        change = attr.Change(
            permissions=stat.S_IMODE(attributes.st_mode) if fields.update_mode else None,
            uid=self._ids.users.stored(attributes.st_uid) if fields.update_uid else None,
            gid=self._ids.groups.stored(attributes.st_gid) if fields.update_gid else None,
            size=attributes.st_size if fields.update_size else None,
            atime_ns=attributes.st_atime_ns if fields.update_atime else None,
            mtime_ns=attributes.st_mtime_ns if fields.update_mtime else None,
        )
        async with self._locks.holding(target.nodeid):
            if change.size is not None:
                # The copy will be empty from the start; and ftruncate(2) always sets it (fs/open.c).
                if change.mtime_ns is None and (fh is not None or change.size == 0 < target.attr.size):
                    change = replace(change, mtime_ns=time.time_ns())
                await self._bring_data(target, truncate=change.size == 0)
            else:
                await self._bring_data(target, wanted=copy_up.need_data(self._stack, target))
            attr.set_(self._stack, target, change)
            return self._entry(target)

    @_handler
    async def setxattr(
        self,
        inode: "InodeT",
        name: "XAttrNameT",
        value: bytes,
        ctx: pyfuse3.RequestContext,  # noqa: ARG002
    ) -> None:
        """FUSE_SETXATTR; pyfuse3 has seen to XATTR_CREATE and XATTR_REPLACE.  Errors: as overlay.xattr.set_()."""
        target = self._get(inode)
        async with self._locks.holding(target.nodeid):
            await self._bring_data(target, wanted=copy_up.need_data(self._stack, target))
            xattr.set_(self._stack, target, name, value)

    @_handler
    async def getxattr(self, inode: "InodeT", name: "XAttrNameT", ctx: pyfuse3.RequestContext) -> bytes:  # noqa: ARG002
        """FUSE_GETXATTR.  Errors: ENODATA."""
        return xattr.get(self._stack, self._get(inode), name)

    @_handler
    async def listxattr(self, inode: "InodeT", ctx: pyfuse3.RequestContext) -> "Sequence[XAttrNameT]":
        """FUSE_LISTXATTR.  Only root is shown trusted.* (kernel: xattrs.c: ovl_can_list(), by CAP_SYS_ADMIN, which a
        request does not tell).
        """
        names = xattr.get_all(self._stack, self._get(inode))
        return [pyfuse3.XAttrNameT(name) for name in names if ctx.uid == 0 or not name.startswith(b"trusted.")]

    @_handler
    async def removexattr(self, inode: "InodeT", name: "XAttrNameT", ctx: pyfuse3.RequestContext) -> None:  # noqa: ARG002
        """FUSE_REMOVEXATTR.  Errors: ENODATA."""
        target = self._get(inode)
        async with self._locks.holding(target.nodeid):
            xattr.get(self._stack, target, name)
            await self._bring_data(target, wanted=copy_up.need_data(self._stack, target))
            xattr.remove(self._stack, target, name)

    @_handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:  # noqa: ARG002
        """FUSE_STATFS."""
        numbers = attr.statvfs(self._stack)
        out = pyfuse3.StatvfsData()
        for field in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail", "namemax"):
            setattr(out, f"f_{field}", getattr(numbers, f"f_{field}"))
        return out

    # ---- file data -----------------------------------------------------------------------------------------------

    def _open(self, inode: Inode, flags: int) -> pyfuse3.FileInfo:
        if not self.opens_itself:
            return pyfuse3.FileInfo()
        handle = Handle(self._stack, inode, flags)
        fh = self._next_handle
        self._next_handle += 1
        self._handles[fh] = handle
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(fh), keep_cache=True)

    @_handler
    async def open(self, inode: "InodeT", flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """FUSE_OPEN: for writing, the data is copied up first.  O_TRUNC comes here, not as a setattr."""
        target = self._get(inode)
        if flags & os.O_ACCMODE == os.O_RDONLY and not flags & os.O_TRUNC:
            return self._open(target, flags)
        async with self._locks.holding(target.nodeid):
            truncate = bool(flags & os.O_TRUNC)
            before = target.attr
            await self._bring_data(target, truncate=truncate)
            if target.attr != before and not truncate:
                # An open does not make the kernel ask for the attributes again.  Safe here: it takes no lock.
                pyfuse3.invalidate_inode(inode, attr_only=True)
            if truncate:
                # O_TRUNC sets the times also of a file that was empty.
                change = attr.Change(size=0, mtime_ns=time.time_ns())
                if self.opens_itself and ctx.uid != 0:
                    change = replace(change, permissions=_without_privileges(target.attr.mode))
                attr.set_(self._stack, target, change)
            return self._open(target, flags)

    @_handler
    async def create(
        self, parent_inode: "InodeT", name: "FileNameT", mode: "ModeT", flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """FUSE_CREATE: make and open.  Errors: as overlay.dir.create()."""
        owner = self._ids.users.stored(ctx.uid), self._ids.groups.stored(ctx.gid)
        new = NewObject(stat.S_IFREG | stat.S_IMODE(mode), *owner, umask=self._umask(ctx))
        inode = directory_ops.create(self._stack, self._get(parent_inode), namei.check_name(name), new)
        info = self._open(inode, flags & ~os.O_EXCL)
        return info, self._counted_entry(inode)

    @_handler
    async def read(self, fh: "FileHandleT", off: int, size: int) -> bytes:
        """FUSE_READ.  Errors: EIO, a layer that has shrunk."""
        return self._handles[fh].read(off, size)

    @_handler
    async def read_unopened(self, inode: "InodeT", off: int, size: int) -> bytes:
        """FUSE_READ of a file that the lane has opened, and whose layer is not what it was: see `opens_itself`.

        Errors: EIO, the layer was changed.
        """
        handle = Handle(self._stack, self._get(inode), os.O_RDONLY)
        try:
            return handle.read(off, size)
        finally:
            handle.close()

    @_handler
    async def write(self, fh: "FileHandleT", off: int, buf: bytes) -> int:
        """FUSE_WRITE.  Errors: as pwrite(2)."""
        return self._handles[fh].write(off, buf)

    @_handler
    async def fsync(self, fh: "FileHandleT", datasync: bool) -> None:
        """FUSE_FSYNC, in a thread."""
        handle = self._handles[fh]
        await trio.to_thread.run_sync(lambda: handle.sync(data_only=datasync))

    @_handler
    async def release(self, fh: "FileHandleT") -> None:
        """FUSE_RELEASE."""
        self._handles.pop(fh).close()


def _without_privileges(mode: int) -> int | None:
    """The permissions that a file has left when somebody without CAP_FSETID truncates it by opening it; None: all.

    The kernel leaves that to us (fs/fuse/dir.c: fuse_do_setattr(), ATTR_OPEN: no SETATTR follows an open with O_TRUNC),
    unlike a write or a truncation.  Kernel: fs/attr.c: setattr_should_drop_suidgid().
    """
    taken = mode & (stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0))
    return stat.S_IMODE(mode & ~taken) if taken else None


def _attributes(shown: Attr) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.entry_timeout = TIMEOUT_S
    entry.attr_timeout = TIMEOUT_S
    entry.st_mode = pyfuse3.ModeT(shown.mode)
    entry.st_nlink = shown.nlink
    entry.st_uid = shown.uid
    entry.st_gid = shown.gid
    entry.st_rdev = shown.rdev
    entry.st_size = shown.size
    entry.st_blksize = 4096
    entry.st_blocks = shown.blocks
    entry.st_atime_ns = shown.atime_ns
    entry.st_mtime_ns = shown.mtime_ns
    entry.st_ctime_ns = shown.ctime_ns
    return entry
