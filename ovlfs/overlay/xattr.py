"""Which extended attributes does an inode show, and which may be set?

All that the layers hold, but for the overlay's own: `trusted.overlay.*` (or `user.overlay.*`, whichever this mount
uses).  A user's attribute of such a name is stored escaped (`overlay.overlay.x`), so that one overlay can serve as a
layer of another.

Kernel: fs/overlayfs/xattrs.c: ovl_own_xattr_get(), ovl_xattr_set(), ovl_listxattr(), ovl_xattr_escape_name().
"""

import errno
import os

from ovlfs.layer.directory import getxattr
from ovlfs.layer.override import OVERRIDE_XATTR
from ovlfs.layer.tree import Inode
from ovlfs.overlay import copy_up
from ovlfs.overlay.stack import Stack


def get_all(stack: Stack, inode: Inode) -> dict[bytes, bytes]:
    """All attributes of an inode, by the names that it shows."""
    if inode.upper:
        with stack.object(inode) as path:
            return stack.need_upper().layer.xattrs_at(path)
    layer, ref = copy_up.metadata_source(stack, inode)
    return layer.xattrs(ref)


def get(stack: Stack, inode: Inode, name: bytes) -> bytes:
    """One attribute.  Raises OSError(ENODATA)."""
    value: bytes | None
    if inode.upper and not _is_private(stack, name):
        with stack.object(inode) as path:
            value = getxattr(path, _stored(stack, name), follow=True)
    else:
        value = get_all(stack, inode).get(name)
    if value is None:
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
    return value


def set_(stack: Stack, inode: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
    """Set an attribute; `flags` as in setxattr(2): XATTR_CREATE, XATTR_REPLACE.

    Precondition: not copy_up.need_data(inode).

    Raises:
        OSError: EROFS; EEXIST, ENODATA for the flags; EPERM, EOPNOTSUPP, ENOSPC, E2BIG, ERANGE as the upper file
            system says.
    """
    _check_settable(stack, name)
    copy_up.metadata(stack, inode)
    with stack.object(inode) as path:
        os.setxattr(path, _stored(stack, name), value, flags)
    stack.refresh(inode.nodeid)


def remove(stack: Stack, inode: Inode, name: bytes) -> None:
    """Remove an attribute.  Raises OSError(ENODATA) before anything is copied up; see `set_`.

    Precondition: not copy_up.need_data(inode).
    """
    _check_settable(stack, name)
    stack.need_upper()
    get(stack, inode, name)
    copy_up.metadata(stack, inode)
    with stack.object(inode) as path:
        os.removexattr(path, _stored(stack, name))
    stack.refresh(inode.nodeid)


def _stored(stack: Stack, name: bytes) -> bytes:
    prefix = stack.need_upper().prefix
    return prefix + b"overlay." + name[len(prefix) :] if name.startswith(prefix) else name


def _is_private(stack: Stack, name: bytes) -> bool:
    return stack.need_upper().layer.override and name == OVERRIDE_XATTR


def _check_settable(stack: Stack, name: bytes) -> None:
    """The xattr in which an unprivileged mount keeps owners is not the user's to write."""
    if _is_private(stack, name):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))
