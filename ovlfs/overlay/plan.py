"""What would a change of this object do to the upperdir?

The questions that copy_up.py asks before it does anything, asked without doing it: which ancestors are missing in the
upperdir, how much data there is to copy, and under which names the copy will appear.

Kernel: fs/overlayfs/copy_up.c: ovl_copy_up_flags(), as far as it only looks.
"""

import os
import stat
from dataclasses import dataclass

from ovlfs.ids import ROOT_NODEID, Name
from ovlfs.layer.tree import Inode
from ovlfs.overlay import copy_up
from ovlfs.overlay.stack import Stack


@dataclass(frozen=True, slots=True)
class Plan:
    """What a change would do first.

    Attributes:
        in_place: nothing: the upperdir has the object, with its data.
        directories: paths of the ancestors that get an upper object before, topmost first.
        steps: what is done, in this order (copy_up.py, native/lane_copy_up.c).
        completes: there is an upper object, which gets its data in its place; else a temporary one is made in workdir.
        size_bytes: how long the copied file is; 0 for what is no regular file.
        data_bytes: how much of that is copied, holes left out, when it is opened for writing.
        metadata_alone: a chmod, chown, rename or link copies no data.
        names: all paths under which the copy appears: more than one for a hard link.
    """

    in_place: bool
    directories: tuple[bytes, ...] = ()
    steps: tuple[str, ...] = ()
    completes: bool = False
    size_bytes: int = 0
    data_bytes: int = 0
    metadata_alone: bool = True
    names: tuple[bytes, ...] = ()


def plan(stack: Stack, inode: Inode) -> Plan:
    """What opening an object for writing (a directory: making a name in it) would do first.

    Nothing is changed, and nothing is opened but the lower file, to see its holes.  On a stack without an upperdir:
    what it would be with an empty one.
    """
    if inode.upper and not inode.metacopy:
        return Plan(in_place=True)
    if inode.nodeid == ROOT_NODEID:
        return Plan(in_place=True)  # every upperdir has its root
    regular = stat.S_ISREG(inode.attr.mode)
    if not inode.upper:
        copy_up.find_all_names(stack, inode)
    names = [_path(stack, parent, name) for parent, name in _names(stack, inode)]
    missing = [one for one in copy_up.missing(stack, inode) if one.nodeid not in (ROOT_NODEID, inode.nodeid)]
    for parent, _ in _names(stack, inode)[1:]:
        missing += [one for one in copy_up.missing(stack, parent) if one.nodeid != ROOT_NODEID]
    directories = [stack.tree.path(one.nodeid) or b"" for one in missing if not one.upper]
    data_bytes = _data_bytes(stack, inode) if regular and inode.attr.size else 0
    return Plan(
        in_place=False,
        directories=tuple(dict.fromkeys(directories)),
        steps=_steps(stack, inode, data_bytes),
        completes=inode.upper,
        size_bytes=inode.attr.size if regular else 0,
        data_bytes=data_bytes,
        metadata_alone=not copy_up.need_data(stack, inode),
        names=tuple(names),
    )


def _steps(stack: Stack, inode: Inode, data_bytes: int) -> tuple[str, ...]:
    sync = ("fsync",) if data_bytes and not stack.volatile else ()
    if inode.upper:
        return ("data", *sync, "overlay.metacopy goes")
    data = ("data",) if data_bytes else ()
    return (*data, "owner and mode", "xattrs", "overlay.origin", "times", *sync, "into its place, in one step")


def _names(stack: Stack, inode: Inode) -> list[tuple[Inode, Name]]:
    return [(stack.tree.get(nodeid), name) for nodeid, name in stack.tree.names(inode.nodeid)]


def _path(stack: Stack, parent: Inode, name: Name) -> bytes:
    path = stack.tree.path(parent.nodeid)
    return b"%s/%s" % (path, name) if path else name


def _data_bytes(stack: Stack, inode: Inode) -> int:
    fd, extents = copy_up.data_of(stack, inode)
    os.close(fd)
    return sum(extent.length for extent in extents)
