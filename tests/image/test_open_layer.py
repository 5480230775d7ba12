"""Layers of every fixture: verified, indexed, remembered; in place where they lie uncompressed."""

import gzip
import hashlib
import json
import os
import resource
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_builders import LAYERS, Layout, digest, docker25, docker_archive, make_config, make_tar

from ovlfs.errors import ImageError, LayerError
from ovlfs.ids import DiffId, Digest, Name
from ovlfs.image.image import Image, LayerBlob, open_image
from ovlfs.image.store import Store
from ovlfs.layer.base import Ref, What
from ovlfs.layer.open import ImageLayer, open_layer, open_layers

FIXTURES = [
    ("small-docker20.tar", True),
    ("small-two-docker20.tar:v1", True),
    ("small-two-docker20.tar:v2", True),
    ("small-two-docker20.tar.gz:v2", True),
    ("small-skopeo.tar", True),
    ("small-podman.tar", True),
    ("small-plain.oci.tar", True),
    ("small-oci.tar", False),
    ("small-zstd.oci.tar", False),
    ("small-zstdchunked.oci.tar", False),
    ("multi.oci.tar", False),
    ("rootfs.tar.xz", True),
    ("small-export.tar", True),
]


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as still at once."""
    monkeypatch.setattr("ovlfs.image.files._SETTLE_NS", -1 << 62)


def names_in(layer: ImageLayer) -> set[bytes]:
    """Every path that the layer has something to say about."""

    def walk(ref: Ref, path: bytes) -> Iterator[bytes]:
        for name, what in layer.list(ref):
            yield path + name
            if what is What.DIRECTORY:
                entry = layer.lookup(ref, name)
                assert entry is not None
                yield from walk(entry.ref, path + name + b"/")

    return set(walk(layer.root, b""))


def names_by_tarfile(layer: LayerBlob, store: Store) -> set[bytes]:
    """The same by the standard library: entries, whiteouts by the name they hide, and parents never described."""
    found: set[bytes] = set()
    kept = store.open(store.layer_name(layer.diff_id))
    fd = layer.blob.open() if kept is None else kept
    offset = layer.blob.offset if kept is None else 0
    with os.fdopen(fd, "rb") as file:
        file.seek(offset)
        with tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                parts = os.fsencode(member.name).strip(b"/").split(b"/")
                parts = [part for part in parts if part != b"."]
                if layer.whiteouts and parts and parts[-1] == b".wh..wh..opq":
                    parts.pop()
                elif layer.whiteouts and parts and parts[-1].startswith(b".wh."):
                    parts[-1] = parts[-1][4:]
                found.update(b"/".join(parts[: depth + 1]) for depth in range(len(parts)))
    return found


def store_files(store: Store, below: str = "") -> list[str]:
    root = Path(os.fsdecode(store.path))
    found = (path for path in root.rglob("*") if path.is_file() and path.parent.name != "locks")
    return sorted(name for name in (str(path.relative_to(root)) for path in found) if name.startswith(below))


def close(layers: list[ImageLayer]) -> None:
    for layer in layers:
        layer.close()


@pytest.mark.parametrize(("name", "in_place"), FIXTURES)
def test_open_layers_of_fixture(images: Path, store: Store, name: str, in_place: bool) -> None:
    """Every layer is verified against its diff_id, has the entries that its tar has, and opens again from the index."""
    image = open_image(f"{images}/{name}", store=store)
    layers = open_layers(image, store)
    entries = [names_in(layer) for layer in layers]
    assert entries == [names_by_tarfile(blob, store) for blob in image.layers]
    for layer in layers:
        layer.check()
    close(layers)

    assert bool(store_files(store, "layers/")) != in_place
    said: list[str] = []
    again = open_layers(image, store, progress=lambda what, _done, _total: said.append(what))
    assert said == []
    assert [names_in(one) for one in again] == entries
    close(again)


@pytest.mark.parametrize(("name", "_in_place"), FIXTURES)
def test_open_layer_file_content(images: Path, store: Store, name: str, _in_place: bool) -> None:
    """The bytes that the extents of a file name are the file's, wherever the layer lies."""
    with (images / "EXPECTED.jsonl").open() as lines:
        expected = {row["path"]: row["sha256"] for row in map(json.loads, lines) if row["image"] == "small:v1"}
    image = open_image(f"{images}/{name}", store=store)
    layer = open_layer(image.layers[0], store, number=0)
    ref: Ref = layer.root
    for part in (b"usr", b"bin", b"busybox"):
        entry = layer.lookup(ref, Name(part))
        assert entry is not None
        ref = entry.ref
    fd, extents = layer.extents(ref)
    content = b"".join(os.pread(fd, extent.length, extent.physical) for extent in extents)
    os.close(fd)
    layer.close()

    assert hashlib.sha256(content).hexdigest() == expected["usr/bin/busybox"]


def test_open_layers_forms_share_the_store(images: Path, store: Store) -> None:
    """The same layers from another file: nothing is decompressed or indexed again."""
    close(open_layers(open_image(f"{images}/small-oci.tar"), store))
    before = store_files(store)
    said: list[str] = []
    for name in ("small-zstd.oci.tar", "multi.oci.tar"):
        image = open_image(f"{images}/{name}")
        close(open_layers(image, store, progress=lambda what, _done, _total: said.append(what)))

    assert store_files(store) == before
    assert said == []


def test_open_layer_same_diff_id_twice(tmp_path: Path, store: Store) -> None:
    """One layer may stand in one image twice."""
    layout = Layout()
    stored = gzip.compress(LAYERS[0])
    layout.entries(layout.manifest([LAYERS[0], LAYERS[1], LAYERS[0]], stored=[stored, LAYERS[1], stored]))
    layers = open_layers(open_image(str(layout.save(tmp_path / "i.tar"))), store)

    assert names_in(layers[0]) == names_in(layers[2]) == {b"srv", b"srv/file0"}
    close(layers)


def test_open_layer_empty(tmp_path: Path, store: Store) -> None:
    """No bytes, or two zero blocks, are an empty tar."""
    path = tmp_path / "i.tar"
    path.write_bytes(docker25([b"", bytes(1024), LAYERS[0]]))
    layers = open_layers(open_image(str(path)), store)

    assert [names_in(layer) for layer in layers[:2]] == [set(), set()]
    close(layers)


def test_open_layer_inline_data(tmp_path: Path, store: Store) -> None:
    """A layer held by its descriptor is written to the store."""
    import base64

    layout = Layout()
    entry = layout.manifest(LAYERS[:1])
    descriptor = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest(LAYERS[0])}
    descriptor |= {"size": len(LAYERS[0]), "data": base64.b64encode(LAYERS[0]).decode()}  # type: ignore[dict-item]
    entry = layout.manifest(LAYERS[:1], changes={"layers": [descriptor]})
    (layer,) = open_layers(open_image(str(layout.entries(entry).save(tmp_path / "i.tar"))), store)

    assert names_in(layer) == {b"srv", b"srv/file0"}
    layer.close()


def test_open_layer_rootfs_keeps_wh_names(tmp_path: Path, store: Store) -> None:
    """In a root file system `.wh.x` is a name like any other; the two dialects have two indexes."""
    path = tmp_path / "r.tar"
    raw = make_tar([("usr", None), ("usr/.wh.x", b"")])
    path.write_bytes(raw)
    (layer,) = open_layers(open_image(str(path), store=store), store)
    assert names_in(layer) == {b"usr", b"usr/.wh.x"}
    layer.close()
    archive = tmp_path / "i.tar"
    archive.write_bytes(docker_archive([raw]))
    (layer,) = open_layers(open_image(str(archive)), store)

    assert names_in(layer) == {b"usr", b"usr/x"}
    layer.close()


def test_open_layer_progress_counts_up(images: Path, store: Store) -> None:
    """What is done is told in bytes, up to the total."""
    image = open_image(f"{images}/small-oci.tar")
    seen: list[tuple[str, int, int]] = []
    open_layer(image.layers[0], store, number=0, progress=lambda *said: seen.append(said)).close()

    assert seen[0][0].startswith("decompressing ")
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2] == image.layers[0].size


def test_open_layer_index_lost_is_made_again(images: Path, store: Store) -> None:
    """Without its index a verified layer is scanned, not hashed."""
    image = open_image(f"{images}/small-docker20.tar")
    close(open_layers(image, store))
    for name in store_files(store, "index/"):
        (Path(os.fsdecode(store.path)) / name).unlink()
    said: list[str] = []
    layer = open_layer(image.layers[0], store, number=0, progress=lambda what, _done, _total: said.append(what))

    assert said == []
    assert b"usr/bin/busybox" in names_in(layer)
    layer.close()


@pytest.mark.parametrize("name", ["rootfs.tar.xz", "small-export.tar"])
def test_open_rootfs_hashes_once(images: Path, store: Store, name: str) -> None:
    """The pass that found the diff_id of a root file system is not repeated to verify it."""
    said: list[str] = []
    image = open_image(f"{images}/{name}", store=store, progress=lambda what, _done, _total: said.append(what))
    assert said
    said.clear()
    close(open_layers(image, store, progress=lambda what, _done, _total: said.append(what)))

    assert said == []


def test_open_layer_index_of_another_format_is_made_again(images: Path, store: Store) -> None:
    """An index whose checksum is right, but which this scanner does not read."""
    image = open_image(f"{images}/small-docker20.tar")
    open_layer(image.layers[0], store, number=0).close()
    (name,) = store_files(store, "index/")
    store.save_index(name.encode(), b"something else")
    for _ in range(2):
        layer = open_layer(image.layers[0], store, number=0)
        assert b"usr/bin/busybox" in names_in(layer)
        layer.close()


def broken_layer(stored_as: str, tmp_path: Path) -> Image:
    raw = bytearray(LAYERS[1])
    raw[1024 + 512 + 148] ^= 1  # nothing there: the data of file1
    raw[512 + 148] ^= 1  # the second header's checksum
    layer = bytes(raw)
    layout = Layout()
    stored = gzip.compress(layer) if stored_as == "gzip" else layer
    layout.entries(layout.manifest([layer], stored=[stored]))
    return open_image(str(layout.save(tmp_path / "broken.tar")))


@pytest.mark.parametrize("stored_as", ["plain", "gzip"])
def test_open_layer_broken_tar_names_file_byte_and_rule(tmp_path: Path, store: Store, stored_as: str) -> None:
    """A tar that is what its digest says, but no tar; nothing stays in the store."""
    image = broken_layer(stored_as, tmp_path)
    with pytest.raises(LayerError, match=r"broken\.tar: .* at byte 512: ") as caught:
        open_layers(image, store)

    assert caught.value.offset == 512
    assert store_files(store) == []


def test_open_layer_wrong_digest_beats_broken_tar(tmp_path: Path, store: Store) -> None:
    """Of a layer that is not the one named, that is what the error says."""
    image = broken_layer("gzip", tmp_path)
    (layer,) = image.layers
    wrong = LayerBlob(
        layer.blob, DiffId(Digest(digest(b"other"))), layer.chain_id, layer.digest, layer.size, layer.media_type
    )
    with pytest.raises(ImageError, match="the uncompressed layer has sha256 digest"):
        open_layer(wrong, store, number=0)


def test_open_layer_no_space_leaves_nothing(tmp_path: Path, store: Store) -> None:
    """A store that cannot hold the layer says so; the temp is gone."""
    noise = make_tar([("noise", os.urandom(3_000_000))])
    layout = Layout()
    layout.entries(layout.manifest([noise], stored=[gzip.compress(noise)]))
    image = open_image(str(layout.save(tmp_path / "i.tar")))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(ImageError, match=r"store .*: layers/.*cannot be written: File too large"):
            open_layers(image, store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert store_files(store) == []


def test_open_layer_large_hashes_in_a_second_thread(tmp_path: Path, store: Store) -> None:
    """Above 4 MiB: the same digests, right and wrong."""
    noise = make_tar([("noise", os.urandom(9_000_000))])
    for number, stored in enumerate((noise, gzip.compress(noise, 1))):
        layout = Layout()
        layout.entries(layout.manifest([noise], stored=[stored]))
        (layer,) = open_layers(open_image(str(layout.save(tmp_path / f"{number}.tar"))), store)
        assert names_in(layer) == {b"noise"}
        layer.close()
        layout = Layout()
        layout.entries(layout.manifest([noise[:-1] + b"x"], stored=[gzip.compress(noise)]))
        with pytest.raises(ImageError, match="the uncompressed layer has sha256 digest"):
            open_layers(open_image(str(layout.save(tmp_path / "bad.tar"))), store)


def test_open_layers_failure_closes_the_others(tmp_path: Path, store: Store) -> None:
    """One bad layer of three: the error, and no descriptor is left open."""
    path = tmp_path / "i.tar"
    path.write_bytes(docker_archive(config=make_config([LAYERS[0], LAYERS[2], LAYERS[2]])))
    image = open_image(str(path))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError, match="the layer has sha256 digest"):
        open_layers(image, store)

    assert len(os.listdir("/proc/self/fd")) == before
