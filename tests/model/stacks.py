"""Random stacks of layers, what they mean (flattened by the rules of the image-spec, in thirty lines), and the same
layers written down in every dialect: as tars, and as directories in the kernel's, in OCI's and with xattr whiteouts.

A layer is a list of (path, What).  Paths use few names, so that layers meet.  Kernel, image-spec: layer.md.
"""

import io
import os
import stat
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from hypothesis import strategies as st

from ovlfs import _native
from ovlfs.ids import ROOT_NODEID, NodeId
from ovlfs.layer.directory import TRUSTED, USER, DirLayer, InoMap
from ovlfs.layer.tar import TarLayer
from ovlfs.layer.tree import Tree

Kind = Literal["file", "dir", "symlink", "whiteout", "opaque", "link"]
Dialect = Literal["kernel", "oci", "xattr"]


class Item(NamedTuple):
    """One thing in one layer.  `number` is its mode for a file and a directory, so that layers can be told apart.

    An opaque item is a directory that hides; a link is a second name for the file `target` of its layer.
    """

    kind: Kind
    number: int
    target: str = ""


Content = dict[str, Item]
"""One layer: path to item.  Every parent is a directory of the layer (opaque or not)."""

NAMES = ("a", "b", "c", "dd", "é")


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


@st.composite
def contents(draw: st.DrawFn) -> Content:
    """A layer that fits together: parents are directories, a name is one thing."""
    layer: Content = {}
    paths = draw(st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map("/".join), max_size=12))
    for path in paths:
        if path in layer or any(p in layer and layer[p].kind not in {"dir", "opaque"} for p in _parents(path)):
            continue
        for parent in _parents(path):
            if parent not in layer:
                layer[parent] = Item("dir", draw(st.integers(0, 0o777)))
        files = [name for name, item in layer.items() if item.kind == "file"]
        kinds: list[Kind] = ["file", "dir", "symlink", "whiteout", "opaque"]
        if files:
            kinds.append("link")
        kind = draw(st.sampled_from(kinds))
        target = draw(st.sampled_from(files)) if kind == "link" else ""
        layer[path] = Item(kind, draw(st.integers(0, 0o777)), target)
    return layer


stacks = st.lists(contents(), min_size=1, max_size=6)
"""Layers, the topmost first."""


class Shown(NamedTuple):
    """What the merged tree shows of a path; `layer` and `owner`, the inode's first path there, say whose it is."""

    kind: Literal["file", "dir", "symlink"]
    number: int
    layer: int
    owner: str


def flatten(stack: list[Content]) -> dict[str, Shown]:
    """The truth: apply the layers to a dict, bottom first, as if each were unpacked over what is there."""
    shown: dict[str, Shown] = {}

    def remove(path: str, *, itself: bool) -> None:
        for other in [p for p in shown if p.startswith(path + "/") or (itself and p == path)]:
            del shown[other]

    for number, layer in reversed(list(enumerate(stack))):
        for path, item in layer.items():  # first all that hides what is below,
            if item.kind in {"whiteout", "opaque"}:
                remove(path, itself=item.kind == "whiteout")
        for path, item in sorted(layer.items()):  # then all that is there, parents first
            if item.kind == "whiteout":
                continue
            if item.kind in {"dir", "opaque"}:
                if path in shown and shown[path].kind != "dir":
                    remove(path, itself=True)
                shown[path] = Shown("dir", item.number, number, path)
            else:
                remove(path, itself=True)
                owner = item.target or path
                real = layer[owner]
                shown[path] = Shown("symlink" if real.kind == "symlink" else "file", real.number, number, owner)
    return shown


# ---- the same layers as tars and directories -------------------------------------------------------------------------


def as_tar(layer: Content, number: int) -> TarLayer:
    """Written in the order of the dict, so that whiteouts come before and after their siblings; links last."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, item in sorted(layer.items(), key=lambda pair: pair[1].kind == "link"):
            parent, _, name = path.rpartition("/")
            info = tarfile.TarInfo(path)
            info.mode = item.number
            if item.kind in {"dir", "opaque"}:
                info.type = tarfile.DIRTYPE
            elif item.kind == "symlink":
                info.type, info.linkname = tarfile.SYMTYPE, f"to{item.number}"
            elif item.kind == "link":
                info.type, info.linkname = tarfile.LNKTYPE, item.target
                info.mode = layer[item.target].number  # a link's header counts for the inode
            elif item.kind == "whiteout":
                info.name = f"{parent}/.wh.{name}".lstrip("/")
            else:
                info.size = item.number  # so that layers can be told apart by their bytes, too
            tar.addfile(info, io.BytesIO(bytes(info.size)))
            if item.kind == "opaque":
                tar.addfile(tarfile.TarInfo(path + "/.wh..wh..opq"))
    scanner = _native.TarScanner()
    scanner.feed(stream.getvalue())
    return TarLayer(scanner.finish(), -1, base_offset=0, layer_number=number)


def as_directory(layer: Content, root: Path, inos: InoMap, dialect: Dialect) -> DirLayer:
    """The directory `root`, which must not exist.  The kernel's dialect needs root."""
    root.mkdir()
    for path, item in sorted(layer.items(), key=lambda pair: (pair[1].kind == "link", pair[0])):
        at = root / path
        if item.kind in {"dir", "opaque"}:
            at.mkdir()
            if item.kind == "opaque":
                _make_opaque(at, dialect)
        elif item.kind == "symlink":
            at.symlink_to(f"to{item.number}")
        elif item.kind == "link":
            os.link(root / item.target, at)
        elif item.kind == "whiteout":
            _make_whiteout(at, root, dialect)
        else:
            at.touch()
            at.chmod(item.number)
    for path, item in layer.items():
        if item.kind in {"dir", "opaque"}:
            (root / path).chmod(item.number)
    prefixes = (USER,) if dialect == "xattr" else (TRUSTED,) if dialect == "kernel" else ()
    return DirLayer(bytes(root), inos, prefixes=prefixes, oci=dialect == "oci")


def _make_opaque(path: Path, dialect: Dialect) -> None:
    if dialect == "oci":
        (path / ".wh..wh..opq").touch()
    elif dialect == "kernel":
        os.setxattr(path, "trusted.overlay.opaque", b"y")
    else:
        os.setxattr(path, "user.overlay.opaque", b"y")


def _make_whiteout(path: Path, root: Path, dialect: Dialect) -> None:
    if dialect == "oci":
        (path.parent / f".wh.{path.name}").touch()
    elif dialect == "kernel":
        os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))
    else:
        path.touch()
        os.setxattr(path, "user.overlay.whiteout", b"")
        opaque = path.parent != root and "user.overlay.opaque" in os.listxattr(path.parent)
        if path.parent != root and not opaque:  # an opaque directory has no use for whiteouts
            os.setxattr(path.parent, "user.overlay.opaque", b"x")


# ---- what a tree says ------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What a tree shows of a path."""

    kind: str
    mode: int
    layer: int
    nodeid: NodeId


def walk(tree: Tree) -> dict[str, Seen]:
    """Everything below the root."""
    found: dict[str, Seen] = {}
    todo = [(ROOT_NODEID, "")]
    kinds = {stat.S_IFDIR: "dir", stat.S_IFREG: "file", stat.S_IFLNK: "symlink"}
    while todo:
        directory, prefix = todo.pop()
        for _, name, nodeid in tree.list(directory, 0):
            inode = tree.get(nodeid)
            path = prefix + name.decode()
            kind = kinds[stat.S_IFMT(inode.attr.mode)]
            found[path] = Seen(kind, stat.S_IMODE(inode.attr.mode), inode.lower[0].layer - 1, nodeid)
            if inode.is_dir:
                todo.append((nodeid, path + "/"))
    return found


def same(one: Tree, other: Tree) -> None:
    """Assert that two trees say the same of everything, cookies and counts included."""
    assert {inode.nodeid for inode in one} == {inode.nodeid for inode in other}
    assert len(one) == len(other)
    for left in list(one):
        right = other.get(left.nodeid)
        # Reading a directory changes its atime, and whoever looks second sees that.
        assert replace(left.attr, atime_ns=0) == replace(right.attr, atime_ns=0)
        for field in ("ino", "upper", "lower", "metacopy", "redirect", "upper_ino", "nlookup", "is_linked"):
            assert getattr(left, field) == getattr(right, field), field
        assert one.names(left.nodeid) == other.names(left.nodeid)
        assert one.path(left.nodeid) == other.path(left.nodeid)
        assert one.sources(left) == other.sources(right)
