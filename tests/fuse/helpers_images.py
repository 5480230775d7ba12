"""The fixture images of tests/image, where every user can read them, and the truth about them."""

import atexit
import functools
import gzip
import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

from helpers_tree import Tree

_FIXTURES = Path(__file__).parent.parent / "image" / "fixtures.tar.xz"


@functools.cache
def images() -> Path:
    """A directory with the fixture images, extracted once."""
    directory = Path(tempfile.mkdtemp(prefix="ovlfs-images-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.chmod(directory, 0o755)
    with tarfile.open(_FIXTURES) as tar:
        tar.extractall(directory, filter="data")
    raw = (directory / "small-two-docker20.tar").read_bytes()
    (directory / "small-two-docker20.tar.gz").write_bytes(gzip.compress(raw, 1, mtime=0))
    for path in directory.iterdir():
        os.chmod(path, 0o644)
    return directory


@functools.cache
def _expected() -> dict[str, Tree]:
    found: dict[str, Tree] = {}
    with (images() / "EXPECTED.jsonl").open() as lines:
        for line in map(json.loads, lines):
            found.setdefault(line.pop("image"), {})[line.pop("path")] = line
    return found


def expected(tag: str) -> Tree:
    """The tree of small:v1 or small:v2: what the archive says where docker's disk differs from it."""
    tree: Tree = {}
    for path, line in _expected()[f"small:{tag}"].items():
        tree[path] = {key: value for key, value in line.items() if key not in ("nlink", "archive")}
        tree[path] |= line.get("archive", {})
        if path == ".":
            del tree[path]["mtime_ns"]
    return tree
