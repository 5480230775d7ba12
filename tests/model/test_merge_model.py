"""Random stacks of layers: the tree in C, the tree in Python and the flattened truth are equal, in every dialect."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stacks import Content, Dialect, Item, as_directory, as_tar, flatten, same, stacks, walk

from ovlfs import _native
from ovlfs.layer.base import Layer
from ovlfs.layer.directory import DirLayer, InoMap
from ovlfs.layer.tree import Tree

DIALECTS: tuple[Dialect, ...] = ("oci", "xattr", "kernel")
EXAMPLES = settings(max_examples=60, deadline=None)


def compare(layers: list[Layer | None], stack: list[Content]) -> None:
    """The three agree on names, kinds, modes, the layer that serves each, and which names share an inode."""
    reference, native = Tree(layers), cast("Tree", _native.Tree(layers))
    truth, seen = flatten(stack), walk(reference)
    assert walk(native) == seen
    same(native, reference)
    native.check()  # type: ignore[attr-defined]
    assert {path: (one.kind, one.layer) for path, one in seen.items()} == {
        path: (shown.kind, shown.layer) for path, shown in truth.items()
    }
    for path, one in seen.items():
        if one.kind != "symlink":
            assert one.mode == truth[path].number, path
    owners: dict[object, object] = {}
    for path, one in seen.items():
        owner = (truth[path].layer, truth[path].owner)
        assert owners.setdefault(one.nodeid, owner) == owner, path
    assert len(owners) == len({(shown.layer, shown.owner) for shown in truth.values()})


@contextmanager
def written(stack: list[Content], dialects: list[Dialect | None]) -> Iterator[list[Layer | None]]:
    """The stack's layers, each as its dialect says; None: as a tar."""
    base = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    inos = InoMap()
    layers: list[Layer | None] = [None]
    try:
        for number, (layer, dialect) in enumerate(zip(stack, dialects, strict=True)):
            if dialect is None:
                layers.append(as_tar(layer, number))
            else:
                layers.append(as_directory(layer, base / str(number), inos, dialect))
        yield layers
    finally:
        for one in layers:
            if isinstance(one, DirLayer):
                one.close()
        shutil.rmtree(base)


@EXAMPLES
@given(stacks)
@example([{"a": Item("whiteout", 0)}, {"a": Item("dir", 0), "a/b": Item("file", 1)}])
@example([{"a": Item("opaque", 0), "a/c": Item("file", 1)}, {"a": Item("dir", 0), "a/b": Item("file", 1)}])
@example([{"a": Item("dir", 0)}, {"a": Item("file", 0)}, {"a": Item("dir", 0), "a/b": Item("file", 1)}])
@example([{"a": Item("file", 0), "b": Item("link", 0, "a")}, {"b": Item("dir", 0), "b/c": Item("file", 0)}])
def test_tar_stacks_equal_the_flattened_truth(stack: list[Content]) -> None:
    with written(stack, [None] * len(stack)) as layers:
        compare(layers, stack)


@pytest.mark.parametrize("dialect", DIALECTS)
@EXAMPLES
@given(stack=stacks)
def test_directory_stacks_equal_the_flattened_truth(dialect: Dialect, stack: list[Content]) -> None:
    if dialect == "kernel" and os.geteuid() != 0:
        pytest.skip("needs root")
    with written(stack, [dialect] * len(stack)) as layers:
        compare(layers, stack)


@EXAMPLES
@given(stacks, st.lists(st.sampled_from([None, "oci", "xattr"]), min_size=6, max_size=6))
def test_mixed_stacks_equal_the_flattened_truth(stack: list[Content], dialects: list[Dialect | None]) -> None:
    with written(stack, dialects[: len(stack)]) as layers:
        compare(layers, stack)
