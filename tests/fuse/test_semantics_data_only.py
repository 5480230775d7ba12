"""Data-only layers (`lowerdir=a::d`): file data that is reached by an absolute redirect, and never listed."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.fuse, pytest.mark.root]

REDIRECTS = {"file": b"/store/ab", "other": b"/store/cd", "hidden": b"/dir", "nothing": b"/store/none"}


@pytest.fixture
def layers(scratch: Path) -> str:
    """A layer of metacopy files over two data-only layers: as composefs makes them."""
    for name in ("lower", "data1/store", "data2/store", "data2/dir", "upper", "work"):
        (scratch / name).mkdir(parents=True)
    (scratch / "data1/store/ab").write_bytes(b"first " * 1000)
    (scratch / "data2/store/ab").write_bytes(b"not this one")
    (scratch / "data2/store/cd").write_bytes(b"second")
    for name, redirect in REDIRECTS.items():
        path = scratch / "lower" / name
        path.touch()
        os.truncate(path, 6000 if name == "file" else 6)
        os.setxattr(path, "trusted.overlay.metacopy", b"")
        os.setxattr(path, "trusted.overlay.redirect", redirect)
    return f"lowerdir={scratch}/lower::{scratch}/data1::{scratch}/data2,upperdir={scratch}/upper,workdir={scratch}/work"


def contents(mountpoint: Path) -> dict[str, object]:
    """What can be read; for what cannot, that it cannot."""
    found: dict[str, object] = {}
    for name in REDIRECTS:
        try:
            found[name] = (mountpoint / name).read_bytes()
        except OSError as error:
            found[name] = error.errno
    return found


def test_data_comes_from_the_topmost_data_layer_that_has_it(
    layers: str, mounted: Callable[..., Path], scratch: Path
) -> None:
    """Kernel: namei.c: ovl_lookup_data_layers().  What kernel overlayfs reads, we read."""
    kernel = scratch / "kernel"
    kernel.mkdir()
    lowers = layers.partition(",")[0]
    subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", f"ro,metacopy=on,redirect_dir=follow,{lowers}", kernel], check=True
    )
    try:
        truth = contents(kernel)
    finally:
        subprocess.run(["umount", kernel], check=True)

    ours = contents(mounted("-o", layers))

    assert truth["file"] == b"first " * 1000
    assert {name: data for name, data in ours.items() if isinstance(data, bytes)} == {
        name: data for name, data in truth.items() if isinstance(data, bytes)
    }
    assert [name for name, data in ours.items() if isinstance(data, int)] == ["hidden", "nothing"]


def test_data_layers_are_not_listed_and_copy_up_takes_their_data(layers: str, mounted: Callable[..., Path]) -> None:
    """`store` and `dir` are nowhere; a write brings the data into the upperdir and leaves the layers alone."""
    mountpoint = mounted("-o", layers)

    assert not (mountpoint / "store").exists()
    assert not (mountpoint / "dir").exists()
    with (mountpoint / "file").open("ab") as file:
        file.write(b"end")
    assert (mountpoint / "file").read_bytes() == b"first " * 1000 + b"end"
    assert (mountpoint.parent / "data1/store/ab").read_bytes() == b"first " * 1000
