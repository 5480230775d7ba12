"""What does one COPY or ADD copy, and to where?

Sources are paths in the context or in what --from names, patterns, or here-documents; what they are is known before
anything is copied, since the cache needs their digest and the history shows it.  The destination is a path in the
image: relative to WORKDIR, symlinks followed inside the image; a slash at its end says that it is a directory.

Spec: Dockerfile reference, ADD, COPY; moby builder/dockerfile/copy.go, internals.go: performCopy(), parseChownFlag().
"""

import hashlib
import os
import posixpath
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ovlfs.build import trees
from ovlfs.build.copying import Copier, Rules
from ovlfs.build.dockerfile import Heredoc, Instruction, is_heredoc_word
from ovlfs.build.trees import Found, Source
from ovlfs.build.words import WordError
from ovlfs.errors import ImageError, printable
from ovlfs.image.store import Store
from ovlfs.overlay.stack import Stack
from ovlfs.run.user import MAX_ID

MAX_SOURCES = 1 << 16
_MAX_ACCOUNTS = 4 << 20
_REMOTE = re.compile(r"(?:https?|git|ssh|ftp|oci|docker)://|git@|github\.com/", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to copy.  `name`: what it is called in a directory; `digest`: `file:HEX` or `dir:HEX`."""

    source: Source
    found: Found
    name: bytes
    digest: str


@dataclass(frozen=True, slots=True)
class Words:
    """The words of a COPY or ADD, expanded."""

    sources: tuple[str, ...]
    dest: str
    chown: str
    permissions: int | None


def read_words(instruction: Instruction, words: list[str], expand: Callable[[str], str]) -> Words:
    """Sources, destination and flags.  Raises WordError."""
    name = instruction.name
    if len(words) < 2:
        raise WordError(f"{name} requires at least two arguments, but only one was provided: source and destination")
    *sources, dest = (word if is_heredoc_word(word) else expand(word) for word in words)
    for source in sources:
        if _REMOTE.match(source):
            raise WordError(f"{printable(source[:200])}: remote sources are not fetched; download it into the context")
        if not source:
            raise WordError("a source should not be empty")
    if not dest:
        raise WordError("the destination should not be empty")
    chmod = expand(instruction.flags.get("chmod", ""))
    if chmod and not re.fullmatch(r"0?[0-7]{3,4}", chmod):
        raise WordError(f"--chmod={printable(chmod[:40])} should be an octal mode, such as 755")
    return Words(tuple(sources), dest, expand(instruction.flags.get("chown", "")), int(chmod, 8) if chmod else None)


def destination(words: Words, working_dir: str, count: int, name: str) -> str:
    """The absolute destination; its trailing slash is kept.  moby: normalizeDest()."""
    if count > 1 and not words.dest.endswith("/"):
        raise WordError(
            f"When using {name} with more than one source file, the destination must be a directory and end with a /"
        )
    if words.dest.startswith("/"):
        return words.dest
    joined = posixpath.normpath(posixpath.join("/", working_dir, words.dest))
    return joined + "/" if words.dest.endswith("/") and joined != "/" else joined


def find_items(source: Source, path: str, *, owners: bool, missing: str) -> Iterator[Item]:
    """What one source word means.  `owners`: they are copied too; `missing`: what to say of a path that is not there.

    Raises WordError, PatternError, OSError.
    """
    raw = os.fsencode(path).removeprefix(b"/").removeprefix(b"./")
    paths = source.glob(raw) if trees.has_wildcards(raw) else [raw]
    for count, one in enumerate(paths):
        if count >= MAX_SOURCES:
            raise WordError(f"{printable(path)}: fits more than {MAX_SOURCES} names")
        found = source.find(one)
        if found is None:
            raise WordError(f"{missing}stat {printable(one)}: file does not exist")
        name = posixpath.basename(posixpath.normpath(one))
        yield Item(source, found, name, trees.content_digest(source, found, owners=owners))


def heredoc_directory(heredoc: Heredoc, text: str, directory: bytes) -> bytes:
    """Write a here-document as the one file of the empty directory `directory`, which is returned."""
    name = os.fsencode(heredoc.name)
    if b"/" in name or name in (b".", b".."):
        raise WordError(f"a here-document cannot be called '{printable(name)}': it becomes a file of that name")
    path = directory + b"/" + name
    with open(path, "xb") as file:
        file.write(text.encode("utf-8", "surrogateescape"))
    os.chmod(path, 0o644)
    return directory


def summary(digests: list[str]) -> str:
    """The digests as history shows them.  moby: getSourceHashFromInfos()."""
    if len(digests) == 1:
        return digests[0]
    return "multi:" + hashlib.sha256(",".join(digests).encode()).hexdigest()


def transfer(target: Stack, items: list[Item], dest: str, rules: Rules, *, unpack: Store | None) -> int:
    """Copy into a stack; how many xattrs could not be set.  `unpack`: where local tars are decompressed (ADD)."""
    skipped = 0
    raw = os.fsencode(dest)
    for item in items:
        to = trees.resolve(target, raw)
        if item.found.inode.is_dir:
            copier = Copier(item.source, target, rules)
            copier.contents(item.found, to)
            skipped += copier.skipped
            continue
        if unpack is not None and stat.S_ISREG(item.found.inode.attr.mode):
            with trees.unpacked(item.source, item.found.inode, printable(item.name), unpack) as tree:
                if tree is not None:
                    # As docker does: owners are the tar's, whatever --chown says.
                    copier = Copier(tree, target, Rules(owner=None, all_xattrs=True))
                    copier.contents(trees.resolve(tree.stack, b"/"), to)
                    skipped += copier.skipped
                    continue
        into = raw.endswith(b"/") or (not to.missing and to.inode.is_dir)
        copier = Copier(item.source, target, rules)
        copier.file(item.found, to, item.name if into else None)
        skipped += copier.skipped
    return skipped


# ---- --chown ---------------------------------------------------------------------------------------------------------


def owner_of(text: str, target: Stack) -> tuple[int, int]:
    """USER[:GROUP], numbers or names of the image; a user alone is the group, too.  moby: parseChownFlag()."""
    user, colon, group = text.partition(":")
    if not user or (colon and not group) or ":" in group:
        raise WordError(f"--chown={printable(text[:100])}: should be USER or USER:GROUP")
    return (
        _identity(user, b"etc/passwd", target, "user"),
        _identity(group or user, b"etc/group", target, "group"),
    )


def _identity(text: str, path: bytes, target: Stack, what: str) -> int:
    if text.isascii() and text.isdigit():
        number = text
    else:
        number = next((line[2] for line in _lines(target, path) if line[0] == text), "")
        if not number:
            raise WordError(f"--chown: {what} '{printable(text[:100])}' is not in /{path.decode()} of the image")
    if not (number.isascii() and number.isdigit() and len(number) <= 10 and int(number) <= MAX_ID):
        raise WordError(f"--chown: '{printable(number[:40])}' is no id (0 to {MAX_ID})")
    return int(number)


def _lines(target: Stack, path: bytes) -> list[list[str]]:
    found = trees.resolve(target, path)
    if found.missing:
        return []
    attr = found.inode.attr
    if not stat.S_ISREG(attr.mode) or attr.size > _MAX_ACCOUNTS:
        raise ImageError(f"/{path.decode()} in the image: should be a file of at most {_MAX_ACCOUNTS} bytes")
    text = b"".join(Source(target).chunks(found.inode)).decode("utf-8", "surrogateescape")
    return [line.split(":") for line in text.split("\n") if line.count(":") >= 2]
