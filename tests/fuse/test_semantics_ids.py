"""Shifted and squashed owners, as fuse-overlayfs's options ask for them (compared with fuse-overlayfs 1.10 by hand)."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.fuse, pytest.mark.root]

MAPPING = "uidmapping=0:1000:1:1:110000:65536,gidmapping=0:1000:1:1:110000:65536"


@pytest.fixture
def mount(mounted: Callable[..., Path], scratch: Path) -> Callable[[str], Path]:
    """Files of several owners, mounted with further options."""
    for name in ("lower", "upper", "work"):
        (scratch / name).mkdir()
    (scratch / "lower").chmod(0o777)
    for owner in (0, 1, 5000, 70000):
        path = scratch / "lower" / f"f{owner}"
        path.touch()
        os.chown(path, owner, owner)
    (scratch / "upper").chmod(0o777)
    base = f"lowerdir={scratch}/lower,upperdir={scratch}/upper,workdir={scratch}/work"
    return lambda options: mounted("-o", f"{base},{options}")


def owners(directory: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_uid, path.stat().st_gid) for path in directory.iterdir()}


def test_mapped_ids_are_shown_and_stored_shifted(mount: Callable[[str], Path], scratch: Path) -> None:
    """STORED:SHOWN:LENGTH; what has no mapping is shown as 65534."""
    mountpoint = mount(MAPPING)

    assert owners(mountpoint) == {
        "f0": (1000, 1000), "f1": (110000, 110000), "f5000": (114999, 114999), "f70000": (65534, 65534)
    }  # fmt: skip
    os.chown(mountpoint / "f1", 1000, 110004)
    assert owners(mountpoint)["f1"] == (1000, 110004)
    assert owners(scratch / "upper") == {"f1": (0, 5)}
    with pytest.raises(OSError, match="too large"):
        os.chown(mountpoint / "f5000", 7, 7)


def test_created_files_belong_to_the_shifted_caller(mount: Callable[[str], Path], scratch: Path) -> None:
    """The caller's id is looked up from the side that is shown."""
    mountpoint = mount(MAPPING)
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(mountpoint)  # the way there is root's
            os.setgroups([])
            os.setgid(110004)
            os.setuid(110004)
            Path("new").touch()
            Path("dir").mkdir()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0

    assert owners(mountpoint)["new"] == (110004, 110004)
    assert owners(scratch / "upper") == {"new": (5, 5), "dir": (5, 5)}


def test_squashed_owners_are_all_the_same(mount: Callable[[str], Path], scratch: Path) -> None:
    """squash_to_uid and squash_to_gid change what is shown, not what is stored."""
    mountpoint = mount("squash_to_uid=7,squash_to_gid=8")

    os.chown(mountpoint / "f1", 55, 55)

    assert set(owners(mountpoint).values()) == {(7, 8)}
    assert owners(scratch / "upper") == {"f1": (55, 55)}
