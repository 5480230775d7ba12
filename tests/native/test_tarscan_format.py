"""The tar format: dialects, numbers, extended headers, sparse files, and what is refused."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tarblocks import (
    END,
    OTHER,
    at,
    base256,
    directory,
    file,
    gnu_long,
    hard_link,
    header,
    image,
    index,
    octal,
    padded,
    pax,
    record,
    symlink,
    tree,
    with_checksum,
)

from ovlfs._native import Index, TarError, TarScanner

NS = 10**9
SECONDS_MAX = 9223372035
SAMPLE = b"".join(
    [
        directory(b"./"),
        file(b"a/b", b"x" * 700),
        file(b".wh.z"),
        file(b"d/.wh..wh..opq"),
        symlink(b"l", b"a"),
        file(b"l/q"),
        hard_link(b"h", b"a/b"),
        hard_link(b"i", b"low/f"),
        pax((b"path", b"p/q/r"), (b"SCHILY.xattr.user.k", b"v\0w"), (b"mtime", b"-1.5")),
        file(b"x", b"123"),
        gnu_long(b"L", b"n/" * 60),
        directory(b"y"),
    ]
)


def fails(*parts: bytes, rule: str) -> TarError:
    with pytest.raises(TarError, match=rule) as caught:
        index(*parts)
    return caught.value


def attr(*parts: bytes) -> tuple[int, ...]:
    ix = index(*parts)
    return ix.attr(at(ix, b"x").ref)


# ---- ends ----


@pytest.mark.parametrize("stream", [b"", bytes(512), bytes(1024), bytes(10240), bytes(512) + b"garbage"])
def test_tar_without_entries_is_an_empty_layer(stream: bytes) -> None:
    """No byte, one zero block, many: nothing is in it."""
    scanner = TarScanner()
    scanner.feed(stream)

    assert Index(scanner.finish()).list(0) == []


@pytest.mark.parametrize("end", [b"", bytes(512), bytes(1024), bytes(1024) + file(b"b"), bytes(512) + b"garbage"])
def test_tar_ends_at_first_zero_block_and_the_rest_counts(end: bytes) -> None:
    """What follows a zero block is no archive, but it is hashed: the offset goes on."""
    scanner = TarScanner()
    scanner.feed(file(b"a", b"1") + end)

    assert scanner.offset == 1024 + len(end)
    assert scanner.ended == (end != b"")
    ix = Index(scanner.finish())
    assert tree(ix) == {b"a": OTHER}
    assert ix.tar_end == 1024


def test_tar_cut_at_every_byte_is_an_error() -> None:
    """Except between entries, where nothing shows that more was to come."""
    whole = set()
    wrong = []
    for cut in range(len(SAMPLE)):
        scanner = TarScanner()
        try:
            scanner.feed(SAMPLE[:cut])
            scanner.finish()
            whole.add(cut)
        except TarError as error:
            if "must not end within" not in error.rule or error.offset != cut:
                wrong.append((cut, error))

    assert wrong == []
    assert all(cut % 512 == 0 for cut in whole)
    assert len(whole) == 10  # one before each entry; none behind an extended header


def test_tar_with_extended_header_at_end_is_rejected() -> None:
    """An extended header describes an entry."""
    fails(pax((b"path", b"a")), rule="must be followed by its entry")
    fails(gnu_long(b"L", b"a"), rule="must be followed by its entry")


# ---- headers ----


@pytest.mark.parametrize("entry", [0, 1])
def test_header_with_bad_checksum_is_rejected(entry: int) -> None:
    """At the second entry as at the first, with its offset."""
    bad = bytearray(file(b"b"))
    bad[3] ^= 1
    error = fails(*[file(b"a")] * entry, bytes(bad), rule="must match its checksum")

    assert error.offset == 512 * entry


def test_header_with_signed_checksum_is_accepted() -> None:
    """Ancient tars summed signed bytes."""
    block = with_checksum(header(b"\xe9\xe9x"), signed=True)

    assert block != header(b"\xe9\xe9x")
    assert tree(index(block)) == {b"\xe9\xe9x": OTHER}


@pytest.mark.parametrize("kind", [b"V", b"M", b"7", b"Z", b"D", b"N", b"X", b"\xff", b"8"])
def test_header_of_unknown_type_is_rejected(kind: bytes) -> None:
    """What is not understood is not guessed."""
    assert fails(header(b"a", kind), rule="type must be").name == b"a"


def test_header_types_become_modes() -> None:
    """Files, links, devices and fifos."""
    assert attr(header(b"x", b"\0", mode=0o4755))[0] == 0o104755
    assert attr(symlink(b"x", b"target", mode=0))[:1] + attr(symlink(b"x", b"target"))[5:7] == (0o120777, 6, 0)
    assert attr(header(b"x", b"3", major=1, minor=3))[::4][:2] == (0o020644, os.makedev(1, 3))
    assert attr(header(b"x", b"4", major=259, minor=70000))[4] == os.makedev(259, 70000)
    assert attr(header(b"x", b"6"))[0] == 0o010644
    assert attr(header(b"x/", b"\0"))[0] == 0o040644
    fails(header(b"x", b"3", major=4096), rule="device numbers")


def test_header_prefix_belongs_to_ustar_only() -> None:
    """GNU keeps times where ustar has the prefix, star does so in its last bytes, V7 has nothing."""
    assert set(tree(index(header(b"x", prefix=b"p")))) == {b"p", b"p/x"}
    assert set(tree(index(header(b"x", prefix=b"p", magic=b"ustar  \0")))) == {b"x"}
    assert set(tree(index(header(b"x", prefix=b"p", magic=b"")))) == {b"x"}
    star = b"p".ljust(131, b"\0") + b"00000000000 00000000000 "
    assert set(tree(index(header(b"x", prefix=star.ljust(163, b"\0") + b"tar\0")))) == {b"p", b"p/x"}


@pytest.mark.parametrize("field", ["size", "uid", "gid", "mtime"])
@pytest.mark.parametrize("text", [b"0000x00", b"9999999", b"-1", b"12 34", b"0x10"])
def test_header_number_that_is_not_octal_is_rejected(field: str, text: bytes) -> None:
    """Octal digits between blanks, or base-256."""
    fails(header(b"a", **{field: text}), rule="must be")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [b"17", b"   17", b"0000017", b"17 ", b"   17 \0"])
def test_header_number_with_blanks_is_read(text: bytes) -> None:
    """Writers pad with zeros, spaces and NULs."""
    assert attr(header(b"x", uid=text))[2] == 0o17


@pytest.mark.parametrize(
    "size", [base256(-1, 12), base256(1 << 63, 12), base256((1 << 62) + 1, 12), base256(1 << 85, 12)]
)
def test_header_size_beyond_limits_is_rejected(size: bytes) -> None:
    """Negative, 2^63, more than 2^62."""
    fails(header(b"a", size=size), rule="a size must be")


def test_header_ids_in_base256_are_read_up_to_the_limit() -> None:
    """2^32-1 means "unchanged" to chown(2), so nobody owns a file that way."""
    assert attr(header(b"x", uid=base256(2**32 - 2, 8), gid=base256(3_000_000, 8)))[2:4] == (2**32 - 2, 3_000_000)
    for bad in (2**32 - 1, 2**32, -1):
        fails(header(b"x", uid=base256(bad, 8)), rule="uid and gid")
        fails(header(b"x", gid=base256(bad, 8)), rule="uid and gid")
        fails(pax((b"uid", b"%d" % bad)), file(b"x"), rule="uid and gid")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, 0), (-2, -2), (1 << 33, 1 << 33), (1 << 62, SECONDS_MAX), (1 << 80, SECONDS_MAX), (-(1 << 80), -SECONDS_MAX)],
)
def test_header_mtime_in_base256_saturates(seconds: int, shown: int) -> None:
    """Times before 1970 and after 2242 are kept; beyond what fits 64 bits of ns they stop."""
    assert attr(header(b"x", mtime=base256(seconds, 12)))[8] == shown * NS


# ---- PAX ----


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        (b"12", 12 * NS),
        (b"1350244992.023960108", 1350244992_023960108),
        (b"-2", -2 * NS),
        (b"-1.5", -NS * 3 // 2),
        (b"-0.0000000001", -1),
        (b"0.9999999999", NS - 1),
        (b".5", NS // 2),
        (b"9" * 30, SECONDS_MAX * NS),
        (b"-" + b"9" * 30, -SECONDS_MAX * NS),
    ],
)
def test_pax_mtime_is_read_to_the_ns(text: bytes, ns: int) -> None:
    """Fractions, negative times, more digits than ns; rounded down."""
    assert attr(pax((b"mtime", text)), file(b"x"))[7:] == (ns, ns, ns)


@pytest.mark.parametrize("key", [b"mtime", b"atime", b"ctime"])
@pytest.mark.parametrize("text", [b"x", b"-", b".", b"1.2.3", b"1e5", b" 1"])
def test_pax_time_that_is_no_number_is_rejected(key: bytes, text: bytes) -> None:
    """A time is a decimal number."""
    fails(pax((key, text)), file(b"x"), rule="a PAX time")


def test_pax_records_beat_gnu_long_names_and_headers() -> None:
    """path, then L, then the header; an empty record takes itself back."""
    ix = index(gnu_long(b"L", b"gnu"), gnu_long(b"K", b"to-gnu"), pax((b"path", b"pax")), symlink(b"x", b"y"))
    assert ix.readlink(at(ix, b"pax").ref) == b"to-gnu"
    ix = index(pax((b"path", b"pax"), (b"linkpath", b"to")), pax((b"path", b"")), symlink(b"x", b"y"))
    assert ix.readlink(at(ix, b"x").ref) == b"to"
    assert set(tree(index(gnu_long(b"L", b"one"), gnu_long(b"L", b"two"), file(b"x")))) == {b"two"}


def test_pax_records_count_for_one_entry() -> None:
    """The entry after the next has its own."""
    assert set(tree(index(pax((b"path", b"p"), (b"uid", b"7")), file(b"x"), file(b"y")))) == {b"p", b"y"}


def test_pax_size_and_ids_override_header() -> None:
    """What does not fit the header stands in PAX records."""
    content = b"z" * 1500
    ix = index(pax((b"size", b"1500"), (b"uid", b"3000000"), (b"gid", b"5")), header(b"x"), padded(content), file(b"y"))

    assert ix.attr(at(ix, b"x").ref)[2:6] == (3000000, 5, 0, 1500)
    assert ix.extents(at(ix, b"x").ref) == [(0, 1500, 1536)]
    assert at(ix, b"y").what == OTHER


def test_pax_global_header_means_nothing() -> None:
    """`g` is checked and ignored: it must not give every file an owner."""
    assert attr(pax((b"uid", b"7"), (b"path", b"evil"), kind=b"g"), file(b"x"))[2] == 0
    fails(header(b"g", b"g", size=5) + padded(b"99 a="), file(b"x"), rule="PAX record")


@pytest.mark.parametrize(
    "records",
    [
        b"0 a=b\n",
        b"1 \n",
        b"5 a=b\n",
        b"7 a=b\n",
        b"999999 a=b\n",
        b"99999999999999999999999999 a=b\n",
        b"-6 a=b\n",
        b"6 a=bX",
        b"a=b\n",
        b"4 a\n",
        b"5 =b\n",
        b"6 a=b\n\0x",
        b" 6 a=b\n",
    ],
)
@pytest.mark.parametrize("kind", [b"x", b"g"])
def test_pax_record_that_lies_about_its_length_is_rejected(records: bytes, kind: bytes) -> None:
    """0, too short, too long, huge, no newline, no keyword."""
    fails(header(b"p", kind, size=len(records)) + padded(records), file(b"x"), rule="PAX record")


def test_pax_header_over_1_mib_is_rejected() -> None:
    """In one piece or in several; one MiB itself is legal."""
    filler = record(b"comment", b"c" * ((1 << 20) - 17))
    assert len(filler) == 1 << 20
    block = header(b"p", b"x", size=len(filler)) + padded(filler)
    assert tree(index(block, file(b"x"))) == {b"x": OTHER}
    fails(header(b"p", b"x", size=(1 << 20) + 1), rule="1 MiB")
    fails(header(b"p", b"g", size=(1 << 20) + 1), rule="1 MiB")
    fails(header(b"p", b"L", size=(1 << 20) + 1), rule="1 MiB")
    fails(block, pax((b"comment", b"c")), file(b"x"), rule="1 MiB")


# ---- xattrs ----


def test_xattr_values_are_bytes() -> None:
    """NUL, `=`, newline, nothing at all: the value is what the length says."""
    values = {b"user.a": b"\0\x01=\n", b"user.empty": b"", b"security.capability": bytes(range(20))}
    ix = index(pax(*((b"SCHILY.xattr." + key, value) for key, value in values.items())), file(b"x"), file(b"y"))

    assert ix.xattrs(at(ix, b"x").ref) == values
    assert ix.xattrs(at(ix, b"y").ref) == {}


def test_xattr_named_twice_has_last_value() -> None:
    """As with any PAX record."""
    ix = index(pax(*[(b"SCHILY.xattr.user.a", b"%d" % i) for i in range(3)]), file(b"x"))

    assert ix.xattrs(at(ix, b"x").ref) == {b"user.a": b"2"}


@pytest.mark.parametrize(
    "name",
    [
        b"SCHILY.xattr.trusted.overlay.opaque",
        b"SCHILY.xattr.user.overlay.redirect",
        b"SCHILY.xattr.user.fuseoverlayfs.opaque",
        b"SCHILY.xattr.user.containers.override_stat",
        b"SCHILY.xattr.security.selinux",
        b"LIBARCHIVE.xattr.user.a",
        b"SCHILY.acl.access",
    ],
)
def test_xattr_of_other_machinery_is_dropped(name: bytes) -> None:
    """What would steer an overlay, or belongs to the machine that made the tar, does not come in."""
    ix = index(pax((name, b"y")), directory(b"d"))

    assert ix.xattrs(at(ix, b"d").ref) == {}
    assert at(ix, b"d").flags == 0


def test_xattr_limits() -> None:
    """Names of 255 bytes, values of 64 KiB, 1024 of them; not more."""
    ix = index(pax((b"SCHILY.xattr." + b"n" * 255, b"v" * 65536)), file(b"x"))
    assert len(ix.xattrs(at(ix, b"x").ref)[b"n" * 255]) == 65536
    fails(pax((b"SCHILY.xattr." + b"n" * 256, b"")), file(b"x"), rule="1 to 255 bytes")
    fails(pax((b"SCHILY.xattr.", b"")), file(b"x"), rule="1 to 255 bytes")
    fails(pax((b"SCHILY.xattr.a\0b", b"")), file(b"x"), rule="1 to 255 bytes")
    fails(pax((b"SCHILY.xattr.a", b"v" * 65537)), file(b"x"), rule="65536 bytes")
    many = [(b"SCHILY.xattr.user.%d" % i, b"") for i in range(1025)]
    assert len(index(pax(*many[:1024]), file(b"x")).xattrs(1)) == 1024
    fails(pax(*many), file(b"x"), rule="1024 xattrs")


# ---- sparse ----


def gnu_sparse(regions: list[tuple[int, int]], real: int, stored: int, *, more: list[list[tuple[int, int]]]) -> bytes:
    def pack(part: list[tuple[int, int]], room: int) -> bytes:
        return b"".join(octal(o, 12) + octal(n, 12) for o, n in part).ljust(24 * room, b"\0")

    block = bytearray(header(b"x", b"S", size=stored, magic=b"ustar  \0"))
    block[386:483] = pack(regions, 4) + bytes([bool(more)])
    block[483:495] = octal(real, 12)
    out = with_checksum(bytes(block))
    for i, part in enumerate(more):
        out += (pack(part, 21) + bytes([i + 1 < len(more)])).ljust(512, b"\0")
    return out


def test_sparse_old_gnu_with_extension_blocks() -> None:
    """The map goes on in blocks of 21 regions; data follows them without gaps; holes are no blocks."""
    regions = [(i * 4096, 512) for i in range(30)]
    ix = index(
        gnu_sparse(regions[:4], 200000, 30 * 512, more=[regions[4:25], regions[25:]]), bytes(30 * 512), file(b"y")
    )

    assert ix.extents(at(ix, b"x").ref) == [(i * 4096, 512, 1536 + i * 512) for i in range(30)]
    assert ix.attr(at(ix, b"x").ref)[5:7] == (200000, 30)
    assert at(ix, b"y").what == OTHER


def test_sparse_old_gnu_with_endless_extension_blocks_is_rejected() -> None:
    """A map has at most 1 MiB."""
    fails(gnu_sparse([(0, 0)], 0, 0, more=[[]] * 2100), rule="sparse map must not be longer")


def pax_sparse(version: str, regions: list[tuple[int, int]], real: int) -> bytes:
    data = bytes(sum(length for _, length in regions))
    numbers = [number for region in regions for number in region]
    if version == "1.0":
        text = padded(b"".join(b"%d\n" % number for number in [len(regions), *numbers]))
        keys = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"x")]
        return pax(*keys, (b"GNU.sparse.realsize", b"%d" % real)) + file(b"GNUSparseFile.1/x", text + data)
    keys = [(b"GNU.sparse.size", b"%d" % real), (b"GNU.sparse.numblocks", b"%d" % len(regions))]
    if version == "0.1":
        keys += [(b"GNU.sparse.name", b"x"), (b"GNU.sparse.map", b",".join(b"%d" % number for number in numbers))]
    else:
        for offset, length in regions:
            keys += [(b"GNU.sparse.offset", b"%d" % offset), (b"GNU.sparse.numbytes", b"%d" % length)]
    return pax(*keys) + file(b"x", data)


VERSIONS = pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])


@VERSIONS
def test_sparse_pax_formats(version: str) -> None:
    """0.0 repeats records, 0.1 has a list, 1.0 puts the map in front of the data."""
    ix = index(pax_sparse(version, [(100, 200), (300, 50), (4096, 10), (9000, 0)], 9000), file(b"y"))
    extents = ix.extents(at(ix, b"x").ref)

    assert [extent[:2] for extent in extents] == [(100, 250), (4096, 10)]
    assert extents[1][2] - extents[0][2] == 250
    assert ix.attr(at(ix, b"x").ref)[5:7] == (9000, 1)
    assert at(ix, b"y").what == OTHER


@VERSIONS
@pytest.mark.parametrize("regions", [[(100, 200), (200, 50)], [(300, 10), (100, 10)], [(990, 20)], [(2000, 0)]])
def test_sparse_map_that_overlaps_or_leaves_file_is_rejected(version: str, regions: list[tuple[int, int]]) -> None:
    """Regions ascend, do not overlap, and end within the file."""
    fails(pax_sparse(version, regions, 1000), rule="regions of a sparse map")


@VERSIONS
def test_sparse_file_of_holes_only(version: str) -> None:
    """2^60 bytes of nothing are no data."""
    ix = index(pax_sparse(version, [(1 << 60, 0)], 1 << 60))

    assert ix.attr(at(ix, b"x").ref)[5:7] == (1 << 60, 0)
    assert ix.extents(at(ix, b"x").ref) == []


def test_sparse_map_lies_are_rejected() -> None:
    """Text, odd numbers, wrong totals, more regions than a map can hold, missing sizes."""
    one = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"10")]
    for text in (b"x\n", b"\n", b"1\n0\n5\n", b"99999999999999999999\n", b"10000000\n", b"1\n0\n-1\n"):
        fails(pax(*one), file(b"x", padded(text)), rule="sparse map")
    fails(pax(*one), file(b"x", b"1\n"), rule="sparse map")
    fails(pax(*one[:2]), file(b"x", padded(b"0\n")), rule="real size")
    fails(pax((b"GNU.sparse.major", b"2")), file(b"x"), rule="0.0, 0.1 or 1.0")
    size = (b"GNU.sparse.size", b"10")
    fails(pax(size, (b"GNU.sparse.map", b"0,1,2")), file(b"x", b"1"), rule="pairs")
    fails(pax(size, (b"GNU.sparse.map", b"0,a")), file(b"x", b"1"), rule="decimal")
    fails(pax(size, (b"GNU.sparse.map", b"0,2")), file(b"x", b"1"), rule="length of the stored data")
    fails(pax(size, (b"GNU.sparse.map", b"0,1")), file(b"x", b"12"), rule="length of the stored data")
    fails(pax(size, (b"GNU.sparse.numbytes", b"1")), file(b"x", b"1"), rule="pairs")
    fails(pax(size, (b"GNU.sparse.offset", b"1")), file(b"x", b"1"), rule="pairs|length|real size")
    fails(pax(*one, (b"GNU.sparse.realsize", b"9" * 30)), file(b"x"), rule="GNU.sparse numbers")


# ---- limits, feeding ----


def test_limits_of_entries_and_memory() -> None:
    """A caller can lower them; a layer beyond them is refused, not killed."""
    scanner = TarScanner(entries_max=2)
    with pytest.raises(TarError, match="more entries"):
        scanner.feed(file(b"a") * 3)
    scanner = TarScanner(memory_max=300_000)
    with pytest.raises(TarError, match="memory limit"):
        scanner.feed(b"".join(file(b"%090d" % i) for i in range(3000)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 1500), min_size=1, max_size=40))
def test_feed_in_any_pieces_gives_the_same_index(sizes: list[int]) -> None:
    """Where the stream is cut means nothing; what is skippable may be skipped."""
    scanner = TarScanner()
    stream = SAMPLE + END
    position, turn = 0, 0
    while position < len(stream):
        size = sizes[turn % len(sizes)]
        turn += 1
        skip = min(size, scanner.skippable, len(stream) - position)
        if turn % 2 and skip:
            scanner.skip(skip)
            position += skip
        else:
            scanner.feed(memoryview(stream)[position : position + size])
            position = min(position + size, len(stream))
        assert scanner.offset == position

    assert scanner.finish() == image(SAMPLE)


def test_feed_accepts_any_buffer_and_skip_only_data() -> None:
    """bytearray, memoryview, empty ones; headers cannot be skipped."""
    scanner = TarScanner()
    scanner.feed(b"")
    with pytest.raises(ValueError, match="must be fed"):
        scanner.skip(1)
    scanner.feed(bytearray(header(b"x", size=base256(5 << 40, 12))))
    assert scanner.skippable == 5 << 40
    scanner.skip(5 << 40)
    scanner.feed(memoryview(END))
    assert Index(scanner.finish()).attr(1)[5] == 5 << 40


def test_scanner_after_error_or_finish_is_spent() -> None:
    """Nothing more can be asked of it."""
    scanner = TarScanner()
    with pytest.raises(TarError):
        scanner.feed(b"x" * 512)
    with pytest.raises(RuntimeError):
        scanner.feed(b"")
    scanner = TarScanner()
    scanner.finish()
    with pytest.raises(RuntimeError):
        scanner.finish()


# ---- against other readers and writers ----


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(
            st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_characters="/"), min_size=1, max_size=120
        ).filter(lambda name: len(name.encode()) < 256 and name not in {".", ".."}),
        st.tuples(st.binary(max_size=1200), st.integers(0, 0o7777), st.integers(0, 2**32 - 2), st.integers(0, 2**33)),
        max_size=6,
    ),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_tarfile_archives_are_read_as_tarfile_wrote_them(
    files: dict[str, tuple[bytes, int, int, int]], form: int
) -> None:
    """Names, modes, owners, times and data of what the standard library writes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, (content, mode, uid, mtime) in files.items():
            member = tarfile.TarInfo("dir/" + name)
            member.size, member.mode, member.uid, member.mtime = len(content), mode, uid, mtime
            tar.addfile(member, io.BytesIO(content))
    scanner = TarScanner(whiteouts=False)
    scanner.feed(out.getvalue())
    ix = Index(scanner.finish())

    for name, (content, mode, uid, mtime) in files.items():
        ref = at(ix, b"dir/" + name.encode()).ref
        found = ix.attr(ref)
        assert found[:1] + found[2:3] + found[5:6] + found[8:9] == (0o100000 | mode, uid, len(content), mtime * NS)
        stored = b"".join(out.getvalue()[physical : physical + n] for _, n, physical in ix.extents(ref))
        assert stored == content


@pytest.mark.parametrize(
    "form", [["gnu"], ["oldgnu"], *[["posix", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0")]]
)
def test_gnu_tar_sparse_archives_are_read(form: list[str], tmp_path: Path) -> None:
    """Every way in which GNU tar stores a file with holes, long names and links gives the same tree."""
    deep = tmp_path / "src" / ("d" * 120) / ("e" * 120)
    deep.mkdir(parents=True)
    holes = deep / "holes"
    with holes.open("wb") as out:
        for i in range(0, 40, 2):
            out.seek(i * 65536)
            out.write(b"%04d" % i * 1024)
        out.truncate(3 << 20)
    (deep / "plain").write_bytes(b"plain")
    os.link(deep / "plain", deep / "second")
    os.symlink("t" * 300, deep / "ln")
    archive = tmp_path / "a.tar"
    subprocess.run(
        ["tar", "--sparse", f"--format={form[0]}", *form[1:], "-cf", archive, "-C", tmp_path / "src", "."], check=True
    )
    content = archive.read_bytes()
    scanner = TarScanner(whiteouts=False)
    scanner.feed(content)
    ix = Index(scanner.finish())
    base = b"d" * 120 + b"/" + b"e" * 120 + b"/"

    read = bytearray(ix.attr(at(ix, base + b"holes").ref)[5])
    for logical, length, physical in ix.extents(at(ix, base + b"holes").ref):
        read[logical : logical + length] = content[physical : physical + length]
    assert read == holes.read_bytes()
    assert ix.attr(at(ix, base + b"holes").ref)[6] < len(read) // 512
    assert ix.readlink(at(ix, base + b"ln").ref) == b"t" * 300
    assert at(ix, base + b"plain").ref == at(ix, base + b"second").ref
    assert ix.attr(at(ix, base + b"plain").ref)[1] == 2
