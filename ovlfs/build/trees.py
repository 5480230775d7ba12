"""Where do COPY and ADD take files from, and where does a path lead?

Everything is a stack of layers: the context is a stack of one directory (its `.wh.` names and overlay.* xattrs mean
nothing), a stage or an image is the stack of its layers, a tar to be unpacked is a stack of one tar.  So one walk reads
them all, and confinement is the layers' own: a symlink is followed by name inside its stack, like in a chroot, and
`..` stops at the root (docker: containerfs.ResolveScopedPath(), symlink.FollowSymlinkInScope()).

What .dockerignore leaves out is not there, also behind a symlink.
"""

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ovlfs.build.ignore import Ignore, compile_glob
from ovlfs.errors import ImageError
from ovlfs.ids import ROOT_NODEID, Name
from ovlfs.image.archive import looks_like_tar
from ovlfs.image.blob import decompress, output_limit, sniff
from ovlfs.image.image import LayerBlob
from ovlfs.image.store import Store, write_all
from ovlfs.layer.directory import DirLayer, InoMap
from ovlfs.layer.open import ImageLayer, open_layer
from ovlfs.layer.tar import TarLayer, scan
from ovlfs.layer.tree import Inode
from ovlfs.overlay import namei, xattr
from ovlfs.overlay.file import Handle
from ovlfs.overlay.params import Params
from ovlfs.overlay.stack import Stack, open_stack

MAX_LINKS = 40
"""Kernel: MAXSYMLINKS."""
CAPABILITY = b"security.capability"
_WILD = frozenset(b"*?[")
_PIECE_BYTES = 1 << 20
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Found:
    """Where a path leads.

    Attributes:
        trail: the inodes from the root to the last that is there.
        names: their names, without the root's.
        missing: the components that are not there.
    """

    trail: tuple[Inode, ...]
    names: tuple[bytes, ...]
    missing: tuple[bytes, ...] = ()

    @property
    def inode(self) -> Inode:
        """What is there."""
        return self.trail[-1]

    @property
    def path(self) -> bytes:
        """The real path of `inode`, relative to the root."""
        return b"/".join(self.names)


def resolve(stack: Stack, path: bytes) -> Found:
    """Where `path` leads, all symlinks followed, from the root.  The inodes of the trail are held in the live tree.

    Raises:
        OSError: ENOTDIR, ELOOP, ENAMETOOLONG.
    """
    trail = [stack.tree.get(ROOT_NODEID)]
    known: list[bytes] = []
    missing: list[bytes] = []
    todo = path.split(b"/")[::-1]
    links = 0
    while todo:
        name = todo.pop()
        if name in (b"", b"."):
            continue
        if name == b"..":
            if missing:
                missing.pop()
            elif known:
                trail.pop()
                known.pop()
            continue
        if missing:
            missing.append(namei.check_name(name))
            continue
        if not trail[-1].is_dir:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fsdecode(path))
        inode = namei.lookup(stack, trail[-1], name)
        if inode is None:
            missing.append(name)
        elif stat.S_ISLNK(inode.attr.mode):
            links += 1
            if links > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fsdecode(path))
            target = namei.readlink(stack, inode)
            if target.startswith(b"/"):
                del trail[1:], known[:]
            todo += target.split(b"/")[::-1]
        else:
            stack.tree.ref(inode.nodeid)
            trail.append(inode)
            known.append(name)
    return Found(tuple(trail), tuple(known), tuple(missing))


@dataclass(frozen=True, slots=True)
class Child:
    """One name in a directory.  `implied`: a directory that is only there for what is in it."""

    name: Name
    path: bytes
    inode: Inode
    implied: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """A tree to take files from."""

    stack: Stack
    ignore: Ignore = field(default_factory=Ignore)

    def find(self, path: bytes) -> Found | None:
        """What `path` leads to; None: nothing, or something that is left out."""
        found = resolve(self.stack, path)
        if found.missing:
            return None
        typed = os.path.normpath(b"/" + path.lstrip(b"/")).lstrip(b"/")
        for one in {typed, found.path} - {b""}:
            if not self._visible(one, found.inode):
                return None
        return found

    def children(self, path: bytes, directory: Inode) -> Iterator[Child]:
        """What is in a directory and not left out, sorted by name."""
        tree = self.stack.tree
        for name, nodeid in sorted((name, nodeid) for _, name, nodeid in tree.list(directory.nodeid, 0)):
            inode = tree.get(nodeid)
            below = b"%s/%s" % (path, name) if path else bytes(name)
            ignored = self._ignored(below)
            if not ignored or self._visible(below, inode):
                yield Child(name, below, inode, ignored or self._implied(inode))

    def glob(self, pattern: bytes) -> list[bytes]:
        """The paths that fit a pattern of filepath.Match, sorted; symlinks on the way are not followed.

        Raises PatternError.
        """
        paths = [b""]
        for part in os.path.normpath(b"/" + pattern).lstrip(b"/").split(b"/"):
            expression = compile_glob(os.fsdecode(part))
            deeper = []
            for path in paths:
                directory = namei.walk(self.stack, path) if path else self.stack.tree.get(ROOT_NODEID)
                if directory is not None and directory.is_dir:
                    deeper += [
                        child.path
                        for child in self.children(path, directory)
                        if expression.fullmatch(os.fsdecode(child.name))
                    ]
            paths = deeper
        return paths

    def _ignored(self, path: bytes) -> bool:
        return bool(self.ignore) and self.ignore.ignored(os.fsdecode(path))

    def _visible(self, path: bytes, inode: Inode) -> bool:
        if not self._ignored(path):
            return True
        # A directory that is left out is there all the same for the exceptions (`!`) in it.
        return inode.is_dir and self.ignore.has_exceptions and next(self.children(path, inode), None) is not None

    def _implied(self, inode: Inode) -> bool:
        if not inode.is_dir:
            return False
        number, ref = inode.lower[0]
        layer = self.stack.layers[number]
        assert layer is not None
        return layer.is_implied(ref)

    def chunks(self, inode: Inode) -> Iterator[bytes]:
        """A regular file's bytes; holes are zeros."""
        handle = Handle(self.stack, inode, os.O_RDONLY)
        try:
            at = 0
            while piece := handle.read(at, _PIECE_BYTES):
                yield piece
                at += len(piece)
        finally:
            handle.close()


def has_wildcards(path: bytes) -> bool:
    """Whether a source is a pattern; a backslash takes the meaning from the next character."""
    at = 0
    while at < len(path):
        if path[at : at + 1] == b"\\":
            at += 1
        elif path[at] in _WILD:
            return True
        at += 1
    return False


# ---- opening ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def context(path: bytes, ignore: Ignore) -> Iterator[Source]:
    """The build context."""
    layer = DirLayer(path, InoMap(), prefixes=())
    stack = open_stack(Params(), [layer])
    try:
        yield Source(stack, ignore)
    finally:
        stack.close()


def open_all(layers: Sequence[LayerBlob], store: Store) -> list[ImageLayer]:
    """The layers (bottom first) for a stack, top first; the caller closes them."""
    opened: list[ImageLayer] = []
    try:
        for number, layer in enumerate(layers):
            opened.append(open_layer(layer, store, number=number))
    except BaseException:
        for one in opened:
            one.close()
        raise
    return opened[::-1]


@contextlib.contextmanager
def image_tree(layers: Sequence[LayerBlob], store: Store) -> Iterator[Source]:
    """The merged tree of a stage or an image."""
    stack = open_stack(Params(), open_all(layers, store))
    try:
        yield Source(stack)
    finally:
        stack.close()


@contextlib.contextmanager
def unpacked(source: Source, inode: Inode, where: str, store: Store) -> Iterator[Source | None]:
    """The tree in a file that is a tar, also a compressed one; None if it is none.

    moby: archive.IsArchivePath(): what decompresses and begins with a tar header.  It is decompressed into the store
    for as long as the block lasts.
    """
    first = next(source.chunks(inode), b"")
    kind = sniff(first[:6])
    begin = first
    if kind:
        try:
            begin = next(decompress(source.chunks(inode), kind, where, output_limit(inode.attr.size)), b"")
        except ImageError:  # it only looks compressed
            begin = b""
    if not looks_like_tar(begin[:_BLOCK]) or not any(begin[:_BLOCK]):
        yield None
        return
    with store.create(b"tmp/unpacked") as temp:
        plain = source.chunks(inode)
        if kind:
            plain = decompress(plain, kind, where, output_limit(inode.attr.size))
        size = 0
        for piece in plain:
            write_all(temp.fd, piece)
            size += len(piece)
        index = scan(temp.fd, 0, size, whiteouts=False, where=where)
        stack = open_stack(Params(), [TarLayer(index, temp.fd, base_offset=0, layer_number=0)])
        try:
            yield Source(stack)
        finally:
            stack.close()


# ---- content ---------------------------------------------------------------------------------------------------------


def content_digest(source: Source, found: Found, *, owners: bool) -> str:
    """What the copied files will be, but for their times: `file:HEX` or `dir:HEX`, as the history of docker shows it.

    The hash is our own: docker hashes the headers of the tar in which the context was sent.  `owners`: they are copied.
    """
    if not found.inode.is_dir:
        return "file:" + _hash_of(source, b"", found.inode, owners=owners)
    whole = hashlib.sha256()
    todo = [Child(Name(b"."), found.path, found.inode)]
    while todo:
        child = todo.pop()
        relative = child.path[len(found.path) :].lstrip(b"/")
        if relative:
            # What only leads to something else is no content of its own.
            kind = b"implied" if child.implied else _hash_of(source, relative, child.inode, owners=owners).encode()
            whole.update(b"%d:%s=%s;" % (len(relative), relative, kind))
        if child.inode.is_dir:
            todo += list(source.children(child.path, child.inode))[::-1]
    return "dir:" + whole.hexdigest()


def _hash_of(source: Source, path: bytes, inode: Inode, *, owners: bool) -> str:
    attr = inode.attr
    hashed = hashlib.sha256()
    owner = (attr.uid, attr.gid) if owners else ()
    hashed.update(repr((path, attr.mode, owner, attr.rdev)).encode())
    hashed.update(
        repr(sorted(xattr.get_all(source.stack, inode).items()) if owners else capability(source, inode)).encode()
    )
    if stat.S_ISLNK(attr.mode):
        hashed.update(namei.readlink(source.stack, inode))
    elif stat.S_ISREG(attr.mode):
        for piece in source.chunks(inode):
            hashed.update(piece)
    return hashed.hexdigest()


def capability(source: Source, inode: Inode) -> bytes | None:
    """File capabilities: the one xattr that docker copies."""
    if not stat.S_ISREG(inode.attr.mode):
        return None
    return xattr.get_all(source.stack, inode).get(CAPABILITY)
