"""How is an upperdir read by a process that does not mount it?

As the mount reads it, in the same dialect: the overlay's xattrs in trusted.overlay.* or user.overlay.*, owners in the
inodes or in user.containers.override_stat.  A mount finds out by trying; here the same is found out without writing a
byte, so that an upperdir that somebody has mounted can be looked at.

Kernel: fs/overlayfs/super.c: ovl_get_upper().
"""

import contextlib
import errno
import os
import tempfile

from ovlfs.errors import MountError, printable
from ovlfs.layer.directory import TRUSTED, USER, DirLayer, InoMap
from ovlfs.layer.override import OVERRIDE_XATTR
from ovlfs.overlay import owner
from ovlfs.overlay.params import Params


def open_layer(path: bytes, params: Params | None = None, inos: InoMap | None = None) -> DirLayer:
    """The upperdir at `path` as a layer, to be read only and to be closed by the caller.

    Args:
        path: the upperdir, mounted or not.
        params: the options with which it is mounted, where they are known.
        inos: the numbering of file systems that the lower layers use, if they are directories.

    Raises:
        MountError: it is no directory that can be read.
    """
    params = params or Params()
    try:
        layer = DirLayer(path, inos or InoMap(), prefixes=(TRUSTED,))
    except OSError as error:
        raise MountError(f"upperdir {printable(path)}: {error.strerror}") from error
    try:
        marked = OVERRIDE_XATTR in map(os.fsencode, os.listxattr(layer.fd))
        userxattr = params.userxattr
        if userxattr is None:
            userxattr = marked or not _may_set_trusted(layer.fd)
        layer.prefixes = (USER,) if userxattr else (TRUSTED,)
        layer.override = params.xattr_permissions != 0 and (
            params.xattr_permissions == 2 or marked or not _may_give_away()
        )
    except OSError as error:
        layer.close()
        raise MountError(f"upperdir {printable(path)}: {error.strerror}") from error
    return layer


def _may_set_trusted(fd: int) -> bool:
    """Whether this process may set trusted.* xattrs: then removing one that is not there says just that."""
    try:
        os.removexattr(fd, TRUSTED + b"probe")
    except OSError as error:
        if error.errno == errno.EROFS:
            return os.geteuid() == 0
        return error.errno == errno.ENODATA
    return True


def _may_give_away() -> bool:
    """Whether this process stores owners directly, as overlay.owner finds out in the workdir."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ovlfs-"))
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        return owner.probe(fd, b"owner")
