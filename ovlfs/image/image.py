"""Which layers, and which config, make up the image the user named?

`open_image` reads documents only, no layer: it recognises the form, chooses one image and one platform, checks the
digest and size of every document on the way, and answers with an `Image`: the config, and the layers bottom first,
each a range of bytes that layer/ verifies against its diff_id before it serves the first of them.

Where a file has manifest.json and index.json (docker 25 and later), manifest.json is believed: docker has written
wrong OCI indexes there (moby#47065, #47072, #47210, #51389).  Only a platform, or a digest that manifest.json does
not know, is looked for in the index.

Spec: image-spec image-layout.md, config.md; platform choice: platform.py.
"""

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ovlfs.errors import ImageError, printable
from ovlfs.ids import ChainId, DiffId, Digest
from ovlfs.image.blob import Blob, decompress, output_limit, read_range, sniff
from ovlfs.image.config import Config, parse_config
from ovlfs.image.digest import chain_ids, check_digest, parse_digest, sha256, split_digest
from ovlfs.image.documents import Object, parse_object
from ovlfs.image.files import FileIdentity, Where, read_exactly
from ovlfs.image.form import Files, Form, Progress, Recognised, range_fact, recognise
from ovlfs.image.manifest import (
    INDEX_TYPES,
    MAX_DESCRIPTORS,
    MAX_DOCUMENT,
    MAX_LAYERS,
    MAX_MANIFEST_JSON,
    ArchiveItem,
    Descriptor,
    Index,
    Manifest,
    check_mountable,
    parse_archive_manifest,
    parse_document,
    parse_index_json,
)
from ovlfs.image.platform import Platform, fallbacks, host_platform
from ovlfs.image.reference import Reference, parse_reference, same_name
from ovlfs.image.store import Store

MAX_NESTING = 8
"""Indexes within indexes; docker and buildkit write two."""

DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
ROOTFS_LAYER = "application/x-tar"

_HEX_STEM = re.compile(r"(?:sha256:)?([0-9a-f]{64})(?:\.json)?")
_BLOB_NAME = re.compile(r"blobs/([a-z0-9]+)/([0-9a-f]+)")
_V1_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class LayerBlob:
    """One layer: where its bytes are, and what they must be.

    `digest` and `size` are of the stored bytes, `diff_id` is of the tar; `digest` is None where nothing states it.
    `whiteouts` is False for a rootfs tar, where `.wh.` names have no meaning.
    """

    blob: Blob
    diff_id: DiffId
    chain_id: ChainId
    digest: Digest | None
    size: int
    media_type: str
    created_by: str = ""
    whiteouts: bool = True


@dataclass(frozen=True, slots=True)
class Image:
    """An image that can be mounted.

    `directory` is set for a plain directory, which has no layers.  `manifest_digest` is None where there is no
    manifest (docker-archive, rootfs).  `image_id` is the digest of the config, None where there is none.
    """

    form: Form
    path: bytes
    config: Config
    layers: tuple[LayerBlob, ...] = ()
    tags: tuple[str, ...] = ()
    chosen_tag: str | None = None
    manifest_digest: Digest | None = None
    image_id: Digest | None = None
    compression: str = ""
    directory: bytes | None = None

    def describe(self) -> dict[str, Any]:
        """Everything that `inspect` shows, as values for json.dumps."""
        config = self.config
        return {
            "path": os.fsdecode(self.path),
            "form": self.form.value,
            "compression": self.compression or None,
            "tags": list(self.tags),
            "chosen_tag": self.chosen_tag,
            "image_id": self.image_id,
            "manifest_digest": self.manifest_digest,
            "platform": str(config.platform) if config.raw else None,
            "created": config.created or None,
            "author": config.author or None,
            "config": {
                "user": config.user,
                "env": list(config.env),
                "entrypoint": list(config.entrypoint),
                "cmd": list(config.cmd),
                "working_dir": config.working_dir,
                "volumes": list(config.volumes),
                "exposed_ports": list(config.exposed_ports),
                "labels": dict(config.labels),
                "stop_signal": config.stop_signal,
                "healthcheck": config.healthcheck,
            },
            "history": [
                {
                    "created": step.created or None,
                    "created_by": step.created_by,
                    "comment": step.comment,
                    "empty_layer": step.empty_layer,
                }
                for step in config.history
            ],
            "layers": [
                {
                    "number": number,
                    "diff_id": layer.diff_id,
                    "chain_id": layer.chain_id,
                    "digest": layer.digest,
                    "size": layer.size,
                    "media_type": layer.media_type,
                    "created_by": layer.created_by,
                }
                for number, layer in enumerate(self.layers)
            ],
        }


@dataclass(frozen=True, slots=True)
class Listed:
    """One of the images in a file, as `@number` names it."""

    number: int
    tags: tuple[str, ...]
    digest: Digest | None = None
    platforms: tuple[Platform, ...] = ()

    def __str__(self) -> str:
        """As a message lists it."""
        return f"@{self.number} ({', '.join(printable(tag[:100]) for tag in self.tags[:5]) or 'no tag'})"


def open_image(
    reference: Reference | str | bytes,
    *,
    platform: Platform | None = None,
    progress: Progress | None = None,
    store: Store | None = None,
) -> Image:
    """The image that `reference` names, for `platform` (default: this machine's, where there is a choice).

    The store is made only when it is needed: for a compressed archive, or one whose diff_ids nobody states.
    Raises ImageError naming the file and the rule it breaks; UsageError if the reference makes no sense.
    """
    if not isinstance(reference, Reference):
        reference = parse_reference(reference)
    return _Reader(reference, platform, progress, store).image()


def list_images(
    path: str | bytes | Reference, *, progress: Progress | None = None, store: Store | None = None
) -> list[Listed]:
    """The images in a file, in its own order."""
    reference = path if isinstance(path, Reference) else parse_reference(path)
    return _Reader(reference, None, progress, store).listed()


@dataclass(slots=True)
class _Group:
    """One image of an index: the descriptors, one for each platform unless they are indexes themselves."""

    tags: tuple[str, ...]
    descriptors: list[Descriptor] = field(default_factory=list)


class _Reader:
    """The walk from a reference to an image.  Lives for one call."""

    def __init__(
        self, reference: Reference, platform: Platform | None, progress: Progress | None, store: Store | None
    ) -> None:
        self.reference = reference
        self.platform = platform
        self.progress = progress
        self._store = store
        self.found: Recognised = recognise(reference.path, self.store, progress)
        self.where: Where = self.found.files.where

    def store(self) -> Store:
        if self._store is None:
            self._store = Store()
        return self._store

    @property
    def files(self) -> Files:
        return self.found.files

    def image(self) -> Image:
        match self.found.form:
            case Form.DOCKER_ARCHIVE:
                return self.docker()
            case Form.DOCKER_LEGACY:
                return self.legacy()
            case Form.OCI_ARCHIVE | Form.OCI_LAYOUT | Form.SKOPEO_DIR:
                return self.oci()
            case Form.ROOTFS_TAR:
                return self.rootfs()
            case Form.DIRECTORY:
                self.no_choice("a directory")
                assert self.found.directory is not None
                return self.made(Config(), directory=self.found.directory.root)

    def listed(self) -> list[Listed]:
        match self.found.form:
            case Form.DOCKER_ARCHIVE:
                return _list_items(self.items())
            case Form.DOCKER_LEGACY:
                return _list_tops(self.tops())
            case Form.OCI_ARCHIVE | Form.OCI_LAYOUT | Form.SKOPEO_DIR:
                return self.list_groups(self.groups())
            case Form.ROOTFS_TAR | Form.DIRECTORY:
                return [Listed(0, ())]

    def made(self, config: Config, **fields: Any) -> Image:
        return Image(
            form=self.found.form,
            path=self.reference.path,
            config=config,
            compression=self.found.compression,
            **fields,
        )

    # -- one of several

    def no_choice(self, what: str) -> None:
        reference = self.reference
        if reference.tag is not None or reference.digest is not None or reference.index:
            raise ImageError(f"{reference}: {self.where} is {what}, which has no tags")

    def choose(self, images: list[Listed]) -> int:
        """The number of the image that the reference means; the digest is compared with `digest` of each."""
        reference = self.reference
        choices = ", ".join(str(image) for image in images[:20]) + (", ..." if len(images) > 20 else "")
        if reference.index is not None:
            if reference.index >= len(images):
                raise ImageError(f"{self.where}: has no image @{reference.index}; it has {choices}")
            return reference.index
        if reference.digest is not None:
            matching = [image.number for image in images if image.digest == reference.digest]
            if not matching:
                raise ImageError(f"{self.where}: has no image {reference.digest}; it has {choices}")
            return matching[0]
        if reference.tag is None:
            if len(images) == 1:
                return 0
            raise ImageError(f"{self.where}: has {len(images)} images, choose one with :TAG or :@NUMBER: {choices}")
        tag = reference.tag
        matching = [image.number for image in images if any(same_name(tag, have) for have in image.tags)]
        if not matching and not set(tag) & set(":/"):
            # `v2` alone, where only one image is tagged anything:v2
            matching = [image.number for image in images if any(have.rpartition(":")[2] == tag for have in image.tags)]
            if len(matching) > 1:
                raise ImageError(f"{self.where}: tag '{printable(tag)}' fits several images: {choices}")
        if not matching:
            raise ImageError(f"{self.where}: has no tag '{printable(tag)}'; it has {choices}")
        # Of two images with one name, docker load leaves the later one with it.
        return matching[-1]

    # -- docker-archive

    def items(self) -> tuple[ArchiveItem, ...]:
        blob = self.files.blob(b"manifest.json")
        return parse_archive_manifest(blob.read(MAX_MANIFEST_JSON), blob.where)

    def docker(self) -> Image:
        if self.platform is not None and self.found.has_oci:
            return self.oci()
        items = self.items()
        images = _list_items(items)
        digest = self.reference.digest
        if self.found.has_oci and digest is not None and digest not in {image.digest for image in images}:
            return self.oci()
        item = items[self.choose(images)]
        config = self.read_config(item)
        self.check_platform(config)
        where = f"{self.where}: manifest.json"
        _check_count(len(item.layers), config, where)
        blobs = []
        for name in item.layers:
            named = _BLOB_NAME.fullmatch(_clean(name))
            stated = parse_digest(f"{named[1]}:{named[2]}", where) if named else None
            blobs.append(self.files.blob(os.fsencode(name), stated))
        return self.made(
            config,
            layers=_layers(blobs, config, [DOCKER_LAYER] * len(blobs)),
            tags=item.tags,
            chosen_tag=self.chosen(item.tags),
            image_id=sha256(config.raw),
        )

    def read_config(self, item: ArchiveItem) -> Config:
        blob = self.files.blob(os.fsencode(item.config))
        raw = blob.read(MAX_DOCUMENT)
        named = _HEX_STEM.fullmatch(posixpath.basename(item.config))
        if named:
            check_digest(raw, Digest(f"sha256:{named[1]}"), blob.where)
        return parse_config(raw, blob.where)

    def check_platform(self, config: Config) -> None:
        """A platform that was asked for must be there; without one, what is there will do."""
        if self.platform is not None and config.platform not in fallbacks(self.platform):
            raise ImageError(f"{self.where}: has no image for {self.platform}; it is for {config.platform}")

    def chosen(self, tags: tuple[str, ...]) -> str | None:
        wanted = self.reference.tag
        if wanted is None:
            return tags[0] if tags else None
        fitting = [tag for tag in tags if same_name(wanted, tag) or tag.rpartition(":")[2] == wanted]
        return fitting[0] if fitting else wanted

    # -- docker before 1.10: image/spec v1.0, one directory for each layer, chained by `parent`

    def tops(self) -> list[tuple[str, tuple[str, ...]]]:
        """The id of the top layer of each image, and its tags, from `repositories`."""
        blob = self.files.blob(b"repositories")
        found = parse_object(blob.read(MAX_MANIFEST_JSON), blob.where, MAX_MANIFEST_JSON)
        tops: dict[str, list[str]] = {}
        for repository in found.names():
            for tag, top in found.mapping(repository).items():
                tops.setdefault(_v1_id(top, blob.where), []).append(f"{repository}:{tag}")
        if not tops:
            raise ImageError(f"{blob.where}: names no image")
        if len(tops) > MAX_DESCRIPTORS:
            raise ImageError(f"{blob.where}: names {len(tops)} images, the limit is {MAX_DESCRIPTORS}")
        return [(top, tuple(tags)) for top, tags in tops.items()]

    def legacy(self) -> Image:
        tops = self.tops()
        top, tags = tops[self.choose(_list_tops(tops))]
        chain = self.chain(top)  # top first
        blobs, diff_ids, history = [], [], []
        for layer_id, document in reversed(chain):
            blob = self.files.blob(f"{layer_id}/layer.tar".encode())
            blobs.append(blob)
            diff_ids.append(self.diff_id(blob))
            history.append(
                {
                    "created": document.text("created"),
                    "created_by": " ".join(document.object("container_config").words("Cmd")),
                }
            )
        first = chain[0][1]
        made = {
            "architecture": first.text("architecture") or "amd64",
            "os": first.text("os") or "linux",
            "created": first.text("created"),
            "author": first.text("author"),
            "config": first.get("config"),
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": history,
        }
        config = parse_config(json.dumps(made).encode(), f"{self.where}: {chain[0][0]}/json")
        self.check_platform(config)
        return self.made(
            config,
            layers=_layers(blobs, config, [DOCKER_LAYER] * len(blobs)),
            tags=tags,
            chosen_tag=self.chosen(tags),
            image_id=Digest(f"sha256:{top}"),
        )

    def chain(self, top: str) -> list[tuple[str, Object]]:
        chain: list[tuple[str, Object]] = []
        seen = set()
        layer_id = top
        while layer_id:
            if layer_id in seen:
                raise ImageError(f"{self.where}: {layer_id}/json: the chain of parents is a circle")
            if len(chain) >= MAX_LAYERS:
                raise ImageError(f"{self.where}: {top}: has more than {MAX_LAYERS} layers")
            seen.add(layer_id)
            blob = self.files.blob(f"{layer_id}/json".encode())
            document = parse_object(blob.read(MAX_DOCUMENT), blob.where, MAX_DOCUMENT)
            chain.append((layer_id, document))
            parent = document.text("parent")
            layer_id = _v1_id(parent, blob.where) if parent else ""
        return chain

    # -- rootfs

    def rootfs(self) -> Image:
        self.no_choice("a rootfs tar, not an image")
        assert self.found.archive is not None
        blob = self.found.archive.whole()
        diff_id = self.found.diff_id or self.diff_id(blob)
        layer = LayerBlob(
            blob, diff_id, ChainId(diff_id), None, blob.size, ROOTFS_LAYER, created_by="", whiteouts=False
        )
        return self.made(Config(), layers=(layer,))

    def diff_id(self, blob: Blob) -> DiffId:
        """The digest of a layer for which nobody states one.  Remembered as long as the file stays the same."""
        store = self.store()
        identity = blob.identity
        assert identity is not None
        what = f"plain-{blob.offset}-{blob.size}"
        known = store.recall(what, identity)
        if known is not None:
            return DiffId(Digest(known))
        fd = blob.open()
        try:
            kind = sniff(read_exactly(fd, blob.offset, min(6, blob.size), blob.where))
            computed = hashlib.sha256()
            plain = decompress(self.counted(fd, blob), kind, blob.where, output_limit(blob.size))
            for chunk in plain:
                computed.update(chunk)
            if FileIdentity.of(fd) != identity:
                raise ImageError(f"{blob.where}: the file changed while it was being read")
        finally:
            os.close(fd)
        diff_id = DiffId(Digest("sha256:" + computed.hexdigest()))
        if identity.settled():
            store.remember(what, identity, diff_id)
            if not kind:
                store.remember(range_fact(blob.offset, blob.size), identity, diff_id)
        return diff_id

    def counted(self, fd: int, blob: Blob) -> Iterator[bytes]:
        done = 0
        for chunk in read_range(fd, blob.offset, blob.size, blob.where):
            yield chunk
            done += len(chunk)
            if self.progress is not None:
                self.progress(f"hashing {blob.where}", done, blob.size)

    # -- OCI

    def oci(self) -> Image:
        if self.reference.digest is not None:
            tags, candidates = self.by_digest(self.groups(), self.reference.digest)
        else:
            groups = self.groups()
            group = groups[self.choose(self.list_groups(groups))]
            tags, candidates = group.tags, self.manifests(group.descriptors)
        descriptor, manifest, config = self.for_platform(candidates)
        where = f"{self.where}: manifest {descriptor.digest}"
        _check_count(len(manifest.layers), config, where)
        return self.made(
            config,
            layers=_layers(
                [self.blob(layer, f"layer {number}") for number, layer in enumerate(manifest.layers)],
                config,
                [layer.media_type for layer in manifest.layers],
            ),
            tags=tags,
            chosen_tag=self.chosen(tags),
            manifest_digest=descriptor.digest,
            image_id=manifest.config.digest,
        )

    def groups(self) -> list[_Group]:
        """The images of index.json.

        Entries with the same tag are one image for several platforms, and so are all entries that have a platform
        but no tag; an entry named twice is one image with two tags.
        """
        if self.found.form is Form.SKOPEO_DIR:
            blob = self.files.blob(b"manifest.json")
            raw = blob.read(MAX_DOCUMENT)
            document = parse_document(raw, blob.where)
            return [_Group((), [Descriptor(document.media_type, sha256(raw), len(raw), data=raw)])]
        if self.files.has(b"oci-layout"):
            layout = self.files.blob(b"oci-layout")
            version = parse_object(layout.read(4096), layout.where, 4096).text("imageLayoutVersion")
            if not version.startswith("1."):
                raise ImageError(f"{layout.where}: layout version '{printable(version[:40])}' is not supported (1.0.0)")
        blob = self.files.blob(b"index.json")
        index = parse_index_json(blob.read(MAX_DOCUMENT), blob.where)
        by_key: dict[str, _Group] = {}
        by_digest: dict[Digest, _Group] = {}
        for descriptor in index.manifests:
            if not descriptor.is_image:
                continue
            tags = descriptor.tags
            if tags and descriptor.digest in by_digest:
                group = by_digest[descriptor.digest]
                group.tags = tuple(dict.fromkeys(group.tags + tags))
                continue
            key = tags[0] if tags else "" if descriptor.platform else "@" + descriptor.digest
            group = by_key.setdefault(key, _Group(tags))
            group.tags = tuple(dict.fromkeys(group.tags + tags))
            if descriptor not in group.descriptors:
                group.descriptors.append(descriptor)
            by_digest[descriptor.digest] = group
        if not by_key:
            raise ImageError(f"{blob.where}: names no image")
        return list(by_key.values())

    @staticmethod
    def list_groups(groups: list[_Group]) -> list[Listed]:
        return [
            Listed(
                number,
                group.tags,
                group.descriptors[0].digest if len(group.descriptors) == 1 else None,
                tuple(found.platform for found in group.descriptors if found.platform is not None),
            )
            for number, group in enumerate(groups)
        ]

    def by_digest(self, groups: list[_Group], digest: Digest) -> tuple[tuple[str, ...], list[Descriptor]]:
        """The manifests with `digest`: that of an index, of a manifest, or of a config (the image id)."""
        for group in groups:
            if any(found.digest == digest for found in group.descriptors):
                return group.tags, self.manifests([found for found in group.descriptors if found.digest == digest])
        for group in groups:
            for descriptor in self.manifests(group.descriptors):
                if descriptor.digest == digest or self.manifest(descriptor).config.digest == digest:
                    return group.tags, [descriptor]
        raise ImageError(
            f"{self.where}: has no image {digest}; it has {', '.join(map(str, self.list_groups(groups)[:20]))}"
        )

    def manifests(self, descriptors: list[Descriptor]) -> list[Descriptor]:
        """The manifests that `descriptors` lead to, through indexes within indexes, in order.

        Each digest is followed once, so neither a circle nor a thousand names for one index costs anything.
        """
        found: list[Descriptor] = []
        seen: set[Digest] = set()

        def follow(descriptor: Descriptor, depth: int) -> None:
            if descriptor.digest in seen or not descriptor.is_image:
                return
            if depth > MAX_NESTING:
                raise ImageError(f"{self.where}: indexes are nested deeper than {MAX_NESTING} levels")
            if len(seen) >= MAX_DESCRIPTORS:
                raise ImageError(f"{self.where}: an index leads to more than {MAX_DESCRIPTORS} manifests")
            seen.add(descriptor.digest)
            if descriptor.media_type and descriptor.media_type not in INDEX_TYPES:
                found.append(descriptor)
                return
            document = self.document(descriptor)
            if isinstance(document, Manifest):
                found.append(descriptor)
                return
            for entry in document.manifests:
                follow(entry, depth + 1)

        for descriptor in descriptors:
            follow(descriptor, 1)
        return found

    def for_platform(self, candidates: list[Descriptor]) -> tuple[Descriptor, Manifest, Config]:
        """The one candidate, or the first for the best platform."""
        if not candidates:
            raise ImageError(f"{self.where}: the index names no image, only attestations or artifacts")
        if len(candidates) == 1:
            manifest = self.manifest(candidates[0])
            check_mountable(manifest, f"{self.where}: manifest {candidates[0].digest}")
            config = self.config(manifest, candidates[0])
            self.check_platform(config)
            return candidates[0], manifest, config
        offered = [(self.platform_of(candidate), candidate) for candidate in candidates]
        wanted = self.platform or host_platform()
        for acceptable in fallbacks(wanted):
            for offer, candidate in offered:
                if offer == acceptable:
                    manifest = self.manifest(candidate)
                    check_mountable(manifest, f"{self.where}: manifest {candidate.digest}")
                    return candidate, manifest, self.config(manifest, candidate)
        names = ", ".join(dict.fromkeys(str(offer) for offer, _ in offered if offer is not None))
        raise ImageError(f"{self.where}: has no image for {wanted}; choose a platform it has: {printable(names[:500])}")

    def platform_of(self, descriptor: Descriptor) -> Platform | None:
        """The platform as the index says, else as the config says; None for what is no image."""
        if descriptor.platform is not None:
            return descriptor.platform
        manifest = self.manifest(descriptor)
        try:
            check_mountable(manifest, self.where)
        except ImageError:  # an artifact beside images
            return None
        return self.config(manifest, descriptor).platform

    def config(self, manifest: Manifest, descriptor: Descriptor) -> Config:
        where = f"config of manifest {descriptor.digest}"
        return parse_config(self.content(manifest.config, "config"), f"{self.where}: {where}")

    def manifest(self, descriptor: Descriptor) -> Manifest:
        document = self.document(descriptor)
        if not isinstance(document, Manifest):
            raise ImageError(f"{self.where}: {descriptor.digest}: should be a manifest, not an index")
        return document

    def document(self, descriptor: Descriptor) -> Manifest | Index:
        raw = self.content(descriptor, "manifest")
        return parse_document(raw, f"{self.where}: {descriptor.digest}", descriptor.media_type)

    def content(self, descriptor: Descriptor, what: str) -> bytes:
        """The bytes of a document, with size and digest checked."""
        blob = self.blob(descriptor, what)
        raw = blob.read(MAX_DOCUMENT)
        check_digest(raw, descriptor.digest, blob.where)
        return raw

    def blob(self, descriptor: Descriptor, what: str) -> Blob:
        """The blob of a descriptor; its size is checked, its digest is the reader's to check."""
        where = f"{self.where}: {what} {descriptor.digest}"
        if descriptor.data is not None:
            return Blob(where, b"", (), 0, descriptor.size, descriptor.digest, None, inline=descriptor.data)
        algorithm, encoded = split_digest(descriptor.digest)
        name = f"blobs/{algorithm}/{encoded}".encode()
        if self.found.form is Form.SKOPEO_DIR:
            name = encoded.encode()
            if self.files.has(name + b".manifest.json"):
                name += b".manifest.json"
        if not self.files.has(name):
            foreign = "; it is to be fetched from " + printable(descriptor.urls[0][:100]) if descriptor.urls else ""
            raise ImageError(f"{where}: is not in the image{foreign}")
        blob = self.files.blob(name, descriptor.digest)
        if blob.size != descriptor.size:
            raise ImageError(f"{where}: has {blob.size} bytes, but its descriptor says {descriptor.size}")
        return blob


def _list_items(items: tuple[ArchiveItem, ...]) -> list[Listed]:
    listed = []
    for number, item in enumerate(items):
        named = _HEX_STEM.fullmatch(posixpath.basename(item.config))
        listed.append(Listed(number, item.tags, Digest(f"sha256:{named[1]}") if named else None))
    return listed


def _list_tops(tops: list[tuple[str, tuple[str, ...]]]) -> list[Listed]:
    return [Listed(number, tags, Digest(f"sha256:{top}")) for number, (top, tags) in enumerate(tops)]


def _clean(name: str) -> str:
    return posixpath.normpath("/" + name).lstrip("/")


def _v1_id(text: str, where: Where) -> str:
    if not _V1_ID.fullmatch(text):
        raise ImageError(f"{where}: '{printable(text[:100])}' is no layer id (64 lowercase hex digits)")
    return text


def _check_count(layers: int, config: Config, where: Where) -> None:
    if layers != len(config.diff_ids):
        raise ImageError(f"{where}: names {layers} layers, but the config has {len(config.diff_ids)} diff_ids")
    if layers == 0:
        raise ImageError(f"{where}: the image has no layers, so there is nothing to mount")


def _layers(blobs: list[Blob], config: Config, media_types: list[str]) -> tuple[LayerBlob, ...]:
    return tuple(
        LayerBlob(blob, diff_id, chain_id, blob.digest, blob.size, media_type, created_by)
        for blob, diff_id, chain_id, media_type, created_by in zip(
            blobs,
            config.diff_ids,
            chain_ids(config.diff_ids),
            media_types,
            config.created_by(len(blobs)),
            strict=True,
        )
    )
