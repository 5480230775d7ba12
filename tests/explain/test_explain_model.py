"""Random stacks: what is explained is the flattened truth, and what no layer shows is hidden, all of it and once."""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stacks import Content, Dialect, Item, as_directory, as_tar, flatten, stacks

from ovlfs.explain.explain import explain
from ovlfs.explain.text import text
from ovlfs.layer.base import Layer
from ovlfs.layer.directory import DirLayer, InoMap
from ovlfs.overlay.params import Params
from ovlfs.overlay.stack import Stack

KINDS = {"file": "regular file", "dir": "directory", "symlink": "symlink"}


@contextmanager
def stack_of(contents: list[Content], dialects: list[Dialect | None]) -> Iterator[Stack]:
    """A read-only stack of layers, each written as its dialect says; None: as a tar."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    base = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    inos = InoMap()
    layers: list[Layer] = []
    try:
        for number, (content, dialect) in enumerate(zip(contents, dialects, strict=True)):
            if dialect is None:
                layer = as_tar(content, number)
                layer.fd = nothing  # its files are asked for their holes
                layers.append(layer)
            else:
                layers.append(as_directory(content, base / str(number), inos, dialect))
        yield Stack(layers, None, Params(read_only=True), kernel_userxattr=False)
    finally:
        os.close(nothing)
        for one in layers:
            if isinstance(one, DirLayer):
                one.close()
        shutil.rmtree(base)


def check(stack: Stack, contents: list[Content]) -> None:
    truth = flatten(contents)
    paths = {path for content in contents for path in content} | {"nowhere", "a/nowhere", "a/b/c/dd/nowhere"}
    for path in sorted(paths):
        facts = explain(stack, path.encode())
        assert facts["notes"] == []
        assert text(facts).startswith("/" + path)
        parents = ["/".join(path.split("/")[:count]) for count in range(1, path.count("/") + 1)]
        if any(parent in truth and truth[parent].kind == "symlink" for parent in parents):
            continue  # it leads elsewhere, or nowhere
        shown = truth.get(path)
        found = facts["object"]
        assert (found is None) == (shown is None), path
        if shown is not None:
            assert found["kind"] == KINDS[shown.kind], path
            assert found["attributes_from"] - 1 == shown.layer, path
        has = {number + 1 for number, content in enumerate(contents) if path in content}
        has -= {number + 1 for number, content in enumerate(contents) if path in content and _hides(content, path)}
        shows = set(found["from"]) if found else set()
        hidden = Counter(layer for one in facts["hidden"] for layer in one["layers"])
        assert set(hidden) == has - shows, path
        assert not hidden or max(hidden.values()) == 1, path


def _hides(content: Content, path: str) -> bool:
    return content[path].kind == "whiteout"


DIALECTS = st.lists(st.sampled_from([None, "oci", "xattr"]), min_size=6, max_size=6)


@settings(max_examples=80, deadline=None)
@given(stacks, DIALECTS)
@example([{"a": Item("dir", 0)}, {"a": Item("file", 0)}, {"a": Item("dir", 0), "a/b": Item("file", 1)}], [None] * 6)
@example([{"a": Item("opaque", 0), "a/c": Item("file", 1)}, {"a": Item("dir", 0), "a/b": Item("file", 1)}], [None] * 6)
@example([{"a": Item("whiteout", 0)}, {"a": Item("dir", 0), "a/b": Item("file", 1)}], ["xattr"] * 6)
@example([{"a": Item("file", 0)}, {"a": Item("whiteout", 0)}, {"a": Item("file", 1)}], ["oci"] * 6)
def test_what_is_explained_is_the_flattened_truth(contents: list[Content], dialects: list[Dialect | None]) -> None:
    with stack_of(contents, dialects[: len(contents)]) as stack:
        check(stack, contents)


@pytest.mark.root
@settings(max_examples=40, deadline=None)
@given(stacks)
def test_what_is_explained_of_kernel_layers_is_the_flattened_truth(contents: list[Content]) -> None:
    with stack_of(contents, ["kernel"] * len(contents)) as stack:
        check(stack, contents)
