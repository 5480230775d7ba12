"""What people read: golden texts, in golden/.  `OVLFS_GOLDEN=write pytest tests/explain` writes them anew."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_explain import Run

GOLDEN = Path(__file__).parent / "golden"


def assert_golden(name: str, text: str, scratch: Path) -> None:
    """`text` is what golden/NAME.txt says, the scratch directory taken for DIR."""
    text = text.replace(str(scratch), "DIR")
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("OVLFS_GOLDEN") == "write":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


IMAGE_PATHS = {
    "image-replaced": "/etc/hosts",
    "image-whited-out": "/etc/motd",
    "image-opaque": "/etc/skel",
    "image-hidden": "/etc/skel/.profile",
    "image-symlink": "/bin/sh",
    "image-never": "/etc/never/was/here",
    "image-not-a-directory": "/etc/hosts/x",
    "image-root": "/",
}


@pytest.mark.parametrize("name", IMAGE_PATHS)
def test_image_text(name: str, ovlfs: Run, scratch: Path, layered_image: Path) -> None:
    assert_golden(name, ovlfs("explain", layered_image, IMAGE_PATHS[name]).stdout, scratch)


@pytest.mark.fuse
def test_mount_text(ovlfs: Run, scratch: Path, layered_image: Path, mounted: Callable[..., Path]) -> None:
    """A mount whose upperdir has a bit of everything."""
    mountpoint = mounted("--upper", scratch / "up", layered_image)
    (mountpoint / "usr").rename(mountpoint / "usr2")
    (mountpoint / "etc/hosts").chmod(0o600)
    (mountpoint / "etc/skel/.bashrc").unlink()
    (mountpoint / "srv/new").write_bytes(b"new\n")

    for name, path in {
        "mount-redirect": "/usr2/bin/sh",
        "mount-metacopy": "/etc/hosts",
        "mount-whiteout": "/etc/skel/.bashrc",
        "mount-upper": "/srv/new",
        "mount-directory": "/etc",
        "mount-moved-away": "/usr/bin/sh",
    }.items():
        assert_golden(name, ovlfs("explain", mountpoint, path).stdout, scratch)


def test_json_says_what_the_text_says(ovlfs: Run, layered_image: Path) -> None:
    facts = json.loads(ovlfs("explain", "--json", layered_image, "/etc/hosts").stdout)

    assert set(facts) == {
        "path", "resolved", "error", "reason", "object", "steps", "hidden", "write", "layers", "notes",
    }  # fmt: skip
    assert facts["object"]["kind"] == "regular file"
    assert [one["created_by"][:3] for one in facts["layers"]] == ["RUN", "/bi", "/bi"]
    assert [re.sub("[0-9a-f]{64}", "", one["diff_id"]) for one in facts["layers"]] == ["sha256:"] * 3


def test_names_that_lie_are_shown_as_escapes(ovlfs: Run, scratch: Path) -> None:
    """A name of an image must not write to the terminal what it likes."""
    (scratch / "root").mkdir()
    (scratch / "root" / "evil\x1b[31m\nname").touch()
    shown = ovlfs("explain", scratch / "root", "/evil\x1b[31m\nname").stdout

    assert "\x1b" not in shown
    assert shown.startswith("/evil\\x1b[31m\\nname is a regular file")


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["nothing-there", "/x"], 1, "nothing-there"),
        ([], 2, "required"),
        (["a"], 2, "required"),
    ],
)
def test_errors_are_one_line(arguments: list[str], code: int, error: str, ovlfs: Run, scratch: Path) -> None:
    result = ovlfs("explain", *arguments, code=code, cwd=scratch)

    assert result.stdout == ""
    assert error in result.stderr
    assert result.stderr.count("\n") == 1
