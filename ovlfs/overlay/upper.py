"""How does an object come to be in the upperdir?

Always the same way: it is made in workdir with everything that belongs to it (content, owner, mode, xattrs, times),
and then moved into its place by one rename.  So whoever looks at the upperdir, at whatever moment the machine stops,
finds the old state or the new one.

Whiteouts are character devices 0:0 (no privilege needed since Linux 5.8), one inode hard-linked many times.  Where the
file system takes no such device (another overlay, for instance), they are empty files with the xattr overlay.whiteout,
and their directory says so with overlay.opaque="x".

Kernel: fs/overlayfs/dir.c: ovl_create_temp(), ovl_whiteout(), ovl_cleanup_and_whiteout(), ovl_create_over_whiteout();
super.c: ovl_workdir_create(), ovl_workdir_cleanup().
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ovlfs.ids import Ino, Name
from ovlfs.layer import sys
from ovlfs.layer.base import Attr
from ovlfs.layer.directory import DirLayer
from ovlfs.overlay.owner import NewObject, Owner

_WHITEOUT = Name(b"#whiteout")
_WHITEOUT_FALLBACK = frozenset((errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP))
"""renameat2(RENAME_WHITEOUT) answers: not on this file system, or not for this user."""
_NO_DEVICE = frozenset((errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS))
"""mknod(2) answers that mean "no character device 0:0 here"."""


class Upper:
    """The upperdir (as a layer) and the directory in workdir where objects are made.

    Attributes:
        layer: the upperdir.
        work_fd: the directory for temporary objects, on the same file system.
        prefix: the namespace of the overlay's own xattrs, b"trusted.overlay." or b"user.overlay.".
        owner: how owners, modes and devices are stored.
        devices: whether a whiteout is a device 0:0, and not an xattr.
    """

    def __init__(self, layer: DirLayer, work_fd: int, prefix: bytes, owner: Owner) -> None:
        self.layer = layer
        self.work_fd = work_fd
        self.prefix = prefix
        self.owner = owner
        self._counter = 0
        self.devices = self._takes_devices()

    def close(self) -> None:
        """Remove the shared whiteout and give the descriptors back."""
        with suppress(FileNotFoundError):
            os.unlink(_WHITEOUT, dir_fd=self.work_fd)
        os.close(self.work_fd)
        self.layer.close()

    # ---- temporary objects ---------------------------------------------------------------------------------------

    def temp_name(self) -> Name:
        """A name in workdir that is not taken (the kernel's "#%x")."""
        self._counter += 1
        return Name(b"#%x" % self._counter)

    def temp_path(self, temp: Name) -> bytes:
        """A path of a temporary object, not to be followed."""
        return sys.fd_path(self.work_fd, temp)

    @contextmanager
    def temp(self, name: Name | None = None) -> Iterator[Name]:
        """A name (or this one) for a temporary object.  What is left under it when the block fails is removed."""
        name = name or self.temp_name()
        try:
            yield name
        except BaseException:
            self.discard(name)
            raise

    def discard(self, temp: Name) -> None:
        """Remove whatever is under a temporary name, a directory with all its whiteouts too."""
        try:
            st = os.stat(temp, dir_fd=self.work_fd, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(st.st_mode):
            remove_tree(self.work_fd, temp)
        else:
            os.unlink(temp, dir_fd=self.work_fd)

    def make(self, temp: Name, attr: NewObject) -> None:
        """Make an object under a temporary name, with its owner and mode."""
        self.owner.make(self.work_fd, temp, attr)
        with self.temp_object(temp) as path:
            self.owner.set(path, attr.mode, attr.uid, attr.gid, rdev=attr.rdev)

    @contextmanager
    def temp_object(self, temp: Name) -> Iterator[bytes]:
        """A path of the temporary object itself, valid inside the with block; calls must follow it."""
        fd = sys.open_beneath(self.work_fd, temp, os.O_PATH | os.O_NOFOLLOW)
        try:
            yield sys.fd_path(fd)
        finally:
            os.close(fd)

    # ---- moving into place ---------------------------------------------------------------------------------------

    def place(self, temp: Name, parent: bytes, name: Name) -> None:
        """Move a temporary object to `name` in the upper directory `parent`: over nothing or over a whiteout."""
        with self.layer.directory(parent) as dirfd:
            try:
                sys.renameat2(self.work_fd, temp, dirfd, name, sys.RENAME_NOREPLACE)
            except FileExistsError:
                if not self.is_whiteout(parent, name):
                    raise  # somebody else writes to the upperdir: keep what is there
                sys.renameat2(self.work_fd, temp, dirfd, name, sys.RENAME_EXCHANGE)
                os.unlink(temp, dir_fd=self.work_fd)

    def replace(self, temp: Name, parent: bytes, name: Name) -> None:
        """Move a temporary object over the object at `name`, which goes away."""
        with self.layer.directory(parent) as dirfd:
            sys.renameat2(self.work_fd, temp, dirfd, name, sys.RENAME_EXCHANGE)
        self.discard(temp)

    def link(self, path: bytes, parent: bytes, name: Name) -> None:
        """A second name for the object at `path` (sys.fd_path): over nothing or over a whiteout."""
        temp = self.temp_name()
        os.link(path, temp, dst_dir_fd=self.work_fd, follow_symlinks=True)
        try:
            self.place(temp, parent, name)
        except BaseException:
            self.discard(temp)
            raise

    def take_away(self, parent: bytes, name: Name) -> None:
        """Remove an object (a directory with its whiteouts), leaving nothing at its place."""
        temp = self.temp_name()
        with self.layer.directory(parent) as dirfd:
            st = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
            if not stat.S_ISDIR(st.st_mode):
                os.unlink(name, dir_fd=dirfd)
                return
            sys.renameat2(dirfd, name, self.work_fd, temp)
        self.discard(temp)

    # ---- whiteouts -----------------------------------------------------------------------------------------------

    def whiteout(self, parent: bytes, name: Name, *, over: bool) -> None:
        """Put a whiteout at `name`; `over`: in the place of an object, which goes away."""
        with self.temp() as temp:
            self._make_whiteout(temp, parent)
            if over:
                self.replace(temp, parent, name)
            else:
                with self.layer.directory(parent) as dirfd:
                    sys.renameat2(self.work_fd, temp, dirfd, name, sys.RENAME_NOREPLACE)

    def _takes_devices(self) -> bool:
        try:
            os.mknod(_WHITEOUT, stat.S_IFCHR, 0, dir_fd=self.work_fd)
        except OSError as error:
            if error.errno in _NO_DEVICE:
                return False
            raise
        os.unlink(_WHITEOUT, dir_fd=self.work_fd)
        return True

    def _make_whiteout(self, temp: Name, parent: bytes) -> None:
        """Kernel: ovl_whiteout(): a hard link of the one whiteout, which is made anew when its links run out."""
        if not self.devices:
            self._make_xattr_whiteout(temp, parent)
            return
        for _ in range(2):
            try:
                os.link(_WHITEOUT, temp, src_dir_fd=self.work_fd, dst_dir_fd=self.work_fd, follow_symlinks=False)
            except FileNotFoundError:
                os.mknod(_WHITEOUT, stat.S_IFCHR, 0, dir_fd=self.work_fd)
            except OSError as error:
                if error.errno != errno.EMLINK:
                    raise
                os.unlink(_WHITEOUT, dir_fd=self.work_fd)
            else:
                return
        os.mknod(temp, stat.S_IFCHR, 0, dir_fd=self.work_fd)

    def _make_xattr_whiteout(self, temp: Name, parent: bytes) -> None:
        """Kernel (reading it): util.c: ovl_path_check_xwhiteout_xattr(); overlayfs.rst, "Nesting overlayfs mounts"."""
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self.work_fd)
        try:
            self.set_own(sys.fd_path(fd), b"whiteout", b"y")
        finally:
            os.close(fd)
        with self.layer.located(parent) as path:
            if self.layer.own_xattr(path, b"opaque", follow=True) is None:
                self.set_own(path, b"opaque", b"x")

    def rename(
        self, parent: bytes, name: Name, new_parent: bytes, new_name: Name, *, whiteout: bool, exchange: bool
    ) -> None:
        """rename(2) inside the upperdir; `whiteout`: in the same step a whiteout appears at the old place."""
        with self.layer.directory(parent) as old, self.layer.directory(new_parent) as new:
            if exchange:
                sys.renameat2(old, name, new, new_name, sys.RENAME_EXCHANGE)
            elif not whiteout:
                sys.renameat2(old, name, new, new_name)
            elif not self.devices:
                self._rename_then_whiteout(old, name, new, new_name, parent)
            else:
                try:
                    sys.renameat2(old, name, new, new_name, sys.RENAME_WHITEOUT)
                except OSError as error:
                    if error.errno not in _WHITEOUT_FALLBACK:
                        raise
                    self._rename_then_whiteout(old, name, new, new_name, parent)

    def _rename_then_whiteout(self, old: int, name: Name, new: int, new_name: Name, parent: bytes) -> None:
        """Without RENAME_WHITEOUT: a whiteout takes the old place while the object waits in workdir."""
        with self.temp() as temp:
            self._make_whiteout(temp, parent)
            sys.renameat2(self.work_fd, temp, old, name, sys.RENAME_EXCHANGE)
            try:
                sys.renameat2(self.work_fd, temp, new, new_name)
            except BaseException:
                sys.renameat2(self.work_fd, temp, old, name, sys.RENAME_EXCHANGE)
                raise

    def is_whiteout(self, parent: bytes, name: Name) -> bool:
        """Whether the upperdir has a whiteout at `name`."""
        with self.layer.directory(parent) as dirfd:
            try:
                st = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
            except FileNotFoundError:
                return False
            if stat.S_ISCHR(st.st_mode):
                return st.st_rdev == 0
            return (
                stat.S_ISREG(st.st_mode)
                and st.st_size == 0
                and self.layer.own_xattr(sys.fd_path(dirfd, name), b"whiteout") is not None
            )

    def has_names(self, path: bytes) -> bool:
        """Whether an upper directory holds anything, whiteouts included."""
        fd = sys.open_beneath(self.layer.fd, path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with os.scandir(fd) as entries:
                return next(entries, None) is not None
        finally:
            os.close(fd)

    # ---- objects in place ----------------------------------------------------------------------------------------

    def attr(self, path: bytes) -> tuple[Attr, int, Ino]:
        """(attributes, real inode number, its st_ino) of the object at `path` (sys.fd_path)."""
        st = os.stat(path)
        return self.layer.attr_at(path), st.st_ino, self.layer.ino_of(st)

    def set_own(self, path: bytes, name: bytes, value: bytes) -> None:
        """Set an xattr of the overlay's own on the object at `path`."""
        os.setxattr(path, self.prefix + name, value)

    def drop_own(self, path: bytes, name: bytes) -> None:
        """Remove an xattr of the overlay's own, if it is there."""
        try:
            os.removexattr(path, self.prefix + name)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise


def remove_tree(dirfd: int, name: bytes) -> None:
    """Remove a directory of workdir with all below it, following nothing.  Iterative: depth is not ours to trust."""
    todo: list[tuple[bytes, bool]] = [(name, False)]
    while todo:
        path, emptied = todo.pop()
        if not emptied:
            todo.append((path, True))
            todo.extend((sub, False) for sub in _remove_files(dirfd, path))
            continue
        parent, _, last = path.rpartition(b"/")
        fd = sys.open_beneath(dirfd, parent, os.O_PATH | os.O_DIRECTORY)
        try:
            os.rmdir(last, dir_fd=fd)
        finally:
            os.close(fd)


def _remove_files(dirfd: int, path: bytes) -> list[bytes]:
    """Unlink all but the directories in `path`; the paths of those."""
    fd = sys.open_beneath(dirfd, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with os.scandir(fd) as entries:
            found = [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]
        for name, is_dir in found:
            if not is_dir:
                os.unlink(name, dir_fd=fd)
    finally:
        os.close(fd)
    return [b"%s/%s" % (path, name) for name, is_dir in found if is_dir]
