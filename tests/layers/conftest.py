"""An image of every rule, and one whose names want to run in a browser."""

import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from layers_images import EVIL, FIXTURES, Layer, make_tar


@pytest.fixture(scope="session")
def real_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `docker save` of docker 20.10 wrote: nine layers, with whiteouts, opaque directories and hard links."""
    directory = tmp_path_factory.mktemp("image")
    with tarfile.open(FIXTURES) as tar:
        member = next(one for one in tar.getmembers() if one.name.endswith("small-docker20.tar"))
        tar.extract(member, directory, filter="data")
    return directory / member.name


@pytest.fixture
def image_of(scratch: Path) -> Callable[..., Path]:
    """`image_of(layers, history)` writes a docker archive; bottom layer first."""

    def build(layers: list[Layer], history: list[str], *, name: str = "image.tar", tag: str = "some:tag") -> Path:
        raw = [make_tar(layer) for layer in layers]
        diff_ids = ["sha256:" + hashlib.sha256(one).hexdigest() for one in raw]
        config = {
            "os": "linux",
            "architecture": "amd64",
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": [{"created_by": line} for line in history],
        }
        files = [f"layer{number}.tar" for number in range(len(raw))]
        manifest = [{"Config": "config.json", "RepoTags": [tag], "Layers": files}]
        documents: Layer = [
            (b"manifest.json", json.dumps(manifest).encode()),
            (b"config.json", json.dumps(config).encode()),
        ]
        path = scratch / name
        path.write_bytes(make_tar([*documents, *((file.encode(), one) for file, one in zip(files, raw, strict=True))]))
        return path

    return build


@pytest.fixture
def hostile_image(image_of: Callable[..., Path]) -> Path:
    """Every name, and the history, tries to be markup, script, or a sign of direction."""
    bottom: Layer = [(b"evil", None), *((b"evil/" + name.replace(b"/", b""), b"12345") for name in EVIL)]
    deep: Layer = [(b"/".join([b"d"] * 200) + b"/end", b"1")]
    top: Layer = [(b"evil/.wh." + name.replace(b"/", b""), b"") for name in EVIL[:3]]
    history = [
        "RUN </script><script>window.owned=1</script>",
        '"><img src=x onerror=window.owned=1>',
        "\u202e \x00\x1b[31m\n" + "A" * 5000,
    ]
    return image_of([bottom, deep, top], history, name="<b>evil's.tar")
