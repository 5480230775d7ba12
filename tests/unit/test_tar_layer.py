"""A layer that lies in a tar, seen through the Layer protocol."""

import errno
import io
import os
import tarfile
import tempfile
from collections.abc import Iterator

import pytest

from ovlfs.errors import LayerError
from ovlfs.ids import Name
from ovlfs.layer.base import Attr, Entry, Extent, Layer, What
from ovlfs.layer.tar import INO_BASE, INO_SHIFT, LAYERS_MAX, READ_BYTES, TarLayer, scan

BEFORE = 512
"""The layer's tar does not begin where the file does."""


def make_tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(
            name: str,
            kind: bytes = tarfile.REGTYPE,
            content: bytes = b"",
            link: str = "",
            pax: dict[str, str] | None = None,
        ) -> None:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname, member.mtime = kind, len(content), link, 1.25
            member.pax_headers = pax or {}
            tar.addfile(member, io.BytesIO(content))

        add("etc/hosts", content=b"127.0.0.1 localhost\n")
        add("usr/", tarfile.DIRTYPE)
        add("usr/big", content=b"b" * (3 * READ_BYTES))
        add("usr/again", tarfile.LNKTYPE, link="etc/hosts")
        add("usr/below", tarfile.LNKTYPE, link="bin/sh")
        add("usr/early", tarfile.LNKTYPE, link="usr/late")
        add("usr/late", content=b"late")
        add("usr/.wh.gone")
        add("opt/.wh..wh..opq")
        add("ln", tarfile.SYMTYPE, link="etc")
        add("caps", pax={"SCHILY.xattr.user.k": "v", "SCHILY.xattr.trusted.overlay.opaque": "y"})
    return out.getvalue()


@pytest.fixture
def fd() -> Iterator[int]:
    with tempfile.TemporaryFile() as stored:
        stored.write(b"?" * BEFORE + make_tar())
        stored.flush()
        yield stored.fileno()


@pytest.fixture
def layer(fd: int) -> TarLayer:
    index = scan(fd, BEFORE, os.fstat(fd).st_size - BEFORE, whiteouts=True, where="layer")
    return TarLayer(index, fd, base_offset=BEFORE, layer_number=2)


def at(layer: Layer, path: bytes) -> Entry:
    entry = Entry(What.DIRECTORY, layer.root)
    for name in path.split(b"/"):
        found = layer.lookup(entry.ref, Name(name))
        assert found is not None
        entry = found
    return entry


def test_lookup_tells_what_the_layer_says(layer: TarLayer) -> None:
    """Absent, whiteout, directory (opaque, implied), other, link below with and without a fallback."""
    assert layer.lookup(layer.root, Name(b"no")) is None
    assert at(layer, b"usr/gone") == Entry(What.WHITEOUT)
    assert at(layer, b"etc").implied
    assert not at(layer, b"usr").implied
    assert at(layer, b"opt").opaque
    assert at(layer, b"ln").what is What.OTHER
    assert at(layer, b"usr/below") == Entry(What.LINK_BELOW, target=b"bin/sh")
    assert at(layer, b"usr/early") == Entry(What.LINK_BELOW, at(layer, b"usr/late").ref, target=b"usr/late")
    assert layer.root_entry() == Entry(What.DIRECTORY, 0, implied=True)
    with pytest.raises(NotADirectoryError):
        layer.lookup(at(layer, b"ln").ref, Name(b"x"))


def test_list_names_what_lookup_finds(layer: TarLayer) -> None:
    """Each name once, whiteouts included."""
    assert dict(layer.list(at(layer, b"usr").ref)) == {
        b"big": What.OTHER,
        b"again": What.OTHER,
        b"below": What.LINK_BELOW,
        b"early": What.LINK_BELOW,
        b"late": What.OTHER,
        b"gone": What.WHITEOUT,
    }


def test_attr_is_that_of_the_tar(layer: TarLayer) -> None:
    """One time for all three; blocks of data only."""
    assert layer.attr(at(layer, b"etc/hosts").ref) == Attr(0o100644, 2, 0, 0, 0, 20, 1, *[1_250_000_000] * 3)
    assert layer.attr(layer.root).mode == 0o040755


def test_ino_is_unique_over_layers_and_below_2_63(fd: int, layer: TarLayer) -> None:
    """The number of the layer above, the ordinal below."""
    last = TarLayer(scan(fd, 0, 0, whiteouts=True, where="x"), fd, base_offset=0, layer_number=LAYERS_MAX - 1)

    assert layer.ino(layer.root) == ((INO_BASE + 2) << INO_SHIFT) + 1
    assert last.ino(2**32 - 1) < 2**63
    with pytest.raises(ValueError, match="layer_number"):
        TarLayer(b"", fd, base_offset=0, layer_number=LAYERS_MAX)


def test_extents_read_the_file_where_it_lies(layer: TarLayer) -> None:
    """The offset of the tar within the file is added; the descriptor is the caller's."""
    descriptor, extents = layer.extents(at(layer, b"etc/hosts").ref)

    try:
        assert extents == [Extent(0, 20, extents[0].physical)]
        assert os.pread(descriptor, 20, extents[0].physical) == b"127.0.0.1 localhost\n"
        assert not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)
    with pytest.raises(OSError, match="Invalid argument"):
        layer.extents(layer.root)


def test_links_xattrs_readlink(layer: TarLayer) -> None:
    """All names of the hard link group; no overlay.* xattrs; EINVAL for what is no symlink."""
    assert sorted(layer.links(at(layer, b"etc/hosts").ref)) == [b"etc/hosts", b"usr/again"]
    assert layer.xattrs(at(layer, b"caps").ref) == {b"user.k": b"v"}
    assert layer.readlink(at(layer, b"ln").ref) == b"etc"
    with pytest.raises(OSError, match="Invalid argument"):
        layer.readlink(layer.root)


def test_damage_is_euclean(fd: int) -> None:
    """At open, and later."""
    with pytest.raises(OSError, match="index") as caught:
        TarLayer(b"no index", fd, base_offset=0, layer_number=0)
    assert caught.value.errno == errno.EUCLEAN
    layer = TarLayer(scan(fd, 0, 0, whiteouts=True, where="x"), fd, base_offset=0, layer_number=0)
    for ask in (layer.attr, layer.readlink, layer.xattrs, layer.links, layer.extents, layer.list):
        with pytest.raises(OSError) as caught:
            ask(77)
        assert caught.value.errno == errno.EUCLEAN


def test_scan_of_broken_tar_names_entry_offset_and_rule() -> None:
    """One line, safe to print."""
    with tempfile.TemporaryFile() as stored:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("d/\x1b[31m"))
            member = tarfile.TarInfo("d/\n")
            member.type = b"V"
            tar.addfile(member)
        stored.write(out.getvalue())
        stored.flush()
        with pytest.raises(LayerError) as caught:
            scan(stored.fileno(), 0, len(out.getvalue()), whiteouts=True, where="img layer 1")

    assert caught.value.offset == 512
    assert str(caught.value).startswith("img layer 1: entry 'd/\\n' at byte 512: an entry's type must be")


def test_scan_of_file_shorter_than_stated_is_an_error(fd: int) -> None:
    """The size is checked first; a file that shrinks later gives an error, not a signal."""
    size = os.fstat(fd).st_size
    with pytest.raises(LayerError, match="must hold"):
        scan(fd, BEFORE, size, whiteouts=True, where="layer")
    with pytest.raises(LayerError, match="must not end within"):
        scan(fd, BEFORE, 2048 + 100, whiteouts=True, where="layer")
    read_end, write_end = os.pipe()
    os.close(write_end)
    try:
        with pytest.raises((LayerError, OSError)):
            scan(read_end, 0, 512, whiteouts=True, where="layer")
    finally:
        os.close(read_end)
