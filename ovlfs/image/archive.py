"""Which members does an image archive have, and where are their bytes?

Reads the headers of an uncompressed tar with pread and skips the data, so a 400 MB archive takes milliseconds.
It is strict where stdlib's tarfile is not: a header with a wrong checksum or a member that is cut off is an
error, never a silent end of the archive.  Names are cleaned on both sides; of a name that comes twice the last
one counts, as for tar -x.

This is the *outer* tar of an image only.  Layers, with their owners, xattrs, whiteouts and sparse files, are
scanned by layer/.

Spec: POSIX.1-2017 pax "ustar Interchange Format"; GNU tar manual "GNU tar and POSIX tar".
"""

import enum
import os
from dataclasses import dataclass

from ovlfs.errors import ImageError, printable
from ovlfs.image.files import Where, clean_name, read_exactly

MAX_MEMBERS = 65536
"""An image archive has a few members for each layer.  A tar with more that names no image by then is a rootfs."""
MAX_EXTENSION = 1 << 20
"""Bytes of one PAX header or GNU long name."""
_MAX_OFFSET = 1 << 60
_BLOCK = 512
_ZEROS = bytes(_BLOCK)

MARKERS = (b"manifest.json", b"oci-layout", b"index.json", b"repositories")
"""Members at the root that make a tar an image archive (form.py says which of them are enough)."""
ROOTFS = frozenset({b"usr", b"etc", b"bin"})
"""Names at the root that no image archive has, and no root file system lacks."""


class MemberKind(enum.Enum):
    """What kinds of members an image archive has."""

    FILE = enum.auto()
    SYMLINK = enum.auto()
    HARDLINK = enum.auto()
    OTHER = enum.auto()


_KINDS = {
    b"0": MemberKind.FILE,
    b"\0": MemberKind.FILE,
    b"7": MemberKind.FILE,
    b"1": MemberKind.HARDLINK,
    b"2": MemberKind.SYMLINK,
}
_WITHOUT_DATA = frozenset(b"123456")


@dataclass(frozen=True, slots=True)
class Member:
    """One member: `length` bytes at `offset` of the archive; `link` is the target as written."""

    name: bytes
    kind: MemberKind
    offset: int
    length: int
    link: bytes = b""


@dataclass(frozen=True, slots=True)
class MemberTable:
    """The members by cleaned name.  `complete` is False for a tar that is no image archive: it has a name of ROOTFS,
    or too many members; the rest of it was not read.
    """

    members: dict[bytes, Member]
    complete: bool

    def find(self, name: bytes, where: Where) -> Member:
        """The regular file called `name`, through at most one link; ImageError if there is none.

        Links are followed by looking names up in this table only.  docker 1.10 to 24 and skopeo write a layer that
        two images share as a symlink `../<other>/layer.tar`; a second hop has no writer and is refused.
        """
        cleaned = clean_name(name)
        shown = printable(cleaned[:200])
        member = self.members.get(cleaned)
        if member is None:
            raise ImageError(f"{where}: '{shown}' is not in the archive")
        if member.kind in {MemberKind.SYMLINK, MemberKind.HARDLINK}:
            base = os.path.dirname(cleaned) + b"/" if member.kind is MemberKind.SYMLINK else b""
            target = b"" if member.link.startswith(b"/") else clean_name(base + member.link)
            if not target or _leaves(base + member.link):
                raise ImageError(f"{where}: '{shown}' is a link out of the archive")
            found = self.members.get(target)
            if found is None:
                raise ImageError(f"{where}: '{shown}' links to '{printable(target[:200])}', not in the archive")
            if found.kind is not MemberKind.FILE:
                raise ImageError(f"{where}: '{shown}' links to '{printable(target[:200])}', which is no regular file")
            return found
        if member.kind is not MemberKind.FILE:
            raise ImageError(f"{where}: '{shown}' should be a regular file")
        return member


def _leaves(path: bytes) -> bool:
    """Whether a relative path has a `..` that steps over its start."""
    depth = 0
    for part in path.split(b"/"):
        depth += -1 if part == b".." else part not in {b"", b"."}
        if depth < 0:
            return True
    return False


def read_members(fd: int, size: int, where: Where) -> MemberTable:
    """The members of the tar that fills the first `size` bytes of `fd`.

    The archive ends at the first zero block or, cleanly, at the end of the file.  Raises ImageError naming the byte.
    """
    members: dict[bytes, Member] = {}
    count = 0
    position = 0
    long_name = long_link = None
    pax: dict[bytes, bytes] = {}
    while position < size:
        header = read_exactly(fd, position, min(_BLOCK, size - position), where)
        if len(header) < _BLOCK:
            raise ImageError(f"{where} at byte {position}: the tar ends within a header")
        if header == _ZEROS:
            break
        _check_sum(header, position, where)
        kind = header[156:157]
        length = 0 if kind[0] in _WITHOUT_DATA else _number(header[124:136], position, where)
        start = position + _BLOCK
        if kind in {b"x", b"g", b"L", b"K"}:
            if length > MAX_EXTENSION:
                raise ImageError(f"{where} at byte {position}: a header of {length} bytes, limit {MAX_EXTENSION}")
            _check_end(start, length, size, position, where)
            extension = read_exactly(fd, start, length, where)
            if kind == b"x":
                pax = _pax_records(extension, start, where)
            elif kind == b"L":
                long_name = extension.split(b"\0", 1)[0]
            elif kind == b"K":
                long_link = extension.split(b"\0", 1)[0]
            # A global header ("g") names nothing that an image's members need.
            position = start + _padded(length)
            continue
        if b"size" in pax and kind[0] not in _WITHOUT_DATA:
            length = _pax_size(pax[b"size"], position, where)
        if kind == b"S":
            start = _skip_sparse_map(fd, header, start, size, where)
        _check_end(start, length, size, position, where)
        count += 1
        if count > MAX_MEMBERS:
            if any(marker in members for marker in MARKERS):
                raise ImageError(f"{where}: has more than {MAX_MEMBERS} members, too many for an image")
            return MemberTable(members, complete=False)
        name = pax.get(b"path") or long_name or _ustar_name(header)
        link = pax.get(b"linkpath") or long_link or header[157:257].split(b"\0", 1)[0]
        cleaned = clean_name(name)
        if cleaned.partition(b"/")[0] in ROOTFS:
            return MemberTable(members, complete=False)
        if cleaned:  # the root itself, which docker-drag writes as "/", is no member
            sort = _KINDS.get(kind, MemberKind.OTHER)
            if sort is MemberKind.FILE and name.endswith(b"/"):
                sort = MemberKind.OTHER  # a directory, as tar wrote it before ustar
            members[cleaned] = Member(cleaned, sort, start, length, link)
        long_name = long_link = None
        pax = {}
        position = start + _padded(length)
    return MemberTable(members, complete=True)


def looks_like_tar(block: bytes) -> bool:
    """Whether the first bytes of a file are a tar's: a header with a right checksum, or the zeros of an empty tar."""
    if len(block) < _BLOCK:
        return not block
    block = block[:_BLOCK]
    if block == _ZEROS:
        return True
    try:
        _check_sum(block, 0, "")
    except ImageError:
        return False
    return True


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK


def _check_end(start: int, length: int, size: int, position: int, where: Where) -> None:
    # The padding after the last member may be missing, its data may not.
    if start + length > size:
        raise ImageError(f"{where} at byte {position}: a member of {length} bytes goes beyond the end of the tar")


def _check_sum(header: bytes, position: int, where: Where) -> None:
    stated = _number(header[148:156], position, where)
    plain = sum(header) - sum(header[148:156]) + 8 * 0x20
    if stated == plain:
        return
    high = sum(byte > 127 for byte in header) - sum(byte > 127 for byte in header[148:156])
    if stated != plain - 256 * high:  # old tars summed signed chars
        raise ImageError(f"{where} at byte {position}: not a tar header (wrong checksum)")


def _number(raw: bytes, position: int, where: Where) -> int:
    """An octal or base-256 number that can be a length."""
    if raw[0] & 0x80:
        value = -1 if raw[0] & 0x40 else int.from_bytes(bytes([raw[0] & 0x3F]) + raw[1:], "big")
    else:
        digits = raw.split(b"\0", 1)[0].strip()
        if digits.strip(b"01234567"):
            raise ImageError(f"{where} at byte {position}: a tar header holds '{printable(digits)}' for a number")
        value = int(digits or b"0", 8)
    if not 0 <= value <= _MAX_OFFSET:
        raise ImageError(f"{where} at byte {position}: a tar header holds an impossible number")
    return value


def _pax_size(raw: bytes, position: int, where: Where) -> int:
    if not raw.isdigit() or len(raw) > 18:
        raise ImageError(f"{where} at byte {position}: PAX size '{printable(raw[:40])}' is impossible")
    return int(raw)


def _pax_records(raw: bytes, position: int, where: Where) -> dict[bytes, bytes]:
    """The records of a PAX header: `length key=value` and a newline each."""
    records = {}
    at = 0
    while at < len(raw):
        space = raw.find(b" ", at, at + 20)
        digits = raw[at:space] if space > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        if end <= space + 1 or end > len(raw) or raw[end - 1] != 0x0A or b"=" not in raw[space:end]:
            raise ImageError(f"{where} at byte {position + at}: a PAX record should be 'length key=value'")
        key, _, value = raw[space + 1 : end - 1].partition(b"=")
        records[key] = value
        at = end
    return records


def _ustar_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        if prefix:
            return prefix + b"/" + name
    return name


def _skip_sparse_map(fd: int, header: bytes, start: int, size: int, where: Where) -> int:
    """Where the data of an old GNU sparse member begins: behind its extension blocks."""
    extended = header[482] != 0
    while extended:
        _check_end(start, _BLOCK, size, start, where)
        extended = read_exactly(fd, start, _BLOCK, where)[504] != 0
        start += _BLOCK
    return start
