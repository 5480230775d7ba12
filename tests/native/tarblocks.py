"""Tars made by hand, block by block: what tarfile would refuse to write is what the tests need."""

from typing import Any, NamedTuple

from ovlfs import _native
from ovlfs.layer.base import What

BLOCK = 512
END = bytes(2 * BLOCK)

WHITEOUT, DIRECTORY, OTHER, LINK_BELOW = (int(what) for what in What)
OPAQUE, IMPLIED = _native.INDEX_OPAQUE, _native.INDEX_IMPLIED


def octal(number: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, number)


def base256(number: int, width: int) -> bytes:
    return bytes([0x80 if number >= 0 else 0xFF]) + number.to_bytes(width - 1, "big", signed=number < 0)


def with_checksum(block: bytes, *, signed: bool = False) -> bytes:
    block = block[:148] + b" " * 8 + block[156:]
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in block)
    return block[:148] + b"%06o\0 " % total + block[156:]


def header(
    name: bytes,
    kind: bytes = b"0",
    *,
    size: int | bytes = 0,
    mode: int = 0o644,
    uid: int | bytes = 0,
    gid: int | bytes = 0,
    mtime: int | bytes = 0,
    link: bytes = b"",
    major: int = 0,
    minor: int = 0,
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
) -> bytes:
    def number(value: int | bytes, width: int) -> bytes:
        return value.ljust(width, b"\0") if isinstance(value, bytes) else octal(value, width)

    return with_checksum(
        b"".join(
            [
                name.ljust(100, b"\0")[:100],
                octal(mode, 8),
                number(uid, 8),
                number(gid, 8),
                number(size, 12),
                number(mtime, 12),
                b" " * 8,
                kind,
                link.ljust(100, b"\0")[:100],
                magic.ljust(8, b"\0"),
                bytes(64),
                octal(major, 8),
                octal(minor, 8),
                prefix.ljust(167, b"\0")[:167],
            ]
        )
    )


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def record(key: bytes, value: bytes) -> bytes:
    """A PAX record, whose length counts its own digits."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(b"%d" % length) + len(rest) != length:
        length += 1
    return b"%d" % length + rest


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    content = b"".join(record(key, value) for key, value in records)
    return header(b"PaxHeaders/x", kind, size=len(content)) + padded(content)


def gnu_long(kind: bytes, text: bytes) -> bytes:
    return header(b"././@LongLink", kind, size=len(text) + 1) + padded(text + b"\0")


def file(name: bytes, content: bytes = b"", **fields: Any) -> bytes:
    return header(name, size=len(content), **fields) + padded(content)


def directory(name: bytes, mode: int = 0o755, **fields: Any) -> bytes:
    return header(name, b"5", mode=mode, **fields)


def symlink(name: bytes, target: bytes, **fields: Any) -> bytes:
    return header(name, b"2", link=target, **fields)


def hard_link(name: bytes, target: bytes, **fields: Any) -> bytes:
    return header(name, b"1", link=target, **fields)


def index(*parts: bytes, whiteouts: bool = True) -> _native.Index:
    """The index of the tar that the parts make up, end blocks added."""
    return _native.Index(image(*parts, whiteouts=whiteouts))


def image(*parts: bytes, whiteouts: bool = True) -> bytes:
    scanner = _native.TarScanner(whiteouts=whiteouts)
    scanner.feed(b"".join(parts) + END)
    return scanner.finish()


class Node(NamedTuple):
    what: int
    ref: int
    flags: int
    target: bytes


def find(ix: _native.Index, path: bytes) -> Node | None:
    """The node at a path without symlinks."""
    node = Node(DIRECTORY, 0, ix.flags(0), b"")
    for name in path.split(b"/"):
        found = ix.lookup(node.ref, name)
        if found is None:
            return None
        node = Node(*found)
    return node


def at(ix: _native.Index, path: bytes) -> Node:
    node = find(ix, path)
    assert node is not None, path
    return node


def tree(ix: _native.Index) -> dict[bytes, int]:
    """Every path and what is there."""
    out: dict[bytes, int] = {}
    todo = [(b"", 0)]
    while todo:
        base, ref = todo.pop()
        for name, what in ix.list(ref):
            out[base + name] = what
            if what == DIRECTORY:
                found = ix.lookup(ref, name)
                assert found is not None
                todo.append((base + name + b"/", found[1]))
    return out
