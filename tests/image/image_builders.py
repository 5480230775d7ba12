"""Images in every form, built in code, with as many faults as a test wants."""

import functools
import gzip
import hashlib
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import archives

OCI = "application/vnd.oci.image."
DOCKER = "application/vnd.docker.distribution."
OCI_LAYER = OCI + "layer.v1.tar"


def digest(raw: bytes) -> str:
    return "sha256:" + hashlib.sha256(raw).hexdigest()


def hexed(raw: bytes) -> str:
    return digest(raw)[7:]


def dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


make_tar = functools.partial(archives.tar_of, form=tarfile.USTAR_FORMAT)
"""Names and bytes as a tar, in the older format; a str is a symlink's target, None a directory."""


def layer(number: int) -> bytes:
    """A layer tar that differs from its neighbours."""
    return make_tar([("srv", None), (f"srv/file{number}", f"content {number}\n".encode() * (number + 1))])


LAYERS = [layer(0), layer(1), layer(2)]


def make_config(layers: list[bytes], **changes: Any) -> bytes:
    return dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": [digest(one) for one in layers]},
            "history": [{"created_by": f"step {number}"} for number in range(len(layers))]
            + [{"created_by": "CMD", "empty_layer": True}],
        }
        | changes
    )


def descriptor(raw: bytes, media_type: str, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest(raw), "size": len(raw), **more}


@dataclass
class Layout:
    """An OCI layout in the making: put blobs, write `index`, then save it as an archive or a directory."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    index: Any = None
    extra: dict[str, bytes] = field(default_factory=dict)

    def put(self, raw: bytes, media_type: str, **more: Any) -> dict[str, Any]:
        self.blobs[digest(raw)] = raw
        return descriptor(raw, media_type, **more)

    def manifest(
        self,
        layers: list[bytes] | None = None,
        *,
        stored: list[bytes] | None = None,
        layer_type: str = OCI_LAYER,
        config: bytes | None = None,
        config_type: str = OCI + "config.v1+json",
        media_type: str = OCI + "manifest.v1+json",
        changes: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Put a manifest of `layers`, stored as they are or as `stored`; the answer is its descriptor."""
        layers = LAYERS if layers is None else layers
        raw_config = make_config(layers) if config is None else config
        document = {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": self.put(raw_config, config_type),
            "layers": [self.put(one, layer_type) for one in (layers if stored is None else stored)],
        }
        return self.put(dumps(document | (changes or {})), media_type)

    def nest(self, entries: list[dict[str, Any]], media_type: str = OCI + "index.v1+json") -> dict[str, Any]:
        return self.put(dumps({"schemaVersion": 2, "mediaType": media_type, "manifests": entries}), media_type)

    def entries(self, *entries: dict[str, Any]) -> "Layout":
        self.index = {"schemaVersion": 2, "manifests": list(entries)}
        return self

    def members(self) -> list[tuple[str, bytes | str | None]]:
        found: list[tuple[str, bytes | str | None]] = [("blobs", None), ("blobs/sha256", None)]
        found += [("blobs/sha256/" + name[7:], raw) for name, raw in sorted(self.blobs.items())]
        raw_index = self.index if isinstance(self.index, bytes) else dumps(self.index)
        found += [("index.json", raw_index), ("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')]
        return found + list(self.extra.items())

    def save(self, path: Path) -> Path:
        path.write_bytes(make_tar(self.members()))
        return path

    def save_directory(self, path: Path) -> Path:
        for name, content in self.members():
            target = path / name
            if isinstance(content, bytes):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            else:
                target.mkdir(parents=True, exist_ok=True)
        return path


def docker_archive(
    layers: list[bytes] | None = None,
    *,
    tags: list[str] | None = None,
    config: bytes | None = None,
    manifest: Any = None,
    extra: list[tuple[str, bytes | str | None]] | None = None,
) -> bytes:
    """An archive as docker 1.10 to 24 write it."""
    layers = LAYERS if layers is None else layers
    raw_config = make_config(layers) if config is None else config
    members: list[tuple[str, bytes | str | None]] = []
    names = []
    for number, one in enumerate(layers):
        name = f"{number:064x}/layer.tar"
        names.append(name)
        members += [(f"{number:064x}", None), (f"{number:064x}/VERSION", b"1.0"), (name, one)]
    members.append((hexed(raw_config) + ".json", raw_config))
    if manifest is None:
        manifest = [
            {"Config": hexed(raw_config) + ".json", "RepoTags": ["app:v1"] if tags is None else tags, "Layers": names}
        ]
    members.append(("manifest.json", manifest if isinstance(manifest, bytes) else dumps(manifest)))
    return make_tar(members + (extra or []))


def docker_legacy(layers: list[bytes] | None = None, *, parents: dict[int, int] | None = None) -> bytes:
    """An archive as docker before 1.10 writes it: no manifest.json, a chain of `<id>/json`."""
    layers = LAYERS if layers is None else layers
    members: list[tuple[str, bytes | str | None]] = []
    ids = [f"{number + 10:064x}" for number in range(len(layers))]
    for number, one in enumerate(layers):
        document: dict[str, Any] = {
            "id": ids[number],
            "architecture": "amd64",
            "os": "linux",
            "container_config": {"Cmd": ["/bin/sh", "-c", f"step {number}"]},
            "config": {"Cmd": ["/bin/sh"], "Env": ["A=b"]},
        }
        if parents is not None and number in parents:
            document["parent"] = ids[parents[number]]
        elif number:
            document["parent"] = ids[number - 1]
        members += [
            (ids[number], None),
            (ids[number] + "/VERSION", b"1.0"),
            (ids[number] + "/json", dumps(document)),
            (ids[number] + "/layer.tar", one),
        ]
    members.append(("repositories", dumps({"old": {"v1": ids[-1]}})))
    return make_tar(members)


def docker25(layers: list[bytes] | None = None) -> bytes:
    """Docker 25 to 28: plain layers under blobs/, both manifest.json and an OCI index, LayerSources."""
    layers = LAYERS if layers is None else layers
    layout = Layout()
    entry = layout.manifest(layers)
    names = {"io.containerd.image.name": "docker.io/library/app:v1", "org.opencontainers.image.ref.name": "v1"}
    layout.entries(entry | {"annotations": names})
    raw_config = make_config(layers)
    layout.extra["manifest.json"] = dumps(
        [
            {
                "Config": "blobs/sha256/" + hexed(raw_config),
                "RepoTags": ["app:v1"],
                "Layers": ["blobs/sha256/" + hexed(one) for one in layers],
                "LayerSources": {digest(one): descriptor(one, OCI_LAYER) for one in layers},
            }
        ]
    )
    layout.extra["repositories"] = dumps({"app": {"v1": "0" * 64}})
    return make_tar(layout.members())


def docker29(layers: list[bytes] | None = None) -> bytes:
    """Docker 29: gzip layers under their compressed digest, a nested index with an attestation manifest."""
    layers = LAYERS if layers is None else layers
    stored = [gzip.compress(one, mtime=0) for one in layers]
    layout = Layout()
    entry = layout.manifest(layers, stored=stored, layer_type=OCI_LAYER + "+gzip")
    entry |= {"platform": {"architecture": "amd64", "os": "linux"}}
    inner = layout.nest([entry, attestation(layout, entry["digest"])])
    names = {"io.containerd.image.name": "docker.io/library/app:v1", "org.opencontainers.image.ref.name": "v1"}
    layout.entries(inner | {"annotations": names})
    layout.extra["manifest.json"] = dumps(
        [
            {
                "Config": "blobs/sha256/" + hexed(make_config(layers)),
                "RepoTags": ["app:v1"],
                "Layers": ["blobs/sha256/" + hexed(one) for one in stored],
            }
        ]
    )
    return make_tar(layout.members())


def attestation(layout: Layout, subject: str) -> dict[str, Any]:
    entry = layout.manifest([], stored=[b"{}"], layer_type="application/vnd.in-toto+json")
    return entry | {
        "platform": {"architecture": "unknown", "os": "unknown"},
        "annotations": {"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": subject},
    }


def docker_drag(layers: list[bytes] | None = None) -> bytes:
    """docker-drag: a PAX tar whose first member is a directory called `/`, fake v1 ids, `repositories`."""
    layers = LAYERS if layers is None else layers
    raw_config = make_config(layers)
    ids = [hexed(one + b"\n") for one in layers]
    members: list[tuple[str, bytes | str | None]] = [("/", None)]
    for one, v1_id in zip(layers, ids, strict=True):
        members += [
            (v1_id + "/VERSION", b"1.0"),
            (v1_id + "/json", dumps({"id": v1_id})),
            (v1_id + "/layer.tar", one),
        ]
    members += [
        (hexed(raw_config) + ".json", raw_config),
        (
            "manifest.json",
            dumps(
                [
                    {
                        "Config": hexed(raw_config) + ".json",
                        "RepoTags": ["app:v1"],
                        "Layers": [v1_id + "/layer.tar" for v1_id in ids],
                    }
                ]
            ),
        ),
        ("repositories", dumps({"app": {"v1": ids[-1]}})),
    ]
    return make_tar(members, form=tarfile.PAX_FORMAT)
