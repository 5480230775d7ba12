"""Where are a blob's bytes, and what are they uncompressed?

A blob is a range of bytes in a file, or a few bytes held by a descriptor.  Its compression is told by its first
bytes, never by its media type: real images have plain layers typed `tar+gzip`, and the other way round.  The
decompressors accept what the reference tools write (several gzip members, zeros behind them, several zstd frames,
skippable frames anywhere, xz padding) and refuse the rest: a stream that is cut off, garbage behind it, a zstd window
or an output that is too large.

Every stream is a generator of chunks of at most 1 MiB or so; output is bounded before it is produced, so that no
input, however small, takes more memory than that.  isal and zstandard are imported when first needed.

Spec: RFC 1952, RFC 8878 (zstd frames), xz-file-format 1.2.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ovlfs.errors import ImageError, UsageError, printable
from ovlfs.ids import Digest
from ovlfs.image.files import FileIdentity, Where, open_file, read_exactly

CHUNK = 1 << 18
"""Bytes read at a time."""
OUTPUT_CHUNK = 1 << 20
"""Bytes decompressed at a time."""

MAX_WINDOW_LOG = 27
"""The zstd window, 128 MiB, that `zstd -d` accepts without --long."""
MAX_XZ_MEMORY = 256 << 20
"""Bytes the xz decoder may take; `xz -9` needs 65 MiB."""
MAX_EMPTY_STREAMS = 65536
"""Members or frames without content in a row; real files have one, if any."""

MAX_OUTPUT = 64 << 30
"""Bytes that one blob may decompress to,"""
FREE_OUTPUT = 2 << 30
"""and below this any ratio is fine; above it,"""
MAX_RATIO = 200
"""at most this many bytes for each stored one.  gzip alone reaches 1032, a layer of programs 2 to 5."""
OUTPUT_ENVIRONMENT = "OVLFS_MAX_UNPACKED"
"""Bytes; takes the place of all three."""

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True, slots=True)
class Blob:
    """`size` bytes at `offset` of the file `parts` below `root` (or `root` itself), or the bytes `inline`.

    `digest` is what a document says of the stored bytes; None where none does (a docker-archive's layers).
    `identity` is the file's when the image was opened: what is read later must be the same file.
    """

    where: Where
    root: bytes
    parts: tuple[bytes, ...]
    offset: int
    size: int
    digest: Digest | None
    identity: FileIdentity | None
    inline: bytes | None = None

    def open(self) -> int:
        """A descriptor of the file, for the caller to close; ImageError if it is another file by now."""
        fd = open_file(self.root, self.parts, self.where)
        if self.identity is not None and FileIdentity.of(fd) != self.identity:
            os.close(fd)
            raise ImageError(f"{self.where}: the file changed while it was being read")
        return fd

    def read(self, limit: int) -> bytes:
        """All the stored bytes, at most `limit`."""
        if self.size > limit:
            raise ImageError(f"{self.where}: has {self.size} bytes, the limit is {limit}")
        if self.inline is not None:
            return self.inline
        fd = self.open()
        try:
            return read_exactly(fd, self.offset, self.size, self.where)
        finally:
            os.close(fd)

    def chunks(self, fd: int | None = None) -> Iterator[bytes]:
        """The stored bytes, from the descriptor `fd` if it is already open."""
        if self.inline is not None:
            yield self.inline
            return
        own = self.open() if fd is None else None
        source = fd if fd is not None else own
        try:
            yield from read_range(source or 0, self.offset, self.size, self.where)
        finally:
            if own is not None:
                os.close(own)


def read_range(fd: int, offset: int, length: int, where: Where) -> Iterator[bytes]:
    """A range of a file in chunks; ImageError where the file ends before it."""
    end = offset + length
    while offset < end:
        chunk = read_exactly(fd, offset, min(CHUNK, end - offset), where)
        offset += len(chunk)
        yield chunk


def sniff(first: bytes) -> str:
    """The compression that the first 6 bytes tell: gzip, zstd, xz, bzip2, or "" for none."""
    if first[:3] == b"\x1f\x8b\x08":
        return "gzip"
    if first[:4] == _ZSTD_MAGIC or _is_skippable(first[:4]):
        return "zstd"
    if first[:6] == b"\xfd7zXZ\x00":
        return "xz"
    if first[:3] == b"BZh" and first[3:4] in b"123456789" and first[3:4]:
        return "bzip2"
    return ""


def output_limit(stored: int, limit: int | None = None) -> int:
    """How many bytes a blob of `stored` bytes may decompress to."""
    if limit is not None:
        return limit
    text = os.environ.get(OUTPUT_ENVIRONMENT)
    if text:
        if not text.isdecimal():
            raise UsageError(f"{OUTPUT_ENVIRONMENT} should be a number of bytes, not '{printable(text[:40])}'")
        return int(text)
    return min(MAX_OUTPUT, max(FREE_OUTPUT, stored * MAX_RATIO))


def decompress(chunks: Iterator[bytes], kind: str, where: Where, limit: int) -> Iterator[bytes]:
    """The uncompressed bytes of a stream of `kind` (see `sniff`); at most `limit` of them.

    Raises ImageError: damaged, cut off, followed by garbage, or too large; naming the byte of the stored stream.
    """
    match kind:
        case "":
            plain = chunks
        case "gzip":
            plain = _streams(chunks, *_gzip(), where, padding="zeros")
        case "xz":
            plain = _streams(chunks, *_xz(), where, padding="fours")
        case "bzip2":
            plain = _streams(chunks, *_bzip2(), where, padding="zeros")
        case "zstd":
            plain = _zstd(chunks, where)
        case _:
            raise AssertionError(kind)
    total = 0
    for chunk in plain:
        total += len(chunk)
        if total > limit:
            raise ImageError(
                f"{where}: decompresses to more than {limit} bytes; if that is meant, set {OUTPUT_ENVIRONMENT}"
            )
        yield chunk


class _Decompressor(Protocol):
    """What bz2, lzma and isal have in common: one stream, bounded output."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Zlib:
    """zlib's decompressobj with the interface of the others."""

    def __init__(self) -> None:
        import zlib  # noqa: PLC0415 - only where isal is missing

        self._object = zlib.decompressobj(31)
        self.eof = False
        self.needs_input = True
        self.unused_data = b""

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        plain = self._object.decompress(self._object.unconsumed_tail + data, max_length)
        self.eof = self._object.eof
        self.unused_data = self._object.unused_data
        self.needs_input = not self._object.unconsumed_tail and len(plain) < max_length
        return plain


_Maker = tuple[Callable[[], _Decompressor], bytes, str, type[Exception]]


def _gzip() -> _Maker:
    import zlib  # noqa: PLC0415 - see the module's docstring

    try:
        from isal import igzip_lib  # noqa: PLC0415
    except ImportError:
        return _Zlib, b"\x1f\x8b", "gzip", zlib.error

    def make() -> _Decompressor:
        decompressor: _Decompressor = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        return decompressor

    damage: Any = igzip_lib.IsalError  # its stubs call the class an instance
    return make, b"\x1f\x8b", "gzip", damage


def _xz() -> _Maker:
    import lzma  # noqa: PLC0415

    return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, MAX_XZ_MEMORY), b"\xfd7zXZ\x00", "xz", lzma.LZMAError


def _bzip2() -> _Maker:
    import bz2  # noqa: PLC0415

    return bz2.BZ2Decompressor, b"BZh", "bzip2", OSError


def _streams(
    chunks: Iterator[bytes],
    make: Callable[[], _Decompressor],
    magic: bytes,
    name: str,
    damage: type[Exception],
    where: Where,
    *,
    padding: str,
) -> Iterator[bytes]:
    """A file of one or more streams, with zeros behind them."""
    source = _Source(chunks, where)
    empty = 0
    while source.more(len(magic)):
        start = source.position
        if start and source.peek(1) == b"\0":
            _only_zeros(source, name, resumes=magic if padding == "fours" else b"")
            continue
        if source.peek(len(magic)) != magic:
            raise source.error(f"garbage behind the {name} stream" if start else f"is not {name}")
        stream = make()
        produced = 0
        # The first piece is small: a file of a million empty members then costs no megabyte of copying for each.
        piece = source.take(4096)
        while True:
            try:
                plain = stream.decompress(piece, OUTPUT_CHUNK)
            except damage as error:
                raise source.error(f"damaged {name} stream that began at byte {start} ({error})") from error
            if plain:
                produced += len(plain)
                yield plain
            if stream.eof:
                break
            if stream.needs_input or (not plain and not piece):
                piece = source.take(CHUNK)
                if not piece:
                    raise source.error(f"the {name} stream that began at byte {start} is cut off")
            else:
                piece = b""
        source.give_back(stream.unused_data)
        empty = 0 if produced else empty + 1
        if empty > MAX_EMPTY_STREAMS:
            raise source.error(f"more than {MAX_EMPTY_STREAMS} empty {name} streams in a row")
    if source.peek(1).strip(b"\0"):
        raise source.error(f"garbage behind the {name} stream")


def _only_zeros(source: "_Source", name: str, resumes: bytes) -> None:
    """Step over zeros up to the end, or (xz) over a multiple of four up to the next stream."""
    start = source.position
    while piece := source.take(CHUNK):
        rest = piece.lstrip(b"\0")
        if rest:
            source.give_back(rest)
            if not resumes or (source.position - start) % 4 or source.peek(len(resumes)) != resumes:
                raise source.error(f"garbage behind the {name} stream")
            return


class _Source:
    """Chunks as one buffer that can be peeked at, with the position in the stored stream for messages."""

    def __init__(self, chunks: Iterator[bytes], where: Where) -> None:
        self._chunks = chunks
        self._where = where
        self._buffer = b""
        self._start = 0
        self.position = 0

    def error(self, rule: str) -> ImageError:
        """An error at the current position."""
        return ImageError(f"{self._where} at byte {self.position}: {rule}")

    def more(self, length: int) -> bool:
        """Have `length` bytes ready if the stream has them; False if it has not."""
        while len(self._buffer) - self._start < length:
            chunk = next(self._chunks, b"")
            if not chunk:
                return False
            self._buffer = self._buffer[self._start :] + chunk
            self._start = 0
        return True

    def peek(self, length: int) -> bytes:
        """The next `length` bytes, fewer at the end."""
        self.more(length)
        return self._buffer[self._start : self._start + length]

    def take(self, at_most: int) -> bytes:
        """The next bytes, at least one and at most `at_most`; b"" at the end."""
        self.more(1)
        piece = self._buffer[self._start : self._start + at_most]
        self._start += len(piece)
        self.position += len(piece)
        return piece

    def exactly(self, length: int, what: str) -> bytes:
        """The next `length` bytes, or an error."""
        if not self.more(length):
            raise self.error(f"{what} is cut off")
        return self.take(length)

    def skip(self, length: int, what: str) -> None:
        """Step over `length` bytes without holding them."""
        while length:
            piece = self.take(min(length, CHUNK))
            if not piece:
                raise self.error(f"{what} is cut off")
            length -= len(piece)

    def give_back(self, tail: bytes) -> None:
        """Return the last bytes taken."""
        self.position -= len(tail)
        if self._buffer[self._start - len(tail) : self._start] == tail:
            self._start -= len(tail)
        else:
            self._buffer = tail + self._buffer[self._start :]
            self._start = 0


# -- zstd
#
# zstandard tells neither that a stream is cut off nor how much a few bytes will become (an RLE block of 4 bytes
# becomes 128 KiB), so the frames and blocks are walked here, which takes 3 bytes of header for each 128 KiB, and
# zstandard only decodes.  A frame that reaches its last block is complete; anything else is an error here.


def _is_skippable(magic: bytes) -> bool:
    return len(magic) == 4 and magic[0] & 0xF0 == 0x50 and magic[1:] == b"\x2a\x4d\x18"


def _zstd(chunks: Iterator[bytes], where: Where) -> Iterator[bytes]:
    import zstandard  # noqa: PLC0415

    context = zstandard.ZstdDecompressor(max_window_size=1 << MAX_WINDOW_LOG)
    source = _Source(chunks, where)
    empty = 0
    while source.more(1):
        start = source.position
        magic = source.peek(4)
        if _is_skippable(magic):
            source.take(4)
            source.skip(int.from_bytes(source.exactly(4, "a skippable zstd frame"), "little"), "a skippable zstd frame")
        elif magic == _ZSTD_MAGIC:
            produced = 0
            try:
                for plain in _zstd_frame(source, context):
                    produced += len(plain)
                    yield plain
            except zstandard.ZstdError as error:
                raise source.error(f"damaged zstd frame that began at byte {start} ({error})") from error
            empty = 0 if produced else empty + 1
            if empty > MAX_EMPTY_STREAMS:
                raise source.error(f"more than {MAX_EMPTY_STREAMS} empty zstd frames in a row")
        elif start and not magic.strip(b"\0"):
            _only_zeros(source, "zstd", resumes=b"")
        else:
            raise source.error("garbage behind the zstd frame" if start else "is not zstd")


def _zstd_frame(source: _Source, context: Any) -> Iterator[bytes]:
    """One frame (RFC 8878, 3.1.1), decoded in pieces of about OUTPUT_CHUNK."""
    what = "a zstd frame"
    pieces = [source.exactly(4, what), source.exactly(1, what)]
    descriptor = pieces[1][0]
    single_segment = bool(descriptor & 0x20)
    if single_segment:
        window = 0
    else:
        pieces.append(source.exactly(1, what))
        base = 1 << (10 + (pieces[-1][0] >> 3))
        window = base + base // 8 * (pieces[-1][0] & 7)
    dictionary = source.exactly((0, 1, 2, 4)[descriptor & 3], what)
    content_length = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    content = source.exactly(content_length, what)
    if single_segment:
        window = int.from_bytes(content, "little") + (256 if content_length == 2 else 0)
    if window > 1 << MAX_WINDOW_LOG:
        raise source.error(f"the zstd window of {window} bytes is larger than {1 << MAX_WINDOW_LOG}")
    if any(dictionary):
        raise source.error("a zstd frame needs a dictionary, which images do not have")
    pieces += [dictionary, content]
    decoder = context.decompressobj()
    room = OUTPUT_CHUNK
    last = False
    while not last:
        head = source.exactly(3, what)
        value = int.from_bytes(head, "little")
        last, kind, length = bool(value & 1), value >> 1 & 3, value >> 3
        if kind == 3 or length > 1 << 17:
            raise source.error("a zstd block is damaged")
        pieces += [head, source.exactly(1 if kind == 1 else length, what)]
        room -= 1 << 17  # no block becomes more
        if last and descriptor & 4:
            pieces.append(source.exactly(4, what))
        if last or room <= 0:
            plain = decoder.decompress(b"".join(pieces))
            if plain:
                yield plain
            pieces.clear()
            room = OUTPUT_CHUNK
    if not decoder.eof:
        raise source.error("a zstd frame does not end where its last block does")
