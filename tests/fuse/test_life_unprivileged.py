"""Mounts without privileges: by fusermount3, and in a user namespace."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
from helpers_users import UID, User

SmallImage = Callable[..., Path]

pytestmark = [pytest.mark.fuse, pytest.mark.root]


@pytest.fixture
def image(small_image: SmallImage) -> Path:
    """An image whose files everybody may write, so that the kernel lets the user do it."""
    path = small_image(permissions=0o777)
    path.chmod(0o644)
    return path


def listed(user: User, mountpoint: Path) -> dict[str, Any]:
    return processes.described(user.ovlfs("mounts", "--json").stdout, mountpoint)


def test_a_user_mounts_changes_and_unmounts(user: User, image: Path) -> None:
    mountpoint = user.mount("mnt", image)
    found = listed(user, mountpoint)

    assert found["alive"]
    assert found["upper"].startswith(str(user.home / ".local/share/ovlfs/uppers/"))
    assert found["log"].startswith(str(user.home / ".local/state/ovlfs/log/"))
    assert os.stat(user.home / "run/ovlfs").st_mode & 0o777 == 0o700
    user.run("sh", "-c", "stat -c %u mnt/etc/hosts; echo changed > mnt/etc/hosts; rm mnt/etc/motd")
    user.ovlfs("umount", mountpoint)
    assert not processes.is_running(found["pid"])
    assert str(mountpoint) not in user.ovlfs("mounts", "--json").stdout
    assert Path(found["upper"], "etc/hosts").read_text() == "changed\n"
    user.mount("mnt", image)
    assert user.run("sh", "-c", "ls mnt/etc; cat mnt/etc/hosts").stdout == "hosts\nchanged\n"
    user.ovlfs("umount", mountpoint)


def test_a_users_dead_mount_is_cleaned_by_the_next(user: User, image: Path) -> None:
    mountpoint = user.mount("mnt", "--ephemeral", image)
    found = listed(user, mountpoint)
    user.run("kill", "-9", found["pid"])
    processes.wait_until(lambda: not processes.is_running(found["pid"]), "the daemon ended")
    assert not listed(user, mountpoint)["alive"]

    user.mount("mnt", image)
    assert not Path(found["upper"]).exists()
    user.ovlfs("umount", mountpoint)
    assert "is not mounted" in user.ovlfs("umount", mountpoint, code=1).stderr


def test_a_busy_mount_of_a_user_is_said_to_be_busy(user: User, image: Path) -> None:
    mountpoint = user.mount("mnt", image)
    result = user.run("sh", "-c", 'cd mnt && "$@"', "sh", *_umount(user, mountpoint), code=1)
    assert "is busy" in result.stderr
    assert result.stderr.count("\n") == 1
    user.ovlfs("umount", mountpoint)


def _umount(_user: User, mountpoint: Path) -> list[object]:
    from helpers_users import interpreter

    return [interpreter(), "-m", "ovlfs.cli.main", "umount", mountpoint]


def test_what_a_user_may_not_do_is_said_in_one_line(user: User, image: Path) -> None:
    user.directory("mnt")
    for arguments, said in (
        (["--allow-other", image, "mnt"], "user_allow_other"),
        ([image, "/usr"], "/usr"),
        (["--upper", "/usr/up", image, "mnt"], "/usr/up"),
    ):
        result = user.ovlfs("mount", *arguments, code=1)
        assert result.stderr.startswith("ovlfs: ")
        assert result.stderr.count("\n") == 1
        assert said in result.stderr


def test_a_user_cannot_unmount_what_root_mounted(user: User, image: Path) -> None:
    mountpoint = user.directory("mnt")
    user.ovlfs("mount", "--ephemeral", image, mountpoint, as_root=True)
    result = user.ovlfs("umount", mountpoint, code=1)
    assert result.stderr.count("\n") == 1
    user.ovlfs("umount", mountpoint, as_root=True)


def test_root_of_a_user_namespace_mounts_and_unmounts(user: User, image: Path) -> None:
    """`unshare -Urm`: the store and the registry are the user's, /var and /run are not writable."""
    user.directory("mnt")
    script = """
        $OVLFS mount "$1" mnt
        cat mnt/etc/motd
        echo changed > mnt/etc/motd
        $OVLFS mounts --json
        $OVLFS umount mnt
        $OVLFS mount "$1" mnt
        cat mnt/etc/motd
        $OVLFS umount mnt
    """
    result = user.in_namespace(script, image)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("mounted ")
    assert lines[2] == "hello"
    assert lines[-1] == "changed"
    found = processes.described("\n".join(lines[3 : lines.index("]") + 1]), user.home / "mnt")
    assert found["alive"]
    assert os.stat(found["upper"]).st_uid == UID
