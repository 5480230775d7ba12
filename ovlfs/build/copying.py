"""How do files come from one merged tree into another?

What COPY and ADD put is decided as docker's classic builder decides it: names are replaced, except that a directory
merges with a directory; the contents of a source directory go into the destination, not the directory itself; owner
0:0, or --chown, or as in the stage that --from names; modes and times (in whole seconds) as in the source; of the
xattrs only file capabilities.  A tar keeps its owners and all its xattrs.  Everything is written through overlay/, so
copy-ups, whiteouts and opaque directories come about as in a mount.

Spec: Dockerfile reference, ADD, COPY; moby builder/dockerfile/copy.go: performCopyForInfo(), copyDirectory(),
copyFile(); pkg/archive: Unpack(), createTarFile().
Differences, as BuildKit has it: set-uid bits and file capabilities survive (the classic builder loses them to its
chown), and so do the xattrs of a tar; a zstd tar is unpacked whatever docker's age.
"""

import errno
import os
import stat
from dataclasses import dataclass, field

from ovlfs.build.trees import CAPABILITY, Child, Found, Source, capability, resolve
from ovlfs.errors import ImageError, printable
from ovlfs.ids import Name, NodeId
from ovlfs.layer.directory import WHITEOUT_PREFIX
from ovlfs.layer.tree import Inode
from ovlfs.overlay import attr, namei, xattr
from ovlfs.overlay import dir as directories
from ovlfs.overlay.file import COPY_MAX_BYTES, Handle
from ovlfs.overlay.owner import NewObject
from ovlfs.overlay.stack import Stack

_SECOND_NS = 10**9
_NO_XATTR = frozenset((errno.EPERM, errno.EOPNOTSUPP))
"""setxattr errors of an unprivileged user and of file systems without xattrs; docker leaves the xattr out, too."""
DIRECTORY_MODE = 0o755


@dataclass(frozen=True, slots=True)
class Rules:
    """What the copies get.

    Attributes:
        owner: None: the source's.
        permissions: --chmod; None: the source's.
        all_xattrs: not only file capabilities.
    """

    owner: tuple[int, int] | None = (0, 0)
    permissions: int | None = None
    all_xattrs: bool = False

    @property
    def parent_owner(self) -> tuple[int, int]:
        """Who gets the directories that have to be made."""
        return self.owner or (0, 0)


@dataclass(slots=True)
class Copier:
    """Copies from `source` into `target`.  `skipped` counts the xattrs that could not be set."""

    source: Source
    target: Stack
    rules: Rules
    skipped: int = 0
    _links: dict[NodeId, Inode] = field(default_factory=dict)

    def contents(self, found: Found, to: Found) -> None:
        """Everything in a directory of the source into a directory of the target, which is made if need be."""
        if to.missing:
            parent = make_directories(self.target, Found(to.trail, to.names, to.missing[:-1]), (0, 0))
            inode = make_directories(self.target, Found((parent,), (), to.missing[-1:]), self.rules.parent_owner)
        else:
            inode = to.inode
        if not inode.is_dir:
            raise ImageError(f"cannot copy a directory over the file /{printable(to.path)}")
        self._merge(found.path, found.inode, inode)

    def file(self, found: Found, to: Found, name: bytes | None) -> None:
        """A file to the path `to`, or to `name` in the directory there."""
        if name is None and to.missing:
            to, name = Found(to.trail, to.names, to.missing[:-1]), to.missing[-1]
        elif name is None:
            to, name = Found(to.trail[:-1], to.names[:-1]), to.names[-1]
        parent = make_directories(self.target, to, self.rules.parent_owner)
        if not parent.is_dir:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fsdecode(to.path))
        self._put(Child(Name(name), found.path, found.inode), parent)

    # -- inside

    def _merge(self, path: bytes, from_directory: Inode, into: Inode) -> None:
        """Post-order without recursion: how deep a tree is is not ours to trust; times are set when all is in."""
        todo: list[tuple[Child | attr.Change, Inode]] = []
        todo += [(child, into) for child in self.source.children(path, from_directory)][::-1]
        while todo:
            child, at = todo.pop()
            if isinstance(child, attr.Change):
                attr.set_(self.target, at, child)
                continue
            made = self._put(child, at)
            if made is None or not child.inode.is_dir:
                continue
            if not child.implied:
                todo.append((_times(child.inode), made))
            todo += [(below, made) for below in self.source.children(child.path, child.inode)][::-1]

    def _put(self, child: Child, parent: Inode) -> Inode | None:
        """One object; of a directory, itself alone (and it is held).  None: nothing is copied (a socket)."""
        kind = stat.S_IFMT(child.inode.attr.mode)
        if kind == stat.S_IFSOCK:
            return None  # as in docker: a tar has no sockets
        if child.name.startswith(WHITEOUT_PREFIX):
            raise ImageError(f"/{printable(child.path)}: a name that begins with .wh. cannot be in a layer")
        existing = namei.lookup(self.target, parent, child.name)
        if kind == stat.S_IFDIR:
            return self._put_directory(child, parent, existing)
        if existing is not None:
            remove(self.target, parent, child.name, existing)
        link = self._links.get(child.inode.nodeid) if child.inode.attr.nlink > 1 else None
        if link is not None:
            directories.link(self.target, link, parent, child.name)
            return link
        made = self._create(child, parent)
        if child.inode.attr.nlink > 1:
            self._links[child.inode.nodeid] = hold(self.target, made)
        return made

    def _put_directory(self, child: Child, parent: Inode, existing: Inode | None) -> Inode:
        if existing is not None and child.implied and stat.S_ISLNK(existing.attr.mode):
            # A tar that says only `lib/x` means the directory that lib leads to.
            path = self.target.upper_path(parent.nodeid)
            found = resolve(self.target, b"%s/%s" % (path, child.name))
            if not found.missing and found.inode.is_dir:
                return found.inode
        if existing is not None and not existing.is_dir:
            remove(self.target, parent, child.name, existing)
            existing = None
        if existing is None:
            return hold(self.target, self._create(child, parent))
        if not child.implied:
            self._dress(child, existing)
        return hold(self.target, existing)

    def _create(self, child: Child, parent: Inode) -> Inode:
        found = child.inode.attr
        owner = self._owner(child)
        target = namei.readlink(self.source.stack, child.inode) if stat.S_ISLNK(found.mode) else b""
        kind = stat.S_IFMT(found.mode)
        new = NewObject(kind | (0o777 if kind == stat.S_IFLNK else 0o700), *owner, found.rdev, target)
        try:
            made = directories.create(self.target, parent, child.name, new)
        except OSError as error:
            error.filename = os.fsdecode(b"/" + child.path)
            raise
        if kind == stat.S_IFREG:
            self._write(child.inode, made)
        self._dress(child, made)
        return made

    def _owner(self, child: Child) -> tuple[int, int]:
        if self.rules.owner is not None:
            return self.rules.owner
        return (0, 0) if child.implied else (child.inode.attr.uid, child.inode.attr.gid)

    def _dress(self, child: Child, made: Inode) -> None:
        """Owner and mode, then xattrs, then times: each of them clears what comes after it."""
        found = child.inode.attr
        permissions = stat.S_IMODE(found.mode) if self.rules.permissions is None else self.rules.permissions
        if child.implied:
            permissions = DIRECTORY_MODE
        link = stat.S_ISLNK(found.mode)
        uid, gid = self._owner(child)
        attr.set_(self.target, made, attr.Change(permissions=None if link else permissions, uid=uid, gid=gid))
        self._set_xattrs(child, made)
        if not child.implied:
            attr.set_(self.target, made, _times(child.inode))

    def _set_xattrs(self, child: Child, made: Inode) -> None:
        if self.rules.all_xattrs:
            wanted = xattr.get_all(self.source.stack, child.inode)
        else:
            found = capability(self.source, child.inode)
            wanted = {} if found is None else {CAPABILITY: found}
        for name, value in wanted.items():
            try:
                xattr.set_(self.target, made, name, value)
            except OSError as error:
                if error.errno not in _NO_XATTR:
                    raise
                self.skipped += 1

    def _write(self, inode: Inode, made: Inode) -> None:
        """The bytes; holes stay holes."""
        reading = Handle(self.source.stack, inode, os.O_RDONLY)
        try:
            writing = Handle(self.target, made, os.O_WRONLY)
            try:
                size, at = inode.attr.size, 0
                while at < size:
                    try:
                        at = reading.seek(at, os.SEEK_DATA)
                    except OSError as error:
                        if error.errno != errno.ENXIO:
                            raise
                        break  # a hole up to the end
                    end = min(reading.seek(at, os.SEEK_HOLE), size)
                    while at < end:
                        copied = reading.copying_to(writing, at, at, min(COPY_MAX_BYTES, end - at))()
                        if copied == 0:
                            raise OSError(errno.EIO, "the file became shorter while it was being copied")
                        at += copied
                os.ftruncate(writing.fd, size)
            finally:
                writing.close()
        finally:
            reading.close()


def _times(inode: Inode) -> attr.Change:
    """A tar made by docker has whole seconds, and so have the copies."""
    seconds = inode.attr.mtime_ns // _SECOND_NS * _SECOND_NS
    return attr.Change(atime_ns=seconds, mtime_ns=seconds)


def make_directories(target: Stack, to: Found, owner: tuple[int, int]) -> Inode:
    """The directory that `to` leads to; what is missing is made with mode 0755, whatever its parent's setgid bit."""
    inode = to.inode
    for name in to.missing:
        if not inode.is_dir:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fsdecode(name))
        if name.startswith(WHITEOUT_PREFIX):
            raise ImageError(f"{printable(name)}: a name that begins with .wh. cannot be in a layer")
        inode = hold(target, directories.create(target, inode, name, NewObject(stat.S_IFDIR | DIRECTORY_MODE, *owner)))
        if stat.S_IMODE(inode.attr.mode) != DIRECTORY_MODE or (inode.attr.uid, inode.attr.gid) != owner:
            attr.set_(target, inode, attr.Change(permissions=DIRECTORY_MODE, uid=owner[0], gid=owner[1]))
    return inode


def hold(stack: Stack, inode: Inode) -> Inode:
    """Keep an inode: the live tree drops what nobody holds when a name beside or below it goes away."""
    stack.tree.ref(inode.nodeid)
    return inode


def remove(target: Stack, parent: Inode, name: Name, inode: Inode) -> None:
    """Remove a name, a directory with all in it.  Not recursive.  Precondition: the parent is held."""
    todo: list[tuple[Inode, Name, Inode, bool]] = [(parent, name, inode, False)]
    while todo:
        above, last, at, emptied = todo.pop()
        if not at.is_dir:
            directories.unlink(target, above, last)
        elif emptied:
            directories.rmdir(target, above, last)
            target.tree.forget(at.nodeid, 1)
        else:
            todo.append((above, last, hold(target, at), True))
            names = target.tree.list(at.nodeid, 0)
            todo += [(at, child, target.tree.get(nodeid), False) for _, child, nodeid in names]
