"""How does a user without privileges keep owners and device nodes?

In the xattr user.containers.override_stat of an ordinary file or directory that the user owns:
`uid:gid:mode[:type]`, mode in octal, type one of file, dir, symlink, pipe, socket, block-MAJOR-MINOR,
char-MAJOR-MINOR.  A symlink that needs one is a regular file which holds the target.

The format is containers/storage's (pkg/idtools/idtools.go: Stat, ContainersOverrideXattr) and fuse-overlayfs's
(`xattr_permissions=2`, utils.c: override_mode()), so that their tools read what we write.
"""

import errno
import os
import stat
from dataclasses import dataclass

OVERRIDE_XATTR = b"user.containers.override_stat"

_TYPES = {
    b"file": stat.S_IFREG,
    b"dir": stat.S_IFDIR,
    b"symlink": stat.S_IFLNK,
    b"pipe": stat.S_IFIFO,
    b"socket": stat.S_IFSOCK,
    b"block": stat.S_IFBLK,
    b"char": stat.S_IFCHR,
}
_NAMES = {kind: name for name, kind in _TYPES.items()}


@dataclass(frozen=True, slots=True)
class Override:
    """What the xattr says; `file_type` is an S_IF* value, or 0 where it says nothing of the type."""

    uid: int
    gid: int
    permissions: int
    file_type: int = 0
    rdev: int = 0


def parse_override(value: bytes) -> Override:
    """Read an override_stat value.  Raises OSError(EUCLEAN) when it is damaged."""
    parts = value.rstrip(b"\0").split(b":", 3)
    try:
        uid, gid, permissions = int(parts[0]), int(parts[1]), int(parts[2], 8) & 0o7777
        if not (0 <= uid < 0xFFFFFFFF and 0 <= gid < 0xFFFFFFFF):
            raise _damaged(value)
        if len(parts) == 3:
            return Override(uid, gid, permissions)
        # fuse-overlayfs writes "block-8-1", containers/storage also "block-8-1"; "block8:1" is older
        text = parts[3]
        for name, kind in _TYPES.items():
            if text == name and kind not in (stat.S_IFBLK, stat.S_IFCHR):
                return Override(uid, gid, permissions, kind)
            if kind in (stat.S_IFBLK, stat.S_IFCHR) and text.startswith(name):
                major, minor = text[len(name) :].lstrip(b"-").replace(b":", b"-").split(b"-")
                return Override(uid, gid, permissions, kind, os.makedev(int(major), int(minor)))
    except (ValueError, IndexError, OverflowError):
        pass
    raise _damaged(value)


def _damaged(value: bytes) -> OSError:
    return OSError(errno.EUCLEAN, "damaged user.containers.override_stat", os.fsdecode(value))


def format_override(override: Override) -> bytes:
    """The xattr's value."""
    text = b"%d:%d:%04o" % (override.uid, override.gid, override.permissions)
    if not override.file_type:
        return text
    name = _NAMES[override.file_type]
    if override.file_type in (stat.S_IFBLK, stat.S_IFCHR):
        return b"%s:%s-%d-%d" % (text, name, os.major(override.rdev), os.minor(override.rdev))
    return text + b":" + name
