"""How does a layer become a blob: compressed, with its digest, its diff_id and its size known, in one pass?

The compressors are set up so that the same tar gives the same blob: no name and no time in a gzip header, one thread,
fixed levels.  (Another version of zlib or libzstd may write other bytes; the diff_id stays.)

Spec: image-spec layer.md (media types), RFC 1952, RFC 8878.
"""

import hashlib
import zlib
from typing import Any

from ovlfs.ids import DiffId, Digest
from ovlfs.image.store import write_all

COMPRESSIONS = ("none", "gzip", "zstd")
MEDIA_TYPES = {
    "none": "application/vnd.oci.image.layer.v1.tar",
    "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
}
_GZIP_LEVEL = 6
_ZSTD_LEVEL = 3
_PIECE_BYTES = 1 << 17


class BlobWriter:
    """Writes a layer tar to the descriptor `fd`, which stays the caller's, from its position on.

    Attributes:
        size: bytes written to `fd` so far.
        plain_size: bytes of the tar so far.
    """

    def __init__(self, fd: int, compression: str = "none") -> None:
        assert compression in COMPRESSIONS
        self.compression = compression
        self.size = 0
        self.plain_size = 0
        self._fd = fd
        self._compressor = _compressor(compression)
        self._plain = hashlib.sha256()
        self._stored = hashlib.sha256() if self._compressor else self._plain
        self._pending: list[bytes] = []
        self._pending_bytes = 0

    def write(self, piece: bytes) -> None:
        """The next bytes of the tar."""
        self._pending.append(piece)
        self._pending_bytes += len(piece)
        if self._pending_bytes >= _PIECE_BYTES:
            self._flush()

    def finish(self) -> None:
        """No more bytes come.  The descriptor is not synced."""
        self._flush()
        if self._compressor is not None:
            self._put(self._compressor.flush())

    def _flush(self) -> None:
        tar = b"".join(self._pending)
        self._pending.clear()
        self._pending_bytes = 0
        self.plain_size += len(tar)
        self._plain.update(tar)
        if self._compressor is None:
            self.size += len(tar)
            write_all(self._fd, tar)
        else:
            self._put(self._compressor.compress(tar))

    def _put(self, stored: bytes) -> None:
        self._stored.update(stored)
        self.size += len(stored)
        write_all(self._fd, stored)

    @property
    def diff_id(self) -> DiffId:
        """The digest of the tar.  Precondition: finished."""
        return DiffId(Digest("sha256:" + self._plain.hexdigest()))

    @property
    def digest(self) -> Digest:
        """The digest of what was written to the descriptor.  Precondition: finished."""
        return Digest("sha256:" + self._stored.hexdigest())


def _compressor(compression: str) -> Any:
    if compression == "gzip":
        return zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, 31)  # 31: gzip, and zlib writes no time and no name
    if compression == "zstd":
        import zstandard  # noqa: PLC0415  # only where it is used

        return zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compressobj()
    return None
