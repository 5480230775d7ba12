"""Hostile images: one clear error that names the file and the rule, and nothing left in the store.

The layers themselves are attacked elsewhere; here it is what is around them: digests, sizes, documents, indexes,
links, compression, and a file that changes while it is used.
"""

import base64
import contextlib
import gzip
import json
import os
import random
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import zstandard

sys.path.insert(0, str(Path(__file__).parent.parent / "image"))

from image_builders import (
    LAYERS,
    OCI,
    OCI_LAYER,
    Layout,
    attestation,
    digest,
    docker_archive,
    docker_legacy,
    dumps,
    hexed,
    make_config,
    make_tar,
)

from ovlfs.errors import ImageError
from ovlfs.image.image import Image, open_image
from ovlfs.image.platform import parse_platform
from ovlfs.image.store import Store
from ovlfs.layer.open import open_layer, open_layers


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store, which is also the default one; files count as still at once."""
    monkeypatch.setenv("OVLFS_STORE", str(tmp_path / "store"))
    monkeypatch.setattr("ovlfs.image.files._SETTLE_NS", -1 << 62)
    return Store(bytes(tmp_path / "store"))


def left_in(store: Store) -> list[str]:
    """The files that a failure left, apart from the empty ones that are flocked."""
    root = Path(os.fsdecode(store.path))
    return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.parent.name != "locks"]


def use(path: Path | str, store: Store, **options: Any) -> Image:
    """Open the image and all its layers, as a mount does."""
    image = open_image(str(path), store=store, **options)
    for layer in open_layers(image, store):
        layer.close()
    return image


def refused(path: Path | str, store: Store, rule: str, **options: Any) -> None:
    """The image is refused; the error names the file and the rule on one line, and nothing is left."""
    before = left_in(store)
    with pytest.raises(ImageError, match=rule) as caught:
        use(path, store, **options)

    text = str(caught.value)
    assert Path(str(path)).name.partition(":")[0] in text
    assert text.isprintable()
    assert len(text) < 1000
    assert left_in(store) == before


def saved(tmp_path: Path, raw: bytes, name: str = "hostile.tar") -> Path:
    path = tmp_path / name
    path.write_bytes(raw)
    return path


def one_layer(tmp_path: Path, stored: bytes, layer: bytes = LAYERS[0]) -> Path:
    """An oci-archive whose only layer is stored as `stored`."""
    layout = Layout()
    return layout.entries(layout.manifest([layer], stored=[stored])).save(tmp_path / "hostile.tar")


# -- H29 to H32: compression


def test_h29_gzip_bomb_layer_stops_at_the_limit(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """1:1000 in a layer."""
    monkeypatch.setenv("OVLFS_MAX_UNPACKED", str(1 << 20))
    path = one_layer(tmp_path, gzip.compress(bytes(100 << 20)))
    refused(path, store, "decompresses to more than 1048576 bytes")


def test_h29_gzip_bomb_archive_stops_at_the_limit(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1:1000 around the archive."""
    monkeypatch.setenv("OVLFS_MAX_UNPACKED", str(1 << 20))
    path = saved(tmp_path, gzip.compress(bytes(100 << 20)), "hostile.tar.gz")
    refused(path, store, "decompresses to more than 1048576 bytes")


def test_h29_gzip_in_gzip_is_not_followed(tmp_path: Path, store: Store) -> None:
    """Compression within compression is no tar."""
    path = saved(tmp_path, gzip.compress(gzip.compress(docker_archive())))
    with pytest.raises(ImageError, match=r"hostile\.tar: is no image"):
        open_image(str(path), store=store)


def test_h30_zstd_window_of_2_gib(tmp_path: Path, store: Store) -> None:
    path = one_layer(tmp_path, b"\x28\xb5\x2f\xfd\x00\xa8" + bytes(100))
    refused(path, store, "zstd window of 2147483648 bytes is larger than")


def test_h31_zstd_of_skippable_frames_only_is_an_empty_stream(tmp_path: Path, store: Store) -> None:
    """It decompresses to nothing, which is not the layer."""
    path = one_layer(tmp_path, b"\x50\x2a\x4d\x18\x04\0\0\0skip" * 3)
    refused(path, store, "uncompressed layer has sha256 digest e3b0c442")


def test_h31_zstd_skippable_frame_of_4_gib(tmp_path: Path, store: Store) -> None:
    path = one_layer(tmp_path, b"\x5f\x2a\x4d\x18\xff\xff\xff\xff" + bytes(1000))
    refused(path, store, "skippable zstd frame is cut off")


def test_h32_a_million_empty_gzip_members(tmp_path: Path, store: Store) -> None:
    path = one_layer(tmp_path, gzip.compress(b"", mtime=0) * 1_000_000)
    refused(path, store, "more than 65536 empty gzip streams")


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 100])
def test_truncated_compressed_layer(tmp_path: Path, store: Store, cut: int) -> None:
    """A cut in the stored bytes is found by the decoder, even where size and digest agree with it."""
    noise = make_tar([("noise", random.Random(3).randbytes(100_000))])
    refused(one_layer(tmp_path, gzip.compress(noise)[:-cut], noise), store, "cut off")
    refused(one_layer(tmp_path, zstandard.compress(noise)[:-cut], noise), store, "cut off")


@pytest.mark.parametrize("cut", [1, 8, 9, 1000])
def test_truncated_compressed_archive(tmp_path: Path, store: Store, cut: int) -> None:
    """The same around the archive; no half archive stays in the store."""
    raw = docker_archive([make_tar([("noise", random.Random(6).randbytes(50_000))])])
    refused(saved(tmp_path, gzip.compress(raw)[:-cut], "hostile.tar.gz"), store, "cut off")
    refused(saved(tmp_path, zstandard.compress(raw)[:-cut], "hostile.tar.zst"), store, "cut off")


# -- H33, H34: digests, sizes, blobs that are something else


def layout_directory(tmp_path: Path) -> tuple[Path, Path, Layout]:
    """A good layout, its bottom layer's file, and what it was made of."""
    layout = Layout()
    path = layout.entries(layout.manifest(LAYERS[:1])).save_directory(tmp_path / "hostile")
    return path, path / "blobs" / "sha256" / hexed(LAYERS[0]), layout


def test_h33_layer_content_does_not_have_its_digest(tmp_path: Path, store: Store) -> None:
    path, blob, _ = layout_directory(tmp_path)
    raw = bytearray(blob.read_bytes())
    raw[1000] ^= 1
    blob.write_bytes(raw)
    refused(path, store, f"the layer has sha256 digest {hexed(bytes(raw))}, but {hexed(LAYERS[0])} is named")


def test_h33_compressed_layer_digest_and_diff_id_disagree(tmp_path: Path, store: Store) -> None:
    """The stored bytes are right, what comes out is another layer."""
    refused(one_layer(tmp_path, gzip.compress(LAYERS[1])), store, "the uncompressed layer has sha256 digest")


def test_h33_compressed_layer_has_another_digest(tmp_path: Path, store: Store) -> None:
    """What comes out is right, the stored bytes are not those of the manifest."""
    layout = Layout()
    layout.entries(layout.manifest([LAYERS[0]], stored=[gzip.compress(LAYERS[0], 1, mtime=0)]))
    path = layout.save_directory(tmp_path / "hostile")
    blob = path / "blobs" / "sha256" / hexed(gzip.compress(LAYERS[0], 1, mtime=0))
    blob.write_bytes(gzip.compress(LAYERS[0], 1, mtime=1))
    refused(path, store, "the stored layer has sha256 digest")


def test_h33_uncompressed_layer_with_digest_other_than_diff_id(tmp_path: Path, store: Store) -> None:
    refused(one_layer(tmp_path, LAYERS[1]), store, "is stored uncompressed, so its digest .* should be its diff_id")


@pytest.mark.parametrize("which", ["layer", "config", "manifest"])
@pytest.mark.parametrize("change", [-1, 1])
def test_h33_size_does_not_match(tmp_path: Path, store: Store, which: str, change: int) -> None:
    """Checked before anything is hashed."""
    layout = Layout()
    config = layout.put(make_config(LAYERS), OCI + "config.v1+json")
    layers = [layout.put(one, OCI_LAYER) for one in LAYERS]
    if which == "layer":
        layers[1]["size"] += change
    if which == "config":
        config["size"] += change
    entry = layout.put(dumps({"schemaVersion": 2, "config": config, "layers": layers}), OCI + "manifest.v1+json")
    if which == "manifest":
        entry["size"] += change
    path = layout.entries(entry).save(tmp_path / "hostile.tar")
    refused(path, store, r"has \d+ bytes, but its descriptor says \d+")


@pytest.mark.parametrize("size", [-1, 1 << 63, "12", 1.5, None, True])
def test_h33_size_is_impossible(tmp_path: Path, store: Store, size: Any) -> None:
    layout = Layout()
    entry = layout.manifest() | {"size": size}
    path = layout.entries(entry).save(tmp_path / "hostile.tar")
    refused(path, store, r"size|descriptor says 0")


def test_h33_config_content_does_not_have_its_digest(tmp_path: Path, store: Store) -> None:
    path, _, _ = layout_directory(tmp_path)
    config = make_config(LAYERS[:1])
    (path / "blobs" / "sha256" / hexed(config)).write_bytes(config.replace(b"amd64", b"arm64"))
    refused(path, store, f"content has digest .*, but {hexed(config)} is named")


def test_h33_docker_archive_config_does_not_have_the_digest_of_its_name(tmp_path: Path, store: Store) -> None:
    config = make_config(LAYERS)
    raw = docker_archive(config=config).replace(config, config.replace(b"amd64", b"arm64"))
    refused(saved(tmp_path, raw), store, f"but {hexed(config)} is named")


def test_h33_docker_archive_layer_is_not_its_diff_id(tmp_path: Path, store: Store) -> None:
    path = saved(tmp_path, docker_archive(LAYERS[:1], config=make_config([LAYERS[1]])))
    refused(path, store, "the layer has sha256 digest")


@pytest.mark.parametrize("kind", ["missing", "directory", "symlink", "dangling", "fifo", "symlinked parent"])
def test_h33_blob_in_a_layout_is_something_else(tmp_path: Path, store: Store, kind: str) -> None:
    """Missing, a directory, a symlink to a file of the host, a fifo (without waiting on it)."""
    path, blob, _ = layout_directory(tmp_path)
    (tmp_path / "shadow").write_bytes(LAYERS[0])
    rule = "regular file"
    if kind == "symlinked parent":
        (path / "blobs").rename(tmp_path / "elsewhere")
        (path / "blobs").symlink_to(tmp_path / "elsewhere")
        rule = "symlink, which may not be followed"
    else:
        blob.unlink()
    if kind == "missing":
        rule = "is not in the image"
    elif kind == "directory":
        blob.mkdir()
    elif kind in {"symlink", "dangling"}:
        blob.symlink_to(tmp_path / ("shadow" if kind == "symlink" else "nowhere"))
        rule = "is a symlink, which may not be followed"
    elif kind == "fifo":
        os.mkfifo(blob)
    refused(path, store, rule)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mknod needs root")
def test_h33_blob_in_a_layout_is_a_device(tmp_path: Path, store: Store) -> None:
    path, blob, _ = layout_directory(tmp_path)
    blob.unlink()
    try:
        os.mknod(blob, 0o20644, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("mknod is not permitted here")
    refused(path, store, "regular file")


def test_h33_foreign_layer_that_is_not_there_names_its_url(tmp_path: Path, store: Store) -> None:
    """Nothing is fetched; the escape in the url does not reach the terminal."""
    layout = Layout()
    missing = {
        "mediaType": OCI + "layer.nondistributable.v1.tar",
        "digest": digest(LAYERS[0]),
        "size": 10,
        "urls": ["http://x/\x1b[31m"],
    }
    path = layout.entries(layout.manifest(LAYERS[:1], changes={"layers": [missing]})).save(tmp_path / "hostile.tar")
    layout.blobs.pop(digest(LAYERS[0]))
    layout.save(path)
    refused(path, store, r"is not in the image; it is to be fetched from http://x/\\x1b")


@pytest.mark.parametrize(
    "bad",
    [
        "sha256:../../../etc/passwd",
        "sha256:" + "A" * 64,
        "sha256:" + "a" * 63,
        "sha256:" + "a" * 65,
        "sha256:" + "a" * 64 + "\n",
        "md5:" + "a" * 32,
        "blake3:" + "a" * 64,
        "a" * 64,
        "sha256:",
        ":",
        "",
        None,
        17,
        "sha256:" + "\u0661" * 64,
    ],
)
@pytest.mark.parametrize("place", ["index", "layer", "config", "diff_id"])
def test_h34_digest_is_checked_before_it_is_used(tmp_path: Path, store: Store, bad: Any, place: str) -> None:
    """Traversal, uppercase, wrong length, unknown algorithm: nowhere does it become a path."""
    layout = Layout()
    changes: dict[str, Any] = {}
    config = make_config(LAYERS)
    if place == "diff_id":
        config = make_config(LAYERS, rootfs={"type": "layers", "diff_ids": [bad] * 3})
    if place == "layer":
        changes["layers"] = [{"mediaType": OCI_LAYER, "digest": bad, "size": 1}] * 3
    if place == "config":
        changes["config"] = {"mediaType": OCI + "config.v1+json", "digest": bad, "size": 1}
    entry = layout.manifest(config=config, changes=changes)
    if place == "index":
        entry["digest"] = bad
    path = layout.entries(entry).save(tmp_path / "hostile.tar")
    refused(path, store, r"digest")


# -- H35: names in manifest.json


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "../../../../../../etc/shadow", "", "."])
@pytest.mark.parametrize("place", ["Config", "Layers"])
def test_h35_names_never_leave_the_archive(tmp_path: Path, store: Store, name: str, place: str) -> None:
    """They are looked up among the members, nowhere else."""
    config = make_config(LAYERS[:1])
    item: dict[str, Any] = {"Config": hexed(config) + ".json", "RepoTags": ["a:1"], "Layers": [f"{0:064x}/layer.tar"]}
    item[place] = name if place == "Config" else [name]
    path = saved(tmp_path, docker_archive(LAYERS[:1], manifest=[item]))
    refused(path, store, r"is not in the archive|should name its Config|should be names of members")


@pytest.mark.parametrize(
    ("links", "rule"),
    [
        ({"x/layer.tar": "../../../../etc/passwd"}, "is a link out of the archive"),
        ({"x/layer.tar": "/etc/passwd"}, "is a link out of the archive"),
        ({"x/layer.tar": "layer.tar"}, "which is no regular file"),
        ({"x/layer.tar": "../y", "y": "x/layer.tar"}, "which is no regular file"),
        ({"x/layer.tar": "../nowhere"}, "not in the archive"),
        ({"x/layer.tar": ".."}, "is a link out of the archive|not in the archive"),
        ({"x/layer.tar": "../y", "y": f"{0:064x}/layer.tar"}, "which is no regular file"),
    ],
)
def test_h35_layer_symlink_is_followed_once_and_by_name_only(
    tmp_path: Path, store: Store, links: dict[str, str], rule: str
) -> None:
    """Out of the archive, to itself, in a circle, to nothing, and two hops."""
    config = make_config(LAYERS[:1])
    item = {"Config": hexed(config) + ".json", "RepoTags": ["a:1"], "Layers": ["x/layer.tar"]}
    path = saved(tmp_path, docker_archive(LAYERS[:1], manifest=[item], extra=list(links.items())))
    refused(path, store, rule)


def test_h35_layer_is_a_directory(tmp_path: Path, store: Store) -> None:
    config = make_config(LAYERS[:1])
    item = {"Config": hexed(config) + ".json", "RepoTags": ["a:1"], "Layers": [f"{0:064x}"]}
    refused(saved(tmp_path, docker_archive(LAYERS[:1], manifest=[item])), store, "should be a regular file")


@pytest.mark.parametrize("parents", [{0: 2}, {0: 0}, {1: 2}])
def test_h35_legacy_parents_in_a_circle(tmp_path: Path, store: Store, parents: dict[int, int]) -> None:
    refused(saved(tmp_path, docker_legacy(parents=parents)), store, "the chain of parents is a circle")


@pytest.mark.parametrize("top", ["../../etc", "A" * 64, "", "a" * 63])
def test_h35_legacy_id_is_checked(tmp_path: Path, store: Store, top: str) -> None:
    raw = make_tar([("a" * 64 + "/json", b"{}"), ("repositories", dumps({"old": {"v1": top}}))])
    refused(saved(tmp_path, raw), store, "is no layer id")


# -- H36: counts and documents


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_h36_layer_count_differs_from_diff_ids(tmp_path: Path, store: Store, count: int) -> None:
    diff_ids = [digest(LAYERS[0])] * count
    config = make_config(LAYERS, rootfs={"type": "layers", "diff_ids": diff_ids})
    refused(saved(tmp_path, docker_archive(config=config)), store, f"names 3 layers, but the config has {count} diff")
    layout = Layout()
    path = layout.entries(layout.manifest(config=config)).save(tmp_path / "hostile.oci")
    refused(path, store, f"names 3 layers, but the config has {count} diff_ids")


def test_h36_no_layers(tmp_path: Path, store: Store) -> None:
    refused(saved(tmp_path, docker_archive([])), store, "has no layers")


def test_h36_too_many_layers(tmp_path: Path, store: Store) -> None:
    item = {"Config": "c.json", "RepoTags": ["a:1"], "Layers": ["x"] * 100_000}
    refused(saved(tmp_path, docker_archive(manifest=[item])), store, "field 'Layers' has 100000 items, the limit is")
    layout = Layout()
    entry = layout.manifest(changes={"layers": [layout.put(LAYERS[0], OCI_LAYER)] * 2000})
    refused(layout.entries(entry).save(tmp_path / "hostile.oci"), store, "field 'layers' has 2000 items, the limit")


@pytest.mark.parametrize("field", ["Config", "Layers", "RepoTags"])
def test_h36_null_fields_of_manifest_json(tmp_path: Path, store: Store, field: str) -> None:
    """Null is absent; an image without tags is still an image."""
    config = make_config(LAYERS[:1])
    item: dict[str, Any] = {"Config": hexed(config) + ".json", "RepoTags": ["a:1"], "Layers": [f"{0:064x}/layer.tar"]}
    path = saved(tmp_path, docker_archive(LAYERS[:1], manifest=[item | {field: None}]))
    if field == "RepoTags":
        assert use(path, store).tags == ()
    else:
        refused(path, store, "should name its Config|names 0 layers")


def test_h36_json_over_the_limit(tmp_path: Path, store: Store) -> None:
    """manifest.json 1 MiB, config 4 MiB: larger ones are not even read."""
    refused(saved(tmp_path, docker_archive(manifest=b" " * (1 << 20) + b"[]")), store, "the limit is 1048576")
    big = make_config(LAYERS, padding="x" * (4 << 20))
    refused(saved(tmp_path, docker_archive(config=big)), store, "the limit is 4194304")


@pytest.mark.parametrize("depth", [65, 100_000, 400_000])
@pytest.mark.parametrize("unit", [b"[", b'{"a":'])
def test_h36_json_nested_deeply(tmp_path: Path, store: Store, depth: int, unit: bytes) -> None:
    """Counted before the parser recurses."""
    raw = (unit * depth)[: 1 << 20]
    refused(saved(tmp_path, docker_archive(manifest=raw)), store, "nested deeper than 64 levels")


@pytest.mark.parametrize(
    ("raw", "rule"),
    [
        (b"", "is not JSON"),
        (b"[", "is not JSON"),
        (b"[NaN]", "NaN is no JSON number"),
        (b'[{"Config":' + b"1" * 5000 + b"}]", "is not JSON"),
        (b"{}", "should be a list of images"),
        (b'"x"', "should be a list of images"),
        (b"[]", "names no image"),
        (b"[1]", "should be a JSON object, not an integer"),
        (b'[{"Config":["x"]}]', "field 'Config' should be a string, not a list"),
        (b'[{"Config":"x","Layers":[1]}]', "Layers should be names of members"),
        (b'[{"Config":"x","Layers":{"a":1}}]', "field 'Layers' should be a list, not an object"),
        (b"\xff\xfe[\0]\0", "is not JSON"),
        (b'"' + b"\\" * 99_999, "is not JSON"),
        (b'"\\' * 400_000, "is not JSON"),
    ],
)
def test_h36_manifest_json_that_is_something_else(tmp_path: Path, store: Store, raw: bytes, rule: str) -> None:
    refused(saved(tmp_path, docker_archive(manifest=raw)), store, rule)


def test_h36_duplicate_keys_last_wins(tmp_path: Path, store: Store) -> None:
    """As in Go, which every writer is tested against: no two readers see two images."""
    config = make_config(LAYERS[:1])
    name = hexed(config).encode() + b".json"
    raw = b'[{"Config":"nowhere","Config":"%b","RepoTags":null,"Layers":["%064x/layer.tar"]}]' % (name, 0)

    assert len(use(saved(tmp_path, docker_archive(LAYERS[:1], manifest=raw)), store).layers) == 1


@pytest.mark.parametrize(
    "field", ["rootfs", "history", "config", "os", "architecture", "created", "config.Env", "config.Labels"]
)
@pytest.mark.parametrize("value", [17, "x", [], {}, [[]], True])
def test_h36_config_fields_of_the_wrong_kind(tmp_path: Path, store: Store, field: str, value: Any) -> None:
    """A clear error or a harmless meaning, never a traceback."""
    document = json.loads(make_config(LAYERS))
    outer, _, inner = field.partition(".")
    document[outer] = value if not inner else document[outer] | {inner: value}
    path = saved(tmp_path, docker_archive(config=dumps(document)))
    with contextlib.suppress(ImageError):
        open_image(str(path), store=store)


# -- H37 to H39: indexes and media types


def test_h37_index_that_contains_itself(tmp_path: Path, store: Store) -> None:
    """A digest cannot really contain itself: the lie is found when it is checked."""
    fake = digest(b"the index itself")
    document = dumps(
        {
            "schemaVersion": 2,
            "manifests": [{"mediaType": OCI + "index.v1+json", "digest": fake, "size": 0}],
        }
    )
    document = document.replace(b'"size":0', b'"size":%d' % (len(document) + 2))
    layout = Layout(blobs={fake: document})
    layout.entries({"mediaType": OCI + "index.v1+json", "digest": fake, "size": len(document)})
    refused(layout.save(tmp_path / "hostile.tar"), store, "content has digest")


def test_h37_indexes_nested_a_thousand_deep(tmp_path: Path, store: Store) -> None:
    layout = Layout()
    entry = layout.manifest()
    for _ in range(1000):
        entry = layout.nest([entry])
    refused(layout.entries(entry).save(tmp_path / "hostile.tar"), store, "nested deeper than 8 levels")


def test_h37_index_that_branches_without_end(tmp_path: Path, store: Store) -> None:
    """Each index names the next one 4000 times; each is read once."""
    layout = Layout()
    entry = layout.manifest()
    for _ in range(6):
        entry = layout.nest([entry] * 4000)

    assert len(use(layout.entries(entry).save(tmp_path / "good.tar"), store).layers) == 3


def test_h37_index_of_100000_entries(tmp_path: Path, store: Store) -> None:
    layout = Layout()
    entry = layout.manifest()
    layout.index = {"manifests": [entry] * 10_000}
    refused(layout.save(tmp_path / "hostile.tar"), store, "field 'manifests' has 10000 items, the limit is 4096")
    layout.index = {"manifests": [entry] * 100_000}
    refused(layout.save(tmp_path / "hostile.tar"), store, "the limit is 4194304")


def test_h37_index_of_attestations_only(tmp_path: Path, store: Store) -> None:
    layout = Layout()
    inner = layout.nest([attestation(layout, "sha256:" + "0" * 64)] * 3)
    refused(layout.entries(inner).save(tmp_path / "hostile.tar"), store, "names no image, only attestations or art")
    layout.entries(attestation(layout, "sha256:" + "0" * 64))
    refused(layout.save(tmp_path / "hostile.tar"), store, "names no image")


@pytest.mark.parametrize("media_type", [OCI + "manifest.v1+json", OCI + "index.v1+json", ""])
@pytest.mark.parametrize("which", [("layers", "manifests"), ("config", "manifests")])
def test_h38_document_with_both_layers_and_manifests(
    tmp_path: Path, store: Store, media_type: str, which: tuple[str, str]
) -> None:
    """Two readers could take it for two images (CVE-2021-41190)."""
    layout = Layout()
    manifest = json.loads(layout.blobs[layout.manifest()["digest"]])
    document = {"schemaVersion": 2, "manifests": [], which[0]: manifest[which[0]]}
    path = layout.entries(layout.put(dumps(document), media_type)).save(tmp_path / "hostile.tar")
    refused(path, store, "has both layers and manifests")


def test_h38_index_json_with_layers(tmp_path: Path, store: Store) -> None:
    layout = Layout()
    layout.entries(layout.manifest())
    layout.index["layers"] = []
    refused(layout.save(tmp_path / "hostile.tar"), store, r"index\.json: has layers, but should be an index")


@pytest.mark.parametrize(
    ("media_type", "own", "rule"),
    [
        (OCI + "index.v1+json", OCI + "manifest.v1+json", "its descriptor says"),
        (OCI + "manifest.v1+json", OCI + "index.v1+json", "its descriptor says"),
        (OCI + "index.v1+json", None, "has the fields of a manifest, but media type"),
        (OCI + "manifest.v1+json", "text/html", "calls itself 'text/html'"),
    ],
)
def test_h39_media_type_lies(tmp_path: Path, store: Store, media_type: str, own: str | None, rule: str) -> None:
    """The descriptor, the document's own word and its fields must agree."""
    layout = Layout()
    document = json.loads(layout.blobs[layout.manifest()["digest"]]) | {"mediaType": own}
    path = layout.entries(layout.put(dumps(document), media_type)).save(tmp_path / "hostile.tar")
    refused(path, store, rule)


@pytest.mark.parametrize("layer_type", [OCI_LAYER, OCI_LAYER + "+gzip", OCI_LAYER + "+zstd", ""])
@pytest.mark.parametrize("stored", ["plain", "gzip", "zstd"])
def test_h39_layer_media_type_does_not_decide_the_compression(
    tmp_path: Path, store: Store, layer_type: str, stored: str
) -> None:
    """Real images have plain layers typed +gzip, and the other way round: the magic counts."""
    raw = {"plain": LAYERS[0], "gzip": gzip.compress(LAYERS[0]), "zstd": zstandard.compress(LAYERS[0])}[stored]
    layout = Layout()
    layout.entries(layout.manifest(LAYERS[:1], stored=[raw], layer_type=layer_type))

    assert len(use(layout.save(tmp_path / "good.tar"), store).layers) == 1


@pytest.mark.parametrize(
    ("layer_type", "rule"),
    [
        (OCI_LAYER + "+gzip+encrypted", "is encrypted"),
        ("application/vnd.erofs.layer.v1", "is no tar"),
        ("application/vnd.in-toto+json", "is no tar"),
        ("application/wasm\x1b[2J", r"is no tar"),
    ],
)
def test_h39_layer_that_is_no_tar(tmp_path: Path, store: Store, layer_type: str, rule: str) -> None:
    layout = Layout()
    refused(layout.entries(layout.manifest(layer_type=layer_type)).save(tmp_path / "hostile.tar"), store, rule)


@pytest.mark.parametrize(
    "config_type", ["application/vnd.oci.empty.v1+json", "application/vnd.cncf.helm.config.v1+json", "text/plain"]
)
def test_h39_artifact_is_no_image(tmp_path: Path, store: Store, config_type: str) -> None:
    layout = Layout()
    path = layout.entries(layout.manifest(config_type=config_type)).save(tmp_path / "hostile.tar")
    refused(path, store, f"is an artifact of type '{config_type}'".replace("+", r"\+"))


def test_h39_artifact_type_is_no_image(tmp_path: Path, store: Store) -> None:
    layout = Layout()
    path = layout.entries(layout.manifest(changes={"artifactType": "application/x-thing"})).save(
        tmp_path / "hostile.tar"
    )
    refused(path, store, "is an artifact of type 'application/x-thing'")


def test_h39_windows_image(tmp_path: Path, store: Store) -> None:
    path = saved(tmp_path, docker_archive(config=make_config(LAYERS, os="windows")))
    refused(path, store, "is for windows, and only linux images can be mounted")


def test_h39_schema_1_manifest(tmp_path: Path, store: Store) -> None:
    layout = Layout()
    entry = layout.put(dumps({"schemaVersion": 1, "fsLayers": []}), OCI + "manifest.v1+json")
    refused(layout.entries(entry).save(tmp_path / "hostile.tar"), store, "schema 1 manifest")


def test_h39_data_of_a_descriptor_lies(tmp_path: Path, store: Store) -> None:
    """Not base64, another size, another digest."""
    layout = Layout()
    good = layout.manifest()
    raw = layout.blobs[good["digest"]]
    for lie, rule in (
        ("!", "is not base64"),
        (base64.b64encode(raw + b" ").decode(), "its size says"),
        (base64.b64encode(raw[:-1] + b" ").decode(), "content has digest"),
    ):
        refused(layout.entries(good | {"data": lie}).save(tmp_path / "hostile.tar"), store, rule)


# -- the outer tar


def test_outer_tar_bad_second_header_is_an_error(tmp_path: Path, store: Store) -> None:
    """Where tarfile silently ends."""
    raw = bytearray(docker_archive())
    raw[512 + 148] ^= 1
    refused(saved(tmp_path, bytes(raw)), store, r"at byte 512: (not a tar header|a tar header holds)")


def test_outer_tar_truncated_anywhere_is_an_error(tmp_path: Path, store: Store) -> None:
    """Every cut before the end blocks is noticed: by the reader, or because manifest.json is missing."""
    raw = docker_archive(LAYERS[:1])
    end = len(raw.rstrip(b"\0"))
    for length in range(0, end, 97):
        path = saved(tmp_path, raw[:length])
        try:
            image = open_image(str(path), store=store)
        except ImageError:
            continue
        assert image.form.value == "rootfs tar"  # what is left of it names no image


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        (slice(124, 136), b"77777777777\0", "goes beyond the end of the tar"),
        (slice(124, 136), b"\x80" + b"\xff" * 11, "impossible number"),
        (slice(124, 136), b"\xff" * 12, "impossible number"),
        (slice(124, 136), b"9999999999x\0", "for a number"),
        (slice(156, 157), b"x", "PAX record|header of"),
    ],
)
def test_outer_tar_header_lies(tmp_path: Path, store: Store, field: slice, value: bytes, rule: str) -> None:
    """Sizes beyond the file, negative, huge and not octal; a file called a PAX header."""
    raw = bytearray(docker_archive(LAYERS[:1]))
    at = raw.index(b"VERSION") - 65
    raw[at + field.start : at + field.stop] = value
    total = sum(raw[at : at + 512]) - sum(raw[at + 148 : at + 156]) + 8 * 32
    raw[at + 148 : at + 156] = b"%06o\0 " % total
    refused(saved(tmp_path, bytes(raw)), store, rule)


@pytest.mark.parametrize(
    "records", [b"0 path=x\n", b"99999999999 path=x\n", b"9 path=x", b"path=x\n", b"-5 a=b\n", b"8 a=b\n\n"]
)
def test_outer_tar_pax_record_lies(tmp_path: Path, store: Store, records: bytes) -> None:
    header = bytearray(make_tar([("pax", records)])[:1024])
    header[156:157] = b"x"
    header[148:156] = b"%06o\0 " % (sum(header[:512]) - sum(header[148:156]) + 8 * 32)
    refused(saved(tmp_path, bytes(header) + docker_archive()), store, "a PAX record should be")


def test_outer_tar_with_too_many_members(tmp_path: Path, store: Store) -> None:
    header = make_tar([("x", b"")])[:512]
    raw = docker_archive()[:-1024].rstrip(b"\0")
    raw += bytes(-len(raw) % 512)
    refused(saved(tmp_path, raw + header * 70_000), store, "more than 65536 members")


# -- H42: the file changes


def change(path: Path, how: str) -> None:
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "overwritten":
        with path.open("r+b") as file:
            file.seek(2000)
            file.write(b"evil")
    elif how == "replaced":
        path.with_name("new").write_bytes(path.read_bytes())
        path.with_name("new").rename(path)


@pytest.mark.parametrize("how", ["truncated", "overwritten", "replaced"])
def test_h42_image_changed_between_open_and_layers(tmp_path: Path, store: Store, how: str) -> None:
    """What was looked up in one file is not read from another."""
    path = saved(tmp_path, docker_archive())
    image = open_image(str(path), store=store)
    change(path, how)
    with pytest.raises(ImageError, match=r"hostile\.tar: .*: the file changed while it was being read"):
        open_layer(image.layers[0], store, number=0)
    assert left_in(store) == []


@pytest.mark.parametrize("how", ["truncated", "overwritten"])
def test_h42_image_changed_while_mounted_is_eio(tmp_path: Path, store: Store, how: str) -> None:
    """Neither zeros nor another file's bytes."""
    path = saved(tmp_path, docker_archive())
    os.utime(path, ns=(1, 1))
    image = open_image(str(path), store=store)
    layer = open_layer(image.layers[2], store, number=2)
    layer.check()
    if how == "truncated":
        change(path, how)
    else:
        with path.open("r+b") as file:
            file.seek(image.layers[2].blob.offset + 1100)
            file.write(b"evil")
    with pytest.raises(OSError, match=r"hostile\.tar: .*the file was changed while it was mounted"):
        layer.check()
    layer.close()


@pytest.mark.parametrize("how", ["replaced", "renamed", "removed", "linked", "touched"])
def test_h42_image_replaced_while_mounted_stays_what_it_was(tmp_path: Path, store: Store, how: str) -> None:
    """The open file is the old one, whatever the name means now."""
    path = saved(tmp_path, docker_archive())
    layer = open_layer(open_image(str(path), store=store).layers[0], store, number=0)
    if how == "replaced":
        change(path, how)
    elif how == "renamed":
        path.rename(tmp_path / "other")
    elif how == "linked":
        os.link(path, tmp_path / "other")
    elif how == "touched":
        os.utime(path, ns=(1, 1))
    else:
        path.unlink()
    layer.check()
    layer.close()


def test_h42_changed_image_is_verified_again(tmp_path: Path, store: Store) -> None:
    """What was verified once is forgotten with any change of the file."""
    path = saved(tmp_path, docker_archive())
    use(path, store)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"content 0", b"evil    0"))
    with pytest.raises(ImageError, match="the layer has sha256 digest"):
        use(path, store)


def test_h42_layer_in_the_store_is_verified_again_when_it_changed(tmp_path: Path, store: Store) -> None:
    """Truncated or overwritten in the store: decompressed again."""
    path = one_layer(tmp_path, gzip.compress(LAYERS[0]))
    use(path, store)
    kept = Path(os.fsdecode(store.full_path(store.layer_name(digest(LAYERS[0])))))
    for how in ("truncated", "overwritten"):
        change(kept, how)
        use(path, store)
        assert kept.read_bytes() == LAYERS[0]


# -- H45: two at once (a store of somebody else: tests/image/test_store.py)


def test_h45_concurrent_mounts_share_one_decompression(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits, is told so, and uses what the first made."""
    noise = make_tar([("noise", random.Random(4).randbytes(3_000_000))])
    path = one_layer(tmp_path, gzip.compress(noise), noise)
    image = open_image(str(path), store=store)
    begun = threading.Event()
    go_on = threading.Event()
    said: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        said.append(what)
        if what.startswith("waiting"):
            go_on.set()
        elif what.startswith("decompressing"):
            begun.set()
            assert go_on.wait(30)

    def mount() -> None:
        open_layer(image.layers[0], Store(store.path), number=0, progress=progress).close()

    threads = [threading.Thread(target=mount) for _ in range(2)]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    for thread in threads:
        thread.join(30)

    assert sum(what.startswith("waiting") for what in said) == 1
    assert len([name for name in left_in(store) if name.startswith("layers/")]) == 1


_MOUNT = """
import sys
from ovlfs.image.image import open_image
from ovlfs.image.store import Store
from ovlfs.layer.open import open_layers
image = open_image(sys.argv[1], store=Store())
said = set()
open_layers(image, Store(), progress=lambda what, done, total: said.add(what.split(" ")[0]))
print(*sorted(said))
"""


def test_h45_concurrent_processes_share_the_store(tmp_path: Path, store: Store) -> None:
    """Six processes at once on a compressed archive: all succeed, one decompresses, nothing is left half done."""
    noise = [make_tar([(f"noise{number}", random.Random(number).randbytes(2_000_000))]) for number in range(2)]
    path = saved(tmp_path, gzip.compress(docker_archive(noise), 1), "good.tar.gz")
    os.utime(path, ns=(1, 1))
    processes = [
        subprocess.Popen([sys.executable, "-c", _MOUNT, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(6)
    ]
    results = [process.communicate(timeout=60) for process in processes]

    assert [process.returncode for process in processes] == [0] * 6, results
    assert len([name for name in left_in(store) if name.startswith("archives/")]) == 1
    assert [name for name in left_in(store) if name.startswith("tmp/")] == []


def test_platform_text_of_an_image_is_shown_escaped(tmp_path: Path, store: Store) -> None:
    """A platform in an index is the attacker's text too."""
    layout = Layout()
    entries = [
        layout.manifest(LAYERS[: number + 1]) | {"platform": {"os": "linux", "architecture": f"\x1b[3{number}m"}}
        for number in range(2)
    ]
    path = layout.entries(*entries).save(tmp_path / "hostile.tar")
    refused(path, store, r"has no image for linux/arm64; .*\\x1b\[30m", platform=parse_platform("arm64"))


def test_tag_text_of_an_image_is_shown_escaped(tmp_path: Path, store: Store) -> None:
    path = saved(tmp_path, docker_archive(tags=["\x1b[2Japp:v1", "\u202e:x"]))
    refused(f"{path}:nope", store, r"has no tag 'nope'; it has @0 \(\\x1b\[2Japp:v1, \\u202e:x\)")


def test_struct_of_random_bytes_never_breaks_the_reader(tmp_path: Path, store: Store) -> None:
    """Random changes of a good archive give an image or an ImageError, nothing else."""
    rng = random.Random(5)
    good = docker_archive(LAYERS[:1])
    for _ in range(300):
        raw = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(raw))
            raw[at : at + 4] = struct.pack("<I", rng.getrandbits(32))
        path = saved(tmp_path, bytes(raw))
        with contextlib.suppress(ImageError):
            use(path, store)
