"""What belongs to one mount: its layers, its upperdir and workdir, and the live tree over them.

Opening a stack claims the workdir: nobody else may use it at the same time, what a killed daemon left in it is
removed, and a `volatile` mount leaves the mark that the kernel leaves.

Kernel: fs/overlayfs/super.c: ovl_get_upper(), ovl_get_workdir(), ovl_make_workdir(), ovl_create_volatile_dirty().
"""

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from ovlfs.errors import MountError, printable
from ovlfs.events import Events
from ovlfs.ids import NodeId
from ovlfs.layer import open_tree, sys
from ovlfs.layer.base import Layer
from ovlfs.layer.directory import TRUSTED, USER, DirLayer, InoMap
from ovlfs.layer.override import OVERRIDE_XATTR
from ovlfs.layer.tree import Inode
from ovlfs.overlay import owner
from ovlfs.overlay.params import Params
from ovlfs.overlay.upper import Upper, remove_tree

_WORK = b"work"
_DIRTY = b"work/incompat/volatile/dirty"
"""Relative to workdir.  As with the kernel it stays, also after an orderly end: nothing was ever synced."""


class Stack:
    """The layers of one mount and what is known of their merged tree.

    Attributes:
        layers: layers[0] is the upperdir's, or None; layers[1] the topmost lower layer.
        tree: the live tree.
        upper: None for a read-only stack.
        redirect: whether directories with something below may be renamed (overlay.redirect).
        metacopy: whether a change of attributes copies only those.
        volatile: whether nothing is ever synced.
        cut: how many layers were left out at the bottom, because the root of one above is opaque.
    """

    def __init__(
        self, lowers: Sequence[Layer], upper: Upper | None, params: Params, *, kernel_userxattr: bool, cut: int = 0
    ) -> None:
        self.layers: list[Layer | None] = [upper.layer if upper else None, *lowers]
        self.upper = upper
        self.params = params
        self.tree = open_tree(self.layers)
        self.events = Events()
        self.volatile = params.volatile
        self.cut = cut
        # Under `userxattr` the kernel follows neither redirects nor metacopies (params.c: ovl_fs_params_verify()),
        # so an upperdir that it shall be able to mount must do without, unless asked for.
        self.redirect = not kernel_userxattr if params.redirect_dir is None else params.redirect_dir
        self.metacopy = not kernel_userxattr if params.metacopy is None else params.metacopy

    def need_upper(self) -> Upper:
        """The upperdir.  Raises OSError(EROFS) on a read-only stack."""
        if self.upper is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return self.upper

    def name_of(self, number: int) -> str:
        """What people call a layer of the stack: upper; layer 1 is the bottom one; data layers are apart."""
        layer = self.layers[number]
        if number == 0 or (number == 1 and self.upper is None and self.params.upperdir is not None):
            return "upper"
        assert layer is not None
        below = [other for other in self.layers[number:] if other is not None and other.data_only == layer.data_only]
        return f"data layer {len(below)}" if layer.data_only else f"layer {len(below) + self.cut}"

    @contextmanager
    def object(self, inode: Inode) -> Iterator[bytes]:
        """A path of an inode's object in the upperdir (sys.fd_path: calls follow it), valid inside the with block."""
        upper = self.need_upper()
        orphan = self.tree.orphan(inode.nodeid)
        if orphan is not None:
            yield sys.fd_path(orphan)
            return
        with upper.layer.located(self.upper_path(inode.nodeid)) as path:
            yield path

    def upper_path(self, nodeid: NodeId) -> bytes:
        """The path of an inode in the upperdir, which is its path in the tree.  Raises ENOENT: it has none."""
        path = self.tree.path(nodeid)
        if path is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return path

    def refresh(self, nodeid: NodeId) -> None:
        """Take the attributes of an upper object anew from the disk."""
        upper = self.need_upper()
        inode = self.tree.get(nodeid)
        with self.object(inode) as path:
            attr, _, _ = upper.attr(path)
        if inode.is_dir:
            attr = replace(attr, nlink=1 if inode.lower else attr.nlink)
        elif inode.metacopy:
            attr = replace(attr, blocks=inode.attr.blocks)
        self.tree.set_attr(nodeid, attr)

    def tell_forget(self, nodeid: NodeId) -> None:
        """The kernel forgets an inode, which the lane does not know all about."""
        try:
            path = self.tree.path(nodeid)
        except OSError:
            return  # ESTALE: it is not known any more, so nothing will be decided
        self.events.tell("forget", path or b"", "" if path is not None else "it has no name any more")

    def close(self) -> None:
        """Put everything on disk and give everything back."""
        if self.upper is not None:
            if not self.volatile:
                sys.syncfs(self.upper.layer.fd)
            self.upper.close()
        for layer in self.layers[1:]:
            close = getattr(layer, "close", None)
            if close is not None:
                close()


def open_stack(params: Params, lowers: Sequence[Layer] | None = None, *, inos: InoMap | None = None) -> Stack:
    """Open all that `params` names.

    Args:
        params: the mount options.
        lowers: the layers of an image, top first; None: the directories `params.lowerdirs`.
        inos: the numbering of file systems that `lowers` use, if they are directories.

    Raises:
        MountError: with one line that says what cannot be used, and why.
    """
    inos = inos or InoMap()
    upper, userxattr = None, params.userxattr
    if params.upperdir is not None and params.workdir is not None and not params.read_only:
        upper, userxattr = _open_upper(params, inos)
    try:
        directories = lowers is None
        if lowers is None:
            prefixes = (USER, TRUSTED) if userxattr else (TRUSTED, USER)
            lowers = [_open_lower(path, inos, prefixes, oci=params.oci_whiteouts) for path in params.lowerdirs]
            lowers += [_open_lower(path, inos, prefixes, oci=False, data_only=True) for path in params.datadirs]
        if params.upperdir is not None and upper is None:
            # Nothing can be written, so an upperdir is a layer like the others, but for `.wh.` names.
            lowers = [_open_lower(params.upperdir, inos, (TRUSTED, USER), oci=False), *lowers]
        kept = _cut_below_opaque_root(lowers)
        cut = len(lowers) - len(kept)
        return Stack(kept, upper, params, kernel_userxattr=bool(userxattr) and directories, cut=cut)
    except BaseException:
        if upper is not None:
            upper.close()
        raise


def _cut_below_opaque_root(lowers: Sequence[Layer]) -> list[Layer]:
    """A tar layer with `.wh..wh..opq` at its root hides all layers below it."""
    kept: list[Layer] = []
    for layer in lowers:
        kept.append(layer)
        if layer.root_opaque:
            break
    return kept


def _open_lower(
    path: bytes, inos: InoMap, prefixes: tuple[bytes, ...], *, oci: bool, data_only: bool = False
) -> DirLayer:
    try:
        layer = DirLayer(path, inos, prefixes=prefixes, oci=oci)
        layer.data_only = data_only
        layer.override = OVERRIDE_XATTR in map(os.fsencode, os.listxattr(layer.fd))
    except OSError as error:
        raise MountError(f"lowerdir {printable(path)}: {error.strerror}") from error
    return layer


def _open_upper(params: Params, inos: InoMap) -> tuple[Upper, bool]:
    """The upperdir and workdir, claimed; and whether the overlay's xattrs are user.overlay.*."""
    assert params.upperdir is not None
    assert params.workdir is not None
    where = params.upperdir
    try:
        layer = DirLayer(params.upperdir, inos, prefixes=(TRUSTED,))
        inos.ino(os.fstat(layer.fd).st_dev, 0)  # the upperdir's file system is number 0
        try:
            where = params.workdir
            work_fd = _claim_workdir(params, layer)
        except BaseException:
            layer.close()
            raise
    except OSError as error:
        what = "upperdir" if where == params.upperdir else "workdir"
        raise MountError(f"{what} {printable(where)}: {error.strerror}") from error
    userxattr = _choose_userxattr(params, layer, work_fd)
    layer.prefixes = (USER,) if userxattr else (TRUSTED,)
    existing = OVERRIDE_XATTR in map(os.fsencode, os.listxattr(layer.fd))
    direct = params.xattr_permissions == 0 or (
        params.xattr_permissions is None and not existing and owner.probe(work_fd, b"#owner")
    )
    layer.override = not direct
    strategy: owner.Owner = owner.DirectOwner() if direct else owner.OverrideOwner(always=params.override_always)
    return Upper(layer, work_fd, layer.prefixes[0], strategy), userxattr


def _claim_workdir(params: Params, layer: DirLayer) -> int:
    """Lock the workdir, empty it, and return a descriptor of the directory for temporary objects."""
    assert params.workdir is not None
    fd = os.open(params.workdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_dev != os.fstat(layer.fd).st_dev:
            raise MountError("workdir and upperdir must be on the same file system")
        with suppress(FileNotFoundError):
            os.stat(_DIRTY, dir_fd=fd)
            raise MountError(
                f"workdir {printable(params.workdir)}: the last mount was volatile, so the upperdir may be incomplete "
                f"after a crash; remove {printable(os.path.join(params.workdir, _DIRTY))} to use it all the same"
            )
        with suppress(FileExistsError):
            os.mkdir(_WORK, 0o700, dir_fd=fd)
        work_fd = sys.open_beneath(fd, _WORK, os.O_RDONLY | os.O_DIRECTORY)
    finally:
        os.close(fd)
    try:
        try:
            fcntl.flock(work_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MountError(f"workdir {printable(params.workdir)} is in use by another mount") from None
        _empty(work_fd)
        if params.volatile and params.volatile_mark:
            os.makedirs(os.path.join(params.workdir, os.path.dirname(_DIRTY)), exist_ok=True)
            os.close(os.open(os.path.join(params.workdir, _DIRTY), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except BaseException:
        os.close(work_fd)
        raise
    return work_fd


def _empty(work_fd: int) -> None:
    """Remove what an earlier mount left in workdir/work.  Kernel: ovl_workdir_cleanup()."""
    for entry in os.listdir(work_fd):
        name = os.fsencode(entry)
        try:
            os.unlink(name, dir_fd=work_fd)
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.EPERM):
                raise
            remove_tree(work_fd, name)


def _choose_userxattr(params: Params, layer: DirLayer, work_fd: int) -> bool:
    """Whether the overlay's own xattrs go to user.overlay.*: asked for, used before here, or all that we may set."""
    if params.userxattr is not None:
        return params.userxattr
    if OVERRIDE_XATTR in map(os.fsencode, os.listxattr(layer.fd)):
        return True
    try:
        os.setxattr(work_fd, TRUSTED + b"probe", b"y")
        os.removexattr(work_fd, TRUSTED + b"probe")
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP):
            return True
        raise
    return False
