"""Decompression: every framing that tools write, and no silent end."""

import bz2
import gzip
import lzma
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zstandard

from ovlfs.errors import ImageError
from ovlfs.image import blob as blob_module
from ovlfs.image.blob import decompress, output_limit, sniff

PLAIN = bytes(random.Random(1).choices(b"abcdefgh\0", k=300_000)) + bytes(2_000_000) + b"end"
SKIPPABLE = b"\x5a\x2a\x4d\x18" + struct.pack("<I", 70_000) + bytes(70_000)


def zstd(raw: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(raw)


def zstd_streamed(raw: bytes) -> bytes:
    """One frame without content size, with a checksum, as skopeo and the zstd tool write it."""
    compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    return compressor.compress(raw) + compressor.flush()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": zstd_streamed,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
}
KINDS = list(COMPRESS)


def pieces(raw: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(raw), size):
        yield raw[at : at + size]


def unpack(raw: bytes, size: int = 1 << 18, limit: int = 1 << 30, kind: str | None = None) -> bytes:
    return b"".join(decompress(pieces(raw, size), sniff(raw[:6]) if kind is None else kind, "x.tar", limit))


@pytest.fixture(params=["isal", "zlib"])
def gzip_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both gzip decoders: isal where it is installed, zlib everywhere."""
    name: str = request.param
    if name == "zlib":
        import zlib

        monkeypatch.setattr(blob_module, "_gzip", lambda: (blob_module._Zlib, b"\x1f\x8b", "gzip", zlib.error))
    return name


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_decompress_single_stream_in_any_pieces(kind: str, size: int, gzip_by: str) -> None:
    """How the stored bytes are cut makes no difference."""
    plain = PLAIN if size > 7 else PLAIN[:20_000]

    assert unpack(COMPRESS[kind](plain), size) == plain


@pytest.mark.parametrize("kind", KINDS)
def test_decompress_several_streams_is_all_of_them(kind: str, gzip_by: str) -> None:
    """Members, frames and streams behind the first count."""
    raw = COMPRESS[kind](PLAIN) + COMPRESS[kind](b"") + COMPRESS[kind](b"more")

    assert unpack(raw) == PLAIN + b"more"


@pytest.mark.parametrize("kind", KINDS)
def test_decompress_empty_stream_is_empty(kind: str, gzip_by: str) -> None:
    assert unpack(COMPRESS[kind](b"")) == b""


@pytest.mark.parametrize("kind", KINDS)
def test_decompress_trailing_zeros_are_accepted(kind: str, gzip_by: str) -> None:
    """Some generators pad with NULs (umoci#360); xz pads in fours."""
    assert unpack(COMPRESS[kind](PLAIN) + bytes(512)) == PLAIN


@pytest.mark.parametrize("kind", KINDS)
def test_decompress_trailing_garbage_is_an_error(kind: str, gzip_by: str) -> None:
    with pytest.raises(ImageError, match=r"^x\.tar at byte \d+: garbage behind the "):
        unpack(COMPRESS[kind](PLAIN) + b"garbage")


@pytest.mark.parametrize("kind", KINDS)
def test_decompress_zeros_then_garbage_is_an_error(kind: str, gzip_by: str) -> None:
    with pytest.raises(ImageError, match="garbage behind the "):
        unpack(COMPRESS[kind](PLAIN) + bytes(8) + b"garbage!")


@pytest.mark.parametrize("kind", KINDS)
def test_decompress_truncated_anywhere_is_an_error(kind: str, gzip_by: str) -> None:
    """No cut goes unnoticed, not even one that the decoder's library is silent about."""
    raw = COMPRESS[kind](b"some text, some text, and more text")
    for length in range(6, len(raw)):
        with pytest.raises(ImageError, match=r"^x\.tar at byte \d+: .*(cut off|garbage|damaged)"):
            unpack(raw[:length])


@pytest.mark.parametrize("kind", KINDS)
def test_decompress_damaged_is_an_error(kind: str, gzip_by: str) -> None:
    """A changed byte in the checksum or in the data is found."""
    raw = bytearray(COMPRESS[kind](PLAIN))
    raw[len(raw) // 2] ^= 0x55
    with pytest.raises(ImageError, match=r"^x\.tar at byte \d+: "):
        unpack(bytes(raw))
    raw = bytearray(gzip.compress(PLAIN))
    raw[-6] ^= 1
    with pytest.raises(ImageError, match="damaged gzip"):
        unpack(bytes(raw))


def test_decompress_xz_padding_between_streams() -> None:
    """Zeros in fours may stand between xz streams; three of them may not."""
    one, two = lzma.compress(b"one"), lzma.compress(b"two")

    assert unpack(one + bytes(4) + two) == b"onetwo"
    with pytest.raises(ImageError, match="garbage behind the xz stream"):
        unpack(one + bytes(3) + two)


def test_decompress_zstd_skippable_frames_anywhere() -> None:
    """First (which skopeo fails on), between and last."""
    frame = zstd(PLAIN)

    assert sniff(SKIPPABLE[:6]) == "zstd"
    assert unpack(SKIPPABLE + frame + SKIPPABLE + frame + SKIPPABLE) == PLAIN * 2
    assert unpack(SKIPPABLE) == b""


def test_decompress_zstd_skippable_frame_that_lies_about_its_length() -> None:
    """4 GiB said, 10 bytes there: an error at once, no memory taken."""
    with pytest.raises(ImageError, match="a skippable zstd frame is cut off"):
        unpack(b"\x50\x2a\x4d\x18\xff\xff\xff\xff" + bytes(10))


@pytest.mark.parametrize("level", [1, 3, 19])
def test_decompress_zstd_with_and_without_content_size(level: int) -> None:
    """Single-segment, sized and unsized frames, incompressible and RLE blocks."""
    noise = random.Random(2).randbytes(400_000)
    for raw in (b"", b"x", b"x" * 255, b"x" * 256, noise, noise[:65_792], bytes(5_000_000), PLAIN):
        assert unpack(zstd(raw, level=level)) == raw
        assert unpack(zstd(raw, level=level, write_content_size=False)) == raw


def test_decompress_zstd_window_too_large_is_an_error() -> None:
    """A window of 2 GiB is refused from the frame header, before any memory is taken."""
    with pytest.raises(ImageError, match=r"zstd window of 2147483648 bytes is larger than 134217728"):
        unpack(b"\x28\xb5\x2f\xfd\x00\xa8" + bytes(20))
    huge = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 60) + bytes(20)
    with pytest.raises(ImageError, match="zstd window"):
        unpack(huge)


def test_decompress_zstd_dictionary_is_an_error() -> None:
    with pytest.raises(ImageError, match="needs a dictionary"):
        unpack(b"\x28\xb5\x2f\xfd\x01\x00\x07" + bytes(20))


@pytest.mark.parametrize("kind", KINDS)
def test_decompress_chunks_are_bounded(kind: str) -> None:
    """However well the input compresses, no chunk is much more than a megabyte."""
    raw = COMPRESS[kind](bytes(20 << 20))

    assert max(map(len, decompress(iter([raw]), kind, "x", 1 << 30))) <= (1 << 20) + (1 << 17)


@pytest.mark.parametrize("kind", KINDS)
def test_decompress_over_the_limit_stops(kind: str) -> None:
    """A bomb stops at its limit, and the error says how to lift it."""
    raw = COMPRESS[kind](bytes(20 << 20))
    produced = 0
    with pytest.raises(ImageError, match=r"x\.tar: decompresses to more than 1000000 bytes.*OVLFS_MAX_UNPACKED"):
        for chunk in decompress(iter([raw]), kind, "x.tar", 1_000_000):
            produced += len(chunk)

    assert produced <= 1_000_000


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_decompress_endless_empty_streams_is_an_error(kind: str) -> None:
    """A million empty members cost no more than 65536 of them."""
    with pytest.raises(ImageError, match="more than 65536 empty"):
        unpack(COMPRESS[kind](b"") * 70_000)


def test_output_limit_ratio_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 GiB are always fine, then 200 to 1, 64 GiB at most; the environment overrides all."""
    assert output_limit(10) == 2 << 30
    assert output_limit(1 << 26) == 200 << 26
    assert output_limit(1 << 40) == 64 << 30
    monkeypatch.setenv("OVLFS_MAX_UNPACKED", "123")
    assert output_limit(1 << 40) == 123


@pytest.mark.parametrize("first", [b"", b"B", b"BZh", b"BZhx", b"\x1f\x8b", b"ustar", bytes(6), b"PK\3\4"])
def test_sniff_other_bytes_are_no_compression(first: bytes) -> None:
    assert sniff(first) == ""
