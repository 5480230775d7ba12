"""The live tree, in Python and in C: every method's rules, for both."""

import errno
import gc
import os
import stat
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import archives
import pytest
from archives import hard_link

from ovlfs import _native
from ovlfs.ids import ROOT_NODEID, Ino, Name, NodeId
from ovlfs.layer import merge, open_tree
from ovlfs.layer.base import Attr, Entry, Extent, Layer, Ref, What
from ovlfs.layer.directory import TRUSTED, USER, DirLayer, InoMap
from ovlfs.layer.merge import Source
from ovlfs.layer.origin import encode
from ovlfs.layer.tar import TarLayer
from ovlfs.layer.tree import ABSENT, Tree

FRESH = 1 << 62
FILE = Attr(stat.S_IFREG | 0o644, 1, 0, 0, 0, 5, 8, 1, 2, 3)
DIRECTORY = replace(FILE, mode=stat.S_IFDIR | 0o755, nlink=2)

Make = Callable[..., Tree]


@pytest.fixture(params=["py", "c"])
def make(request: pytest.FixtureRequest) -> Make:
    """`make(upper, lower, ...)`: the tree over a stack, of either kind."""

    def build(*layers: Layer | None) -> Tree:
        return Tree(layers) if request.param == "py" else cast("Tree", _native.Tree(layers))

    return build


class Directories:
    """Makes directory layers.  Contents: bytes a file, None a directory, str a symlink."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.inos = InoMap()
        self.layers: list[DirLayer] = []

    def path(self, number: int) -> Path:
        return self.base / f"layer{number}"

    def make(
        self,
        content: dict[str, bytes | str | None],
        *,
        oci: bool = False,
        override: bool = False,
        prefixes: tuple[bytes, ...] = (TRUSTED, USER),
    ) -> DirLayer:
        root = self.path(len(self.layers))
        root.mkdir()
        for name, what in content.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if what is None:
                path.mkdir(exist_ok=True)
            elif isinstance(what, str):
                path.symlink_to(what)
            else:
                path.write_bytes(what)
        layer = DirLayer(bytes(root), self.inos, prefixes=prefixes, oci=oci, override=override)
        self.layers.append(layer)
        return layer


@pytest.fixture
def directories(scratch: Path) -> Iterator[Directories]:
    made = Directories(scratch)
    yield made
    for layer in made.layers:
        layer.close()


def tar_layer(*members: tuple[str, bytes | str | None] | tarfile.TarInfo, number: int = 0) -> TarLayer:
    """A tar layer.  A TarInfo stands for itself."""
    pairs = ((one.name, one) if isinstance(one, tarfile.TarInfo) else one for one in members)
    scanner = _native.TarScanner()
    scanner.feed(archives.tar_of(pairs))
    return TarLayer(scanner.finish(), -1, base_offset=0, layer_number=number)


class DictLayer:
    """A layer in memory, of a kind that C does not know."""

    root: Ref = b""
    root_opaque = False
    data_only = False

    def __init__(self, content: dict[bytes, Attr | None]) -> None:
        """Paths; None is a whiteout."""
        self.content = content
        self.asked: list[bytes] = []

    def is_implied(self, ref: Ref) -> bool:  # noqa: ARG002
        return False

    def lookup(self, directory: Ref, name: Name) -> Entry | None:
        assert isinstance(directory, bytes)
        path = directory + b"/" + name if directory else name
        self.asked.append(path)
        if path not in self.content:
            return None
        attr = self.content[path]
        if attr is None:
            return Entry(What.WHITEOUT)
        return Entry(What.DIRECTORY if stat.S_ISDIR(attr.mode) else What.OTHER, path)

    def attr(self, ref: Ref) -> Attr:
        assert isinstance(ref, bytes)
        attr = self.content[ref] if ref else DIRECTORY
        assert attr is not None
        return attr

    def ino(self, ref: Ref) -> Ino:
        assert isinstance(ref, bytes)
        return Ino(1000 + sorted([b"", *self.content]).index(ref))

    def readlink(self, ref: Ref) -> bytes:  # noqa: ARG002
        raise AssertionError

    def xattrs(self, ref: Ref) -> dict[bytes, bytes]:  # noqa: ARG002
        raise AssertionError

    def links(self, ref: Ref) -> list[bytes]:  # noqa: ARG002
        raise AssertionError

    def extents(self, ref: Ref) -> tuple[int, list[Extent]]:  # noqa: ARG002
        raise AssertionError

    def list(self, directory: Ref) -> Iterator[tuple[Name, What]]:
        assert isinstance(directory, bytes)
        for path, attr in self.content.items():
            parent, _, name = path.rpartition(b"/")
            if parent == directory:
                what = What.WHITEOUT if attr is None else What.DIRECTORY if stat.S_ISDIR(attr.mode) else What.OTHER
                yield Name(name), what


def at(tree: Tree, path: str) -> NodeId:
    """The nodeid of a path, ABSENT without."""
    nodeid = ROOT_NODEID
    for part in path.encode().split(b"/") if path else []:
        nodeid = tree.lookup(nodeid, Name(part))
        if nodeid == ABSENT:
            break
    return nodeid


def paths(tree: Tree, nodeid: NodeId = ROOT_NODEID, prefix: bytes = b"") -> list[bytes]:
    """All paths of the tree, sorted, directories with a slash."""
    found: list[bytes] = []
    for _, name, child in tree.list(nodeid, 0):
        if tree.get(child).is_dir:
            found += [prefix + name + b"/", *paths(tree, child, prefix + name + b"/")]
        else:
            found.append(prefix + name)
    return sorted(found)


def check(tree: object) -> None:
    if isinstance(tree, _native.Tree):
        tree.check()


def stale(call: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno == errno.ESTALE


# ---- merging -------------------------------------------------------------------------------------------------------


def test_lookup_known_name_answers_the_same_nodeid(make: Make, directories: Directories) -> None:
    """A name is resolved once; the root is 1, an inode's nodeid is its st_ino."""
    tree = make(None, directories.make({"a/b": b"x"}))
    inode = tree.get(at(tree, "a/b"))
    assert at(tree, "a/b") == at(tree, "a/b") == int(inode.ino) == (directories.path(0) / "a/b").stat().st_ino
    assert tree.get(ROOT_NODEID).ino == directories.path(0).stat().st_ino
    assert len(tree) == 3
    assert {one.nodeid for one in tree} == {1, at(tree, "a"), inode.nodeid}


def test_lookup_absent_name_is_zero(make: Make, directories: Directories) -> None:
    tree = make(None, directories.make({"a": b"x"}))
    assert tree.lookup(ROOT_NODEID, Name(b"b")) == ABSENT
    assert tree.lookup(ROOT_NODEID, Name(b"x" * 255)) == ABSENT


def test_lookup_in_a_file_is_enotdir(make: Make, directories: Directories) -> None:
    tree = make(None, directories.make({"a": b"x"}))
    for call in (lambda: tree.lookup(at(tree, "a"), Name(b"b")), lambda: tree.list(at(tree, "a"), 0)):
        with pytest.raises(NotADirectoryError):
            call()


def test_unknown_nodeid_is_estale(make: Make, directories: Directories) -> None:
    tree, nodeid = make(directories.make({}), directories.make({"a": b""})), NodeId(0xDEAD)
    a = Name(b"a")
    for call in (
        lambda: tree.get(nodeid),
        lambda: tree.lookup(nodeid, a),
        lambda: tree.list(nodeid, 0),
        lambda: tree.is_empty(nodeid),
        lambda: tree.path(nodeid),
        lambda: tree.names(nodeid),
        lambda: tree.add(nodeid, a, FILE, 1, Ino(5)),
        lambda: tree.link(nodeid, ROOT_NODEID, Name(b"b")),
        lambda: tree.remove(nodeid, a),
        lambda: tree.move(nodeid, a, ROOT_NODEID, a),
        lambda: tree.move(ROOT_NODEID, a, nodeid, a),
        lambda: tree.move(ROOT_NODEID, Name(b"none"), ROOT_NODEID, a),
        lambda: tree.exchange(ROOT_NODEID, a, ROOT_NODEID, Name(b"none")),
        lambda: tree.set_upper(nodeid, 1, metacopy=False),
        lambda: tree.set_redirect(nodeid),
        lambda: tree.set_attr(nodeid, FILE),
        lambda: tree.ref(nodeid),
    ):
        stale(call)
    assert tree.forget(nodeid, 1)
    assert paths(tree) == [b"a"]


def test_layers_merge_from_the_top(make: Make, directories: Directories) -> None:
    """Whiteouts and opaque directories hide what is below; a file over a directory, and the other way round, too."""
    top = directories.make(
        {"d/.wh.gone": b"", "d/new": b"1", "o/.wh..wh..opq": b"", "o/x": b"", "f": b"", "g/x": b"", ".wh.w": b""},
        oci=True,
    )
    bottom = directories.make(
        {"d/gone": b"", "d/old": b"22", "d/new": b"333", "o/hidden": b"", "f/below": b"", "g": b"", "w/y": b""}
    )
    tree = make(None, top, bottom)
    assert paths(tree) == [b"d/", b"d/new", b"d/old", b"f", b"g/", b"g/x", b"o/", b"o/x"]
    assert tree.get(at(tree, "d/new")).attr.size == 1
    merged, opaque = tree.get(at(tree, "d")), tree.get(at(tree, "o"))
    assert merged.lower == (Source(1, b"d"), Source(2, b"d"))
    assert opaque.lower == (Source(1, b"o"),)
    assert (merged.attr.nlink, opaque.attr.nlink) == (1, 2)
    assert merged.ino == (directories.path(0) / "d").stat().st_ino
    assert tree.sources(merged) == merged.lower
    assert not merged.upper
    check(tree)


@pytest.mark.root
def test_kernel_whiteouts_hide(make: Make, directories: Directories) -> None:
    """Char 0:0, xattr whiteouts where the directory says "x", opaque "y"; a char device of another number is one."""
    top = directories.make({"d/x": b"", "o/own": b"", "ghost": b""})
    bottom = directories.make({"d/x": b"", "d/c": b"", "d/dev": b"", "o/hidden": b"", "keep": b"", "ghost": b""})
    path = directories.path(0)
    os.mknod(path / "d/c", stat.S_IFCHR, os.makedev(0, 0))
    os.mknod(path / "d/dev", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.setxattr(path / "d", "trusted.overlay.opaque", b"x")
    os.setxattr(path / "d/x", "trusted.overlay.whiteout", b"")
    os.setxattr(path / "o", "trusted.overlay.opaque", b"y")
    os.setxattr(path / "ghost", "user.overlay.whiteout", b"y")
    tree = make(None, top, bottom)
    assert paths(tree) == [b"d/", b"d/dev", b"keep", b"o/", b"o/own"]
    assert tree.get(at(tree, "d/dev")).attr.rdev == os.makedev(1, 3)
    assert at(tree, "ghost") == at(tree, "d/x") == at(tree, "d/c") == ABSENT


def test_xattr_whiteout_that_only_a_lookup_sees_is_not_listed(make: Make, directories: Directories) -> None:
    """Without opaque "x" the list shows it, but every listed name is looked up."""
    top = directories.make({"d/x": b"", "d/y": b""}, prefixes=(USER,))
    os.setxattr(directories.path(0) / "d/x", "user.overlay.whiteout", b"")
    tree = make(None, top, directories.make({"d/x": b"below"}))
    assert [name for _, name, _ in tree.list(at(tree, "d"), 0)] == [b"y"]
    assert at(tree, "d/x") == ABSENT


def test_tar_and_directory_layers_merge(make: Make, directories: Directories) -> None:
    """A directory that a tar only mentions takes its attributes from below."""
    bottom = directories.make({"etc/hosts": b"", "etc/motd": b""})
    (directories.path(0) / "etc").chmod(0o711)
    top = tar_layer(("etc/.wh.motd", b""), ("etc/passwd", b"root"), ("usr", None), ("usr/sh", "bin"))
    tree = make(None, top, bottom)
    assert paths(tree) == [b"etc/", b"etc/hosts", b"etc/passwd", b"usr/", b"usr/sh"]
    etc = tree.get(at(tree, "etc"))
    assert etc.attr.mode == stat.S_IFDIR | 0o711
    assert etc.ino == top.ino(etc.lower[0].ref)
    passwd = tree.get(at(tree, "etc/passwd"))
    assert passwd.attr == top.attr(passwd.lower[0].ref)
    assert passwd.attr.mtime_ns == 1_700_000_000 * 10**9
    assert stat.S_ISLNK(tree.get(at(tree, "usr/sh")).attr.mode)


def test_tar_link_to_a_layer_below_shares_the_inode(make: Make) -> None:
    """Its own later entry stands in where no layer below has the path; without one that name is EIO."""
    bottom = tar_layer(("a", b"data"), ("b", b""), number=0)
    top = tar_layer(hard_link("l", "a"), hard_link("m", "later"), ("later", b"own"), hard_link("n", "none"), number=1)
    tree = make(None, top, bottom)
    assert at(tree, "l") == at(tree, "a")
    assert tree.names(at(tree, "l")) == [(1, b"l"), (1, b"a")]
    assert tree.get(at(tree, "l")).lower == (Source(2, bottom.lookup(0, Name(b"a")).ref),)  # type: ignore[union-attr]
    assert at(tree, "m") == at(tree, "later")
    with pytest.raises(OSError) as caught:
        at(tree, "n")
    assert caught.value.errno == errno.EIO
    check(tree)


def test_layer_of_an_unknown_kind_is_asked_in_python(make: Make, directories: Directories) -> None:
    fake = DictLayer({b"d": DIRECTORY, b"d/x": FILE, b"gone": None, b"f": FILE})
    tree = make(None, fake, directories.make({"d/y": b"", "gone": b"", "under": b""}))
    assert paths(tree) == [b"d/", b"d/x", b"d/y", b"f", b"under"]
    assert at(tree, "gone") == ABSENT
    assert tree.get(at(tree, "d")).lower == (Source(1, b"d"), Source(2, b"d"))
    assert tree.get(at(tree, "d/x")).attr == FILE
    assert tree.sources(tree.get(at(tree, "f"))) == (Source(1, b"f"),)
    check(tree)


def test_hard_links_share_an_inode(make: Make, directories: Directories) -> None:
    layer = directories.make({"a": b"x", "d": None})
    os.link(directories.path(0) / "a", directories.path(0) / "d/b")
    tree = make(None, layer)
    assert at(tree, "a") == at(tree, "d/b")
    inode = at(tree, "a")
    assert tree.names(inode) == [(1, b"a"), (at(tree, "d"), b"b")]
    assert tree.path(inode) == b"a"
    tree.ref(inode)
    tree.remove(ROOT_NODEID, Name(b"a"))
    assert tree.path(inode) == b"d/b"
    check(tree)


def test_devices_are_numbered_in_the_order_of_the_layers(make: Make, scratch: Path) -> None:
    """Not in the order in which somebody looked: st_ino is the same at every mount."""
    inos, there = InoMap(), Path("/sys/kernel") if Path("/sys/kernel").is_dir() else Path("/proc/sys")
    (scratch / "x").write_bytes(b"")
    layers = [DirLayer(bytes(path), inos, prefixes=()) for path in (scratch, there)]
    tree = make(None, *layers)
    assert inos.ino(there.stat().st_dev, 5) == (1 << 48) | 5
    name = os.listdir(there)[0]
    assert tree.get(at(tree, name)).ino >> 48 == 1
    for layer in layers:
        layer.close()


def test_override_stat_gives_owner_mode_and_type(make: Make, directories: Directories) -> None:
    """The usual spellings are read in C, odd ones by the reference, damaged ones are EUCLEAN."""
    values = {
        "plain": (b"1:2:4755", stat.S_IFREG | 0o4755, 0),
        "file": (b"7:8:0600:file", stat.S_IFREG | 0o600, 0),
        "link": (b"0:0:0777:symlink", stat.S_IFLNK | 0o777, 0),
        "pipe": (b"0:0:0600:pipe", stat.S_IFIFO | 0o600, 0),
        "char": (b"0:0:0600:char-10-200", stat.S_IFCHR | 0o600, os.makedev(10, 200)),
        "odd": (b"0:0: 0600:block8:1", stat.S_IFBLK | 0o600, os.makedev(8, 1)),
        "dir": (b"5:6:0700\0", stat.S_IFDIR | 0o700, 0),
    }
    layer = directories.make(
        {name: None if name == "dir" else b"abc" for name in [*values, "bad", "type"]}, override=True
    )
    for name, value in values.items():
        os.setxattr(directories.path(0) / name, "user.containers.override_stat", value[0])
    os.setxattr(directories.path(0) / "bad", "user.containers.override_stat", b"0:0")
    os.setxattr(directories.path(0) / "type", "user.containers.override_stat", b"0:0:0700:dir")
    tree = make(None, layer)
    for name, (_, mode, rdev) in values.items():
        attr = tree.get(at(tree, name)).attr
        assert (attr.mode, attr.rdev) == (mode, rdev), name
        assert attr == layer.attr(name.encode())
    for name in ("bad", "type"):
        with pytest.raises(OSError) as caught:
            at(tree, name)
        assert caught.value.errno == errno.EUCLEAN


def test_directory_swapped_for_a_symlink_leads_nowhere(make: Make, directories: Directories, scratch: Path) -> None:
    """Whoever changes a layer under us cannot lead us out of it."""
    layer = directories.make({"d/e/f": b""})
    (scratch / "outside/e").mkdir(parents=True)
    (scratch / "outside/e/secret").write_bytes(b"")
    tree = make(None, layer)
    parent = at(tree, "d/e")
    (directories.path(0) / "d").rename(directories.path(0) / "was")
    (directories.path(0) / "d").symlink_to("../outside")
    with pytest.raises(OSError) as caught:
        tree.list(parent, 0)
    assert caught.value.errno == errno.ELOOP


def test_path_longer_than_path_max_is_reached(make: Make, directories: Directories) -> None:
    layer = directories.make({"f": b""})
    name, depth = "d" * 250, 20
    fd = os.dup(layer.fd)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        deeper = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.mkdir("x", dir_fd=fd)
    os.close(fd)
    tree = make(None, layer)
    nodeid = at(tree, "/".join([name] * depth + ["x"]))
    assert tree.get(nodeid).is_dir
    assert tree.path(nodeid) == "/".join([name] * depth + ["x"]).encode()
    assert tree.get(nodeid).lower[0].ref == tree.path(nodeid)


def test_damaged_redirect_is_euclean_and_leaves_the_rest(make: Make, directories: Directories) -> None:
    layer = directories.make({"bad/x": b"", "good": b""})
    os.setxattr(directories.path(0) / "bad", "user.overlay.redirect", b"../..")
    tree = make(None, layer)
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            at(tree, "bad")
        assert caught.value.errno == errno.EUCLEAN
    assert tree.get(at(tree, "good")).attr.mode
    check(tree)


# ---- what Python decides -------------------------------------------------------------------------------------------


def test_redirect_leads_to_another_name_below(make: Make, directories: Directories) -> None:
    upper = directories.make({"new/own": b"", "moved/deep": None}, prefixes=(USER,))
    lower = directories.make({"old/below": b"", "moved/deep": None, "there/in/z": b""})
    os.setxattr(directories.path(0) / "new", "user.overlay.redirect", b"old")
    os.setxattr(directories.path(0) / "moved/deep", "user.overlay.redirect", b"/there/in")
    tree = make(upper, lower)
    assert {b"new/below", b"new/own", b"moved/deep/z"} <= set(paths(tree))
    inode = tree.get(at(tree, "new"))
    assert (inode.upper, inode.redirect, inode.lower) == (True, True, (Source(1, b"old"),))
    assert inode.ino == (directories.path(1) / "old").stat().st_ino
    assert tree.sources(inode) == (Source(0, b"new"), Source(1, b"old"))
    check(tree)


def test_metacopy_has_its_data_below(make: Make, directories: Directories) -> None:
    upper = directories.make({"f": b"\0\0\0"}, prefixes=(USER,))
    os.setxattr(directories.path(0) / "f", "user.overlay.metacopy", b"")
    tree = make(upper, directories.make({"f": b"abc"}))
    inode = tree.get(at(tree, "f"))
    assert (inode.upper, inode.metacopy, inode.lower) == (True, True, (Source(1, b"f"),))
    tree.set_upper(inode.nodeid, inode.upper_ino, metacopy=False)
    assert (tree.get(inode.nodeid).metacopy, tree.get(inode.nodeid).lower) == (False, ())


def test_lower_metacopy_keeps_metadata_and_data_apart(make: Make, directories: Directories) -> None:
    layers = [directories.make({"f": bytes(3)}), directories.make({}), directories.make({"f": b"abc"})]
    os.setxattr(directories.path(0) / "f", "user.overlay.metacopy", b"")
    tree = make(None, *layers)
    inode = tree.get(at(tree, "f"))
    assert inode.lower == (Source(1, b"f"), Source(3, b"f"))
    tree.set_upper(inode.nodeid, 77, metacopy=True)
    assert tree.get(inode.nodeid).lower == (Source(1, b"f"), Source(3, b"f"))
    tree.forget(inode.nodeid, 1)
    check(tree)


@pytest.mark.root
def test_upper_file_shows_the_st_ino_of_its_origin(make: Make, directories: Directories) -> None:
    upper, lower = (
        directories.make({"f": b"", "g": b"", "d/x": b""}, prefixes=(TRUSTED,)),
        directories.make({"f": b"", "d/y": b""}),
    )
    value = encode((upper, lower), Source(1, b"f"))
    assert value is not None
    for name in ("f", "g"):
        os.setxattr(directories.path(0) / name, "trusted.overlay.origin", value)
    tree = make(upper, lower)
    first, second = tree.get(at(tree, "f")), tree.get(at(tree, "g"))
    assert first.ino == (directories.path(1) / "f").stat().st_ino
    assert first.upper_ino == (directories.path(0) / "f").stat().st_ino
    assert second.ino == second.upper_ino  # two of one origin: the later shows its own
    assert tree.get(at(tree, "d")).ino == (directories.path(1) / "d").stat().st_ino


# ---- listing -------------------------------------------------------------------------------------------------------


def test_list_goes_on_after_a_cookie(make: Make, directories: Directories) -> None:
    tree = make(None, directories.make({f"f{number:02}": b"" for number in range(20)}))
    every = tree.list(ROOT_NODEID, 0)
    assert [cookie for cookie, _, _ in every] == list(range(1, 21))
    assert tree.list(ROOT_NODEID, -5, 3) == every[:3]
    assert tree.list(ROOT_NODEID, 3, 3) == every[3:6]
    assert tree.list(ROOT_NODEID, 20) == tree.list(ROOT_NODEID, 1 << 62) == tree.list(ROOT_NODEID, 0, 0) == []


def test_list_resolves_no_more_than_it_gives(make: Make, directories: Directories) -> None:
    tree = make(None, directories.make({f"f{number}": b"" for number in range(20)}))
    assert not tree.is_empty(ROOT_NODEID)
    assert len(tree) == 2
    tree.list(ROOT_NODEID, 2, 4)
    assert len(tree) == 6


def test_cookies_are_stable_over_remove_add_and_forget(make: Make, directories: Directories) -> None:
    """A name keeps its cookie until it is removed, and a removed one's is never used again."""
    tree = make(directories.make({}), directories.make({f"f{number}": b"" for number in range(100)}))
    before = {name: cookie for cookie, name, _ in tree.list(ROOT_NODEID, 0)}
    for number in range(0, 100, 2):
        tree.remove(ROOT_NODEID, Name(b"f%d" % number))
    for number in range(60):
        tree.ref(tree.add(ROOT_NODEID, Name(b"n%d" % number), FILE, 5000 + number, Ino(5000 + number)))
    tree.forget(ROOT_NODEID, 0)
    for number in range(10, 60):
        tree.remove(ROOT_NODEID, Name(b"n%d" % number))
    check(tree)
    after = {name: cookie for cookie, name, _ in tree.list(ROOT_NODEID, 0)}
    assert {name: cookie for name, cookie in after.items() if name in before} == {
        name: cookie for name, cookie in before.items() if int(name[1:]) % 2
    }
    assert sorted(cookie for name, cookie in after.items() if name not in before) == list(range(101, 111))
    tree.add(ROOT_NODEID, Name(b"f0"), FILE, 9, Ino(9))
    assert tree.list(ROOT_NODEID, 110) == [(161, b"f0", 9)]
    nodeid = at(tree, "f1")
    tree.forget(nodeid, 0)
    stale(lambda: tree.get(nodeid))
    assert tree.list(ROOT_NODEID, 0)[0][1] == after_first(after)


def after_first(cookies: dict[Name, int]) -> Name:
    return min(cookies, key=lambda name: cookies[name])


def test_large_directory_is_merged_and_listed(make: Make) -> None:
    """100,000 names: anything that is not linear would never end."""
    count = 100_000
    tree = make(None, tar_layer(*[(f"d/{number}", b"") for number in range(count)]))
    directory = at(tree, "d")
    listed = tree.list(directory, 0)
    assert len(listed) == count == len({nodeid for _, _, nodeid in listed})
    for number in range(0, count, 2):
        tree.remove(directory, Name(b"%d" % number))
    at_end = tree.list(directory, 99_990)
    assert [cookie for cookie, _, _ in at_end] == [c for c, name, _ in listed[99_990:] if int(name) % 2]
    assert at(tree, f"d/{count - 1}") == {bytes(name): nodeid for _, name, nodeid in listed}[b"99999"]
    check(tree)


# ---- forgetting ----------------------------------------------------------------------------------------------------


def test_forget_drops_the_inode_and_the_directories_above(make: Make, directories: Directories) -> None:
    tree = make(None, directories.make({"a/b/c": b""}))
    nodeids = [at(tree, path) for path in ("a", "a/b", "a/b/c")]
    for nodeid in nodeids:
        tree.ref(nodeid)
    tree.ref(nodeids[2])
    assert not tree.forget(nodeids[0], 1)
    assert not tree.forget(nodeids[1], 5)
    assert not tree.forget(nodeids[2], 1)
    assert tree.get(nodeids[0]).nlookup == 0
    assert len(tree) == 4
    assert tree.forget(nodeids[2], 1)
    assert len(tree) == 1
    stale(lambda: tree.get(nodeids[0]))
    assert [at(tree, path) for path in ("a", "a/b", "a/b/c")] == nodeids
    check(tree)


def test_forget_of_a_directory_drops_what_only_a_list_knew(make: Make, directories: Directories) -> None:
    tree = make(None, directories.make({"d/a": b"", "d/b": b"", "d/s/x": b""}))
    directory = at(tree, "d")
    tree.ref(directory)
    tree.list(directory, 0)
    tree.ref(at(tree, "d/b"))
    assert not tree.forget(directory, 1)
    assert len(tree) == 3
    assert tree.forget(at(tree, "d/b"), 1)
    assert len(tree) == 1
    check(tree)


def test_forget_of_a_hard_link_drops_the_directories_of_all_its_names(make: Make) -> None:
    layer = tar_layer(
        ("a", None),
        ("a/f", b""),
        ("b", None),
        hard_link("b/f", "a/f"),
        ("c", None),
        ("c/d", None),
        hard_link("c/d/f", "a/f"),
    )
    tree = make(None, layer)
    directories = [at(tree, path) for path in ("a", "b", "c", "c/d")]
    (file,) = {at(tree, path) for path in ("a/f", "b/f", "c/d/f")}
    for nodeid in (*directories, file):
        tree.ref(nodeid)
    assert not any(tree.forget(nodeid, 1) for nodeid in directories)
    assert tree.forget(file, 1)
    assert [inode.nodeid for inode in tree] == [ROOT_NODEID]
    check(tree)


def test_inode_of_a_dropped_nodeid_is_estale(make: Make, directories: Directories) -> None:
    """What the C tree gives is a view, and says so; the root is never dropped."""
    tree = make(None, directories.make({"a": b""}))
    view = tree.get(at(tree, "a"))
    assert tree.forget(view.nodeid, 0)
    if isinstance(tree, _native.Tree):
        for name in ("ino", "attr", "upper", "lower", "nlookup", "is_dir", "is_linked"):
            stale(partial(getattr, view, name))
    assert not tree.forget(ROOT_NODEID, 7)
    assert tree.get(ROOT_NODEID).is_linked


# ---- mutations -----------------------------------------------------------------------------------------------------


def test_add_makes_an_upper_inode(make: Make, directories: Directories) -> None:
    tree = make(directories.make({}), directories.make({"a": b""}))
    nodeid = tree.add(ROOT_NODEID, Name(b"new"), FILE, 4242, Ino(4242))
    inode = tree.get(nodeid)
    assert (inode.nodeid, inode.ino, inode.upper_ino, inode.attr) == (4242, 4242, 4242, FILE)
    assert (inode.upper, inode.lower, inode.metacopy, inode.redirect) == (True, (), False, False)
    assert tree.sources(inode) == (Source(0, b"new"),)
    assert paths(tree) == [b"a", b"new"]
    with pytest.raises(AssertionError):
        tree.add(ROOT_NODEID, Name(b"a"), FILE, 1, Ino(1))


def test_added_directory_is_empty_whatever_is_below(make: Make, directories: Directories) -> None:
    tree = make(directories.make({}), directories.make({"d/x": b""}))
    tree.remove(ROOT_NODEID, Name(b"d"))
    nodeid = tree.add(ROOT_NODEID, Name(b"d"), DIRECTORY, 4242, Ino(4242))
    assert tree.is_empty(nodeid)
    tree.add(nodeid, Name(b"y"), FILE, 4243, Ino(4243))
    assert paths(tree) == [b"d/", b"d/y"]
    assert tree.sources(tree.get(nodeid)) == (Source(0, b"d"),)


def test_unlinked_inode_lives_until_it_is_forgotten(make: Make, directories: Directories) -> None:
    """Its nodeid is taken; a new object with its number gets a fresh one."""
    tree = make(directories.make({}), directories.make({"a": b""}))
    old = tree.add(ROOT_NODEID, Name(b"f"), FILE, 4242, Ino(4242))
    tree.ref(old)
    tree.remove(ROOT_NODEID, Name(b"f"))
    tree.set_attr(old, replace(FILE, nlink=0))
    assert (tree.path(old), tree.names(old), tree.get(old).is_linked) == (None, [], False)
    assert tree.sources(tree.get(old)) == ()
    new = tree.add(ROOT_NODEID, Name(b"f"), FILE, 4242, Ino(4242))
    assert new > FRESH
    assert tree.get(new).ino == 4242
    assert at(tree, "f") == new
    assert tree.forget(old, 1)
    assert tree.add(ROOT_NODEID, Name(b"g"), FILE, 4242, Ino(4242)) == 4242
    check(tree)


def test_removed_inode_that_nobody_holds_is_dropped(make: Make, directories: Directories) -> None:
    tree = make(directories.make({}), directories.make({"a": b""}))
    nodeid = at(tree, "a")
    tree.remove(ROOT_NODEID, Name(b"a"))
    stale(lambda: tree.get(nodeid))
    assert at(tree, "a") == ABSENT
    assert tree.is_empty(ROOT_NODEID)
    with pytest.raises(KeyError):
        tree.remove(ROOT_NODEID, Name(b"a"))


def test_removed_directory_lists_nothing(make: Make, directories: Directories) -> None:
    """Also one that was never read: there is no path any more to read it at."""
    tree = make(directories.make({}), directories.make({"d/x": b""}))
    nodeid = at(tree, "d")
    tree.ref(nodeid)
    tree.remove(ROOT_NODEID, Name(b"d"))
    assert tree.list(nodeid, 0) == []
    assert tree.lookup(nodeid, Name(b"x")) == ABSENT


def test_link_is_another_name(make: Make, directories: Directories) -> None:
    tree = make(directories.make({}), directories.make({"a": b"", "d": None}))
    nodeid, directory = at(tree, "a"), at(tree, "d")
    for name in (b"b", b"c", b"e"):
        tree.link(nodeid, directory, Name(name))
    assert tree.names(nodeid) == [(1, b"a"), (directory, b"b"), (directory, b"c"), (directory, b"e")]
    assert at(tree, "d/c") == nodeid
    with pytest.raises(AssertionError):
        tree.link(nodeid, ROOT_NODEID, Name(b"a"))
    tree.ref(nodeid)
    tree.remove(directory, Name(b"c"))
    tree.remove(ROOT_NODEID, Name(b"a"))
    assert tree.names(nodeid) == [(directory, b"b"), (directory, b"e")]
    tree.move(directory, Name(b"b"), ROOT_NODEID, Name(b"z"))
    assert tree.names(nodeid) == [(directory, b"e"), (1, b"z")]
    check(tree)


def test_move_takes_the_subtree_along(make: Make, directories: Directories) -> None:
    tree = make(directories.make({}), directories.make({"a/b/c": b"", "t": None}))
    deep, moved = at(tree, "a/b/c"), at(tree, "a/b")
    tree.move(at(tree, "a"), Name(b"b"), at(tree, "t"), Name(b"new"))
    assert tree.path(deep) == b"t/new/c"
    assert (at(tree, "a/b"), at(tree, "t/new")) == (ABSENT, moved)
    assert tree.get(moved).lower == (Source(1, b"a/b"),)
    check(tree)


def test_move_within_a_directory_gives_the_last_cookie(make: Make, directories: Directories) -> None:
    tree = make(directories.make({}), directories.make({"a": b"", "b": b"", "c": b""}))
    first = tree.list(ROOT_NODEID, 0)[0]
    tree.move(ROOT_NODEID, Name(first[1]), ROOT_NODEID, Name(b"z"))
    assert tree.list(ROOT_NODEID, 3) == [(4, b"z", first[2])]
    tree.move(ROOT_NODEID, Name(b"z"), ROOT_NODEID, Name(b"z"))
    assert tree.list(ROOT_NODEID, 3) == [(4, b"z", first[2])]


def test_move_over_existing_name_takes_it_away(make: Make, directories: Directories) -> None:
    tree = make(directories.make({}), directories.make({"a": b"", "b": b"", "c": b""}))
    a, b = at(tree, "a"), at(tree, "b")
    tree.ref(b)
    tree.move(ROOT_NODEID, Name(b"a"), ROOT_NODEID, Name(b"b"))
    assert at(tree, "b") == a
    assert not tree.get(b).is_linked
    tree.move(ROOT_NODEID, Name(b"c"), ROOT_NODEID, Name(b"b"))
    stale(lambda: tree.get(a))  # nobody held it
    assert paths(tree) == [b"b"]
    check(tree)


def test_move_over_the_last_reason_for_a_directory_keeps_it(make: Make, directories: Directories) -> None:
    """The directories of a move are in use, whatever is dropped meanwhile."""
    layer = directories.make({"a": b"", "d/x": b""})
    os.link(directories.path(0) / "d/x", directories.path(0) / "d/y")
    tree = make(directories.make({}), layer)
    directory = at(tree, "d")
    assert at(tree, "d/x") == at(tree, "d/y")
    moved = at(tree, "a")
    tree.move(ROOT_NODEID, Name(b"a"), directory, Name(b"x"))
    assert tree.path(moved) == b"d/x"
    assert at(tree, "d") == directory
    check(tree)


def test_exchange_swaps_two_names(make: Make, directories: Directories) -> None:
    tree = make(directories.make({}), directories.make({"a/x": b"", "b": b"", "c": b""}))
    a, b, x = at(tree, "a"), at(tree, "b"), at(tree, "a/x")
    cookies = {name: cookie for cookie, name, _ in tree.list(ROOT_NODEID, 0)}
    tree.exchange(ROOT_NODEID, Name(b"a"), ROOT_NODEID, Name(b"b"))
    assert (at(tree, "a"), at(tree, "b"), tree.path(x)) == (b, a, b"b/x")
    tree.exchange(ROOT_NODEID, Name(b"a"), ROOT_NODEID, Name(b"a"))
    tree.exchange(ROOT_NODEID, Name(b"c"), a, Name(b"x"))
    assert tree.path(x) == b"c"
    assert {name: cookie for cookie, name, _ in tree.list(ROOT_NODEID, 0)} == cookies
    check(tree)


def test_copied_up_inode_keeps_its_numbers(make: Make, directories: Directories) -> None:
    tree = make(directories.make({}), directories.make({"f": b"abc", "d/x": b""}))
    file, directory = at(tree, "f"), at(tree, "d")
    ino = tree.get(file).ino
    tree.set_upper(file, 900, metacopy=True)
    assert (tree.get(file).metacopy, tree.get(file).lower) == (True, (Source(1, b"f"),))
    assert tree.sources(tree.get(file)) == (Source(0, b"f"), Source(1, b"f"))
    tree.set_upper(file, 900, metacopy=False)
    tree.set_upper(directory, 901, metacopy=False)
    tree.set_redirect(directory)
    assert (tree.get(file).ino, tree.get(file).upper_ino, tree.get(file).lower) == (ino, 900, ())
    assert (tree.get(directory).lower, tree.get(directory).redirect) == ((Source(1, b"d"),), True)


def test_set_attr_shows(make: Make, directories: Directories) -> None:
    tree = make(directories.make({}), directories.make({"f": b"abc"}))
    attr = Attr(stat.S_IFREG | 0o4711, 3, 2**32 - 2, 5, 0, 2**62, 2**50, -1, 2**62, -(2**62))
    tree.set_attr(at(tree, "f"), attr)
    assert tree.get(at(tree, "f")).attr == attr


# ---- the C tree only -----------------------------------------------------------------------------------------------


def test_open_tree_obeys_the_environment(monkeypatch: pytest.MonkeyPatch, directories: Directories) -> None:
    layers = (None, directories.make({}))
    monkeypatch.setenv("OVLFS_PURE_PYTHON", "1")
    assert type(open_tree(layers)) is Tree
    monkeypatch.delenv("OVLFS_PURE_PYTHON")
    assert isinstance(open_tree(layers), _native.Tree)


def test_views_of_one_inode_are_equal(directories: Directories) -> None:
    tree = _native.Tree((None, directories.make({"a": b"", "b": b""})))
    a, b = tree.lookup(ROOT_NODEID, Name(b"a")), tree.lookup(ROOT_NODEID, Name(b"b"))
    assert tree.get(a) == tree.get(a) != tree.get(b)
    assert len({tree.get(a), tree.get(a), tree.get(b)}) == 2


def test_directory_does_not_go_into_itself(directories: Directories) -> None:
    """The C tree would turn in circles with its lock held, so it refuses what no caller should ask."""
    tree = _native.Tree((directories.make({}), directories.make({"a/b/c": b""})))
    a = tree.lookup(ROOT_NODEID, Name(b"a"))
    b = tree.lookup(a, Name(b"b"))
    calls: list[Callable[[], None]] = [
        lambda: tree.move(ROOT_NODEID, Name(b"a"), b, Name(b"a")),
        lambda: tree.exchange(ROOT_NODEID, Name(b"a"), b, Name(b"c")),
        lambda: tree.set_attr(a, FILE),
    ]
    for call in calls:
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(PermissionError):
        tree.link(b, ROOT_NODEID, Name(b"l"))
    tree.check()


def test_reference_is_asked_for_what_c_does_not_decide_only(
    directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Name] = []
    reference = merge.lookup

    def spy(layers: merge.Layers, sources: tuple[Source, ...], name: Name) -> merge.Found | None:
        asked.append(name)
        return reference(layers, sources, name)

    monkeypatch.setattr(merge, "lookup", spy)
    upper = directories.make({"m": b"", "o": b"", "plain": b""}, prefixes=(USER,))
    os.setxattr(directories.path(0) / "m", "user.overlay.metacopy", b"")
    os.setxattr(directories.path(0) / "o", "user.overlay.origin", b"")
    tree = _native.Tree((upper, directories.make({"m": b"", "a": b"", "d/e": b""})))
    tree.list(ROOT_NODEID, 0)
    assert sorted(asked) == [b"m", b"o"]


def test_threads_look_up_and_forget_at_the_same_time(directories: Directories) -> None:
    """The core has its own lock: no thread sees half a change."""
    tree = _native.Tree((None, directories.make({f"d{n % 7}/f{n}": b"" for n in range(200)})))
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                for _, _, directory in tree.list(ROOT_NODEID, 0):
                    try:
                        listed = tree.list(directory, 0)
                    except OSError as error:
                        assert error.errno == errno.ESTALE  # noqa: PT017
                        continue
                    for _, _, nodeid in listed:
                        tree.forget(nodeid, 0)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    tree.check()


def test_tree_gives_back_what_it_borrowed(directories: Directories) -> None:
    """No reference is left when the tree and its views are gone, also after errors."""
    fake = DictLayer({b"d": DIRECTORY, b"d/x": FILE})
    tar = tar_layer(("t", b""))
    layer = directories.make({"bad": None, "a": b""})
    os.setxattr(directories.path(0) / "bad", "user.overlay.redirect", b"..")
    layers = (None, fake, tar, layer)

    def use() -> None:
        tree = _native.Tree(layers)
        views = [tree.get(tree.lookup(ROOT_NODEID, Name(name))) for name in (b"d", b"t", b"a")]
        with pytest.raises(OSError):
            tree.lookup(ROOT_NODEID, Name(b"bad"))
        with pytest.raises(TypeError):
            tree.lookup(ROOT_NODEID, "d")  # type: ignore[arg-type]
        with pytest.raises(OverflowError):
            tree.get(NodeId(-1))
        assert [view.attr.nlink for view in views]

    use()
    gc.collect()
    before = [*map(_references, (layers, fake, tar, tar.index, layer))]
    for _ in range(20):
        use()
    gc.collect()
    assert [*map(_references, (layers, fake, tar, tar.index, layer))] == before


def _references(thing: object) -> int:
    return len(gc.get_referrers(thing))
