"""Random mutations on the tree in C and on the one in Python: after each, both say the same of everything.

The disk does not change, only the trees do, so a name that was added is gone once it is forgotten: for both.
"""

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from stacks import Item, as_directory, as_tar, same

from ovlfs import _native
from ovlfs.ids import ROOT_NODEID, Ino, Name, NodeId
from ovlfs.layer.base import Attr, Layer
from ovlfs.layer.directory import USER, DirLayer, InoMap
from ovlfs.layer.tree import Tree

FILE = Attr(stat.S_IFREG | 0o644, 1, 0, 0, 0, 5, 8, 1, 2, 3)
DIRECTORY = replace(FILE, mode=stat.S_IFDIR | 0o755, nlink=2)

NAMES = st.sampled_from([Name(name) for name in (b"a", b"b", b"c", b"d", b"e", b"f", b"missing")])
PICKS = st.integers(0, 1 << 16)
"""Which of the known inodes: the number modulo how many there are, so that it shrinks."""


class TreeMachine(RuleBasedStateMachine):
    """Both trees over one stack: an upperdir with something in it, a directory layer, a tar layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))

    @initialize()
    def make(self) -> None:
        """The stack."""
        inos = InoMap()
        upper = as_directory(
            {"a": Item("dir", 0o700), "a/b": Item("file", 0o600), "c": Item("whiteout", 0), "e": Item("file", 0o644)},
            self.base / "upper",
            inos,
            "xattr",
        )
        os.link(self.base / "upper/e", self.base / "upper/a/f")
        os.setxattr(self.base / "upper/a/b", "user.overlay.origin", b"")
        (self.base / "upper/d").mkdir()
        os.setxattr(self.base / "upper/d", "user.overlay.redirect", b"/b/c")
        lower = as_directory(
            {
                "a": Item("dir", 0o755),
                "a/a": Item("file", 0o644),
                "a/c": Item("link", 0, "a/a"),
                "b": Item("dir", 0o755),
                "b/c": Item("dir", 0o755),
                "b/c/d": Item("file", 0o644),
                "b/e": Item("link", 0, "a/a"),
                "c": Item("file", 0o644),
            },
            self.base / "lower",
            inos,
            "xattr",
        )
        tar = as_tar(
            {
                "a": Item("dir", 0o711),
                "a/d": Item("dir", 0o711),
                "a/d/e": Item("symlink", 0),
                "b": Item("dir", 0o700),
                "b/b": Item("opaque", 0o700),
                "b/b/f": Item("file", 0o600),
                "f": Item("link", 0, "b/b/f"),
            },
            0,
        )
        assert upper.prefixes == (USER,)
        self.directories = [upper, lower]
        layers: list[Layer | None] = [upper, lower, tar]
        self.reference = Tree(layers)
        self.native = _native.Tree(layers)

    def teardown(self) -> None:
        for layer in getattr(self, "directories", []):
            cast("DirLayer", layer).close()
        shutil.rmtree(self.base)

    def both(self, call: Callable[[Tree], object]) -> object:
        """The result, which is the same of both trees, also if it is an exception."""
        results = []
        for tree in (self.reference, cast("Tree", self.native)):
            try:
                results.append(call(tree))
            except (OSError, KeyError, AssertionError) as error:
                results.append((type(error), getattr(error, "errno", None)))
        assert results[0] == results[1]
        return results[0]

    def pick(self, number: int) -> NodeId:
        nodeids = sorted(inode.nodeid for inode in self.reference)
        return nodeids[number % len(nodeids)]

    def pick_directory(self, number: int) -> NodeId:
        nodeids = sorted(inode.nodeid for inode in self.reference if inode.is_dir)
        return nodeids[number % len(nodeids)]

    def contains(self, directory: NodeId, name: Name, at: NodeId) -> bool:
        """Whether `at` is, or is in, the directory with that name: what a caller must not move there."""
        child = self.both(lambda tree: tree.lookup(directory, name))
        if not isinstance(child, int) or child == 0:
            return False
        while at != ROOT_NODEID:
            if at == child:
                return True
            names = self.reference.names(at)
            if not names:
                return False
            at = names[0][0]
        return False

    @rule(directory=PICKS, name=NAMES)
    def lookup(self, directory: int, name: Name) -> None:
        nodeid = self.pick(directory)
        self.both(lambda tree: tree.lookup(nodeid, name))

    @rule(directory=PICKS, name=NAMES)
    def lookup_and_ref(self, directory: int, name: Name) -> None:
        nodeid = self.pick(directory)
        found = self.both(lambda tree: tree.lookup(nodeid, name))
        if isinstance(found, int) and found:
            self.both(lambda tree: tree.ref(NodeId(found)))

    @rule(directory=PICKS, after=st.integers(-1, 12), most=st.integers(0, 9))
    def list(self, directory: int, after: int, most: int) -> None:
        nodeid = self.pick(directory)
        self.both(lambda tree: tree.list(nodeid, after, most))
        self.both(lambda tree: tree.is_empty(nodeid))

    @rule(number=PICKS, count=st.integers(0, 3))
    def forget(self, number: int, count: int) -> None:
        nodeid = self.pick(number)
        self.both(lambda tree: tree.forget(nodeid, count))

    @rule(directory=PICKS, name=NAMES, ino=st.integers(2, 9), is_dir=st.booleans(), held=st.booleans())
    def add(self, directory: int, name: Name, ino: int, *, is_dir: bool, held: bool) -> None:
        nodeid = self.pick_directory(directory)
        attr = DIRECTORY if is_dir else FILE
        added = self.both(lambda tree: tree.add(nodeid, name, attr, ino, Ino(ino)))
        if held and isinstance(added, int):
            self.both(lambda tree: tree.ref(NodeId(added)))

    @rule(number=PICKS, directory=PICKS, name=NAMES)
    def link(self, number: int, directory: int, name: Name) -> None:
        nodeid, parent = self.pick(number), self.pick_directory(directory)
        if not self.reference.get(nodeid).is_dir:
            self.both(lambda tree: tree.link(nodeid, parent, name))

    @rule(directory=PICKS, name=NAMES, unlinked=st.booleans())
    def remove(self, directory: int, name: Name, *, unlinked: bool) -> None:
        parent = self.pick_directory(directory)
        nodeid = self.both(lambda tree: tree.lookup(parent, name))
        self.both(lambda tree: tree.remove(parent, name))
        if unlinked and isinstance(nodeid, int) and nodeid:
            known = NodeId(nodeid)
            self.both(lambda tree: tree.set_attr(known, replace(tree.get(known).attr, nlink=0)))

    @rule(directory=PICKS, name=NAMES, new_directory=PICKS, new_name=NAMES)
    def move(self, directory: int, name: Name, new_directory: int, new_name: Name) -> None:
        parent, new_parent = self.pick_directory(directory), self.pick(new_directory)
        if not self.contains(parent, name, new_parent):
            self.both(lambda tree: tree.move(parent, name, new_parent, new_name))

    @rule(directory=PICKS, name=NAMES, new_directory=PICKS, new_name=NAMES)
    def exchange(self, directory: int, name: Name, new_directory: int, new_name: Name) -> None:
        parent, new_parent = self.pick_directory(directory), self.pick_directory(new_directory)
        if not self.contains(parent, name, new_parent) and not self.contains(new_parent, new_name, parent):
            self.both(lambda tree: tree.exchange(parent, name, new_parent, new_name))

    @rule(number=PICKS, upper_ino=st.integers(2, 9), metacopy=st.booleans())
    def set_upper(self, number: int, upper_ino: int, *, metacopy: bool) -> None:
        nodeid = self.pick(number)
        self.both(lambda tree: tree.set_upper(nodeid, upper_ino, metacopy=metacopy))

    @rule(number=PICKS)
    def set_redirect(self, number: int) -> None:
        nodeid = self.pick(number)
        self.both(lambda tree: tree.set_redirect(nodeid))

    @invariant()
    def equal(self) -> None:
        if hasattr(self, "native"):
            same(cast("Tree", self.native), self.reference)
            self.native.check()


TreeMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestTreeMachine = TreeMachine.TestCase
