"""An image of every rule, and one whose names want to run in a browser."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import archives
import pytest
from layers_images import EVIL, FIXTURES, Layer


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
        raw = [archives.tar_of(one) for one in layers]
        lines = [{"created_by": line} for line in history]
        return archives.docker_archive(scratch / name, raw, tag=tag, history=lines)

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
