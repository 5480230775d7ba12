"""How do owner, mode, times and size of an inode change?

Metadata is copied up, and changed there.  A change of size needs the data too (unless it becomes 0): the caller has
seen to that with copy_up.begin().

Kernel: fs/overlayfs/inode.c: ovl_setattr(); super.c: ovl_statfs().
"""

import os
import stat
from dataclasses import dataclass

from ovlfs.layer.directory import NAME_MAX, DirLayer
from ovlfs.layer.tree import Inode
from ovlfs.overlay import copy_up
from ovlfs.overlay.owner import NewObject
from ovlfs.overlay.stack import Stack


@dataclass(frozen=True, slots=True)
class Change:
    """What setattr shall change; None: leave it.  `size` in bytes, times in ns, `permissions` without the type."""

    permissions: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


def set_(stack: Stack, inode: Inode, change: Change) -> None:
    """Change attributes.

    Precondition: not copy_up.need_data(inode); for a size, the data is in the upperdir.

    Raises:
        OSError: EROFS, EPERM, EFBIG, ENOSPC as the upper file system says.
    """
    upper = stack.need_upper()
    copy_up.metadata(stack, inode)
    attr = inode.attr
    owner = (attr.uid if change.uid is None else change.uid, attr.gid if change.gid is None else change.gid)
    permissions = stat.S_IMODE(attr.mode) if change.permissions is None else change.permissions
    with stack.object(inode) as path:
        if change.size is not None:
            os.truncate(path, change.size)
        if change.permissions is not None or change.uid is not None or change.gid is not None:
            if not upper.owner.can_set(path, *owner):
                _remake(stack, inode, owner)
            else:
                upper.owner.set(path, stat.S_IFMT(attr.mode) | permissions, *owner, rdev=attr.rdev)
        if change.atime_ns is not None or change.mtime_ns is not None:
            st = os.stat(path)
            os.utime(
                path,
                ns=(
                    st.st_atime_ns if change.atime_ns is None else change.atime_ns,
                    st.st_mtime_ns if change.mtime_ns is None else change.mtime_ns,
                ),
            )
    stack.refresh(inode.nodeid)


def _remake(stack: Stack, inode: Inode, owner: tuple[int, int]) -> None:
    """A real symlink, fifo or socket cannot carry the owner in an xattr: put a file that can in its place."""
    upper = stack.need_upper()
    (directory, name), *_ = stack.tree.names(inode.nodeid)
    attr = inode.attr
    with stack.object(inode) as path:
        target = os.readlink(b"", dir_fd=int(path.rpartition(b"/")[2])) if stat.S_ISLNK(attr.mode) else b""
    with upper.temp() as temp:
        upper.make(temp, NewObject(attr.mode, *owner, attr.rdev, target))
        with upper.temp_object(temp) as path:
            os.utime(path, ns=(attr.atime_ns, attr.mtime_ns))
            new_attr, upper_ino, _ = upper.attr(path)
        upper.replace(temp, stack.upper_path(directory), name)
    stack.tree.set_upper(inode.nodeid, upper_ino, metacopy=False)
    stack.tree.set_attr(inode.nodeid, new_attr)


@dataclass(frozen=True, slots=True)
class FileSystemNumbers:
    """What statvfs(3) shows; sizes in units of `f_frsize` bytes."""

    f_bsize: int = 4096
    f_frsize: int = 4096
    f_blocks: int = 0
    f_bfree: int = 0
    f_bavail: int = 0
    f_files: int = 0
    f_ffree: int = 0
    f_favail: int = 0
    f_namemax: int = NAME_MAX


def statvfs(stack: Stack) -> "os.statvfs_result | FileSystemNumbers":
    """The numbers of the upperdir's file system, or of the topmost lower directory's; an image alone has no room."""
    for layer in stack.layers:
        if isinstance(layer, DirLayer):
            return os.fstatvfs(layer.fd)
    return FileSystemNumbers()


def open_for_sync(stack: Stack, inode: Inode) -> int | None:
    """A descriptor to fsync so that a directory's names are on disk; None where there is nothing to sync."""
    if not inode.upper or stack.volatile:
        return None
    with stack.object(inode) as path:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
