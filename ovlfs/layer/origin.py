"""From which lower inode was this upper object copied up?

The xattr overlay.origin holds the lower inode's file handle.  ovlfs needs it for one thing: st_ino must not change
over copy-up and remounts, so an upper object that has an origin shows the origin's st_ino.

The format is the kernel's `struct ovl_fb` (fs/overlayfs/overlayfs.h; written by copy_up.c: ovl_encode_real_fh(),
read by namei.c: ovl_get_fh(), ovl_decode_real_fh()):

    u8 version = 0, u8 magic = 0xfb, u8 length of all, u8 flags, u8 handle type, u8 uuid[16], handle

A directory layer's handle is the kernel's own (name_to_handle_at(2)), with the uuid of its file system.  An inode
of a tar layer has no file handle; it gets one of type 0xf0 with a uuid of our own and its st_ino.  The kernel
takes a handle with a foreign uuid for an origin on another file system and ignores it (namei.c:
ovl_decode_real_fh()), as it should.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Callable

from ovlfs.ids import Ino
from ovlfs.layer import sys
from ovlfs.layer.directory import DirLayer
from ovlfs.layer.merge import Layers, Source

_HEADER = struct.Struct("=BBBBB16s")
_MAGIC = 0xFB
_TYPE_TAR = 0xF0
_UUID_TAR = b"ovlfs tar layer\0"
_FS_IOC_GETFSUUID = 0x80111500  # _IOR(0x15, 0, struct fsuuid2), include/uapi/linux/fs.h, Linux 6.9
_NO_HANDLE = frozenset((errno.EOPNOTSUPP, errno.EOVERFLOW, errno.EPERM, errno.ENOSYS))
_UNDECODABLE = frozenset((errno.ESTALE, errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS))

# Which handles hold the inode number, and where, for users who may not open by handle (CAP_DAC_READ_SEARCH):
# (type, length) -> (struct format, function of the fields).  Sources: include/linux/exportfs.h (FILEID_*),
# fs/libfs.c: generic_encode_ino32_fh(), mm/shmem.c: shmem_encode_fh(), fs/btrfs/export.c, fs/xfs/xfs_export.c.
_INO_IN_HANDLE: dict[tuple[int, int], tuple[str, Callable[[tuple[int, ...]], int]]] = {
    (0x01, 8): ("=II", lambda words: words[0]),  # ino, generation
    (0x01, 12): ("=III", lambda words: words[1] | words[2] << 32),  # generation, ino low, ino high
    (0x81, 12): ("=QI", lambda words: words[0]),  # ino, generation
    (0x4D, 20): ("=QQI", lambda words: words[0]),  # objectid, root, generation
}


def encode(layers: Layers, source: Source) -> bytes | None:
    """The value of overlay.origin for a copy of `source`; None where its file system has no file handles."""
    layer = layers[source.layer]
    if not isinstance(layer, DirLayer):
        assert layer is not None
        return _pack(_TYPE_TAR, _UUID_TAR, struct.pack("=Q", layer.ino(source.ref)))
    assert isinstance(source.ref, bytes)
    try:
        with layer.located(source.ref) as path:
            kind, handle = sys.name_to_handle(sys.AT_FDCWD, path, sys.AT_SYMLINK_FOLLOW)
    except OSError as error:
        if error.errno in _NO_HANDLE:
            return None
        raise
    return _pack(kind, _uuid(layer.fd), handle)


def _pack(kind: int, uuid: bytes, handle: bytes) -> bytes:
    return _HEADER.pack(0, _MAGIC, _HEADER.size + len(handle), 0, kind, uuid) + handle


def _uuid(fd: int) -> bytes:
    buf = bytearray(17)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFSUUID, buf)
    except OSError:
        return bytes(16)  # before Linux 6.9, or no uuid: the kernel compares it with its own and ignores the origin
    return bytes(buf[1:17]) if buf[0] == 16 else bytes(16)


def decode(layers: Layers, value: bytes) -> Ino | None:
    """The st_ino of the lower inode that an overlay.origin names; None when it cannot be known (any more)."""
    if len(value) <= _HEADER.size:
        return None  # an empty origin says "copied up, from where could not be said" (ovl_get_fh())
    _, magic, length, flags, kind, uuid = _HEADER.unpack_from(value)
    if magic != _MAGIC or length != len(value) or flags:
        return None
    handle = value[_HEADER.size :]
    if kind == _TYPE_TAR and uuid == _UUID_TAR and len(handle) == 8:
        return Ino(struct.unpack("=Q", handle)[0])
    seen: set[int] = set()
    for layer in layers[1:]:
        if isinstance(layer, DirLayer):
            device = os.fstat(layer.fd).st_dev
            if device not in seen and _uuid(layer.fd) == uuid:
                seen.add(device)
                number = _ino_of_handle(layer.fd, kind, handle)
                if number is not None:
                    return layer.inos.ino(device, number)
    return None


def _ino_of_handle(mount_fd: int, kind: int, handle: bytes) -> int | None:
    try:
        fd = sys.open_by_handle(mount_fd, kind, handle, os.O_PATH)
    except OSError as error:
        if error.errno not in _UNDECODABLE:
            raise
        if error.errno != errno.EPERM or (kind, len(handle)) not in _INO_IN_HANDLE:
            return None
    else:
        try:
            return os.fstat(fd).st_ino
        finally:
            os.close(fd)
    form, pick = _INO_IN_HANDLE[kind, len(handle)]
    return pick(struct.unpack(form, handle))
