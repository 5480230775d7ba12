"""How does a lower object become an upper one?

The ancestors are copied up first, from the top down; then the object is made in workdir with all that belongs to
it, and appears under all its names.  What the object shows does not change by it: same owner, mode, times, xattrs,
content and st_ino (overlay.origin remembers the last, see layer/origin.py).

A regular file's data is copied only when somebody is going to change it:

* a change of attributes, a rename or a link copies metadata only and marks it overlay.metacopy;
* an open for writing copies the data as well, which may take long.  So it comes in two parts: `begin` says what
  there is to copy (a `DataCopy`, whose `run` any thread may call), `finish` publishes it, and until then the lower
  file stays in force.  Between the two the names may change; the caller holds the inode's lock, so the inode does not.

Order inside (kernel: "data first so that writing does not kill security.capability"): data, owner, mode, xattrs,
times, fsync, then the rename into place, then the parent's times as they were.

Hard links: all names that a lower inode has in the merged tree move up together, as links of one upper file, so that
they stay one file for ever.  (The kernel breaks them with index=off, and keeps them in workdir/index otherwise.)

Kernel: fs/overlayfs/copy_up.c: ovl_copy_up_flags(), ovl_copy_up_one(), ovl_do_copy_up(), ovl_copy_up_file(),
ovl_copy_up_meta_inode_data(), ovl_set_origin().
"""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from ovlfs.ids import ROOT_NODEID, Name
from ovlfs.layer import origin, sys
from ovlfs.layer.base import Attr, Extent, Layer, Ref
from ovlfs.layer.directory import DirLayer, getxattr
from ovlfs.layer.merge import Layers, Source
from ovlfs.layer.tar import TarLayer
from ovlfs.layer.tree import Inode
from ovlfs.overlay import namei
from ovlfs.overlay.owner import NewObject
from ovlfs.overlay.stack import Stack

_FICLONE = 0x40049409
_PIECE_BYTES = 1 << 20
_NO_CLONE = frozenset((errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM))
"""FICLONE and copy_file_range answers that mean "not between these two": copy by reading and writing."""
_SKIPPED_XATTRS = frozenset((errno.EOPNOTSUPP, errno.EPERM))


def metadata(stack: Stack, inode: Inode) -> None:
    """Have an upper object for the inode, without copying a file's data.  Does nothing when there is one.

    Precondition: stack.metacopy, or the inode is no regular file with data (else use `begin`).

    Raises:
        OSError: EROFS; ENOSPC, EDQUOT, EIO and whatever else the upper file system says; nothing has changed then.
    """
    if inode.upper:
        return
    stack.need_upper()
    _need_name(stack, inode)
    for one in missing(stack, inode):
        copy = _Copy(stack, one)
        if stat.S_ISREG(one.attr.mode) and one.attr.size > 0:
            if not stack.metacopy:
                raise OSError(errno.EXDEV, "data has to be copied first")
            copy.publish(metacopy=True)
        else:
            copy.publish(metacopy=False)


def missing(stack: Stack, inode: Inode) -> list[Inode]:
    """The inode and those of its ancestors that are not in the upperdir, topmost first.

    A loop, as in the kernel's ovl_copy_up_flags(): how deep a directory lies is not ours to trust.
    """
    chain = [inode]
    while True:
        names = stack.tree.names(chain[-1].nodeid)
        ancestor = stack.tree.get(names[0][0]) if names else None
        if ancestor is None or ancestor.upper:
            return chain[::-1]
        chain.append(ancestor)


def _need_name(stack: Stack, inode: Inode) -> None:
    """A lower inode whose name was removed cannot be copied up any more: there is no place for the copy.

    Kernel: ovl_copy_up_flags() goes by the dentry all the same.  A file finds its whiteout in the way, or a parent in
    the upperdir that is gone itself; for a directory the checks of ovl_copy_up_workdir() answer.  (Measured on 6.18.
    Not copied: the kernel lets a removed directory take the place of a new empty one.)
    """
    if inode.is_linked:
        return
    parent_gone = False
    parent = stack.tree.last_parent(inode.nodeid)
    if parent is not None:
        try:
            was = stack.tree.get(parent)
            parent_gone = was.upper and not was.is_linked
        except OSError as error:
            if error.errno != errno.ESTALE:  # the kernel has forgotten the directory: what it was is not known any more
                raise
    if inode.is_dir:
        code = errno.EIO if parent_gone else errno.ENOTDIR
    else:
        code = errno.ENOENT if parent_gone else errno.EEXIST
    raise OSError(code, os.strerror(code))


def need_data(stack: Stack, inode: Inode) -> bool:
    """Whether `metadata` cannot copy this inode up without its data."""
    return not inode.upper and not stack.metacopy and stat.S_ISREG(inode.attr.mode) and inode.attr.size > 0


def parent(stack: Stack, directory: Inode) -> bytes:
    """Have an upper directory, and return its path.  Raises ENOENT for a removed one."""
    if not directory.is_linked:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    metadata(stack, directory)
    return stack.upper_path(directory.nodeid)


def begin(stack: Stack, inode: Inode, *, truncate: bool = False) -> "DataCopy | None":
    """Prepare to have the inode's data in the upperdir.

    Args:
        stack: the mount.
        inode: a regular file.
        truncate: nobody will miss the data: the file becomes empty.

    Returns:
        None when nothing is to be copied any more; else the copying, for `run` and then `finish` (or `abort`).
    """
    upper = stack.need_upper()
    if inode.upper and not inode.metacopy:
        return None
    if not inode.upper:
        _need_name(stack, inode)
        copy = _Copy(stack, inode)
        temp = upper.temp_name()
        upper.owner.make(upper.work_fd, temp, NewObject(stat.S_IFREG, inode.attr.uid, inode.attr.gid))
        try:
            fd = sys.open_beneath(upper.work_fd, temp, os.O_RDWR | os.O_NOFOLLOW)
            data = DataCopy(stack, inode, fd, truncate=truncate, temp=temp, copy=copy)
        except BaseException:
            upper.discard(temp)
            raise
        return data
    with stack.object(inode) as path:
        _make_writable(path)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    return DataCopy(stack, inode, fd, truncate=truncate)


def _make_writable(path: bytes) -> None:
    """The data of a read-only file is still ours to write: root may, a user opens his own file for himself."""
    if os.geteuid() != 0:
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if mode & 0o600 != 0o600:
            os.chmod(path, mode | 0o600)


class DataCopy:
    """The copying of one file's data to `fd`: to a temporary file, or to an upper file that is a metacopy so far."""

    def __init__(
        self,
        stack: Stack,
        inode: Inode,
        fd: int,
        *,
        truncate: bool,
        temp: Name | None = None,
        copy: "_Copy | None" = None,
    ) -> None:
        self._stack, self._inode, self._fd = stack, inode, fd
        self._temp, self._copy = temp, copy
        self._size = 0 if truncate else inode.attr.size
        self._caps = _capabilities(fd) if copy is None else {}
        self._source: tuple[int, list[Extent]] | None = None
        self._began_ns = time.monotonic_ns()
        self._copied_bytes = 0
        if self._size:
            try:
                self._source = data_of(stack, inode)
            except BaseException:
                os.close(fd)
                raise
            self._copied_bytes = sum(extent.length for extent in self._source[1])

    @property
    def size(self) -> int:
        """How many bytes the file will have."""
        return self._size

    def run(self) -> None:
        """Copy the data and have it on disk.  Any thread may call it; it touches nothing but the two files."""
        if self._source is not None:
            source_fd, extents = self._source
            copy_data(source_fd, extents, self._fd, self._size)
            if not self._stack.volatile:
                os.fsync(self._fd)

    def finish(self) -> None:
        """Publish.  On an exception the lower data stays in force."""
        try:
            if self._copy is not None and self._temp is not None:
                temp, self._temp = self._temp, None
                self._copy.publish(metacopy=False, temp=temp, size=self._size, copied_bytes=self._copied_bytes)
            else:
                self._replace_metacopy()
        finally:
            self.abort()

    def _replace_metacopy(self) -> None:
        """Kernel: ovl_copy_up_meta_inode_data()."""
        upper = self._stack.need_upper()
        path = sys.fd_path(self._fd)
        if not self._size:
            os.ftruncate(self._fd, 0)
        for name, value in self._caps.items():
            os.setxattr(path, name, value)  # writing has removed it
        # The times stay as the writing has left them: with the kernel, too, opening a metacopy to write changes mtime.
        upper.drop_own(path, b"metacopy")
        upper.drop_own(path, b"redirect")
        inode = self._inode
        self._stack.tree.set_upper(inode.nodeid, inode.upper_ino, metacopy=False)
        attr, _, _ = upper.attr(path)
        self._stack.tree.set_attr(inode.nodeid, attr)
        self._stack.events.tell(
            "copy-up data",
            self._stack.tree.path(inode.nodeid) or b"",
            f"{self._size} bytes",
            began_ns=self._began_ns,
            copied_bytes=self._copied_bytes,
        )

    def abort(self) -> None:
        """Give back what is left: descriptors, and the temporary file if it was not published."""
        if self._source is not None:
            os.close(self._source[0])
            self._source = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._temp is not None:
            self._stack.need_upper().discard(self._temp)
            self._temp = None


def _capabilities(fd: int) -> dict[bytes, bytes]:
    """security.capability of an upper file, which writing its data removes."""
    value = getxattr(sys.fd_path(fd), b"security.capability", follow=True)
    return {} if value is None else {b"security.capability": value}


def metadata_source(stack: Stack, inode: Inode) -> tuple[Layer, Ref]:
    """The lower object that has an inode's xattrs and symlink target.  Precondition: it is not in the upperdir."""
    for source in inode.lower:
        layer = stack.layers[source.layer]
        assert layer is not None
        if not layer.is_implied(source.ref):
            return layer, source.ref
    layer = stack.layers[inode.lower[0].layer]
    assert layer is not None
    return layer, inode.lower[0].ref


def data_source(stack: Stack, inode: Inode) -> tuple[Layer, Source]:
    """The lower object that has a file's data.  Precondition: it is not in the upperdir, or `metacopy`."""
    source = inode.lower[-1]
    layer = stack.layers[source.layer]
    assert layer is not None
    return layer, source


def data_of(stack: Stack, inode: Inode) -> tuple[int, list[Extent]]:
    """(a new descriptor, extents) of a file's lower data, holes left out."""
    layer, source = data_source(stack, inode)
    return extents_of(layer, source.ref)


def extents_of(layer: Layer, ref: Ref) -> tuple[int, list[Extent]]:
    """(a new descriptor, extents) of a layer's file, holes left out."""
    fd, extents = layer.extents(ref)
    if isinstance(layer, DirLayer):
        try:
            extents = _without_holes(fd, os.fstat(fd).st_size)
        except BaseException:
            os.close(fd)
            raise
    return fd, extents


def _without_holes(fd: int, size: int) -> list[Extent]:
    """Kernel: ovl_copy_up_file(): SEEK_DATA and SEEK_HOLE where the file system has them."""
    extents: list[Extent] = []
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # a hole up to the end
            if error.errno == errno.EINVAL:
                return [Extent(0, size, 0)]
            raise
        extents.append(Extent(start, end - start, start))
        at = end
    return extents


def copy_data(source_fd: int, extents: list[Extent], fd: int, size: int) -> None:
    """Write `size` bytes to `fd`: the extents of `source_fd`, and holes.

    Raises:
        OSError: EIO when the source is shorter than its extents say; as write(2) otherwise.
    """
    whole = len(extents) == 1 and extents[0] == Extent(0, size, 0) and os.fstat(source_fd).st_size == size
    if whole and _clone(source_fd, fd):
        return
    in_kernel = True
    for extent in extents:
        done, length = 0, min(extent.length, size - extent.logical)
        while done < length:
            piece = min(_PIECE_BYTES, length - done)
            copied = 0
            if in_kernel:
                try:
                    copied = os.copy_file_range(source_fd, fd, piece, extent.physical + done, extent.logical + done)
                except OSError as error:
                    if error.errno not in _NO_CLONE:
                        raise
                    in_kernel = False
            if not in_kernel:
                data = os.pread(source_fd, piece, extent.physical + done)
                copied = os.pwrite(fd, data, extent.logical + done) if data else 0
            if copied == 0:
                raise OSError(errno.EIO, "the lower file is shorter than it was")
            done += copied
    os.ftruncate(fd, size)


def _clone(source_fd: int, fd: int) -> bool:
    try:
        fcntl.ioctl(fd, _FICLONE, source_fd)
    except OSError as error:
        if error.errno in _NO_CLONE:
            return False
        raise
    return True


class _Copy:
    """One copy-up: the parents are up, the object is made and placed under all its names."""

    def __init__(self, stack: Stack, inode: Inode) -> None:
        self.stack = stack
        self.inode = inode
        self.upper = stack.need_upper()
        self._began_ns = time.monotonic_ns()

    def publish(
        self, *, metacopy: bool, temp: Name | None = None, size: int | None = None, copied_bytes: int = 0
    ) -> None:
        """Make the object (or take `temp`, which has the data) and put it in its place."""
        inode, upper = self.inode, self.upper
        if inode.nodeid == ROOT_NODEID:
            raise OSError(errno.EIO, "the root is in the upperdir already")
        attr = inode.attr if size is None else replace(inode.attr, size=size)
        with upper.temp(temp) as made:
            if temp is None:
                self._make(made, attr)
            self._describe(made, attr, metacopy=metacopy)
            names = self._names()
            with upper.temp_object(made) as path:
                new_attr, upper_ino, _ = upper.attr(path)
                if names:
                    self._place(made, names)
                else:
                    self._keep_orphan(made)
        if inode.is_dir:
            new_attr = replace(new_attr, nlink=1)
        else:
            new_attr = replace(new_attr, nlink=len(names), blocks=inode.attr.blocks if metacopy else new_attr.blocks)
        self.stack.tree.set_upper(inode.nodeid, upper_ino, metacopy=metacopy)
        self.stack.tree.set_attr(inode.nodeid, new_attr)
        what = "directory" if inode.is_dir else "metadata" if metacopy else f"{new_attr.size} bytes"
        self.stack.events.tell(
            "copy-up",
            self.stack.tree.path(inode.nodeid) or b"",
            what,
            began_ns=self._began_ns,
            copied_bytes=copied_bytes,
        )

    def _make(self, temp: Name, attr: Attr) -> None:
        target = b""
        if stat.S_ISLNK(attr.mode):
            layer, ref = metadata_source(self.stack, self.inode)
            target = layer.readlink(ref)
        self.upper.make(temp, NewObject(attr.mode, attr.uid, attr.gid, attr.rdev, target))
        if stat.S_ISREG(attr.mode) and attr.size:
            with self.upper.temp_object(temp) as path:
                os.truncate(path, attr.size)

    def _describe(self, temp: Name, attr: Attr, *, metacopy: bool) -> None:
        """Owner, mode, xattrs, the overlay's own xattrs, times; in this order, as each undoes some of the next."""
        layer, ref = metadata_source(self.stack, self.inode)
        with self.upper.temp_object(temp) as path:
            self.upper.owner.set(path, attr.mode, attr.uid, attr.gid, rdev=attr.rdev)
            for name, value in layer.xattrs(ref).items():
                self._copy_xattr(path, name, value)
            handle = origin.encode(self.stack.layers, self.inode.lower[0])
            if handle is not None:
                self._set_own(path, b"origin", handle)
            if metacopy:
                self.upper.set_own(path, b"metacopy", b"")
            os.utime(path, ns=(attr.atime_ns, attr.mtime_ns))

    def _copy_xattr(self, path: bytes, name: bytes, value: bytes) -> None:
        try:
            os.setxattr(path, self.escaped(name), value)
        except OSError as error:
            # What this user may not set (trusted.*, security.* without privileges; user.* on special files), the
            # upperdir cannot show.  Kernel: ovl_copy_xattr(): "Ignore failure to copy unknown xattrs".
            if error.errno not in _SKIPPED_XATTRS:
                raise
            self.stack.events.tell("xattr not copied up", name, os.strerror(error.errno or 0))

    def escaped(self, name: bytes) -> bytes:
        """The name on disk of a user's xattr.  Kernel: xattrs.c: ovl_xattr_escape_name()."""
        prefix = self.upper.prefix
        return prefix + b"overlay." + name[len(prefix) :] if name.startswith(prefix) else name

    def _set_own(self, path: bytes, name: bytes, value: bytes) -> None:
        """Set what is only good to have: an inode that holds no such xattr does without."""
        try:
            self.upper.set_own(path, name, value)
        except OSError as error:
            if error.errno not in _SKIPPED_XATTRS:
                raise

    def _names(self) -> list[tuple[Inode, Name]]:
        """All names of the inode in the merged tree; the directories are copied up."""
        tree = self.stack.tree
        find_all_names(self.stack, self.inode)
        names = [(tree.get(nodeid), name) for nodeid, name in tree.names(self.inode.nodeid)]
        for directory, _ in names:
            metadata(self.stack, directory)
        return names

    def _place(self, temp: Name, names: list[tuple[Inode, Name]]) -> None:
        """Move the object to its first name and link it to the others; the parents keep their times.

        On an exception it has none of the names.  What comes after a rename must not fail (kernel: best effort).
        """
        placed: list[tuple[Inode, Name]] = []
        try:
            for directory, name in names:
                path = self.stack.upper_path(directory.nodeid)
                with self.stack.object(directory) as parent_path:
                    self._set_own(parent_path, b"impure", b"y")
                    with times_kept(parent_path):
                        if not placed:
                            self.upper.place(temp, path, name)
                        else:
                            with self.upper.layer.located(_join(self.stack, names[0])) as first:
                                self.upper.link(first, path, name)
                        placed.append((directory, name))
        except BaseException:
            for directory, name in placed:
                with suppress(OSError), self.stack.object(directory) as parent_path, times_kept(parent_path):
                    self.upper.take_away(self.stack.upper_path(directory.nodeid), name)
            raise

    def _keep_orphan(self, temp: Name) -> None:
        """An inode without a name, that is still in use: so is its copy.  Kernel: ovl_copy_up_tmpfile()."""
        fd = sys.open_beneath(self.upper.work_fd, temp, os.O_PATH | os.O_NOFOLLOW)
        self.upper.discard(temp)
        self.stack.tree.set_orphan(self.inode.nodeid, fd)


def find_all_names(stack: Stack, inode: Inode) -> None:
    """Look up every path that a lower inode has in the layers, so that the tree knows all its names."""
    if inode.is_dir:
        return
    paths = lower_paths(stack.layers, *metadata_source(stack, inode))
    if len(paths) == 1:
        return
    for path in paths:
        namei.walk(stack, path)
    if stack.upper is not None and len(stack.tree.names(inode.nodeid)) < len(paths):
        # Some are deleted, or stand in a directory that was moved.
        moved = namei.moved_directories(stack)
        for path in paths:
            for now, before in moved:
                if path.startswith(before + b"/"):
                    namei.walk(stack, now + path[len(before) :])


def lower_paths(layers: Layers, layer: Layer, ref: Ref) -> list[bytes]:
    """All paths of a lower inode: those in its own layer, and hard links to them in tar layers above it."""
    paths = list(layer.links(ref))
    known = set(paths)
    for above in reversed(layers[1 : layers.index(layer)]):
        if isinstance(above, TarLayer):
            more = [path for path, target in above.links_below() if target in known and path not in known]
            paths += more
            known.update(more)
    return paths


@contextmanager
def times_kept(path: bytes) -> Iterator[None]:
    """Give the directory its times again after the block, if that can be done."""
    before = os.stat(path)
    yield
    with suppress(OSError):
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _join(stack: Stack, name: tuple[Inode, Name]) -> bytes:
    directory, last = name
    path = stack.upper_path(directory.nodeid)
    return b"%s/%s" % (path, last) if path else last
