"""What do manifest.json, an index and a manifest say?

Documents become frozen dataclasses whose digests, sizes and counts are already checked; nothing here reads files.
A document that has both `layers` and `manifests` is refused, since two readers could take it for two different
images (CVE-2021-41190).  Docker's media types are accepted wherever OCI's are, and the other way round.

Spec: image-spec manifest.md, image-index.md, descriptor.md; docker-archive: moby image/tarexport/load.go.
"""

import base64
import binascii
import re
from dataclasses import dataclass, field

from ovlfs.errors import ImageError, printable
from ovlfs.ids import Digest
from ovlfs.image.digest import parse_digest
from ovlfs.image.documents import Object, parse_json, parse_object
from ovlfs.image.platform import Platform, normalise

MAX_MANIFEST_JSON = 1 << 20
"""Bytes of manifest.json and `repositories` of a docker-archive (containers/image has the same limit)."""
MAX_DOCUMENT = 4 << 20
"""Bytes of a manifest, index or config (containers/image has the same limit, after CVE-2020-1702)."""
MAX_LAYERS = 1024
"""Layers of one image.  The kernel's overlayfs stacks 500, docker 127."""
MAX_DESCRIPTORS = 4096
"""Entries of one index, and images in one archive."""
MAX_BLOB_SIZE = 1 << 50
"""A size above this is a lie."""

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
INDEX_TYPES = frozenset({OCI_INDEX, DOCKER_INDEX})
MANIFEST_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
CONFIG_TYPES = frozenset({OCI_CONFIG, DOCKER_CONFIG})
SCHEMA1_TYPES = frozenset(
    {
        "application/vnd.docker.distribution.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
    }
)

REF_NAME = "org.opencontainers.image.ref.name"
CONTAINERD_NAME = "io.containerd.image.name"
_ATTESTATION = "vnd.docker.reference.type"

_LAYER_TYPE = re.compile(
    r"application/vnd\.(oci\.image\.layer\.(v1|nondistributable\.v1)\.tar(\+gzip|\+zstd|\+bzip2|\+xz)?"
    r"|docker\.image\.rootfs\.(foreign\.)?diff\.tar([.+](gzip|zstd|bzip2|xz))?)"
)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A reference to a blob by digest and size.  `data` are its bytes, where the descriptor holds them itself."""

    media_type: str
    digest: Digest
    size: int
    platform: Platform | None = None
    artifact_type: str = ""
    annotations: dict[str, str] = field(default_factory=dict)
    urls: tuple[str, ...] = ()
    data: bytes | None = None

    @property
    def tags(self) -> tuple[str, ...]:
        """The names that an entry of index.json carries, the spec's first."""
        names = (self.annotations.get(REF_NAME, ""), self.annotations.get(CONTAINERD_NAME, ""))
        return tuple(dict.fromkeys(name for name in names if name))

    @property
    def is_image(self) -> bool:
        """False for what accompanies images: attestations, signatures, other artifacts, and unknown media types."""
        return (
            self.annotations.get(_ATTESTATION) != "attestation-manifest"
            and not self.artifact_type
            and (self.platform is None or self.platform.known)
            and (not self.media_type or self.media_type in INDEX_TYPES | MANIFEST_TYPES | SCHEMA1_TYPES)
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image for one platform: a config and its layers, bottom first."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: dict[str, str]
    artifact_type: str = ""


@dataclass(frozen=True, slots=True)
class Index:
    """Several manifests, or indexes of them."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: dict[str, str]


@dataclass(frozen=True, slots=True)
class ArchiveItem:
    """One image in manifest.json: names of members, not yet cleaned or looked up."""

    config: str
    tags: tuple[str, ...]
    layers: tuple[str, ...]


def parse_descriptor(found: Object) -> Descriptor:
    """A descriptor whose digest has the right form and whose size is possible."""
    digest = parse_digest(found.get("digest"), f"{found.where}: digest")
    size = found.integer("size")
    if not 0 <= size <= MAX_BLOB_SIZE:
        raise ImageError(f"{found.where}: size {str(size)[:30]} of {digest} is impossible")
    platform = None
    if found.get("platform") is not None:
        where = found.object("platform")
        platform = normalise(where.text("os"), where.text("architecture"), where.text("variant"))
    return Descriptor(
        media_type=found.text("mediaType"),
        digest=digest,
        size=size,
        platform=platform,
        artifact_type=found.text("artifactType"),
        annotations=found.mapping("annotations"),
        urls=found.texts("urls", 64),
        data=_inline(found, digest, size),
    )


def _inline(found: Object, digest: Digest, size: int) -> bytes | None:
    text = found.text("data")
    if not text:
        return None
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{found.where}: data of {digest} is not base64") from error
    if len(raw) != size:
        raise ImageError(f"{found.where}: data of {digest} has {len(raw)} bytes, its size says {size}")
    return raw


def parse_document(raw: bytes, where: str, media_type: str = "") -> Manifest | Index:
    """A manifest or an index; which one is told by its content, and `media_type` of the descriptor must agree."""
    found = parse_object(raw, where, MAX_DOCUMENT)
    has_layers = found.get("layers") is not None or found.get("config") is not None
    has_manifests = found.get("manifests") is not None
    if has_layers and has_manifests:
        raise ImageError(f"{where}: has both layers and manifests, so it is neither a manifest nor an index")
    own_type = found.text("mediaType")
    if found.get("fsLayers") is not None or own_type in SCHEMA1_TYPES or found.get("schemaVersion") == 1:
        raise ImageError(f"{where}: is a schema 1 manifest of docker before 1.10, which is not supported")
    if own_type and media_type and own_type != media_type:
        raise ImageError(
            f"{where}: calls itself '{printable(own_type[:80])}', its descriptor says '{printable(media_type[:80])}'"
        )
    stated = own_type or media_type
    is_index = has_manifests or (not has_layers and stated in INDEX_TYPES)
    if stated and stated not in (INDEX_TYPES if is_index else MANIFEST_TYPES):
        kind = "an index" if is_index else "a manifest"
        raise ImageError(f"{where}: has the fields of {kind}, but media type '{printable(stated[:80])}'")
    if is_index:
        return parse_index(found)
    if not has_layers:
        raise ImageError(f"{where}: has neither layers nor manifests")
    if found.get("config") is None:
        raise ImageError(f"{where}: a manifest should name a config")
    return Manifest(
        media_type=stated or OCI_MANIFEST,
        config=parse_descriptor(found.object("config")),
        layers=tuple(parse_descriptor(item) for item in found.objects("layers", MAX_LAYERS)),
        annotations=found.mapping("annotations"),
        artifact_type=found.text("artifactType"),
    )


def parse_index(found: Object) -> Index:
    """An index, also one without mediaType (skopeo 1.9 writes none) and with `manifests: null` (docker 25)."""
    return Index(
        media_type=found.text("mediaType") or OCI_INDEX,
        manifests=tuple(parse_descriptor(item) for item in found.objects("manifests", MAX_DESCRIPTORS)),
        annotations=found.mapping("annotations"),
    )


def parse_index_json(raw: bytes, where: str) -> Index:
    """The index.json of a layout: always an index, whatever it says."""
    found = parse_object(raw, where, MAX_DOCUMENT)
    if found.get("layers") is not None:
        raise ImageError(f"{where}: has layers, but should be an index")
    return parse_index(found)


def parse_archive_manifest(raw: bytes, where: str) -> tuple[ArchiveItem, ...]:
    """The manifest.json of a docker-archive: a list of images."""
    found = parse_json(raw, where, MAX_MANIFEST_JSON)
    if isinstance(found, dict):
        raise ImageError(f"{where}: should be a list of images, as docker save writes it, but is an object")
    if not isinstance(found, list):
        raise ImageError(f"{where}: should be a list of images")
    if not found:
        raise ImageError(f"{where}: names no image")
    if len(found) > MAX_DESCRIPTORS:
        raise ImageError(f"{where}: names {len(found)} images, the limit is {MAX_DESCRIPTORS}")
    items = []
    for number, value in enumerate(found):
        item = Object.of(value, f"{where}: image {number}")
        config = item.text("Config")
        if not config:
            raise ImageError(f"{item.where}: should name its Config")
        layers = item.items("Layers", MAX_LAYERS)
        if not all(isinstance(layer, str) and layer for layer in layers):
            raise ImageError(f"{item.where}: Layers should be names of members")
        items.append(ArchiveItem(config, item.texts("RepoTags", 4096), tuple(layers)))
    return tuple(items)


def check_mountable(manifest: Manifest, where: str) -> None:
    """Raise ImageError for what is no container image: artifacts, encrypted or non-tar layers."""
    config_type = manifest.config.media_type
    if manifest.artifact_type or (config_type and config_type not in CONFIG_TYPES):
        kind = printable((manifest.artifact_type or config_type)[:80])
        raise ImageError(f"{where}: is an artifact of type '{kind}', not a container image")
    for number, layer in enumerate(manifest.layers):
        if not layer.media_type or _LAYER_TYPE.fullmatch(layer.media_type):
            continue
        kind = printable(layer.media_type[:80])
        why = "is encrypted" if kind.endswith("+encrypted") else "is no tar"
        raise ImageError(f"{where}: layer {number} of media type '{kind}' {why}, so it cannot be mounted")
