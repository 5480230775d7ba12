"""The tar of a layer, read by GNU tar and by Python's tarfile: what the old header cannot hold, and holes."""

import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovlfs.errors import LayerError
from ovlfs.image import layer_tar
from ovlfs.image.layer_tar import Content, Entry


def written(*entries: Entry) -> bytes:
    out = io.BytesIO()
    layer_tar.write(sorted(entries, key=layer_tar.sort_key), out.write)
    return out.getvalue()


def read(*entries: Entry) -> list[tarfile.TarInfo]:
    """As Python reads it; bytes of names survive as surrogates."""
    with tarfile.open(fileobj=io.BytesIO(written(*entries)), encoding="utf-8", errors="surrogateescape") as tar:
        return tar.getmembers()


def sparse(size: int, data: dict[int, bytes]) -> Content:
    def piece(offset: int, length: int) -> Iterator[bytes]:
        whole = bytearray(size)
        for at, raw in data.items():
            whole[at : at + len(raw)] = raw
        yield bytes(whole[offset : offset + length])

    return Content(tuple((at, len(raw)) for at, raw in data.items()), piece)


@pytest.mark.parametrize(
    "mtime_ns", [0, 1, 10**9, 1_234_567_890_123_456_789, -1, -(10**9), -1_500_000_000, (1 << 33) * 10**9, 10**18 + 10]
)
def test_times_survive_with_every_nanosecond(mtime_ns: int) -> None:
    (member,) = read(Entry(b"x", stat.S_IFREG, mtime_ns=mtime_ns))
    text = member.pax_headers.get("mtime", str(member.mtime))
    seconds, _, fraction = text.partition(".")
    sign = -1 if text.startswith("-") else 1
    assert sign * (abs(int(seconds)) * 10**9 + int(fraction.ljust(9, "0") or 0)) == mtime_ns


@pytest.mark.parametrize("length", [99, 100, 101, 155, 256, 4000])
def test_names_of_every_length_survive(length: int) -> None:
    name = (b"d" * 80 + b"/") * (length // 81) + b"n" * (length % 81)
    directory, file, link = read(
        Entry(name, stat.S_IFDIR | 0o755),
        Entry(name + b"/f\xff", stat.S_IFREG),
        Entry(name + b"/g", stat.S_IFREG, link_to=name + b"/f\xff"),
    )
    assert os.fsencode(directory.name) == name
    assert os.fsencode(file.name) == name + b"/f\xff"
    assert os.fsencode(link.linkname) == name + b"/f\xff"
    assert link.islnk()


def test_large_ids_and_sizes_survive() -> None:
    (member,) = read(Entry(b"x", stat.S_IFDIR, uid=4_294_967_294, gid=2_097_152))
    assert (member.uid, member.gid) == (4_294_967_294, 2_097_152)
    header = layer_tar._header(
        Entry(b"x", stat.S_IFREG, size=1 << 40, content=Content(((0, 1 << 40),), lambda *_: iter(())))
    )
    assert b" size=1099511627776\n" in header


def test_binary_xattrs_survive() -> None:
    """A PAX value may hold anything, NUL and newline too: its length is stated."""
    value = bytes(range(256))
    raw = written(Entry(b"x", stat.S_IFREG, xattrs={b"security.capability": value, b"user.a": b""}))
    assert b"SCHILY.xattr.security.capability=" + value + b"\n" in raw
    with pytest.raises(LayerError, match=r"cannot hold the xattr 'user\.a=b'"):
        written(Entry(b"x", stat.S_IFREG, xattrs={b"user.a=b": b""}))


@pytest.mark.parametrize(
    ("size", "data"),
    [
        (1 << 20, {}),
        (1 << 20, {0: b"begin"}),
        (1 << 20, {(1 << 20) - 3: b"end"}),
        (3 << 20, {4096: b"x" * 5000, 1 << 20: b"y" * 511, (2 << 20) + 1: b"z"}),
        (1 << 20, dict.fromkeys(range(0, 1 << 20, 8192), b"x")),
    ],
)
def test_holes_are_unpacked_as_holes(tmp_path: Path, size: int, data: dict[int, bytes]) -> None:
    """By GNU tar, with the content that it had; and Python reads the same."""
    entry = Entry(b"dir/file", stat.S_IFREG | 0o644, size=size, content=sparse(size, data))
    raw = written(Entry(b"dir", stat.S_IFDIR | 0o755), entry)
    assert len(raw) < size // 2
    expected = b"".join(sparse(size, data).read(0, size))
    subprocess.run(["tar", "-x", "-S"], input=raw, cwd=tmp_path, check=True)
    assert (tmp_path / "dir/file").read_bytes() == expected
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        file = tar.extractfile("dir/file")
        assert file is not None
        assert file.read() == expected


def test_the_order_of_entries_is_parents_first_and_opaque_before_all() -> None:
    paths = [b"a", b"a/.wh..wh..opq", b"a/.wh.gone", b"a/b", b"a-b", b"", b".wh..wh..opq", b"a/\x01"]
    names = [member.name for member in read(*(Entry(path, stat.S_IFREG) for path in paths))]
    assert names == [".", ".wh..wh..opq", "a", "a-b", "a/.wh..wh..opq", "a/\x01", "a/.wh.gone", "a/b"]


def test_devices_and_modes_survive() -> None:
    (member,) = read(Entry(b"x", stat.S_IFCHR | 0o6755, rdev=os.makedev(4095, 1_048_575)))
    assert (member.devmajor, member.devminor, member.mode, member.ischr()) == (4095, 1_048_575, 0o6755, True)
