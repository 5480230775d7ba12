"""What does one layer say about one name?

A layer is a read-only tree of inodes.  Whatever it is stored in (a tar, a directory), it answers the same six
questions (`Layer`), and it answers them in one language: a name is absent, hidden (a whiteout), a directory or
something else.  The spelling of whiteouts (char 0:0, xattrs, `.wh.` names) is the layer's business and is
never seen above this room.

Kernel: the `struct ovl_path` of fs/overlayfs/ovl_entry.h, and ovl_lookup_single() of namei.c for `Entry`.
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ovlfs.ids import Ino, Name

Ref = int | bytes
"""Names an inode within its layer: an ordinal in a tar index, or a path relative to a directory layer's root."""


class What(enum.IntEnum):
    """What a layer says about a name that it has."""

    WHITEOUT = 0
    """The name is gone: nothing below shows, nothing is here."""
    DIRECTORY = 1
    """A directory, which merges with directories of the same name below unless it is opaque."""
    OTHER = 2
    """A file, symlink, device, fifo or socket: hides everything of that name below."""
    LINK_BELOW = 3
    """A tar's hard link to a path that only layers below have: the same inode as that path's there."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in one directory of one layer.

    `redirect` and `metacopy` are the overlay.* xattrs of directory layers: where to look further down
    (an absolute path in the layers' root, or one name in the same parent), and that the data is further down.
    `implied` marks a directory that a tar never describes, only mentions (`a/b` without `a/`): it is there, but its
    attributes are those of the directory below it, if any.  `target` is the path of a LINK_BELOW, and its `ref` what to
    take when no layer below has that path (a later entry of the same tar), 0: nothing.
    """

    what: What
    ref: Ref = 0
    opaque: bool = False
    implied: bool = False
    redirect: bytes | None = None
    metacopy: bool = False
    target: bytes = b""


@dataclass(frozen=True, slots=True)
class Attr:
    """Attributes of an inode, as stat(2) gives them: sizes in bytes, `blocks` in 512 bytes, times in ns."""

    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes of a file at `logical`, to be read from the layer's `fd` at `physical`.  The rest is holes."""

    logical: int
    length: int
    physical: int


class Layer(Protocol):
    """A read-only tree.  All methods raise OSError (EIO, EUCLEAN) where the store is damaged, never KeyError."""

    @property
    def root(self) -> Ref:
        """The layer's root directory."""

    @property
    def root_opaque(self) -> bool:
        """Whether the layer hides everything below it (`.wh..wh..opq` at a tar's root)."""

    @property
    def data_only(self) -> bool:
        """Whether it merges with nothing, and only has the data of metacopy files whose redirect names it."""

    def is_implied(self, ref: Ref) -> bool:
        """Whether `ref` is a directory that has no attributes of its own (see `Entry`)."""

    def lookup(self, directory: Ref, name: Name) -> Entry | None:
        """What the layer says about `name`; None: nothing.  Raises NotADirectoryError (ENOTDIR)."""

    def attr(self, ref: Ref) -> Attr:
        """The inode's attributes."""

    def ino(self, ref: Ref) -> Ino:
        """The st_ino to show for the inode: unique in the stack, the same at every mount of it."""

    def readlink(self, ref: Ref) -> bytes:
        """A symlink's target.  Raises OSError(EINVAL) for anything else."""

    def xattrs(self, ref: Ref) -> dict[bytes, bytes]:
        """The inode's extended attributes, without the overlay's own (see overlay.xattr), escapes removed."""

    def links(self, ref: Ref) -> list[bytes]:
        """All paths of the inode in this layer, relative to the root: more than one for a hard link group."""

    def extents(self, ref: Ref) -> tuple[int, list[Extent]]:
        """Where a regular file's bytes are: a new descriptor that the caller closes, and the extents in order."""

    def list(self, directory: Ref) -> Iterator[tuple[Name, What]]:
        """Every name that `lookup` would not answer None for, once each, in no particular order."""
