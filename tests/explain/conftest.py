"""Explaining needs the random stacks of tests/model, the users of tests/fuse, and images with a history."""

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent.parent / room) for room in ("model", "fuse")]

Member = tuple[str, bytes | str | None, str]
"""(name, content, link): None is a directory; with a content of "", `link` is where a symlink or hard link leads."""


def archive(path: Path, layers: Sequence[tuple[str, Sequence[Member]]]) -> Path:
    """Write a docker archive of layers, (the line that made it, members), the bottom one first."""
    raw = [_tar(members) for _, members in layers]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(one).hexdigest() for one in raw]},
        "history": [{"created_by": line} for line, _ in layers] + [{"created_by": "CMD", "empty_layer": True}],
    }
    names = [f"layer{number}.tar" for number in range(len(raw))]
    manifest = [{"Config": "config.json", "RepoTags": ["test:latest"], "Layers": names}]
    documents: list[Member] = [
        ("manifest.json", json.dumps(manifest).encode(), ""),
        ("config.json", json.dumps(config).encode(), ""),
    ]
    path.write_bytes(_tar([*documents, *((name, one, "") for name, one in zip(names, raw, strict=True))]))
    return path


def _tar(members: Sequence[Member]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content, link in members:
            info = tarfile.TarInfo(name)
            info.mtime, info.mode = 1_700_000_000, 0o644
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(content, str):
                info.type, info.linkname = (tarfile.SYMTYPE if content == "symlink" else tarfile.LNKTYPE), link
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return stream.getvalue()


@pytest.fixture
def linked_image(scratch: Path) -> Path:
    """Hard links: to a lower layer, within a layer, and through a symlink."""
    below: list[Member] = [("dir", None, ""), ("dir/target", b"the data", ""), ("absolute", "symlink", "/dir")]
    above: list[Member] = [("link", "link", "dir/target"), ("own", b"own", ""), ("own2", "link", "own")]
    return archive(scratch / "linked.tar", [("ADD below /", below), ("COPY above /", above)])


@pytest.fixture
def layered_image(scratch: Path) -> Path:
    """Three layers with a whiteout, an opaque directory, a replaced file and a symlink."""
    base: list[Member] = [
        ("etc", None, ""),
        ("etc/hosts", b"127.0.0.1 localhost\n", ""),
        ("etc/motd", b"hello\n", ""),
        ("etc/skel", None, ""),
        ("etc/skel/.profile", b"umask 022\n", ""),
        ("usr", None, ""),
        ("usr/bin", None, ""),
        ("usr/bin/sh", b"#!\n", ""),
        ("bin", "symlink", "usr/bin"),
    ]
    install: list[Member] = [
        ("etc", None, ""),
        ("etc/hosts", b"127.0.0.1 localhost\n::1 localhost\n", ""),
        ("etc/skel", None, ""),
        ("etc/skel/.wh..wh..opq", b"", ""),
        ("etc/skel/.bashrc", b"PS1=$\n", ""),
    ]
    tidy: list[Member] = [("etc", None, ""), ("etc/.wh.motd", b"", ""), ("srv", None, "")]
    return archive(
        scratch / "app.tar",
        [
            ("/bin/sh -c #(nop) ADD file:4551d5bf1d445bad77bd3852e5cf2909c6 in / ", base),
            ("/bin/sh -c apt-get update && apt-get install -y --no-install-recommends netbase skel", install),
            ("RUN rm /etc/motd # buildkit", tidy),
        ],
    )
