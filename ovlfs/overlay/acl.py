"""Which POSIX ACL does a new object inherit?

The kernel asks a FUSE file system to apply a directory's default ACL itself.  The rule: the new object's access ACL is
the directory's default ACL with the owner, mask (or group) and other entries limited by the mode of the call; a new
directory inherits the default ACL too.

Format: include/uapi/linux/posix_acl_xattr.h (a u32 version 2, then entries of u16 tag, u16 permissions, u32 id).
Kernel: fs/posix_acl.c: posix_acl_create(), posix_acl_create_masq().
"""

import errno
import os
import struct

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"

_VERSION = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")
_USER_OBJ, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x04, 0x10, 0x20


def inherit(default: bytes, mode: int) -> tuple[int, bytes]:
    """(permission bits, access ACL) of an object made with `mode` in a directory with the default ACL `default`.

    Raises:
        OSError: EIO for a damaged ACL.
    """
    if default[:4] != _VERSION or (len(default) - 4) % _ENTRY.size:
        raise OSError(errno.EIO, "damaged default ACL")
    entries = [_ENTRY.unpack_from(default, at) for at in range(4, len(default), _ENTRY.size)]
    group_tag = _MASK if any(tag == _MASK for tag, _, _ in entries) else _GROUP_OBJ
    shifts = {_USER_OBJ: 6, group_tag: 3, _OTHER: 0}
    out = bytearray(_VERSION)
    granted = 0
    for tag, permissions, who in entries:
        kept = permissions
        if tag in shifts:
            kept &= mode >> shifts[tag]
            granted |= kept << shifts[tag]
        out += _ENTRY.pack(tag, kept, who)
    return (mode & ~0o777) | granted, bytes(out)


def default_of(path: bytes) -> bytes | None:
    """The default ACL of the directory at `path` (sys.fd_path), or None."""
    try:
        return os.getxattr(path, DEFAULT)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise
