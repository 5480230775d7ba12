"""How are names made, removed and changed?

The parents are copied up; what has a counterpart below leaves a whiteout when its name goes away, and a directory
that appears where something is below is opaque.  Each operation is one rename in the upperdir, so there is no
moment in which a name is neither here nor there.

Kernel: fs/overlayfs/dir.c: ovl_create_object(), ovl_create_over_whiteout(), ovl_do_remove(), ovl_remove_and_whiteout(),
ovl_clear_empty(), ovl_rename(), ovl_link().

Differences, on purpose: a merged directory is renamed with overlay.redirect by default; removing a lower file with
several names does not copy it up.
"""

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ovlfs.errors import printable
from ovlfs.ids import ROOT_NODEID, Name
from ovlfs.layer import sys
from ovlfs.layer.tree import Inode
from ovlfs.overlay import acl, copy_up, namei
from ovlfs.overlay.owner import NewObject
from ovlfs.overlay.stack import Stack

_NO_NAME = Name(b"/")
"""For a moment in the tree, the name of a file without one; no request can have a slash in a name."""


def create(stack: Stack, parent: Inode, name: bytes, new: NewObject) -> Inode:
    """Make a file, directory, symlink, fifo, socket or device, as `new` says.

    The group and the setgid bit of a setgid directory, and its default ACL, are inherited here.

    Raises:
        OSError: EEXIST, ENOENT (the directory was removed), ENAMETOOLONG, EROFS, EPERM for a device 0:0, which is
            how a whiteout is spelled (kernel: ovl_mknod()); what the upper file system says.
    """
    upper = stack.need_upper()
    last = namei.need_absent(stack, parent, name)
    if stat.S_ISCHR(new.mode) and new.rdev == 0:
        raise OSError(errno.EPERM, "a character device 0:0 is a whiteout")
    path = copy_up.parent(stack, parent)
    new = _inherit_group(parent, new)
    with upper.temp() as temp:
        with stack.object(parent) as parent_path:
            new, acls = _inherit_acl(parent_path, new)
        upper.make(temp, new)
        with upper.temp_object(temp) as at:
            for acl_name, value in acls.items():
                os.setxattr(at, acl_name, value)
            if stat.S_ISDIR(new.mode) and parent.lower:
                upper.set_own(at, b"opaque", b"y")
            attr, upper_ino, ino = upper.attr(at)
        upper.place(temp, path, last)
    if stat.S_ISDIR(new.mode) and parent.lower:
        stack.events.tell("opaque", _joined(path, last), "a new directory")
    nodeid = stack.tree.add(parent.nodeid, last, attr, upper_ino, ino)
    stack.refresh(parent.nodeid)
    return stack.tree.get(nodeid)


def create_nameless(stack: Stack, parent: Inode, new: NewObject) -> Inode:
    """O_TMPFILE: a regular file that has no name yet, perhaps never; the kernel is told of it (one reference).

    It is the tree's orphan, as a file is that has lost its last name.

    Kernel: dir.c: ovl_create_tmpfile().

    Raises:
        OSError: EROFS; ENOENT (the directory was removed); EOPNOTSUPP where the upper file system has no O_TMPFILE.
    """
    upper = stack.need_upper()
    copy_up.parent(stack, parent)
    new = _inherit_group(parent, new)
    with stack.object(parent) as parent_path:
        new, acls = _inherit_acl(parent_path, new)
    fd = os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=upper.work_fd)
    try:
        path = sys.fd_path(fd)
        upper.owner.set(path, new.mode, new.uid, new.gid)
        for name, value in acls.items():
            os.setxattr(path, name, value)
        attr, upper_ino, ino = upper.attr(path)
        held = os.open(path, os.O_PATH | os.O_CLOEXEC)
    finally:
        os.close(fd)
    nodeid = stack.tree.add(parent.nodeid, _NO_NAME, attr, upper_ino, ino)
    stack.tree.ref(nodeid)
    stack.tree.remove(parent.nodeid, _NO_NAME)
    stack.tree.set_orphan(nodeid, held)
    return stack.tree.get(nodeid)


def _inherit_group(parent: Inode, new: NewObject) -> NewObject:
    """Kernel: fs/inode.c: inode_init_owner()."""
    if not parent.attr.mode & stat.S_ISGID:
        return new
    mode = new.mode | stat.S_ISGID if stat.S_ISDIR(new.mode) else new.mode
    return replace(new, gid=parent.attr.gid, mode=mode)


def _inherit_acl(parent_path: bytes, new: NewObject) -> tuple[NewObject, dict[bytes, bytes]]:
    if stat.S_ISLNK(new.mode):
        return new, {}
    default = acl.default_of(parent_path)
    if default is None:
        return replace(new, mode=new.mode & ~new.umask), {}
    mode, access = acl.inherit(default, new.mode)
    acls = {acl.ACCESS: access}
    if stat.S_ISDIR(new.mode):
        acls[acl.DEFAULT] = default
    return replace(new, mode=mode), acls


def link(stack: Stack, inode: Inode, parent: Inode, name: bytes) -> None:
    """Give an inode another name.

    Precondition: not copy_up.need_data(inode).

    Raises:
        OSError: EEXIST, ENOENT (the inode has no name any more, and is no O_TMPFILE), EPERM for a directory, EROFS,
            EMLINK.
    """
    upper = stack.need_upper()
    if inode.is_dir:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))
    last = namei.need_absent(stack, parent, name)
    copy_up.metadata(stack, inode)
    path = copy_up.parent(stack, parent)
    with stack.object(inode) as at:
        _redirect_metacopy(stack, inode, at)
        upper.link(at, path, last)
    stack.tree.link(inode.nodeid, parent.nodeid, last)
    stack.refresh(inode.nodeid)
    stack.refresh(parent.nodeid)


def _redirect_metacopy(stack: Stack, inode: Inode, path: bytes) -> None:
    """A metacopy under another name must say where its data is.  Kernel: ovl_set_link_redirect()."""
    if inode.metacopy and not inode.redirect:
        redirect = namei.redirect_of(stack, inode)
        stack.need_upper().set_own(path, b"redirect", redirect)
        stack.tree.set_redirect(inode.nodeid)
        stack.events.tell("redirect", stack.tree.path(inode.nodeid) or b"", f"of the data, to {printable(redirect)}")


def unlink(stack: Stack, parent: Inode, name: bytes) -> None:
    """Remove a name that is no directory.  Raises OSError(EISDIR, ENOENT, EROFS, ...)."""
    inode = namei.get(stack, parent, name)
    if inode.is_dir:
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    with _unlinking(stack, inode, parent):
        _remove(stack, parent, Name(name), inode)


def rmdir(stack: Stack, parent: Inode, name: bytes) -> None:
    """Remove an empty directory.  Raises OSError(ENOTDIR, ENOTEMPTY, ENOENT, EROFS, ...)."""
    inode = namei.get(stack, parent, name)
    if not inode.is_dir:
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not stack.tree.is_empty(inode.nodeid):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
    with _unlinking(stack, inode, parent):
        _remove(stack, parent, Name(name), inode)


def _remove(stack: Stack, parent: Inode, name: Name, inode: Inode) -> None:
    """Kernel: ovl_do_remove(): a plain removal, or a whiteout where something below would show again."""
    upper = stack.need_upper()
    began_ns = time.monotonic_ns()
    path = copy_up.parent(stack, parent)
    if namei.is_below(stack, parent, name):
        upper.whiteout(path, name, over=inode.upper)
        stack.events.tell("whiteout", _joined(path, name), began_ns=began_ns)
    else:
        upper.take_away(path, name)
    stack.tree.remove(parent.nodeid, name)
    stack.refresh(parent.nodeid)


@contextmanager
def _unlinking(stack: Stack, inode: Inode, parent: Inode) -> Iterator[None]:
    """Around the loss of one of an inode's names: keep hold of an upper object that loses its last, count the links."""
    nodeid = inode.nodeid
    last = len(stack.tree.names(nodeid)) == 1
    fd = -1
    if last and inode.upper and stack.tree.orphan(nodeid) is None:
        path = stack.upper_path(nodeid)
        fd = sys.open_beneath(stack.need_upper().layer.fd, path, os.O_PATH | os.O_NOFOLLOW)
    try:
        yield
    except BaseException:
        if fd >= 0:
            os.close(fd)
        raise
    try:
        stack.tree.get(nodeid)
    except OSError:  # ESTALE: the kernel does not hold it, nobody can ask for it again
        if fd >= 0:
            os.close(fd)
        return
    if last:
        stack.tree.set_last_parent(nodeid, parent.nodeid)
    if fd >= 0:
        stack.tree.set_orphan(nodeid, fd)
    if inode.upper:  # a lower inode keeps the link count of its layer, as with the kernel
        stack.refresh(nodeid)


def rename(
    stack: Stack, parent: Inode, name: bytes, new_parent: Inode, new_name: bytes, *, noreplace: bool, exchange: bool
) -> None:
    """rename(2), with RENAME_NOREPLACE or RENAME_EXCHANGE.

    Precondition: not copy_up.need_data() of the inode, nor, for an exchange, of the other.

    Raises:
        OSError: ENOENT, EEXIST, EISDIR, ENOTDIR, ENOTEMPTY, EINVAL (into itself), EROFS; EXDEV for a directory with
            something below when redirect_dir is off (kernel: ovl_can_move()), or too deep for a redirect.
    """
    upper = stack.need_upper()
    inode = namei.get(stack, parent, name)
    other = namei.lookup(stack, new_parent, new_name)
    old_last, new_last = Name(name), Name(new_name)
    if not new_parent.is_linked:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    if other is None and exchange:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    if other is not None and noreplace:
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    _check_not_into_itself(stack, inode, new_parent)
    if other is not None and exchange:
        _check_not_into_itself(stack, other, parent)
    if other is not None and not exchange:
        _check_overwrite(stack, inode, other)
    if inode is other or (other is not None and inode.nodeid == other.nodeid):
        return  # two names of one inode: rename(2) does nothing
    _check_can_move(stack, inode)
    if exchange:
        assert other is not None
        _check_can_move(stack, other)
    began_ns = time.monotonic_ns()
    copy_up.metadata(stack, inode)
    path, new_path = copy_up.parent(stack, parent), copy_up.parent(stack, new_parent)
    if exchange:
        assert other is not None
        copy_up.metadata(stack, other)
        _mark_moved(stack, inode, (parent, old_last), new_parent)
        _mark_moved(stack, other, (new_parent, new_last), parent)
        upper.rename(path, old_last, new_path, new_last, whiteout=False, exchange=True)
        stack.tree.exchange(parent.nodeid, old_last, new_parent.nodeid, new_last)
    else:
        _mark_moved(stack, inode, (parent, old_last), new_parent)
        hide_old = namei.is_below(stack, parent, old_last)
        if other is None:
            _move(stack, inode, (path, old_last), (new_path, new_last), hide_old=hide_old)
            stack.tree.move(parent.nodeid, old_last, new_parent.nodeid, new_last)
        else:
            with _unlinking(stack, other, new_parent):
                if other.upper and other.is_dir and upper.has_names(stack.upper_path(other.nodeid)):
                    _clear_empty(stack, other, new_path, new_last)
                _move(stack, inode, (path, old_last), (new_path, new_last), hide_old=hide_old, over=other)
                stack.tree.move(parent.nodeid, old_last, new_parent.nodeid, new_last)
    for directory in (parent, new_parent):
        if directory.lower or inode.lower:
            with stack.object(directory) as at:
                upper.set_own(at, b"impure", b"y")
    stack.refresh(parent.nodeid)
    stack.refresh(new_parent.nodeid)
    stack.refresh(inode.nodeid)
    if exchange and other is not None:
        stack.refresh(other.nodeid)
    how = "exchanged with" if exchange else "to"
    stack.events.tell(
        "rename", _joined(path, old_last), f"{how} /{printable(_joined(new_path, new_last))}", began_ns=began_ns
    )


def _joined(path: bytes, name: Name) -> bytes:
    return b"%s/%s" % (path, name) if path else name


def _check_not_into_itself(stack: Stack, inode: Inode, directory: Inode) -> None:
    while inode.is_dir:
        if directory.nodeid == inode.nodeid:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if directory.nodeid == ROOT_NODEID:
            return
        names = stack.tree.names(directory.nodeid)
        if not names:
            return
        directory = stack.tree.get(names[0][0])


def _check_overwrite(stack: Stack, inode: Inode, other: Inode) -> None:
    if other.is_dir and not inode.is_dir:
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if inode.is_dir and not other.is_dir:
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if other.is_dir and not stack.tree.is_empty(other.nodeid):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))


def _check_can_move(stack: Stack, inode: Inode) -> None:
    """Kernel: ovl_can_move(): a directory with something below moves only with a redirect."""
    if inode.is_dir and inode.lower and not stack.redirect:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def _mark_moved(stack: Stack, inode: Inode, old: tuple[Inode, Name], new_parent: Inode) -> None:
    """Before a move: say where the layers below have it, or that they have nothing of it at the new place.

    Kernel: ovl_set_redirect(): one name for a move within a directory, a path from the root otherwise.
    """
    upper = stack.need_upper()
    with stack.object(inode) as at:
        if inode.is_dir and inode.lower:
            redirect = old[1] if old[0].nodeid == new_parent.nodeid else namei.redirect_of(stack, inode)
            if old[0].nodeid != new_parent.nodeid or not inode.redirect:
                upper.set_own(at, b"redirect", redirect)
                stack.events.tell("redirect", stack.upper_path(inode.nodeid), f"to {printable(redirect)}")
            stack.tree.set_redirect(inode.nodeid)
        elif inode.is_dir and new_parent.lower:
            upper.set_own(at, b"opaque", b"y")
            stack.events.tell("opaque", stack.upper_path(inode.nodeid), "moved to where layers below may have the name")
        elif inode.metacopy:
            _redirect_metacopy(stack, inode, at)


def _move(
    stack: Stack,
    inode: Inode,
    old: tuple[bytes, Name],
    new: tuple[bytes, Name],
    *,
    hide_old: bool,
    over: Inode | None = None,
) -> None:
    """The rename itself: over nothing, over a whiteout, or over `over`, in the upperdir or not."""
    upper = stack.need_upper()
    covers_whiteout = (over is None or not over.upper) and upper.is_whiteout(*new)
    if covers_whiteout and (hide_old or inode.is_dir):
        upper.rename(*old, *new, whiteout=False, exchange=True)  # the whiteout now is at the old place
        if not hide_old:
            upper.take_away(*old)
    else:
        upper.rename(*old, *new, whiteout=hide_old, exchange=False)


def _clear_empty(stack: Stack, inode: Inode, path: bytes, name: Name) -> None:
    """Replace a directory that holds only whiteouts by an empty opaque one, so that rename(2) can go over it.

    Kernel: ovl_clear_empty().
    """
    upper = stack.need_upper()
    attr = inode.attr
    with upper.temp() as temp:
        upper.make(temp, NewObject(attr.mode, attr.uid, attr.gid))
        with upper.temp_object(temp) as at:
            upper.set_own(at, b"opaque", b"y")
        upper.replace(temp, path, name)
