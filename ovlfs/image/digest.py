"""Which digests are there, and do these bytes have that digest?

A digest is `alg:encoded`.  It is checked against this grammar before it is used for anything, most of all before
it becomes part of a path: `sha256:../../etc/passwd` once was a way out of the store (CVE-2024-3727).  sha256 has
64 lowercase hex digits, sha512 has 128; an algorithm that cannot be computed here is an error, not a pass.

Spec: image-spec descriptor.md "Digests"; config.md "Layer DiffID", "Layer ChainID".
"""

import hashlib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ovlfs.errors import ImageError, printable
from ovlfs.ids import ChainId, DiffId, Digest

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

HEX_DIGITS = {"sha256": 64, "sha512": 128}
"""The algorithms that are computed here, and the length of their hex form."""

_GRAMMAR = re.compile(r"([a-z0-9]+(?:[+._-][a-z0-9]+)*):([a-zA-Z0-9=_-]+)")
_HEX = re.compile(r"[0-9a-f]+")


def parse_digest(text: object, where: str) -> Digest:
    """`text` as a digest, or ImageError naming `where` and what is wrong with it."""
    if not isinstance(text, str):
        raise ImageError(f"{where}: a digest should be text, not {type(text).__name__}")
    shown = printable(text[:100])
    match = _GRAMMAR.fullmatch(text)
    if match is None:
        raise ImageError(f"{where}: '{shown}' is no digest (algorithm:hex)")
    algorithm, encoded = match[1], match[2]
    if algorithm not in HEX_DIGITS:
        raise ImageError(f"{where}: digest algorithm '{printable(algorithm[:40])}' is not supported (sha256, sha512)")
    if len(encoded) != HEX_DIGITS[algorithm] or not _HEX.fullmatch(encoded):
        raise ImageError(f"{where}: '{shown}' should have {HEX_DIGITS[algorithm]} lowercase hex digits")
    return Digest(text)


def split_digest(digest: str) -> tuple[str, str]:
    """Algorithm and hex of a digest that `parse_digest` has accepted."""
    algorithm, _, encoded = digest.partition(":")
    return algorithm, encoded


def hasher(digest: str) -> "Hash":
    """A hash object for the algorithm of `digest`."""
    return hashlib.new(split_digest(digest)[0], usedforsecurity=True)


def sha256(raw: bytes) -> Digest:
    """The sha256 digest of `raw`."""
    return Digest("sha256:" + hashlib.sha256(raw).hexdigest())


def check_digest(raw: bytes, digest: Digest, where: str) -> None:
    """Raise ImageError unless `raw` has `digest`."""
    computed = hasher(digest)
    computed.update(raw)
    if computed.hexdigest() != split_digest(digest)[1]:
        raise ImageError(f"{where}: content has digest {computed.hexdigest()}, but {split_digest(digest)[1]} is named")


def chain_ids(diff_ids: Iterable[DiffId]) -> list[ChainId]:
    """The ChainID of each layer: the first is its DiffID, each next one hashes `below + " " + diff_id`."""
    chain: list[ChainId] = []
    for diff_id in diff_ids:
        chain.append(next_chain_id(chain[-1] if chain else None, diff_id))
    return chain


def next_chain_id(below: ChainId | None, diff_id: DiffId) -> ChainId:
    """The ChainID of a layer that is put on top of `below`."""
    return ChainId(diff_id if below is None else sha256(f"{below} {diff_id}".encode()))
