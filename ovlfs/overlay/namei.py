"""Where does a name lead, and under which name does it stand in the layers below?

The looking up itself is layer.merge and the live tree; here are the questions that the operations ask about it.

Kernel: fs/overlayfs/namei.c: ovl_lookup(), ovl_lower_positive(); dir.c: ovl_get_redirect(), ovl_set_redirect().
"""

import errno
import os
import stat

from ovlfs.ids import ROOT_NODEID, Name
from ovlfs.layer import merge
from ovlfs.layer.base import What
from ovlfs.layer.directory import NAME_MAX
from ovlfs.layer.tree import ABSENT, Inode
from ovlfs.overlay.stack import Stack

REDIRECT_MAX_BYTES = 256
"""A redirect this long makes rename answer EXDEV.  Kernel: super.c: ovl_redirect_max."""


def check_name(name: bytes) -> Name:
    """Raises OSError(ENAMETOOLONG) for a name of more than 255 bytes."""
    if len(name) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    return Name(name)


def lookup(stack: Stack, parent: Inode, name: bytes) -> Inode | None:
    """The inode of a name, or None."""
    nodeid = stack.tree.lookup(parent.nodeid, check_name(name))
    return None if nodeid == ABSENT else stack.tree.get(nodeid)


def get(stack: Stack, parent: Inode, name: bytes) -> Inode:
    """The inode of a name.  Raises OSError(ENOENT)."""
    inode = lookup(stack, parent, name)
    if inode is None:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    return inode


def need_absent(stack: Stack, parent: Inode, name: bytes) -> Name:
    """Raises OSError(EEXIST) when the name exists, ENOENT when the directory itself was removed."""
    if not parent.is_linked:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    if lookup(stack, parent, name) is not None:
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    return Name(name)


def readlink(stack: Stack, inode: Inode) -> bytes:
    """A symlink's target.  Raises OSError(EINVAL) for anything else."""
    if not stat.S_ISLNK(inode.attr.mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    if inode.upper:
        with stack.object(inode) as path:
            return stack.need_upper().layer.readlink_at(int(path.rpartition(b"/")[2]))
    source = inode.lower[0]
    layer = stack.layers[source.layer]
    assert layer is not None
    return layer.readlink(source.ref)


def is_below(stack: Stack, parent: Inode, name: Name) -> bool:
    """Whether the layers below the upperdir would show `name`, so that it must be hidden by a whiteout."""
    return bool(parent.lower) and merge.lookup(stack.layers, parent.lower, name) is not None


def redirect_of(stack: Stack, inode: Inode) -> bytes:
    """The absolute path under which the layers below know an inode: every moved ancestor counts with where it was.

    Raises:
        OSError: EXDEV when the path is too long for the kernel to follow.
    """
    upper = stack.need_upper()
    parts: list[bytes] = []
    while inode.nodeid != ROOT_NODEID:
        parent_id, name = stack.tree.names(inode.nodeid)[0]
        if inode.redirect:
            with stack.object(inode) as path:
                value = upper.layer.own_xattr(path, b"redirect", follow=True)
            assert value is not None
            if value[:1] == b"/":
                parts.append(value[1:])
                break
            name = Name(value)
        parts.append(name)
        inode = stack.tree.get(parent_id)
    redirect = b"/" + b"/".join(reversed(parts))
    if len(redirect) > REDIRECT_MAX_BYTES:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    return redirect


def walk(stack: Stack, path: bytes) -> Inode | None:
    """The inode of a path from the root, symlinks not followed; None where a component is missing."""
    at = stack.tree.get(ROOT_NODEID)
    for part in path.split(b"/"):
        nodeid = stack.tree.lookup(at.nodeid, Name(part)) if at.is_dir else ABSENT
        if nodeid == ABSENT:
            return None
        at = stack.tree.get(nodeid)
    return at


def moved_directories(stack: Stack) -> list[tuple[bytes, bytes]]:
    """(path now, path in the layers below) of every directory in the upperdir that a redirect has moved.

    One walk over the upperdir: only needed to find the other names of a hard link (copy_up).
    """
    upper = stack.need_upper()
    moved: list[tuple[bytes, bytes]] = []
    todo = [(b"", b"")]
    while todo:
        now, before = todo.pop()
        for name, what in list(upper.layer.list(now)):
            if what is not What.DIRECTORY:
                continue
            path, below = now + b"/" + name if now else name, before + b"/" + name if before else name
            with upper.layer.located(path) as at:
                redirect = upper.layer.own_xattr(at, b"redirect", follow=True)
            if redirect is not None:
                below = redirect[1:] if redirect[:1] == b"/" else below[: len(below) - len(name)] + redirect
                moved.append((path, below))
            todo.append((path, below))
    return moved
