"""How is a tree of changes written as the tar of an OCI layer, the same bytes for the same changes?

Entries come in one order (`sort_key`), and nothing of this machine, of this moment or of this user gets in: no user
names, no access times, zeros wherever a field has nothing to say.  What the old header (ustar) cannot hold goes into a
PAX header before the entry: long names, large ids, fractions of a second and times before 1970, xattrs
(SCHILY.xattr.NAME, the value as it is), holes (GNU.sparse 1.0).  A name that is gone is an empty file `.wh.NAME`, a
directory that hides what is below has an empty file `.wh..wh..opq`; so a file whose own name begins with `.wh.`
cannot be expressed, and is refused.

Spec: image-spec layer.md ("Representing Changes", "Whiteouts"); POSIX.1-2017 pax; GNU tar manual, "Storing Sparse
Files".  The reader is native/tarscan.c.

Names and targets are bytes; where they are not UTF-8 the PAX header says so (`hdrcharset=BINARY`).
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from ovlfs.errors import LayerError, printable

WHITEOUT_PREFIX = b".wh."
OPAQUE_NAME = b".wh..wh..opq"
NAME_MAX = 255
PATH_MAX = 4096
"""What readers take at most (native/tarscan.h: OVL_TAR_PATH_MAX)."""

_BLOCK = 512
_NANO = 1_000_000_000
_NAME_BYTES = 100
_MAX_ID = 0o7777777
_MAX_SIZE = 0o77777777777
_HOLES_WORTH_BYTES = 4096
"""A file whose holes are smaller than this is written without any."""

_DROPPED_PREFIXES = (b"trusted.overlay.", b"user.overlay.", b"user.fuseoverlayfs.", b"user.containers.override_")
_DROPPED = frozenset((b"security.selinux", b"security.ima", b"security.evm"))

_TYPES = {
    stat.S_IFREG: b"0",
    stat.S_IFLNK: b"2",
    stat.S_IFCHR: b"3",
    stat.S_IFBLK: b"4",
    stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}

Range = tuple[int, int]
"""(offset, length) in bytes."""


def is_portable_xattr(name: bytes) -> bool:
    """Whether an xattr belongs to the tree, not to the overlay or to the machine (as native/tarscan.c: drop_xattr)."""
    return not name.startswith(_DROPPED_PREFIXES) and name not in _DROPPED


@dataclass(frozen=True, slots=True)
class Content:
    """A regular file's bytes: where data is (in order, the rest is holes), and what reads one such range in pieces."""

    ranges: tuple[Range, ...]
    read: Callable[[int, int], Iterator[bytes]]


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a layer.

    Attributes:
        path: from the root, without a slash at either end; b"" is the root itself.
        mode: type and permissions.
        mtime_ns: in nanoseconds since 1970, may be negative.
        target: of a symlink.
        link_to: the path of an earlier entry of which this is another name; nothing but `path` counts then.
        content: of a regular file that is not empty.
    """

    path: bytes
    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    rdev: int = 0
    target: bytes = b""
    link_to: bytes | None = None
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    content: Content | None = None


def whiteout(path: bytes) -> Entry:
    """The entry that says that `path` is gone.  Raises LayerError where its name becomes too long for that."""
    directory, slash, name = path.rpartition(b"/")
    if len(name) + len(WHITEOUT_PREFIX) > NAME_MAX:
        raise LayerError(
            printable(b"/" + path),
            f"an OCI layer cannot delete a name of more than {NAME_MAX - len(WHITEOUT_PREFIX)} bytes",
        )
    return Entry(directory + slash + WHITEOUT_PREFIX + name, stat.S_IFREG)


def opaque(directory: bytes) -> Entry:
    """The entry that says that nothing below `directory` shows through."""
    return Entry(directory + b"/" + OPAQUE_NAME if directory else OPAQUE_NAME, stat.S_IFREG)


def check_path(path: bytes) -> None:
    """Raise LayerError for what an OCI layer cannot hold: a name that begins with `.wh.`."""
    for part in path.split(b"/"):
        if part.startswith(WHITEOUT_PREFIX):
            raise LayerError(
                printable(b"/" + path),
                f"an OCI layer cannot hold the name '{printable(part)}': `.wh.` at its beginning means a deletion",
            )


def sort_key(entry: Entry) -> tuple[bytes, bytes]:
    """The order of entries: by path, a directory before what is in it, `.wh..wh..opq` before everything there."""
    directory, _, name = entry.path.rpartition(b"/")
    if name == OPAQUE_NAME:
        return directory + b"/" if directory else b"", b"\0"
    return entry.path, b""


def write(entries: Iterable[Entry], out: Callable[[bytes], object]) -> None:
    """Write a layer tar of `entries`, which are in order (`sort_key`).

    Raises:
        LayerError: an entry that no layer can hold.
    """
    for entry in entries:
        out(_header(entry))
        if entry.content is not None and entry.link_to is None:
            stored = 0
            for offset, length in _ranges(entry):
                for piece in entry.content.read(offset, length):
                    out(piece)
                    stored += len(piece)
            out(bytes(-stored % _BLOCK))
    out(bytes(2 * _BLOCK))


def _ranges(entry: Entry) -> tuple[Range, ...]:
    """What of the content is stored: all of it, unless the holes are worth it.

    Ranges are of whole blocks, but for the end of the file: GNU tar begins each with a block of its own, other readers
    put them together without padding, and so both find the same.
    """
    assert entry.content is not None
    blocks: list[Range] = []
    for offset, length in entry.content.ranges:
        start = offset - offset % _BLOCK
        end = min(entry.size, offset + length + -(offset + length) % _BLOCK)
        if blocks and start <= sum(blocks[-1]):
            start = blocks.pop()[0]
        blocks.append((start, end - start))
    if entry.size - sum(length for _, length in blocks) < _HOLES_WORTH_BYTES:
        return ((0, entry.size),)
    return tuple(blocks)


def _is_sparse(entry: Entry) -> bool:
    return entry.content is not None and _ranges(entry) != ((0, entry.size),)


def _header(entry: Entry) -> bytes:
    """The header of an entry, with its PAX header before it and its sparse map behind it."""
    kind = stat.S_IFMT(entry.mode)
    name = entry.path or b"."
    if kind == stat.S_IFDIR:
        name += b"/"
    if len(name) > PATH_MAX:
        raise LayerError(
            printable(b"/" + name[:60]) + "...", f"a path of {len(name)} bytes is too long for a layer ({PATH_MAX})"
        )
    records: dict[bytes, bytes] = {}
    typeflag = _TYPES[kind]
    target = entry.target
    size, behind = 0, b""
    if entry.link_to is not None:
        typeflag, target = b"1", entry.link_to
    elif kind == stat.S_IFREG:
        size = entry.size
        if _is_sparse(entry):
            behind = _sparse_map(entry)
            size = len(behind) + sum(length for _, length in _ranges(entry))
            records |= {
                b"GNU.sparse.major": b"1",
                b"GNU.sparse.minor": b"0",
                b"GNU.sparse.name": name,
                b"GNU.sparse.realsize": b"%d" % entry.size,
            }
    if len(name) > _NAME_BYTES and b"GNU.sparse.name" not in records:
        records[b"path"] = name
    if len(target) > _NAME_BYTES:
        records[b"linkpath"] = target
    for key, number, most in ((b"uid", entry.uid, _MAX_ID), (b"gid", entry.gid, _MAX_ID), (b"size", size, _MAX_SIZE)):
        if number > most:
            records[key] = b"%d" % number
    seconds, nanoseconds = divmod(entry.mtime_ns, _NANO)
    if nanoseconds or not 0 <= seconds <= _MAX_SIZE:
        records[b"mtime"] = _time(entry.mtime_ns)
    if entry.link_to is None:
        for key, value in entry.xattrs.items():
            if b"=" in key:
                raise LayerError(
                    printable(b"/" + entry.path),
                    f"a tar cannot hold the xattr '{printable(key)}', with '=' in its name",
                )
            records[b"SCHILY.xattr." + key] = value
    if any(not _is_utf8(records.get(key, b"")) for key in (b"path", b"linkpath", b"GNU.sparse.name")):
        records[b"hdrcharset"] = b"BINARY"
    fields = _Fields(
        name=name if b"GNU.sparse.name" not in records else b"GNUSparseFile.0/" + name.rpartition(b"/")[2],
        mode=stat.S_IMODE(entry.mode),
        uid=entry.uid,
        gid=entry.gid,
        size=size,
        seconds=seconds,
        typeflag=typeflag,
        target=target,
        rdev=entry.rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0,
    )
    return _pax_header(records, name) + _block(fields) + behind


@dataclass(frozen=True, slots=True)
class _Fields:
    """What a ustar header holds; what is too large for its field stands in the PAX header and is cut here."""

    name: bytes
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    size: int = 0
    seconds: int = 0
    typeflag: bytes = b"0"
    target: bytes = b""
    rdev: int = 0


def _block(fields: _Fields) -> bytes:
    """The 512 bytes of a ustar header."""

    def octal(number: int, width: int) -> bytes:
        return b"%0*o\0" % (width - 1, number if 0 <= number < 8 ** (width - 1) else 0)

    before = b"".join(
        (
            fields.name[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0"),
            octal(fields.mode, 8),
            octal(fields.uid, 8),
            octal(fields.gid, 8),
            octal(fields.size, 12),
            octal(fields.seconds, 12),
        )
    )
    after = b"".join(
        (
            fields.typeflag,
            fields.target[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0"),
            b"ustar\x0000",
            bytes(64),  # no names of users and groups: they are this machine's
            octal(os.major(fields.rdev), 8),
            octal(os.minor(fields.rdev), 8),
            bytes(167),
        )
    )
    checksum = sum(before) + sum(after) + 8 * ord(" ")
    return before + b"%06o\0 " % checksum + after


def _pax_header(records: dict[bytes, bytes], name: bytes) -> bytes:
    if not records:
        return b""
    # hdrcharset must come before what it describes; GNU.sparse.* in their order; the rest sorted.
    order = sorted(records, key=lambda key: (key != b"hdrcharset", not key.startswith(b"GNU."), key))
    text = b"".join(_record(key, records[key]) for key in order)
    short = (b"PaxHeaders.0/" + name.rstrip(b"/").rpartition(b"/")[2])[:_NAME_BYTES]
    return _block(_Fields(short, size=len(text), typeflag=b"x")) + text + bytes(-len(text) % _BLOCK)


def _record(key: bytes, value: bytes) -> bytes:
    """`LENGTH key=value` and a newline; the length counts its own digits."""
    rest = b" %s=%s\n" % (key, value)
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return b"%d%s" % (length, rest)


def _time(time_ns: int) -> bytes:
    """Seconds with as many decimals as it takes, `-0.5` for half a second before 1970."""
    seconds, nanoseconds = divmod(abs(time_ns), _NANO)
    sign = b"-" if time_ns < 0 else b""
    fraction = (b".%09d" % nanoseconds).rstrip(b"0") if nanoseconds else b""
    return b"%s%d%s" % (sign, seconds, fraction)


def _sparse_map(entry: Entry) -> bytes:
    """GNU.sparse 1.0: the number of ranges and then each, in decimal lines, filled up to a block."""
    ranges = list(_ranges(entry))
    if not ranges or sum(ranges[-1]) < entry.size:
        ranges.append((entry.size, 0))  # as GNU tar marks a hole at the end
    text = b"%d\n" % len(ranges) + b"".join(b"%d\n%d\n" % one for one in ranges)
    return text + bytes(-len(text) % _BLOCK)


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True
