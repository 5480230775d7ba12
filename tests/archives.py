"""Tars and docker archives, made of names and bytes.  For tests of all rooms (`import archives`)."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

MTIME = 1_700_000_000
"""Of every member, in seconds since the epoch."""

Content = bytes | str | tarfile.TarInfo | None
"""Of a file; where a symlink leads; a header that says everything itself, without content; or None: a directory."""
Members = Mapping[str, Content]


def tar(members: Members, **fields: Any) -> bytes:
    """A tar, in the order of `members`; see tar_of()."""
    return tar_of(members.items(), **fields)


def tar_of(members: Iterable[tuple[str | bytes, Content]], *, form: int = tarfile.PAX_FORMAT, **fields: Any) -> bytes:
    """A tar, where a name may come twice, or not be UTF-8; modes are 0755 for directories and 0644 for the rest.

    Args:
        members: what is in it, by name.
        form: tarfile's `format`.
        fields: what every header says (mode, uid, ...), but for those that were given as such.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form, errors="surrogateescape") as out:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                out.addfile(content)
                continue
            info = tarfile.TarInfo(os.fsdecode(name))
            info.mode, info.mtime = 0o644, MTIME
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            out.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return stream.getvalue()


def hard_link(name: str, target: str) -> tarfile.TarInfo:
    """The header of a hard link; `target` is a name in the same layer, or in one below."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mtime = tarfile.LNKTYPE, target, MTIME
    return info


def docker_archive(
    path: Path,
    layers: Sequence[bytes],
    *,
    tag: str = "test:latest",
    stored: Sequence[bytes] | None = None,
    **document: Any,
) -> Path:
    """Write an image as `docker save` does, without all that is not needed.

    Args:
        path: of the archive.
        layers: tars, the bottom one first.
        tag: what the image is called.
        stored: the same layers as they are in the archive, compressed; None: as they are.
        document: more of the image's config: `history`, `config`, another `architecture`.
    """
    diff_ids = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}} | document
    names = [f"layer{number}.tar" for number in range(len(layers))]
    manifest = [{"Config": "config.json", "RepoTags": [tag], "Layers": names}]
    documents = {"manifest.json": json.dumps(manifest).encode(), "config.json": json.dumps(config).encode()}
    path.write_bytes(tar(documents | dict(zip(names, stored or layers, strict=True))))
    return path
