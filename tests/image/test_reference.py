"""What the user types: the longest existing path wins, the rest is a tag, an index, a digest, a path inside."""

from pathlib import Path

import pytest

from ovlfs.errors import ImageError, UsageError
from ovlfs.image.reference import Reference, normalise_name, parse_reference, same_name, split_path

HEX = "sha256:" + "0123456789abcdef" * 4


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.tar").touch()
    (tmp_path / "layout").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("image.tar", Reference(b"image.tar")),
        ("image.tar:app:v2", Reference(b"image.tar", tag="app:v2")),
        ("image.tar:localhost:5000/app:v2", Reference(b"image.tar", tag="localhost:5000/app:v2")),
        ("image.tar:@1", Reference(b"image.tar", index=1)),
        ("image.tar@1", Reference(b"image.tar", index=1)),
        (f"image.tar:@{HEX}", Reference(b"image.tar", digest=HEX)),  # type: ignore[arg-type]
        (f"image.tar@{HEX}", Reference(b"image.tar", digest=HEX)),  # type: ignore[arg-type]
        ("layout:v1", Reference(b"layout", tag="v1")),
        ("docker-archive:image.tar:app:v2", Reference(b"image.tar", tag="app:v2")),
        ("oci:layout:v1", Reference(b"layout", tag="v1")),
    ],
)
def test_parse_forms_typed_by_users(here: Path, typed: str, expected: Reference) -> None:
    """Every documented form, and skopeo's prefixes, mean what the documentation says."""
    assert parse_reference(typed) == expected


def test_parse_whole_path_exists_wins_over_split(here: Path) -> None:
    """A file whose own name has a colon is reachable, with and without a tag."""
    (here / "image.tar:app").touch()

    assert parse_reference("image.tar:app") == Reference(b"image.tar:app")
    assert parse_reference("image.tar:app:v2") == Reference(b"image.tar:app", tag="v2")


def test_parse_bytes_keeps_names_that_are_not_utf8(here: Path) -> None:
    """File names are bytes."""
    Path(b"caf\xe9.tar".decode("utf-8", "surrogateescape")).touch()

    assert parse_reference(b"caf\xe9.tar:v1") == Reference(b"caf\xe9.tar", tag="v1")


@pytest.mark.parametrize(
    ("typed", "reference", "inside"),
    [
        ("image.tar", Reference(b"image.tar"), b"/"),
        ("image.tar:/", Reference(b"image.tar"), b"/"),
        ("image.tar:/etc/passwd", Reference(b"image.tar"), b"/etc/passwd"),
        ("image.tar:/a:/b", Reference(b"image.tar"), b"/a:/b"),
        ("image.tar:app:v2:/etc/passwd", Reference(b"image.tar", tag="app:v2"), b"/etc/passwd"),
        ("image.tar:@1:/etc", Reference(b"image.tar", index=1), b"/etc"),
        ("image.tar:app:v2", Reference(b"image.tar", tag="app:v2"), b"/"),
    ],
)
def test_split_path_inside_image(here: Path, typed: str, reference: Reference, inside: bytes) -> None:
    """What follows the first `:/` behind the file is a path inside the image."""
    assert split_path(typed) == (reference, inside)


@pytest.mark.parametrize("typed", ["docker://alpine", "docker-daemon:app:v1", "containers-storage:x", "registry:x"])
def test_parse_transport_not_built_says_so(here: Path, typed: str) -> None:
    """A transport that is not built yet is named in the error."""
    with pytest.raises(ImageError, match=r"transport '.*' is not supported yet"):
        parse_reference(typed)


def test_parse_missing_file_names_it(here: Path) -> None:
    """The error names the file, not the tag."""
    with pytest.raises(ImageError, match=r"^nothere\.tar: no such file"):
        parse_reference("nothere.tar:app:v1")


@pytest.mark.parametrize(
    "typed", ["", "image.tar:", "image.tar:@", "image.tar:@x", "image.tar:@sha256:../../x", "a\0b"]
)
def test_parse_nonsense_is_usage_error(here: Path, typed: str) -> None:
    """What makes no sense exits with 2."""
    with pytest.raises(UsageError):
        parse_reference(typed)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("app", "docker.io/library/app:latest"),
        ("app:v1", "docker.io/library/app:v1"),
        ("team/app:v1", "docker.io/team/app:v1"),
        ("index.docker.io/library/app", "docker.io/library/app:latest"),
        ("localhost/app:v1", "localhost/app:v1"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("quay.io/a/b/c:1", "quay.io/a/b/c:1"),
    ],
)
def test_normalise_name_as_docker_does(name: str, full: str) -> None:
    """docker.io, library/ and latest are understood."""
    assert normalise_name(name) == full


def test_same_name_podmans_localhost() -> None:
    """Podman calls what it loaded localhost/app:v1; people type app:v1."""
    assert same_name("app:v1", "localhost/app:v1")
    assert same_name("app:v1", "docker.io/library/app:v1")
    assert not same_name("app:v1", "quay.io/app:v1")
    assert not same_name("app", "app:v1")
