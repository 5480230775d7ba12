"""Every form of an image is recognised by content, and of several images the right one is chosen."""

import base64
import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from image_builders import (
    DOCKER,
    LAYERS,
    OCI,
    OCI_LAYER,
    Layout,
    attestation,
    digest,
    docker25,
    docker29,
    docker_archive,
    docker_drag,
    docker_legacy,
    dumps,
    hexed,
    make_config,
    make_tar,
)

from ovlfs.errors import ImageError
from ovlfs.image.form import Form
from ovlfs.image.image import Image, list_images, open_image
from ovlfs.image.platform import parse_platform
from ovlfs.image.store import Store
from ovlfs.layer.open import open_layers

DIFF_IDS = [digest(one) for one in LAYERS]
SMALL_V1 = "sha256:f65311fe8b0780c8502fab272c5419350f4804a419e4dd3956c6ff7ef3937df0"
SMALL_TOP = "sha256:4d313dc70394ec10016bf337af050c68c7184e7279eb77aad7f22a1516d174f8"
SMALL_BASE = "sha256:43e3e386efb2835bd1e32e69145f14d2356ec68aed605aec8a39435ffb0f0153"


def diff_ids(image: Image) -> list[str]:
    return [layer.diff_id for layer in image.layers]


@pytest.mark.parametrize(
    ("name", "form", "tags"),
    [
        ("small-docker20.tar", Form.DOCKER_ARCHIVE, ("small:v1",)),
        ("small-skopeo.tar", Form.DOCKER_ARCHIVE, ("docker.io/library/small:v1",)),
        ("small-podman.tar", Form.DOCKER_ARCHIVE, ("localhost/small:v1",)),
        ("small-oci.tar", Form.OCI_ARCHIVE, ("v1",)),
        ("small-zstd.oci.tar", Form.OCI_ARCHIVE, ("v1",)),
        ("small-zstdchunked.oci.tar", Form.OCI_ARCHIVE, ("v1",)),
        ("small-plain.oci.tar", Form.OCI_ARCHIVE, ("v1",)),
    ],
)
def test_open_fixture_image(images: Path, store: Store, name: str, form: Form, tags: tuple[str, ...]) -> None:
    """The same nine layers, whoever wrote the file; no store is needed to find them."""
    image = open_image(str(images / name))

    assert (image.form, image.tags, image.chosen_tag) == (form, tags, tags[0])
    assert len(image.layers) == 9
    assert (image.layers[0].diff_id, image.layers[8].diff_id) == (SMALL_BASE, SMALL_TOP)
    assert image.layers[0].chain_id == SMALL_BASE
    assert image.layers[0].created_by.startswith("/bin/sh -c #(nop) ADD file:")
    assert image.config.user == "app"
    assert not Path(os.environ["OVLFS_STORE"]).exists()


@pytest.mark.parametrize("name", ["small-docker20.tar", "small-skopeo.tar", "small-podman.tar"])
def test_open_docker_archive_has_dockers_image_id(images: Path, name: str) -> None:
    assert open_image(str(images / name)).image_id == SMALL_V1


def test_open_two_images_without_choice_lists_them(images: Path) -> None:
    with pytest.raises(ImageError, match=r"two-docker20\.tar: has 2 images, choose one .*@0 \(small:v1\), @1 \(small"):
        open_image(str(images / "small-two-docker20.tar"))


@pytest.mark.parametrize("choice", [":small:v2", ":v2", ":@1", ":docker.io/library/small:v2"])
@pytest.mark.parametrize("name", ["small-two-docker20.tar", "small-two-docker20.tar.gz"])
def test_open_one_of_two_by_any_name(images: Path, store: Store, name: str, choice: str) -> None:
    """A tag in any spelling, or the number; a shared layer is found through its symlink."""
    image = open_image(str(images / name) + choice, store=store)

    assert image.chosen_tag == "small:v2"
    assert len(image.layers) == 10
    assert image.layers[0].diff_id == SMALL_BASE
    assert image.compression == ("gzip" if name.endswith("gz") else "")


def test_open_by_image_id(images: Path) -> None:
    assert open_image(f"{images}/small-two-docker20.tar:@{SMALL_V1}").chosen_tag == "small:v1"


@pytest.mark.parametrize(
    ("platform", "marker"),
    [
        ("linux/arm64", "arm64v8"),
        ("linux/arm/v7", "armv7"),
        ("386", "386"),
        ("amd64", None),
        ("linux/amd64/v4", None),
        ("linux/arm64/v8.3", "arm64v8"),
    ],
)
def test_open_platform_of_nested_index(images: Path, platform: str, marker: str | None) -> None:
    """The platform is found through the nested index, the attestation manifest is stepped over."""
    image = open_image(str(images / "multi.oci.tar"), platform=parse_platform(platform))

    assert image.config.labels.get("arch-marker") == marker
    assert image.tags == ("v1", "docker.io/library/small:v1")


def test_open_platform_missing_lists_those_there(images: Path) -> None:
    with pytest.raises(ImageError, match=r"multi\.oci\.tar: has no image for linux/s390x;.*linux/arm64, linux/amd64"):
        open_image(str(images / "multi.oci.tar"), platform=parse_platform("s390x"))


def test_open_platform_that_a_single_image_lacks(images: Path) -> None:
    """A platform that was asked for must be there; without asking, any single image will do."""
    with pytest.raises(ImageError, match="has no image for linux/arm64; it is for linux/amd64"):
        open_image(str(images / "small-oci.tar"), platform=parse_platform("arm64"))
    with pytest.raises(ImageError, match="has no image for linux/arm64; it is for linux/amd64"):
        open_image(str(images / "small-docker20.tar"), platform=parse_platform("arm64"))


@pytest.mark.parametrize("name", ["rootfs.tar.xz", "small-export.tar"])
def test_open_rootfs_tar(images: Path, store: Store, name: str) -> None:
    """A root file system is one layer, in which `.wh.` means nothing, with an empty config."""
    image = open_image(str(images / name), store=store)

    assert image.form is Form.ROOTFS_TAR
    (layer,) = image.layers
    assert not layer.whiteouts
    assert layer.digest is None
    assert (image.config.raw, image.image_id, image.tags) == (b"", None, ())


def test_open_rootfs_tar_has_no_tags(images: Path, store: Store) -> None:
    with pytest.raises(ImageError, match="is a rootfs tar, not an image, which has no tags"):
        open_image(str(images / "small-export.tar") + ":v1", store=store)


def test_open_directory_is_a_root(tmp_path: Path) -> None:
    (tmp_path / "root" / "etc").mkdir(parents=True)
    image = open_image(str(tmp_path / "root"))

    assert image.form is Form.DIRECTORY
    assert image.directory == bytes(tmp_path / "root")
    assert image.layers == ()


FORMS: dict[str, tuple[Callable[[], bytes], Form]] = {
    "docker-1.0": (docker_legacy, Form.DOCKER_LEGACY),
    "docker-1.10": (docker_archive, Form.DOCKER_ARCHIVE),
    "docker-25": (docker25, Form.DOCKER_ARCHIVE),
    "docker-29": (docker29, Form.DOCKER_ARCHIVE),
    "docker-drag": (docker_drag, Form.DOCKER_ARCHIVE),
}
OUTER: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "gzip": gzip.compress,
    "zstd": lambda raw: b"\x50\x2a\x4d\x18\x04\0\0\0skip" + zstandard.ZstdCompressor().compress(raw),
    "xz": lzma.compress,
    "bzip2": bz2.compress,
}


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("form", FORMS)
def test_open_synthetic_form_in_any_compression(tmp_path: Path, store: Store, form: str, outer: str) -> None:
    """Each generation of docker-archive, compressed by hand or not, has the same layers; the name says nothing."""
    build, expected = FORMS[form]
    path = tmp_path / "no-telling.name"
    path.write_bytes(OUTER[outer](build()))
    image = open_image(str(path), store=store)

    assert (image.form, image.compression) == (expected, outer)
    assert diff_ids(image) == DIFF_IDS
    assert [layer.created_by for layer in image.layers][-1].endswith("step 2")


@pytest.mark.parametrize("build", [docker25, docker29])
def test_open_docker25_with_platform_uses_the_index(tmp_path: Path, build: Callable[[], bytes]) -> None:
    """manifest.json is the safer truth; a platform is looked for in the OCI index beside it."""
    path = tmp_path / "i.tar"
    path.write_bytes(build())
    plain = open_image(f"{path}:app:v1")
    chosen = open_image(f"{path}:app:v1", platform=parse_platform("amd64"))

    assert plain.manifest_digest is None
    assert chosen.manifest_digest is not None
    assert diff_ids(plain) == diff_ids(chosen) == DIFF_IDS
    assert open_image(f"{path}@{chosen.manifest_digest}").manifest_digest == chosen.manifest_digest


def test_open_docker_archive_saved_by_id_has_no_tags(tmp_path: Path) -> None:
    """RepoTags is null then."""
    path = tmp_path / "i.tar"
    config = make_config([LAYERS[0]])
    item = {"Config": hexed(config) + ".json", "RepoTags": None, "Layers": [f"{0:064x}/layer.tar"]}
    path.write_bytes(docker_archive([LAYERS[0]], manifest=[item]))

    assert open_image(str(path)).tags == ()
    assert [str(one) for one in list_images(str(path))] == ["@0 (no tag)"]


def test_open_docker_archive_layer_symlink_one_hop(tmp_path: Path) -> None:
    """A layer that two images share is a symlink to the other's layer.tar, found by name."""
    path = tmp_path / "i.tar"
    config = make_config([LAYERS[0], LAYERS[0]])
    item = {"Config": hexed(config) + ".json", "RepoTags": ["a:1"], "Layers": [f"{0:064x}/layer.tar", "x/layer.tar"]}
    link = f"../{0:064x}/layer.tar"
    path.write_bytes(docker_archive([LAYERS[0]], config=config, manifest=[item], extra=[("x/layer.tar", link)]))
    image = open_image(str(path))

    assert image.layers[0].blob.offset == image.layers[1].blob.offset
    assert image.layers[0].chain_id != image.layers[1].chain_id


def test_open_docker_archive_layer_hard_link(tmp_path: Path) -> None:
    """A tar made again by GNU tar may hold a shared layer as a hard link, whose target counts from the root."""
    config = make_config([LAYERS[0]])
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, raw in (("a/layer.tar", LAYERS[0]), ("c.json", config)):
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
        link = tarfile.TarInfo("b/layer.tar")
        link.type, link.linkname = tarfile.LNKTYPE, "a/layer.tar"
        tar.addfile(link)
        manifest = dumps([{"Config": "c.json", "RepoTags": ["a:1"], "Layers": ["b/layer.tar"]}])
        info = tarfile.TarInfo("manifest.json")
        info.size = len(manifest)
        tar.addfile(info, io.BytesIO(manifest))
    path = tmp_path / "i.tar"
    path.write_bytes(stream.getvalue())

    assert b"".join(open_image(str(path)).layers[0].blob.chunks()) == LAYERS[0]


def test_open_docker_archive_of_crane(tmp_path: Path, store: Store) -> None:
    """Crane and kaniko call the config `sha256:<hex>` and store gzip layers as `<hex>.tar.gz`."""
    config = make_config(LAYERS)
    stored = {hexed(gzip.compress(one, mtime=0)) + ".tar.gz": gzip.compress(one, mtime=0) for one in LAYERS}
    manifest = dumps([{"Config": digest(config), "RepoTags": ["a:1"], "Layers": list(stored)}])
    path = tmp_path / "i.tar"
    path.write_bytes(make_tar([(digest(config), config), *stored.items(), ("manifest.json", manifest)]))
    image = open_image(str(path))

    assert diff_ids(image) == DIFF_IDS
    assert image.image_id == digest(config)
    for layer in open_layers(image, store):
        layer.close()


def test_open_names_are_cleaned_on_both_sides(tmp_path: Path) -> None:
    """`./manifest.json` in the tar, and `./x/../layer.tar` in the manifest."""
    config = make_config([LAYERS[0]])
    manifest = dumps([{"Config": "./config.json", "RepoTags": ["a:1"], "Layers": ["./x/../layer.tar"]}])
    path = tmp_path / "i.tar"
    path.write_bytes(
        make_tar([("./", None), ("./layer.tar", LAYERS[0]), ("./config.json", config), ("./manifest.json", manifest)])
    )

    assert diff_ids(open_image(str(path))) == DIFF_IDS[:1]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_open_long_member_names(tmp_path: Path, tar_format: int) -> None:
    """GNU long names and PAX paths."""
    config = make_config([LAYERS[0]])
    name = "/".join(["directory" * 10] * 4) + "/layer.tar"
    manifest = dumps([{"Config": "config.json", "RepoTags": ["a:1"], "Layers": [name]}])
    path = tmp_path / "i.tar"
    members: list[tuple[str, bytes | str | None]] = [
        (name, LAYERS[0]),
        ("config.json", config),
        ("manifest.json", manifest),
    ]
    path.write_bytes(make_tar(members, form=tar_format))

    assert diff_ids(open_image(str(path))) == DIFF_IDS[:1]


@pytest.mark.parametrize("kind", ["archive", "directory"])
def test_open_oci_layout_and_archive(tmp_path: Path, kind: str) -> None:
    """The same layout as a directory and in a tar."""
    layout = Layout()
    layout.entries(layout.manifest() | {"annotations": {"org.opencontainers.image.ref.name": "v1"}})
    path = layout.save(tmp_path / "i") if kind == "archive" else layout.save_directory(tmp_path / "i")
    image = open_image(f"{path}:v1")

    assert image.form is (Form.OCI_ARCHIVE if kind == "archive" else Form.OCI_LAYOUT)
    assert diff_ids(image) == DIFF_IDS
    assert [layer.digest for layer in image.layers] == DIFF_IDS
    assert image.image_id == digest(make_config(LAYERS))


@pytest.mark.parametrize("index", [{"manifests": []}, {"manifests": None}, {}])
def test_open_oci_index_without_images(tmp_path: Path, index: Any) -> None:
    """Docker 25 wrote `manifests: null`."""
    layout = Layout(index=index)
    with pytest.raises(ImageError, match=r"index\.json: names no image"):
        open_image(str(layout.save(tmp_path / "i")))


def test_open_oci_docker_media_types(tmp_path: Path) -> None:
    """Buildx writes docker's media types into an OCI layout; skopeo 1.9 and umoci fail on it."""
    layout = Layout()
    entry = layout.manifest(
        media_type=DOCKER + "manifest.v2+json",
        config_type="application/vnd.docker.container.image.v1+json",
        layer_type="application/vnd.docker.image.rootfs.diff.tar.gzip",
    )
    inner = layout.nest(
        [entry | {"platform": {"os": "linux", "architecture": "amd64"}}], DOCKER + "manifest.list.v2+json"
    )
    layout.entries(inner)

    assert diff_ids(open_image(str(layout.save(tmp_path / "i")))) == DIFF_IDS


def test_open_oci_data_in_descriptors(tmp_path: Path) -> None:
    """`data` takes the place of a blob, for documents and for layers."""
    layout = Layout()
    config = make_config(LAYERS[:1])

    def inline(raw: bytes, media_type: str) -> dict[str, Any]:
        data = base64.b64encode(raw).decode()
        return {"mediaType": media_type, "digest": digest(raw), "size": len(raw), "data": data}

    manifest = dumps(
        {
            "schemaVersion": 2,
            "config": inline(config, OCI + "config.v1+json"),
            "layers": [inline(LAYERS[0], OCI_LAYER)],
        }
    )
    layout.entries(inline(manifest, OCI + "manifest.v1+json"))
    image = open_image(str(layout.save(tmp_path / "i")))

    assert diff_ids(image) == DIFF_IDS[:1]
    assert b"".join(image.layers[0].blob.chunks()) == LAYERS[0]


def test_open_oci_two_tags_one_image(tmp_path: Path) -> None:
    """One manifest under two names is one image."""
    layout = Layout()
    entry = layout.manifest()
    layout.entries(*(entry | {"annotations": {"org.opencontainers.image.ref.name": tag}} for tag in ("v1", "latest")))
    path = layout.save(tmp_path / "i")

    assert open_image(str(path)).tags == ("v1", "latest")
    assert open_image(f"{path}:latest").chosen_tag == "latest"


def test_open_oci_several_images_without_choice(tmp_path: Path) -> None:
    layout = Layout()
    layout.entries(
        *(
            layout.manifest(LAYERS[: number + 1]) | {"annotations": {"org.opencontainers.image.ref.name": tag}}
            for number, tag in enumerate(["a", "b"])
        )
    )
    path = layout.save(tmp_path / "i")

    with pytest.raises(ImageError, match=r"has 2 images, choose one .*: @0 \(a\), @1 \(b\)"):
        open_image(str(path))
    with pytest.raises(ImageError, match=r"has no tag 'c'; it has @0 \(a\), @1 \(b\)"):
        open_image(f"{path}:c")
    with pytest.raises(ImageError, match=r"has no image @2; it has @0 \(a\), @1 \(b\)"):
        open_image(f"{path}:@2")
    assert len(open_image(f"{path}:b").layers) == 2


def test_open_oci_untagged_platforms_are_one_image(tmp_path: Path) -> None:
    """index.json may itself be the list of platforms."""
    layout = Layout()
    entries = []
    for arch in ("amd64", "arm64"):
        config = make_config(LAYERS, architecture=arch)
        entries.append(layout.manifest(config=config) | {"platform": {"os": "linux", "architecture": arch}})
    layout.entries(*entries, attestation(layout, entries[0]["digest"]))
    path = layout.save(tmp_path / "i")

    assert open_image(str(path), platform=parse_platform("arm64")).config.platform.architecture == "arm64"
    (listed,) = list_images(str(path))
    assert [str(one) for one in listed.platforms] == ["linux/amd64", "linux/arm64"]


def test_open_oci_platform_from_config_where_the_index_has_none(tmp_path: Path) -> None:
    """Entries of one tag without platforms: the configs tell, and artifacts are stepped over."""
    layout = Layout()
    tag = {"annotations": {"org.opencontainers.image.ref.name": "v1"}}
    helm = layout.manifest(config_type="application/vnd.cncf.helm.config.v1+json", config=b"{}")
    configs = [make_config(LAYERS, architecture=arch) for arch in ("amd64", "arm64")]
    path = layout.entries(helm | tag, *(layout.manifest(config=config) | tag for config in configs)).save(
        tmp_path / "i"
    )

    assert open_image(str(path), platform=parse_platform("arm64")).config.platform.architecture == "arm64"


def test_open_oci_unknown_media_types_are_ignored(tmp_path: Path) -> None:
    """An unknown media type in an index MUST NOT be an error."""
    layout = Layout()
    other = layout.put(b"something", "application/x-something")
    path = layout.entries(other, layout.manifest()).save(tmp_path / "i")

    assert diff_ids(open_image(str(path))) == DIFF_IDS


def test_open_oci_extra_files_are_ignored(tmp_path: Path) -> None:
    layout = Layout(extra={"README": b"hello", "blobs/sha256/not-hex": b"x"})
    path = layout.entries(layout.manifest()).save(tmp_path / "i")

    assert diff_ids(open_image(str(path))) == DIFF_IDS


def test_open_oci_layout_of_another_version(tmp_path: Path) -> None:
    layout = Layout()
    path = layout.entries(layout.manifest()).save_directory(tmp_path / "i")
    (path / "oci-layout").write_text('{"imageLayoutVersion":"2.0.0"}')
    with pytest.raises(ImageError, match=r"oci-layout: layout version '2\.0\.0' is not supported"):
        open_image(str(path))


def test_open_skopeo_dir(tmp_path: Path) -> None:
    """The dir: form: blobs by bare hex, manifest.json is the manifest itself."""
    layout = Layout()
    entry = layout.manifest()
    path = tmp_path / "d"
    path.mkdir()
    (path / "version").write_text("Directory Transport Version: 1.1\n")
    (path / "manifest.json").write_bytes(layout.blobs.pop(entry["digest"]))
    for name, raw in layout.blobs.items():
        (path / name[7:]).write_bytes(raw)
    image = open_image(f"dir:{path}")

    assert image.form is Form.SKOPEO_DIR
    assert diff_ids(image) == DIFF_IDS
    assert image.manifest_digest == entry["digest"]


def test_open_skopeo_dir_with_all_platforms(tmp_path: Path) -> None:
    """`skopeo copy --all` writes the index as manifest.json and each manifest as `<hex>.manifest.json`."""
    layout = Layout()
    entries = [
        layout.manifest(config=make_config(LAYERS, architecture=arch))
        | {"platform": {"os": "linux", "architecture": arch}}
        for arch in ("amd64", "arm64")
    ]
    path = tmp_path / "d"
    path.mkdir()
    (path / "version").write_text("Directory Transport Version: 1.1\n")
    index = {"schemaVersion": 2, "mediaType": OCI + "index.v1+json", "manifests": entries}
    (path / "manifest.json").write_bytes(dumps(index))
    manifests = {entry["digest"] for entry in entries}
    for name, raw in layout.blobs.items():
        (path / (name[7:] + (".manifest.json" if name in manifests else ""))).write_bytes(raw)

    assert open_image(str(path), platform=parse_platform("arm64")).config.platform.architecture == "arm64"


@pytest.mark.parametrize(
    ("marker", "name"),
    [
        ("docker/registry/v2/blobs", "storage of a registry"),
        ("image/overlay2/imagedb", "data root of docker"),
        ("io.containerd.content.v1.content", "root of containerd"),
        ("overlay-images overlay-layers", "containers-storage"),
    ],
)
def test_open_store_of_another_tool_is_named(tmp_path: Path, marker: str, name: str) -> None:
    """Nobody mounts /var/lib/docker by mistake as if it were a root."""
    for directory in marker.split():
        (tmp_path / directory).mkdir(parents=True)
    with pytest.raises(ImageError, match=f"{name}.*not supported yet"):
        open_image(str(tmp_path))


def test_open_rootfs_with_a_manifest_json_of_its_own(tmp_path: Path, store: Store) -> None:
    """Programs keep files of that name in `/`; a tar with usr/ is a root file system."""
    path = tmp_path / "r.tar"
    path.write_bytes(make_tar([("manifest.json", b'{"name": "web app"}'), ("usr", None), ("usr/x", b"x")]))

    assert open_image(str(path), store=store).form is Form.ROOTFS_TAR


def test_open_empty_tar_is_an_empty_rootfs(tmp_path: Path, store: Store) -> None:
    for raw in (b"", bytes(1024), bytes(10240)):
        path = tmp_path / "r.tar"
        path.write_bytes(raw)
        assert open_image(str(path), store=store).form is Form.ROOTFS_TAR


@pytest.mark.parametrize("raw", [b"x", b"PK\3\4" + bytes(1000), b"\x7fELF" + bytes(600), gzip.compress(b"text")])
def test_open_no_image_says_so(tmp_path: Path, store: Store, raw: bytes) -> None:
    path = tmp_path / "thing"
    path.write_bytes(raw)
    with pytest.raises(ImageError, match=r"/thing: is no image:"):
        open_image(str(path), store=store)


def test_open_fifo_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="should be a regular file"):
        open_image(str(tmp_path / "fifo"))


def test_unpack_archive_once_for_two_opens(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second open neither decompresses nor hashes; a changed file is noticed, and a copy shares the result."""
    path = tmp_path / "i.tar.gz"
    path.write_bytes(gzip.compress(docker_archive(), mtime=0))
    os.utime(path, ns=(1, 1))
    calls: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        assert 0 < done <= total
        calls.append(what)

    _settle(monkeypatch)
    open_image(str(path), store=store, progress=progress)
    assert calls
    calls.clear()
    open_image(str(path), store=store, progress=progress)
    assert not calls
    (tmp_path / "copy").write_bytes(path.read_bytes())
    open_image(str(tmp_path / "copy"), store=store, progress=progress)
    assert calls
    archives = Path(os.fsdecode(store.path)) / "archives" / "sha256"
    assert len(list(archives.iterdir())) == 1
    calls.clear()
    path.write_bytes(gzip.compress(docker_archive(LAYERS[:1]), mtime=0))
    assert len(open_image(str(path), store=store, progress=progress).layers) == 1
    assert calls


def test_unpack_archive_damaged_in_store_is_redone(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A truncated or changed file in the store is not believed."""
    path = tmp_path / "i.tar.gz"
    path.write_bytes(gzip.compress(docker_archive(), mtime=0))
    _settle(monkeypatch)
    open_image(str(path), store=store)
    (unpacked,) = (Path(os.fsdecode(store.path)) / "archives" / "sha256").iterdir()
    unpacked.write_bytes(unpacked.read_bytes()[:5000])

    assert diff_ids(open_image(str(path), store=store)) == DIFF_IDS


def _settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of this test count as still for long enough."""
    monkeypatch.setattr("ovlfs.image.files._SETTLE_NS", -1 << 62)


def test_describe_is_json(images: Path) -> None:
    """What `inspect` shows survives json.dumps, names that are not UTF-8 included."""
    described = json.loads(json.dumps(open_image(str(images / "small-docker20.tar")).describe()))

    assert described["form"] == "docker-archive"
    assert described["image_id"] == SMALL_V1
    assert described["platform"] == "linux/amd64"
    assert [layer["number"] for layer in described["layers"]] == list(range(9))
    assert described["config"]["healthcheck"] is not None


def test_config_key_case_nulls_and_unknown_fields(tmp_path: Path) -> None:
    """Keys match without case (`rootfS`), null is absent, unknown fields are ignored, of two keys the last wins."""
    raw = (
        b'{"os":"windows","os":"linux","Architecture":"amd64","new":{"a":[1]},"history":null,'
        b'"config":{"Env":null,"Cmd":"one string","Labels":null,"User":"\xff"},'
        b'"rootfS":{"type":"layers","DIFF_IDS":["' + DIFF_IDS[0].encode() + b'"]}}'
    )
    path = tmp_path / "i.tar"
    path.write_bytes(docker_archive(LAYERS[:1], config=raw))
    config = open_image(str(path)).config

    assert config.diff_ids == (DIFF_IDS[0],)
    assert (config.env, config.cmd, config.labels) == ((), ("one string",), {})
    assert os.fsencode(config.user) == b"\xff"
    assert config.raw == raw


def test_archive_without_end_blocks_and_with_trailing_garbage(tmp_path: Path) -> None:
    """The archive ends at a zero block, or cleanly at the end of the file."""
    raw = docker_archive()
    stream = io.BytesIO(raw)
    with tarfile.open(fileobj=stream) as tar:
        last = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    path = tmp_path / "i.tar"
    for content in (raw[:last], raw[:last] + bytes(512), raw[:last] + bytes(512) + b"garbage"):
        path.write_bytes(content)
        assert diff_ids(open_image(str(path))) == DIFF_IDS
