"""How is an image written: a config and layers, into a file or a directory that other tools read?

Three forms.  An OCI layout is a directory (or, archived, a tar) with `oci-layout`, `index.json` and
`blobs/ALGORITHM/HEX`; a docker-archive is written as docker 25 and later write it, an archived OCI layout with a
`manifest.json` that names the same blobs, so both kinds of tools read it.  Blobs of layers are copied byte for byte
under their own digest, which is checked while they are copied, so a layer keeps its name wherever it goes.

Nothing is seen half-written: an archive or a new layout is made beside its place under another name, synced, and
renamed; into a layout that exists blobs go one by one in the same way, and `index.json`, which makes them an image,
comes last.  On an error what was written is removed.  The same config and layers give the same bytes.

Spec: image-spec image-layout.md, manifest.md, image-index.md; moby image/tarexport (manifest.json).
"""

import contextlib
import enum
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ovlfs.errors import ImageError, UsageError, printable
from ovlfs.ids import Digest
from ovlfs.image import layer_tar
from ovlfs.image.blob import sniff
from ovlfs.image.digest import hasher, sha256, split_digest
from ovlfs.image.documents import parse_object
from ovlfs.image.files import open_file, shown
from ovlfs.image.form import Form, recognise
from ovlfs.image.image import LayerBlob
from ovlfs.image.manifest import (
    CONTAINERD_NAME,
    MAX_DESCRIPTORS,
    MAX_DOCUMENT,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    REF_NAME,
)
from ovlfs.image.reference import normalise_name
from ovlfs.image.store import Store, write_all

_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
_OCI_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./:@+-]{0,255}")
_DOCKER_NAME = re.compile(
    r"(?:[A-Za-z0-9.-]+(?::[0-9]+)?/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?"
)


class Format(enum.Enum):
    """The forms in which an image is written."""

    DOCKER_ARCHIVE = "docker-archive"
    OCI_ARCHIVE = "oci-archive"
    OCI_LAYOUT = "oci-layout"


@dataclass(frozen=True, slots=True)
class Output:
    """Where an image is written, under which name (None: none), in which form."""

    path: bytes
    tag: str | None
    format: Format

    def __str__(self) -> str:
        """As it is typed, for messages."""
        return shown(self.path) + (f":{printable(self.tag)}" if self.tag is not None else "")


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: the digests of its config and manifest."""

    image_id: Digest
    manifest_digest: Digest


def parse_output(typed: str | bytes, form: str | None = None) -> Output:
    """The output `PATH[:TAG]`.

    PATH is as much as exists already, else what stands before the first colon.  Without `form` (a Format's value), a
    directory, or what ends with a slash, becomes an OCI layout, and anything else a docker-archive.

    Raises:
        UsageError: no path, no tag behind the colon, or a tag that the form cannot hold.
    """
    path, tag = _cut(os.fsencode(typed))
    if form is not None:
        chosen = Format(form)
    else:
        chosen = Format.OCI_LAYOUT if path.endswith(b"/") or os.path.isdir(path) else Format.DOCKER_ARCHIVE
    if not path.strip(b"/") or b"\0" in path:
        raise UsageError("where shall the image be written? PATH[:TAG]")
    if tag is not None:
        if not _TAG.fullmatch(tag):
            raise UsageError(f"'{printable(tag[:300])}' cannot be an image's name")
        if chosen is Format.DOCKER_ARCHIVE and not _DOCKER_NAME.fullmatch(tag):
            raise UsageError(f"'{printable(tag)}' cannot be a name for docker: NAME[:TAG], and no capitals in NAME")
    return Output(path, tag, chosen)


def _cut(typed: bytes) -> tuple[bytes, str | None]:
    if os.path.lexists(typed) or b":" not in typed:
        return typed, None
    colons = [at for at in range(len(typed)) if typed[at : at + 1] == b":"]
    at = next((at for at in reversed(colons) if os.path.lexists(typed[:at])), colons[0])
    if at == len(typed) - 1:
        raise UsageError(f"{printable(typed)}: a tag should follow the colon")
    return typed[:at], os.fsdecode(typed[at + 1 :])


def write_image(
    output: Output,
    config: bytes,
    layers: Sequence[LayerBlob],
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Written:
    """Write an image.  What was at `output` is replaced, but for a layout's other images.

    Args:
        output: where to (`parse_output`).
        config: the config's document, whose rootfs.diff_ids are those of `layers` (`new_config.extended`).
        layers: bottom first: those of an image that was opened, and new ones (`overlay.layer_export.write_layer`).
        progress: called as layers are copied.

    Raises:
        ImageError: a layer is damaged, or `output` cannot be written to; nothing is left behind then.
    """
    stated = parse_object(config, "config", MAX_DOCUMENT).object("rootfs").items("diff_ids", len(layers))
    assert stated == [layer.diff_id for layer in layers]
    image = _Documents(config, [_described(layer) for layer in layers], output)
    copier = _Copier(image, progress)
    try:
        if output.format is Format.OCI_LAYOUT:
            _write_layout(output.path, copier)
        else:
            _write_archive(output.path, copier, docker=output.format is Format.DOCKER_ARCHIVE)
    except OSError as error:
        where = shown(output.path)
        raise ImageError(f"{where}: cannot be written: {os.strerror(error.errno or 0)}") from error
    return Written(sha256(config), sha256(image.manifest))


# ---- documents -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Described:
    """A layer with what a descriptor says of it."""

    layer: LayerBlob
    digest: Digest
    media_type: str


def _described(layer: LayerBlob) -> _Described:
    """The digest of the stored bytes, computed where nobody states it, and the media type that they really have."""
    chunks = layer.blob.chunks()
    first = next(chunks, b"")
    compression = sniff(first[:6])
    if not compression:
        return _Described(layer, Digest(layer.diff_id), _LAYER_TYPE)
    digest = layer.digest
    if digest is None:
        computed = hasher("sha256:")
        computed.update(first)
        for chunk in chunks:
            computed.update(chunk)
        digest = Digest("sha256:" + computed.hexdigest())
    return _Described(layer, digest, f"{_LAYER_TYPE}+{compression}")


class _Documents:
    """The JSON documents of an image, and its layers."""

    def __init__(self, config: bytes, layers: list[_Described], output: Output) -> None:
        self.config = config
        self.layers = layers
        self.tag = output.tag
        self.docker = output.format is Format.DOCKER_ARCHIVE
        self.manifest = _dump(
            {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": _descriptor(OCI_CONFIG, sha256(config), len(config)),
                "layers": [_descriptor(one.media_type, one.digest, one.layer.size) for one in layers],
            }
        )

    @property
    def small(self) -> dict[Digest, bytes]:
        """The documents that are blobs."""
        return {sha256(document): document for document in (self.config, self.manifest)}

    def entry(self) -> dict[str, Any]:
        """The descriptor in index.json."""
        found = _descriptor(OCI_MANIFEST, sha256(self.manifest), len(self.manifest))
        if self.tag is not None:
            found["annotations"] = {REF_NAME: self.tag}
            if self.docker:  # as docker 25 and later write it
                full = normalise_name(self.tag)
                found["annotations"] = {CONTAINERD_NAME: full, REF_NAME: full.rpartition(":")[2]}
        return found

    def index(self, others: Sequence[dict[str, Any]] = ()) -> bytes:
        """index.json."""
        manifests = [*others, self.entry()]
        return _dump({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests})

    def manifest_json(self) -> bytes:
        """manifest.json of a docker-archive."""
        tag = self.tag
        if tag is not None and ":" not in tag.rpartition("/")[2]:
            tag += ":latest"
        item = {
            "Config": os.fsdecode(blob_name(sha256(self.config))),
            "RepoTags": [] if tag is None else [tag],
            "Layers": [os.fsdecode(blob_name(one.digest)) for one in self.layers],
        }
        return _dump([item])


def _descriptor(media_type: str, digest: Digest, size: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": size}


def _dump(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogateescape")


def blob_name(digest: Digest) -> bytes:
    """The name of a blob in a layout."""
    return "/".join(("blobs", *split_digest(digest))).encode()


# ---- blobs -----------------------------------------------------------------------------------------------------------


class _Copier:
    """Copies the layers of an image, each once, and checks their digests on the way."""

    def __init__(self, image: _Documents, progress: Callable[[str, int, int], None] | None) -> None:
        self.image = image
        self._progress = progress
        self.layers = {one.digest: one for one in image.layers}

    def copy(self, digest: Digest) -> Iterator[bytes]:
        """The bytes of a layer; after the last of them, ImageError unless they had the digest."""
        layer = self.layers[digest].layer
        computed = hasher(digest)
        done = 0
        for chunk in layer.blob.chunks():
            computed.update(chunk)
            done += len(chunk)
            yield chunk
            if self._progress is not None:
                self._progress(f"writing layer {digest}", done, layer.size)
        if computed.hexdigest() != split_digest(digest)[1]:
            raise ImageError(f"{layer.blob.where}: the layer has digest {computed.hexdigest()}, but {digest} is named")


# ---- archives --------------------------------------------------------------------------------------------------------


def _write_archive(path: bytes, copier: _Copier, *, docker: bool) -> None:
    directory, name = os.path.split(os.path.realpath(path))
    with _opened(directory) as parent:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(name, dir_fd=parent).st_mode):
                raise ImageError(f"{shown(path)}: is there already, and is no regular file")
        with _replacing(parent, name) as fd:
            layer_tar.write(_members(copier, docker=docker), lambda piece: write_all(fd, piece))


def _members(copier: _Copier, *, docker: bool) -> list[layer_tar.Entry]:
    image = copier.image
    documents = {blob_name(digest): document for digest, document in image.small.items()}
    documents |= {b"index.json": image.index(), b"oci-layout": _OCI_LAYOUT}
    if docker:
        documents[b"manifest.json"] = image.manifest_json()
    members = [_file(name, document) for name, document in documents.items()]
    members += [_blob_member(copier, digest) for digest in copier.layers]
    directories = {os.path.dirname(member.path) for member in members} | {b"blobs"}
    members += [layer_tar.Entry(name, stat.S_IFDIR | 0o755) for name in directories if name]
    return sorted(members, key=layer_tar.sort_key)


def _file(name: bytes, document: bytes) -> layer_tar.Entry:
    content = layer_tar.Content(((0, len(document)),), lambda offset, length: iter((document[offset:][:length],)))
    return layer_tar.Entry(name, stat.S_IFREG | 0o644, size=len(document), content=content)


def _blob_member(copier: _Copier, digest: Digest) -> layer_tar.Entry:
    def read(offset: int, length: int) -> Iterator[bytes]:
        assert (offset, length) == (0, size)
        return copier.copy(digest)

    size = copier.layers[digest].layer.size
    content = layer_tar.Content(((0, size),), read)
    return layer_tar.Entry(blob_name(digest), stat.S_IFREG | 0o644, size=size, content=content)


@contextlib.contextmanager
def _opened(directory: bytes, parent: int | None = None) -> Iterator[int]:
    """A descriptor of a directory; below `parent` no symlink is one."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    fd = os.open(directory, flags if parent is None else flags | os.O_NOFOLLOW, dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _replacing(directory: int, name: bytes) -> Iterator[int]:
    """A new file in a directory, which is called `name` and is on disk at the end of the block, or is removed."""
    temp = _temp_name(name)
    fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=directory)
    try:
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temp, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp, dir_fd=directory)
        raise
    os.fsync(directory)


def _temp_name(name: bytes) -> bytes:
    return b".%s.%s" % (name[:200], secrets.token_hex(8).encode())


# ---- layouts ---------------------------------------------------------------------------------------------------------


def _write_layout(path: bytes, copier: _Copier) -> None:
    path = os.path.realpath(path)
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        names = []
    except NotADirectoryError:
        raise ImageError(f"{shown(path)}: is there already, and is no directory") from None
    if names:
        _add_to_layout(path, copier)
        return
    directory, name = os.path.split(path)
    temp = os.path.join(directory, _temp_name(name))
    os.mkdir(temp, 0o777)
    try:
        with _opened(temp) as layout:
            _add_blobs(layout, copier, [])
            _put(layout, b"oci-layout", _OCI_LAYOUT)
            _put(layout, b"index.json", copier.image.index())
        os.rename(temp, path)  # over an empty directory, too
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    with _opened(directory) as parent:
        os.fsync(parent)


def _add_to_layout(path: bytes, copier: _Copier) -> None:
    """Add to a layout, which may be a stranger's: nothing in it that is a symlink is followed."""
    if recognise(path, Store).form is not Form.OCI_LAYOUT:
        raise ImageError(f"{shown(path)}: is there already, and is neither empty nor an OCI layout")
    with _opened(path) as layout:
        # Two commits into one layout come one after the other, or one would lose the other's entry in index.json.
        fcntl.flock(layout, fcntl.LOCK_EX)
        where = f"{shown(path)}: index.json"
        fd = open_file(path, (b"index.json",), where)
        with open(fd, "rb") as file:
            before = os.fstat(file.fileno()).st_ino
            index = parse_object(file.read(MAX_DOCUMENT + 1), where, MAX_DOCUMENT)
        others = [entry for entry in index.items("manifests", MAX_DESCRIPTORS) if isinstance(entry, dict)]
        added: list[Digest] = []
        try:
            _add_blobs(layout, copier, added)
            _put(layout, b"index.json", copier.image.index([one for one in others if not _is_replaced(one, copier)]))
        except BaseException:
            named = os.stat(b"index.json", dir_fd=layout).st_ino != before  # it is there, but perhaps not on disk
            for digest in () if named else added:
                with _blob_directory(layout, digest) as (directory, name):
                    os.unlink(name, dir_fd=directory)
            raise


def _is_replaced(entry: dict[str, Any], copier: _Copier) -> bool:
    """Whether the new image takes the place of one in the index: the same name, or the same image without a name."""
    annotations = entry.get("annotations")
    name = annotations.get(REF_NAME) if isinstance(annotations, dict) else None
    if copier.image.tag is not None:
        return bool(name == copier.image.tag)
    return name is None and entry.get("digest") == sha256(copier.image.manifest)


def _add_blobs(layout: int, copier: _Copier, added: list[Digest]) -> None:
    """Put all blobs into a layout; those that were not there go to `added`."""
    for digest, document in copier.image.small.items():
        _add_blob(layout, digest, iter((document,)), added)
    for digest in copier.layers:
        _add_blob(layout, digest, copier.copy(digest), added)


def _add_blob(layout: int, digest: Digest, content: Iterator[bytes], added: list[Digest]) -> None:
    with _blob_directory(layout, digest) as (directory, name):
        is_new = not _exists(directory, name)
        if not is_new and _has(directory, name, digest):
            return
        with _replacing(directory, name) as fd:
            for chunk in content:
                write_all(fd, chunk)
    if is_new:
        added.append(digest)


@contextlib.contextmanager
def _blob_directory(layout: int, digest: Digest) -> Iterator[tuple[int, bytes]]:
    """The directory of a blob, made if it is not there, and the blob's name in it."""
    blobs, algorithm, name = blob_name(digest).split(b"/")
    with contextlib.ExitStack() as stack:
        at = layout
        for part in (blobs, algorithm):
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, dir_fd=at)
            at = stack.enter_context(_opened(part, at))
        yield at, name


def _exists(directory: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _has(directory: int, name: bytes, digest: Digest) -> bool:
    """Whether a blob that is there is undamaged."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False  # a symlink: the blob takes its place
        raise
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return False
        return hashlib.file_digest(file, split_digest(digest)[0]).hexdigest() == split_digest(digest)[1]


def _put(layout: int, name: bytes, document: bytes) -> None:
    with _replacing(layout, name) as fd:
        write_all(fd, document)
