"""What is known of the mounted tree right now?

`Tree` owns every inode and every name that the mount has looked at: nodeid, lookup count, names, attributes, the
objects of the layers that serve it, and for a directory that has been read its merged children.  Nobody keeps a
second copy of any of it.  Overlay code changes the disk first and then says so here, with one of the few mutations
(`add`, `link`, `remove`, `move`, `exchange`, `set_upper`, `set_attr`, `forget`).

This module is the readable reference; native/tree.c is the same in C, and tests/model runs both against each other.
`ovlfs.layer.open_tree` picks the native one, OVLFS_PURE_PYTHON=1 this one.

Identity (see ovlfs.ids): an inode's nodeid is its st_ino, so that a plain FUSE session (which cannot tell the kernel
two numbers) shows the right one.  Only when an unlinked inode, which the kernel still holds, has the number
already, a fresh nodeid is taken from 2^62 upwards.  The root is 1, whatever its st_ino.

Hard links: names that lead to the same st_ino share one inode.

Memory: an inode whose lookup count falls to 0 is dropped, unless it is a directory with known children that live.
All that it said can be found again on disk; its name stays listed with its cookie.

Not thread-safe: one thread at a time (the trio thread).
"""

import errno
import os
import stat
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ovlfs.ids import ROOT_NODEID, Ino, Name, NodeId
from ovlfs.layer import merge
from ovlfs.layer.base import Attr
from ovlfs.layer.directory import DirLayer
from ovlfs.layer.merge import Found, Layers, Source
from ovlfs.layer.origin import decode

_FRESH_NODEID = 1 << 62
ABSENT = NodeId(0)


@dataclass(slots=True, eq=False)
class Inode:
    """One inode of the mounted tree.  Read it freely; change it only through the Tree.

    Attributes:
        ino: the st_ino to show.
        attr: the attributes to show.
        upper: the upperdir has it (its path there is its path in the tree).
        lower: below the upperdir: for a directory all sources that merge, top first; else at most one: the object
            that serves it (not `upper`), that has its data (`metacopy`), or nothing.
        metacopy: `upper`, but the data is still in `lower`.
        redirect: `upper`, and moved there from elsewhere: the upper object carries overlay.redirect.
        upper_ino: the real inode number in the upperdir, 0 without.
        nlookup: how many times the kernel was told of it and has not forgotten.
        orphan: a descriptor (O_PATH, ours) of the upper object when that has no name any more but is still in use.
        last_parent: where its last name was, when it has none any more.
    """

    nodeid: NodeId
    ino: Ino
    attr: Attr
    upper: bool
    lower: tuple[Source, ...]
    metacopy: bool = False
    redirect: bool = False
    upper_ino: int = 0
    nlookup: int = 0
    names: list[tuple["Inode", Name]] = field(default_factory=list)
    children: "_Children | None" = None
    orphan: int | None = None
    last_parent: NodeId | None = None

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.attr.mode)

    @property
    def is_linked(self) -> bool:
        """Whether it still has a name (the root has none, and counts as linked)."""
        return bool(self.names) or self.nodeid == ROOT_NODEID


class MergeTrace(Protocol):
    """Who wants to know of merges (_native.Trace)."""

    def merged(self, nodeid: int, names: int, layers: bytes, began_ns: int, /) -> None:
        """A directory has so many names now, from these layers (uint16 each); it began at (time.monotonic_ns)."""


class _Children:
    """The names of a merged directory, in an order that never changes: a name's cookie is its place, from 1."""

    def __init__(self) -> None:
        self.order: list[Name | None] = [None]
        self.by_name: dict[Name, tuple[int, Inode | None]] = {}

    def put(self, name: Name, inode: Inode | None) -> None:
        cookie = self.by_name[name][0] if name in self.by_name else len(self.order)
        if cookie == len(self.order):
            self.order.append(name)
        self.by_name[name] = (cookie, inode)

    def remove(self, name: Name) -> None:
        cookie, _ = self.by_name.pop(name)
        self.order[cookie] = None


class Tree:
    """The live tree over a stack of layers (layers[0] is the upperdir's DirLayer, or None)."""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self._inodes: dict[NodeId, Inode] = {}
        self._by_ino: dict[Ino, Inode] = {}
        self._fresh = _FRESH_NODEID
        self._trace: MergeTrace | None = None
        self._insert(root_inode(layers))

    # ---- reading -----------------------------------------------------------------------------------------------

    def get(self, nodeid: NodeId) -> Inode:
        """The inode of a nodeid.  Raises OSError(ESTALE) for one that is not, or no longer, known."""
        try:
            return self._inodes[nodeid]
        except KeyError:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None

    def lookup(self, parent: NodeId, name: Name) -> NodeId:
        """The nodeid of a name, ABSENT (0) if the directory has no such name.  Does not count as a lookup.

        Raises: NotADirectoryError (ENOTDIR); ESTALE; the layers' errors.
        """
        directory = self.get(parent)
        children = self._merged(directory)
        known = children.by_name.get(name)
        if known is None:
            return ABSENT
        inode = known[1] or self._resolve(directory, children, name)
        return inode.nodeid if inode else ABSENT

    def is_empty(self, nodeid: NodeId) -> bool:
        """Whether a directory has no (visible) names."""
        return not self.list(nodeid, 0, 1)

    def path(self, nodeid: NodeId) -> bytes | None:
        """A path of the inode from the root, b"" for the root itself; None when it has no name any more."""
        inode = self.get(nodeid)
        parts: list[bytes] = []
        while inode.nodeid != ROOT_NODEID:
            if not inode.names:
                return None
            inode, name = inode.names[0]
            parts.append(name)
        return b"/".join(reversed(parts))

    def names(self, nodeid: NodeId) -> list[tuple[NodeId, Name]]:
        """All names of the inode that are known so far: (nodeid of the directory, name)."""
        return [(parent.nodeid, name) for parent, name in self.get(nodeid).names]

    def __len__(self) -> int:
        return len(self._inodes)

    def counts(self) -> tuple[int, int, int]:
        """What is kept: (inodes, directories that were merged, names in those)."""
        merged = [inode.children for inode in self._inodes.values() if inode.children is not None]
        return len(self._inodes), len(merged), sum(len(children.by_name) for children in merged)

    def tell_merged(self, trace: "MergeTrace") -> None:
        """Who is told of each directory that is merged from now on."""
        self._trace = trace

    # ---- mutations: the disk is changed already ------------------------------------------------------------------

    def add(self, parent: NodeId, name: Name, attr: Attr, upper_ino: int, ino: Ino) -> NodeId:
        """A new object in the upperdir, merging with nothing below.  The name must be absent."""
        directory = self.get(parent)
        children = self._merged(directory)
        assert name not in children.by_name
        inode = Inode(self._new_nodeid(ino), ino, attr, upper=True, lower=(), upper_ino=upper_ino)
        if inode.is_dir:
            inode.children = _Children()
        self._enter(inode)
        self._attach(inode, directory, name)
        return inode.nodeid

    def link(self, nodeid: NodeId, parent: NodeId, name: Name) -> None:
        """Another name for an inode.  The name must be absent."""
        directory = self.get(parent)
        assert name not in self._merged(directory).by_name
        self._attach(self.get(nodeid), directory, name)

    def remove(self, parent: NodeId, name: Name) -> None:
        """The name is gone.  The inode stays until the kernel forgets it."""
        directory = self.get(parent)
        children = self._merged(directory)
        inode = children.by_name[name][1]
        children.remove(name)
        if inode is not None:
            inode.names.remove((directory, name))
            self._drop_if_unused(inode)

    def move(self, parent: NodeId, name: Name, new_parent: NodeId, new_name: Name) -> None:
        """The name is now another one; what had the new name, if anything, has lost it."""
        old_directory, new_directory = self.get(parent), self.get(new_parent)
        inode = self._child(old_directory, name)
        if old_directory is new_directory and name == new_name:
            return
        _, replaced = self._merged(new_directory).by_name.get(new_name, (0, None))
        if replaced is not None:
            replaced.names.remove((new_directory, new_name))
        if new_name in self._merged(new_directory).by_name:
            self._merged(new_directory).remove(new_name)
        self._merged(old_directory).remove(name)
        inode.names.remove((old_directory, name))
        self._attach(inode, new_directory, new_name)
        if replaced is not None:  # only now, when the new directory has a name that lives, and is not dropped with it
            self._drop_if_unused(replaced)

    def exchange(self, parent: NodeId, name: Name, new_parent: NodeId, new_name: Name) -> None:
        """Two names have swapped their inodes."""
        one, other = self.get(parent), self.get(new_parent)
        first, second = self._child(one, name), self._child(other, new_name)
        if one is other and name == new_name:
            return
        first.names.remove((one, name))
        second.names.remove((other, new_name))
        self._attach(first, other, new_name)
        self._attach(second, one, name)

    def set_upper(self, nodeid: NodeId, upper_ino: int, *, metacopy: bool) -> None:
        """The inode was copied up (metacopy: its data still is in `lower`)."""
        inode = self.get(nodeid)
        inode.upper, inode.upper_ino, inode.metacopy = True, upper_ino, metacopy
        if not inode.is_dir and not metacopy:
            inode.lower = ()

    def set_redirect(self, nodeid: NodeId) -> None:
        """The inode carries overlay.redirect now."""
        self.get(nodeid).redirect = True

    def set_attr(self, nodeid: NodeId, attr: Attr) -> None:
        """These are the attributes now."""
        self.get(nodeid).attr = attr

    def set_orphan(self, nodeid: NodeId, fd: int) -> None:
        """The inode's upper object has no name any more: `fd` (O_PATH) leads to it, and is the tree's from now on."""
        inode = self._inodes.get(nodeid)
        if inode is None or inode.orphan is not None:
            os.close(fd if inode is None or inode.orphan is None else inode.orphan)
        self.get(nodeid).orphan = fd

    def orphan(self, nodeid: NodeId) -> int | None:
        """The descriptor that set_orphan was given; valid as long as the inode is known."""
        inode = self._inodes.get(nodeid)
        return None if inode is None else inode.orphan

    def set_last_parent(self, nodeid: NodeId, parent: NodeId) -> None:
        """The inode has lost its last name, which was in `parent`."""
        self.get(nodeid).last_parent = parent

    def last_parent(self, nodeid: NodeId) -> NodeId | None:
        """Where the last name of an inode was that has none any more."""
        inode = self._inodes.get(nodeid)
        return None if inode is None else inode.last_parent

    def ref(self, nodeid: NodeId) -> None:
        """The kernel was told of the inode once more."""
        self.get(nodeid).nlookup += 1

    def forget(self, nodeid: NodeId, nlookup: int) -> bool:
        """The kernel has forgotten `nlookup` lookups.  True when the inode is known no longer (or never was)."""
        inode = self._inodes.get(nodeid)
        if inode is None:
            return True
        inode.nlookup = max(0, inode.nlookup - nlookup)
        if inode.nlookup == 0 and inode.children is not None:
            for _, child in list(inode.children.by_name.values()):
                if child is not None:
                    self._drop_if_unused(child)
        self._drop_if_unused(inode)
        return nodeid not in self._inodes

    # ---- inside --------------------------------------------------------------------------------------------------

    def sources(self, inode: Inode) -> tuple[Source, ...]:
        """All objects that serve an inode, top first, the upperdir's own included."""
        path = self.path(inode.nodeid) if inode.upper else None
        return inode.lower if path is None else (Source(0, path), *inode.lower)

    def _merged(self, directory: Inode) -> _Children:
        if directory.children is None:
            if not directory.is_dir:
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            began_ns = time.monotonic_ns()
            children = _Children()
            if directory.is_linked:
                for name in merge.names(self.layers, self.sources(directory)):
                    children.put(name, None)
            directory.children = children
            if self._trace is not None:
                layers = array("H", (source.layer for source in self.sources(directory))).tobytes()
                self._trace.merged(directory.nodeid, len(children.by_name), layers, began_ns)
        return directory.children

    def _child(self, directory: Inode, name: Name) -> Inode:
        return self.get(self.lookup(directory.nodeid, name))

    def _resolve(self, directory: Inode, children: _Children, name: Name) -> Inode | None:
        inode = resolve_name(self.layers, self.sources(directory), name, self.path(directory.nodeid) or b"")
        if inode is None:
            children.remove(name)  # listed, but only a lookup could see that it is whited out
            return None
        inode = self._insert(inode)
        self._attach(inode, directory, name)
        return inode

    def _insert(self, inode: Inode) -> Inode:
        """Enter an inode into the tables, or find the one that has its st_ino already (another hard link)."""
        same = self._by_ino.get(inode.ino)
        if same is not None:
            lives = same.is_linked or same.attr.nlink > 0  # all its names that were known are gone, here is another
            same_object = same.upper == inode.upper and same.upper_ino == inode.upper_ino
            if not inode.is_dir and not same.is_dir and lives and same_object:
                return same
            if inode.upper and inode.nodeid == ABSENT:  # two upper objects of one origin: the later shows its own
                upper = self.layers[0]
                assert isinstance(upper, DirLayer)
                inode.ino = upper.inos.ino(os.fstat(upper.fd).st_dev, inode.upper_ino)
        if inode.nodeid == ABSENT:
            inode.nodeid = self._new_nodeid(inode.ino)
        self._enter(inode)
        return inode

    def _enter(self, inode: Inode) -> None:
        self._inodes[inode.nodeid] = inode
        self._by_ino.setdefault(inode.ino, inode)

    def _new_nodeid(self, ino: Ino) -> NodeId:
        wanted = NodeId(ino)
        if wanted > ROOT_NODEID and wanted not in self._inodes:
            return wanted
        self._fresh += 1
        return NodeId(self._fresh)

    def _attach(self, inode: Inode, directory: Inode, name: Name) -> None:
        self._merged(directory).put(name, inode)
        inode.names.append((directory, name))

    def _drop_if_unused(self, inode: Inode) -> None:
        """Drop an inode that the kernel does not hold, and then its parents for which it was the last reason."""
        while inode.nlookup == 0 and inode.nodeid != ROOT_NODEID:
            if inode.children is not None and any(child for _, child in inode.children.by_name.values()):
                return
            self._inodes.pop(inode.nodeid, None)
            if inode.orphan is not None:
                os.close(inode.orphan)
                inode.orphan = None
            if self._by_ino.get(inode.ino) is inode:
                del self._by_ino[inode.ino]
            parents = [parent for parent, _ in inode.names]
            for parent, name in inode.names:
                if parent.children is not None:
                    parent.children.put(name, None)
            inode.names.clear()
            if not parents:
                return
            inode, *others = parents
            for parent in others:
                self._drop_if_unused(parent)

    def list(self, nodeid: NodeId, after: int, most: int = 1 << 30) -> list[tuple[int, Name, NodeId]]:
        """Up to `most` (cookie, name, nodeid) of a directory whose cookie is above `after`, in cookie order."""
        directory = self.get(nodeid)
        children = self._merged(directory)
        found: list[tuple[int, Name, NodeId]] = []
        for cookie in range(max(after, 0) + 1, len(children.order)):
            if len(found) >= most:
                break
            name = children.order[cookie]
            if name is not None:
                child = children.by_name[name][1] or self._resolve(directory, children, name)
                if child is not None:
                    found.append((cookie, name, child.nodeid))
        return found

    def __iter__(self) -> Iterator[Inode]:
        return iter(self._inodes.values())


def resolve_name(layers: Layers, sources: Sequence[Source], name: Name, directory: bytes) -> Inode | None:
    """What `name` is in the merged directory made of `sources`, whose path in the tree is `directory`.

    The inode is in no tree yet, and has no nodeid.  The native tree asks this for what it does not decide itself.
    """
    found = merge.lookup(layers, sources, name)
    if found is None:
        return None
    return _inode_of(layers, found, b"%s/%s" % (directory, name) if directory else name)


def root_inode(layers: Layers) -> Inode:
    """The root of a stack.  Numbers the file systems of its layers, in the same order at every mount."""
    for layer in layers:
        if isinstance(layer, DirLayer):
            layer.inos.ino(os.fstat(layer.fd).st_dev, 0)
    inode = _inode_of(layers, merge.root(layers), b"")
    inode.nodeid = ROOT_NODEID
    return inode


def _inode_of(layers: Layers, found: Found, path: bytes) -> Inode:
    """An inode for what a lookup found; not yet in the tables."""
    layer = layers[found.attributes.layer]
    assert layer is not None
    attr = layer.attr(found.attributes.ref)
    if found.is_dir != stat.S_ISDIR(attr.mode):
        raise OSError(errno.EUCLEAN, "override_stat says of a directory that it is none, or the other way round")
    if found.is_dir and len(found.sources) > 1:
        attr = replace(attr, nlink=1)  # as the kernel: a merged directory does not count its subdirectories
    upper = found.sources[0].layer == 0
    lower = found.sources[1:] if upper else found.sources
    upper_ino = 0
    if upper:
        upper_ino, ino = _identify_upper(layers, path, lower if found.is_dir else ())
    else:
        owner = layers[lower[0].layer]
        assert owner is not None
        ino = owner.ino(lower[0].ref)
        if not found.is_dir and len(lower) > 1:
            lower = (lower[0], lower[-1])  # metadata in one lower layer, data in another
    if not found.is_dir and len(found.sources) > 1:
        data = layers[lower[-1].layer]
        assert data is not None
        attr = replace(attr, blocks=data.attr(lower[-1].ref).blocks)  # as the kernel: ovl_getattr(), metacopy_blocks
    return Inode(ABSENT, ino, attr, upper, lower, found.metacopy, upper and found.redirect is not None, upper_ino)


def _identify_upper(layers: Layers, path: bytes, lower: Sequence[Source]) -> tuple[int, Ino]:
    """(real inode number, st_ino to show) of an upper object: the st_ino of what it was copied up from.

    Kernel: fs/overlayfs/inode.c: ovl_getattr().
    """
    upper = layers[0]
    assert isinstance(upper, DirLayer)
    with upper.located(path) as at:
        st = os.stat(at)
        if lower:
            layer = layers[lower[0].layer]
            assert layer is not None
            return st.st_ino, layer.ino(lower[0].ref)
        value = upper.own_xattr(at, b"origin", follow=True)
    origin = decode(layers, value) if value is not None else None
    return st.st_ino, origin if origin is not None else upper.ino_of(st)
