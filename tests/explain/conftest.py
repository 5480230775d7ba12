"""Explaining needs the random stacks of tests/model, the users of tests/fuse, and images with a history."""

import sys
from pathlib import Path
from typing import Any

import pytest
from archives import Members, docker_archive, hard_link, tar

sys.path += [str(Path(__file__).parent.parent / room) for room in ("model", "fuse")]


def image(path: Path, layers: dict[str, Members]) -> Path:
    """Write an image of layers, each by the line that made it, the bottom one first."""
    history: list[dict[str, Any]] = [{"created_by": line} for line in layers]
    history.append({"created_by": "CMD", "empty_layer": True})
    return docker_archive(path, [tar(members) for members in layers.values()], history=history)


@pytest.fixture
def linked_image(scratch: Path) -> Path:
    """Hard links: to a lower layer, within a layer, and through a symlink."""
    below: Members = {"dir": None, "dir/target": b"the data", "absolute": "/dir"}
    above: Members = {
        "link": hard_link("link", "dir/target"),
        "own": b"own",
        "own2": hard_link("own2", "own"),
    }
    return image(scratch / "linked.tar", {"ADD below /": below, "COPY above /": above})


@pytest.fixture
def layered_image(scratch: Path) -> Path:
    """Three layers with a whiteout, an opaque directory, a replaced file and a symlink."""
    base: Members = {
        "etc": None,
        "etc/hosts": b"127.0.0.1 localhost\n",
        "etc/motd": b"hello\n",
        "etc/skel": None,
        "etc/skel/.profile": b"umask 022\n",
        "usr": None,
        "usr/bin": None,
        "usr/bin/sh": b"#!\n",
        "bin": "usr/bin",
    }
    install: Members = {
        "etc": None,
        "etc/hosts": b"127.0.0.1 localhost\n::1 localhost\n",
        "etc/skel": None,
        "etc/skel/.wh..wh..opq": b"",
        "etc/skel/.bashrc": b"PS1=$\n",
    }
    tidy: Members = {"etc": None, "etc/.wh.motd": b"", "srv": None}
    return image(
        scratch / "app.tar",
        {
            "/bin/sh -c #(nop) ADD file:4551d5bf1d445bad77bd3852e5cf2909c6 in / ": base,
            "/bin/sh -c apt-get update && apt-get install -y --no-install-recommends netbase skel": install,
            "RUN rm /etc/motd # buildkit": tidy,
        },
    )
