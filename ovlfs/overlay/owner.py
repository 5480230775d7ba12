"""How are owners, modes and device nodes stored in the upperdir?

Two ways, one interface (`Owner`):

* `DirectOwner`, for who may chown and mknod: the object has the owner, mode and type that it shows.
* `OverrideOwner`, for everybody else: the object belongs to the user; what it shows and cannot be stored that way is in
  user.containers.override_stat (layer/override.py).  Where the real object says it already, no xattr is written, so
  that other tools see as little of this as possible.
"""

import os
import stat
from dataclasses import dataclass
from typing import Protocol

from ovlfs.layer import sys
from ovlfs.layer.override import OVERRIDE_XATTR, Override, format_override


@dataclass(frozen=True, slots=True)
class NewObject:
    """What an object shall be: type and permissions (`mode`), owner, device numbers, a symlink's target.

    `umask` is still to be taken off `mode`, unless a default ACL stands in for it.
    """

    mode: int
    uid: int
    gid: int
    rdev: int = 0
    target: bytes = b""
    umask: int = 0


class Owner(Protocol):
    """Makes objects, and gives them what stat(2) shall show."""

    def make(self, dirfd: int, name: bytes, attr: NewObject) -> None:
        """Make an object of the type of `attr.mode`, closed to others until `set` is called."""

    def can_set(self, path: bytes, uid: int, gid: int) -> bool:
        """Whether `set` can give the object at `path` this owner; otherwise it must be made anew."""

    def set(self, path: bytes, mode: int, uid: int, gid: int, *, rdev: int = 0) -> None:
        """Give the object at `path` (sys.fd_path) its owner and mode; suid and sgid bits stay as `mode` says."""


def _make_file(dirfd: int, name: bytes, content: bytes = b"") -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dirfd)
    try:
        if content:
            os.write(fd, content)
    finally:
        os.close(fd)


def _make_real(dirfd: int, name: bytes, attr: NewObject) -> None:
    kind = stat.S_IFMT(attr.mode)
    if kind == stat.S_IFREG:
        _make_file(dirfd, name)
    elif kind == stat.S_IFDIR:
        os.mkdir(name, 0o700, dir_fd=dirfd)
    elif kind == stat.S_IFLNK:
        os.symlink(attr.target, name, dir_fd=dirfd)
    else:
        os.mknod(name, kind | 0o600, attr.rdev, dir_fd=dirfd)


class DirectOwner:
    """As root, or with CAP_CHOWN over the ids in question."""

    def make(self, dirfd: int, name: bytes, attr: NewObject) -> None:  # noqa: D102
        _make_real(dirfd, name, attr)

    def can_set(self, path: bytes, uid: int, gid: int) -> bool:  # noqa: ARG002, D102
        return True

    def set(self, path: bytes, mode: int, uid: int, gid: int, *, rdev: int = 0) -> None:  # noqa: ARG002, D102
        st = os.stat(path)
        if (st.st_uid, st.st_gid) != (uid, gid):
            os.chown(path, uid, gid)
        if not stat.S_ISLNK(st.st_mode):
            os.chmod(path, stat.S_IMODE(mode))  # after chown, which clears suid and sgid


class OverrideOwner:
    """Without privileges: everything is an ordinary file or directory of this user.

    With `always`, the xattr is written even where the object says the same: in a user namespace our files are root's
    only as long as we are in it, and shall be root's in the next mount, too.

    Attributes:
        always: see above; immutable.
    """

    def __init__(self, *, always: bool = False) -> None:
        self._uid, self._gid = os.geteuid(), os.getegid()
        self.always = always

    def make(self, dirfd: int, name: bytes, attr: NewObject) -> None:  # noqa: D102
        kind = stat.S_IFMT(attr.mode)
        ours = (attr.uid, attr.gid) == (self._uid, self._gid) and not self.always
        if kind in (stat.S_IFREG, stat.S_IFDIR) or (ours and kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK)):
            _make_real(dirfd, name, attr)
        else:
            _make_file(dirfd, name, attr.target)

    def can_set(self, path: bytes, uid: int, gid: int) -> bool:
        """Whether `set` can store this owner: real symlinks, fifos and sockets hold no user.* xattrs."""
        if stat.S_IFMT(os.stat(path).st_mode) in (stat.S_IFREG, stat.S_IFDIR):
            return True
        return not self.always and (uid, gid) == (self._uid, self._gid)

    def set(self, path: bytes, mode: int, uid: int, gid: int, *, rdev: int = 0) -> None:  # noqa: D102
        st = os.stat(path)
        permissions = stat.S_IMODE(mode)
        # The daemon must get at its own files; fifos and sockets it never opens, and they hold no xattr to say more.
        needed = {stat.S_IFDIR: 0o700, stat.S_IFREG: 0o600}.get(stat.S_IFMT(st.st_mode), 0)
        if not stat.S_ISLNK(st.st_mode):
            os.chmod(path, permissions | needed)
        kind = stat.S_IFMT(mode)
        shown = Override(uid, gid, permissions, kind, rdev)
        st = os.stat(path)
        if not self.always and shown == Override(
            st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode), stat.S_IFMT(st.st_mode)
        ):
            if OVERRIDE_XATTR in map(os.fsencode, os.listxattr(path)):
                os.removexattr(path, OVERRIDE_XATTR)
        else:
            os.setxattr(path, OVERRIDE_XATTR, format_override(shown))


def probe(work_fd: int, name: bytes) -> bool:
    """Whether this process may give files away here (then owners are stored directly)."""
    _make_file(work_fd, name)
    path = sys.fd_path(work_fd, name)
    try:
        os.chown(path, 1, 1)
        os.chown(path, 65533, 65533)
    except OSError:  # EPERM; EINVAL for ids that the user namespace does not map
        return False
    else:
        return True
    finally:
        os.unlink(name, dir_fd=work_fd)
