"""What does a directory on disk say, as a layer?

It speaks the kernel's dialect: a whiteout is a character device 0:0, or an empty regular file with the xattr
overlay.whiteout; an opaque directory carries overlay.opaque="y".  A *lower* directory may also speak the OCI tar
dialect, as an unpacked layer does (`.wh.NAME`, `.wh..wh..opq`), and fuse-overlayfs's (user.fuseoverlayfs.opaque).
In an upperdir `.wh.` names are ordinary names.

Kernel: fs/overlayfs/util.c: ovl_is_whiteout(), ovl_path_check_xwhiteout_xattr(), ovl_get_opaquedir_val(),
ovl_check_metacopy_xattr(), ovl_get_redirect_xattr().

A `Ref` is a path relative to the layer's root, b"" for the root.  Every access is confined (layer/sys.py).
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from ovlfs.ids import Ino, Name
from ovlfs.layer import sys
from ovlfs.layer.base import Attr, Entry, Extent, Ref, What
from ovlfs.layer.override import OVERRIDE_XATTR, Override, parse_override

WHITEOUT_PREFIX = b".wh."
OPAQUE_NAME = Name(b".wh..wh..opq")
TRUSTED = b"trusted.overlay."
USER = b"user.overlay."
NAME_MAX = 255
_NO_XATTR = frozenset((errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM))
"""getxattr errors that mean "not there": absent; a file system without xattrs; trusted.* or user.* on an inode that
cannot have it.  Anything else is a real error and is raised."""


def getxattr(path: bytes, name: bytes, *, follow: bool = False) -> bytes | None:
    """The value of an xattr, or None when there is none.  `follow`: the path is a sys.fd_path of the object itself."""
    try:
        return os.getxattr(path, name, follow_symlinks=follow)
    except OSError as error:
        if error.errno in _NO_XATTR:
            return None
        raise


def attr_of(st: os.stat_result, override: Override | None = None) -> Attr:
    """`st` as an Attr; owner, mode and type from `override` where there is one."""
    mode, uid, gid, rdev, size = st.st_mode, st.st_uid, st.st_gid, st.st_rdev, st.st_size
    if override is not None:
        uid, gid = override.uid, override.gid
        mode = (override.file_type or stat.S_IFMT(mode)) | override.permissions
        rdev = override.rdev
        if override.file_type and override.file_type not in (stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR):
            size = 0
    return Attr(
        mode, st.st_nlink, uid, gid, rdev, size, st.st_blocks, st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns
    )  # fmt: skip


class InoMap:
    """Gives every (device, inode number) of the stack an st_ino that no other has.

    Kernel: the xino feature (fs/overlayfs/inode.c: ovl_map_dev_ino()): the number of the file system goes into the
    high bits.  Here bits 48-62; tar layers count from 0x80 there (layer/tar.py).  The upperdir's file system (or
    the first layer's) is number 0, so with all layers on one file system st_ino is the real inode number.
    A real number of more than 48 bits is folded; it stays constant, and could collide only there.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}

    def ino(self, device: int, number: int) -> Ino:
        """The st_ino to show for inode `number` of `device`."""
        index = min(self._numbers.setdefault(device, len(self._numbers)), 0x7F)
        if number >> 48:
            number = (number ^ (number >> 17)) & ((1 << 48) - 1)
        return Ino((index << 48) | number)

    def known(self) -> dict[int, int]:
        """The numbers that were given so far, by device."""
        return dict(self._numbers)


class DirLayer:
    """A directory as a layer (see layer.base.Layer for the methods).

    Args:
        path: the directory; it must exist.
        inos: shared by all layers of a stack.
        prefixes: the overlay.* namespaces that are believed, first wins (b"trusted.overlay.", b"user.overlay.").
        oci: whether `.wh.` names are whiteouts (lower layers only).
        override: whether user.containers.override_stat is believed.
    """

    root: Ref = b""
    root_opaque = False
    data_only = False

    def __init__(
        self, path: bytes, inos: InoMap, *, prefixes: tuple[bytes, ...], oci: bool = False, override: bool = False
    ) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.path = os.path.abspath(path)
        self.prefixes = prefixes
        self.oci = oci
        self.override = override
        self.inos = inos
        self._multilinks: dict[int, list[bytes]] | None = None

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.fd)

    @contextmanager
    def directory(self, ref: bytes) -> Iterator[int]:
        """A descriptor (O_PATH) of the directory `ref`, valid inside the with block."""
        fd = sys.open_beneath(self.fd, ref, os.O_PATH | os.O_DIRECTORY)
        try:
            yield fd
        finally:
            os.close(fd)

    def is_implied(self, ref: Ref) -> bool:  # noqa: ARG002, D102
        return False

    def own_xattr(self, path: bytes, name: bytes, *, follow: bool = False) -> bytes | None:
        """The value of the overlay's own xattr `name` (b"origin", ...) of the object at `path`, or None."""
        for prefix in self.prefixes:
            value = getxattr(path, prefix + name, follow=follow)
            if value is not None:
                return value
        return None

    def _whited_out(self, dirfd: int, name: Name) -> bool:
        return (
            self.oci
            and len(name) + len(WHITEOUT_PREFIX) <= NAME_MAX
            and _exists(sys.fd_path(dirfd, WHITEOUT_PREFIX + name))
        )

    def lookup(self, directory: Ref, name: Name) -> Entry | None:  # noqa: D102
        assert isinstance(directory, bytes)
        if self.oci and name.startswith(WHITEOUT_PREFIX):
            return None
        with self.directory(directory) as dirfd:
            path = sys.fd_path(dirfd, name)
            try:
                st = os.lstat(path)
            except FileNotFoundError:
                return Entry(What.WHITEOUT) if self._whited_out(dirfd, name) else None
            return self._entry(dirfd, path, st, b"%s/%s" % (directory, name) if directory else name, name)

    def _entry(self, dirfd: int, path: bytes, st: os.stat_result, ref: bytes, name: Name) -> Entry:
        kind = stat.S_IFMT(st.st_mode)
        if kind == stat.S_IFDIR:
            opaque = self._is_opaque(path) or self._whited_out(dirfd, name)
            return Entry(What.DIRECTORY, ref, opaque=opaque, redirect=self.own_xattr(path, b"redirect"))
        if kind == stat.S_IFCHR and st.st_rdev == 0:
            return Entry(What.WHITEOUT)
        if kind == stat.S_IFREG:
            if st.st_size == 0 and self.own_xattr(path, b"whiteout") is not None:
                return Entry(What.WHITEOUT)
            if self.own_xattr(path, b"metacopy") is not None:
                return Entry(What.OTHER, ref, metacopy=True, redirect=self.own_xattr(path, b"redirect"))
        return Entry(What.OTHER, ref)

    def _is_opaque(self, path: bytes) -> bool:
        """Whether nothing below merges: "y" is the mark ("x" says only that there are xattr whiteouts)."""
        if self.own_xattr(path, b"opaque") == b"y":
            return True
        if not self.oci:
            return False
        return _exists(path + b"/" + OPAQUE_NAME) or getxattr(path, b"user.fuseoverlayfs.opaque") == b"y"

    def attr(self, ref: Ref) -> Attr:  # noqa: D102
        assert isinstance(ref, bytes)
        with self.located(ref) as path:
            return self.attr_at(path)

    def attr_at(self, path: bytes) -> Attr:
        """The attributes of the object at `path`, as `located` gives it."""
        st = os.stat(path)
        override = None
        if self.override and stat.S_IFMT(st.st_mode) in (stat.S_IFREG, stat.S_IFDIR):
            value = getxattr(path, OVERRIDE_XATTR, follow=True)
            override = parse_override(value) if value is not None else None
        return attr_of(st, override)

    @contextmanager
    def located(self, ref: bytes) -> Iterator[bytes]:
        """A path of the object `ref` itself, valid inside the with block; calls must follow it (sys.fd_path)."""
        fd = sys.open_beneath(self.fd, ref, os.O_PATH | os.O_NOFOLLOW)
        try:
            yield sys.fd_path(fd)
        finally:
            os.close(fd)

    def ino(self, ref: Ref) -> Ino:  # noqa: D102
        assert isinstance(ref, bytes)
        with self.located(ref) as path:
            return self.ino_of(os.stat(path))

    def ino_of(self, st: os.stat_result) -> Ino:
        """The st_ino to show for an object of this layer's file system."""
        return self.inos.ino(st.st_dev, st.st_ino)

    def readlink(self, ref: Ref) -> bytes:  # noqa: D102
        assert isinstance(ref, bytes)
        fd = sys.open_beneath(self.fd, ref, os.O_PATH | os.O_NOFOLLOW)
        try:
            return self.readlink_at(fd)
        finally:
            os.close(fd)

    def readlink_at(self, fd: int) -> bytes:
        """The target of the symlink that `fd` (O_PATH) is."""
        if self.override and stat.S_ISREG(os.fstat(fd).st_mode):
            with open(sys.fd_path(fd), "rb") as file:  # a symlink whose owner only override_stat can hold
                return file.read(4096)
        return os.readlink(b"", dir_fd=fd)

    def xattrs(self, ref: Ref) -> dict[bytes, bytes]:  # noqa: D102
        assert isinstance(ref, bytes)
        with self.located(ref) as path:
            return self.xattrs_at(path)

    def xattrs_at(self, path: bytes) -> dict[bytes, bytes]:
        """What xattrs() gives, of the object at `path`."""
        found: dict[bytes, bytes] = {}
        try:
            listed = os.listxattr(path)
        except OSError as error:
            if error.errno in _NO_XATTR:
                return found
            raise
        for text in listed:
            raw = os.fsencode(text)
            shown = self.shown_xattr(raw)
            if shown is not None:
                value = getxattr(path, raw, follow=True)
                if value is not None:
                    found[shown] = value
        return found

    def shown_xattr(self, raw: bytes) -> bytes | None:
        """The name under which an xattr on disk is shown; None: it is the overlay's own.

        Kernel: fs/overlayfs/xattrs.c: ovl_is_own_xattr(), ovl_is_escaped_xattr(): `overlay.overlay.x` is a user's
        `overlay.x`, escaped, so that an overlay can be nested in another.
        """
        if (self.override or self.oci) and raw == OVERRIDE_XATTR:
            return None
        if self.oci and raw.startswith(b"user.fuseoverlayfs."):
            return None
        for prefix in self.prefixes:
            if raw.startswith(prefix):
                rest = raw[len(prefix) :]
                return prefix + rest[len(b"overlay.") :] if rest.startswith(b"overlay.") else None
        return raw

    def links(self, ref: Ref) -> list[bytes]:  # noqa: D102
        assert isinstance(ref, bytes)
        with self.located(ref) as path:
            st = os.stat(path)
        if st.st_nlink == 1 or stat.S_ISDIR(st.st_mode):
            return [ref]
        if self._multilinks is None:
            self._multilinks = self._find_multilinks(st.st_dev)
        return self._multilinks.get(st.st_ino, [ref])

    def _find_multilinks(self, device: int) -> dict[int, list[bytes]]:
        """All names of all files with several, by inode number: one walk over the layer, at the first question."""
        names: dict[int, list[bytes]] = {}
        todo = [b""]
        while todo:
            at = todo.pop()
            fd = sys.open_beneath(self.fd, at, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if os.fstat(fd).st_dev != device:
                    continue  # another file system mounted below: its inode numbers are its own
                with os.scandir(fd) as entries:
                    for entry in entries:
                        path = b"%s/%s" % (at, os.fsencode(entry.name)) if at else os.fsencode(entry.name)
                        if entry.is_dir(follow_symlinks=False):
                            todo.append(path)
                        else:
                            names.setdefault(entry.inode(), []).append(path)
            finally:
                os.close(fd)
        return {number: sorted(paths) for number, paths in names.items() if len(paths) > 1}

    def open(self, ref: bytes, flags: int) -> int:
        """Open a regular file of the layer."""
        return sys.open_beneath(self.fd, ref, flags | os.O_NOFOLLOW)

    def extents(self, ref: Ref) -> tuple[int, list[Extent]]:  # noqa: D102
        assert isinstance(ref, bytes)
        try:
            fd = self.open(ref, os.O_RDONLY | os.O_NOATIME)  # reading changes nothing in a lower layer
        except PermissionError:  # somebody else's file
            fd = self.open(ref, os.O_RDONLY)
        return fd, [Extent(0, os.fstat(fd).st_size, 0)]

    def list(self, directory: Ref) -> Iterator[tuple[Name, What]]:  # noqa: D102
        assert isinstance(directory, bytes)
        fd = sys.open_beneath(self.fd, directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            has_xattr_whiteouts = self.own_xattr(sys.fd_path(fd), b"opaque", follow=True) == b"x" if directory else True
            with os.scandir(fd) as entries:
                found = [
                    (Name(os.fsencode(entry.name)), self._what(fd, entry, has_xattr_whiteouts)) for entry in entries
                ]
        finally:
            os.close(fd)
        if self.oci:
            present = {name for name, _ in found}
            for name, _ in found:
                if name.startswith(WHITEOUT_PREFIX) and name != OPAQUE_NAME:
                    target = Name(name[len(WHITEOUT_PREFIX) :])
                    if target and target not in present:
                        yield target, What.WHITEOUT
            found = [(name, what) for name, what in found if not name.startswith(WHITEOUT_PREFIX)]
        yield from found

    def _what(self, dirfd: int, entry: "os.DirEntry[str]", xattr_whiteouts: bool) -> What:
        if entry.is_dir(follow_symlinks=False):
            return What.DIRECTORY
        if entry.is_symlink():
            return What.OTHER
        regular = entry.is_file(follow_symlinks=False)
        if regular and not xattr_whiteouts:
            return What.OTHER
        st = os.lstat(sys.fd_path(dirfd, os.fsencode(entry.name)))
        if regular:
            path = sys.fd_path(dirfd, os.fsencode(entry.name))
            hidden = st.st_size == 0 and self.own_xattr(path, b"whiteout") is not None
        else:
            hidden = stat.S_ISCHR(st.st_mode) and st.st_rdev == 0
        return What.WHITEOUT if hidden else What.OTHER


def _exists(path: bytes) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True
