"""`ovlfs bundle`: what it writes, run by crun and runc themselves."""

import json
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
from helpers_images import images
from helpers_run import make_image
from helpers_users import UID, User

pytestmark = [pytest.mark.fuse, pytest.mark.root]

Run = Callable[..., "subprocess.CompletedProcess[str]"]
SMALL = "small-docker20.tar"


@pytest.fixture
def unmounted(scratch: Path, ovlfs: Run) -> Iterator[Path]:
    """A path for a bundle, whose rootfs is unmounted at the end."""
    directory = scratch / "b"
    yield directory
    if processes.is_mounted(directory / "rootfs"):
        ovlfs("umount", directory / "rootfs")


def config_of(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "config.json").read_bytes())
    return found


def run_bundle(runtime: str, bundle: Path, scratch: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """By the runtime alone; crun wants no mixed cgroups, so in a mount namespace without any."""
    words = [runtime, "--root", str(scratch / "state"), *arguments, "run", "--bundle", str(bundle), "ovlfs-test"]
    hidden = 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"' if runtime == "crun" else 'exec "$@"'
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", hidden, "sh", *words], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_a_runtime_runs_it(runtime: str, ovlfs: Run, unmounted: Path, scratch: Path) -> None:
    said = ovlfs("bundle", images() / SMALL, unmounted).stdout
    assert f"ovlfs umount {unmounted}/rootfs" in said
    assert stat.S_IMODE(unmounted.stat().st_mode) == 0o700
    flags = ["--cgroup-manager=disabled"] if runtime == "crun" else []
    for _ in range(2):
        result = run_bundle(runtime, unmounted, scratch, *flags)
        assert result.stdout == "serving from /srv/app as app: with two  spaces --port=8080\n", result.stderr
    ovlfs("umount", unmounted / "rootfs")


def test_config_json(ovlfs: Run, unmounted: Path) -> None:
    """Field by field, what image-spec conversion.md says."""
    ovlfs("bundle", "--network", "none", "--hostname", "box", "-v", "/etc:/host:ro", images() / SMALL, unmounted)
    found = config_of(unmounted)
    process = found["process"]
    assert process["user"] == {"uid": 1000, "gid": 1000, "additionalGids": [46]}
    assert process["args"][-1] == "--port=8080"
    assert process["cwd"] == "/srv/app"
    assert {"HOME=/home/app", "HOSTNAME=box", "EMPTY=", "GREETING=hello world, twice"} <= set(process["env"])
    assert "effective" not in process["capabilities"]
    assert "CAP_MKNOD" not in process["capabilities"]["bounding"]
    assert found["hostname"] == "box"
    assert {one["type"] for one in found["linux"]["namespaces"]} == {"pid", "ipc", "uts", "mount", "network"}
    assert list(found["annotations"]) == ["org.opencontainers.image.stopSignal"], "labels are no annotations"
    mounts = {one["destination"]: one for one in found["mounts"]}
    assert mounts["/host"]["options"] == ["rbind", "rprivate", "ro"]
    assert Path(mounts["/srv/data"]["source"], "seed").exists()
    assert "/etc/resolv.conf" not in mounts


def test_words_that_are_not_utf8_pass_as_they_are(ovlfs: Run, unmounted: Path, scratch: Path) -> None:
    image = make_image(scratch / "x.tar", {"Cmd": ["true"]})
    ovlfs("bundle", "-e", b"A=\xff".decode("utf-8", "surrogateescape"), image, unmounted)
    assert b'"A=\xff"' in (unmounted / "config.json").read_bytes()


def test_failures_leave_nothing(ovlfs: Run, unmounted: Path, scratch: Path) -> None:
    for words in (("-u", "nosuch"), ("-w", "/proc/self/fd/3"), ("-v", "/etc:/proc/1"), ("--platform", "linux/s390x")):
        result = ovlfs("bundle", *words, images() / SMALL, unmounted, code=1)
        assert len(result.stderr.splitlines()) == 1
        assert not unmounted.exists()
    unmounted.mkdir()
    ovlfs("bundle", "-u", "nosuch", images() / SMALL, unmounted, code=1)
    assert list(unmounted.iterdir()) == []
    (unmounted / "file").touch()
    assert "empty directory" in ovlfs("bundle", images() / SMALL, unmounted, code=1).stderr
    assert sorted(path.name for path in unmounted.iterdir()) == ["file"]
    (unmounted / "file").unlink()
    ovlfs("bundle", "--nosuch", images() / SMALL, unmounted, code=2)
    ephemeral = Path(os.environ["OVLFS_STORE"]) / "ephemeral"
    assert not ephemeral.exists() or list(ephemeral.iterdir()) == []


def test_set_uid_programs_work_only_where_nobody_else_gets(ovlfs: Run, unmounted: Path) -> None:
    """The mount of a bundle is the host's, so a stranger's set-uid programs must not be within reach of its users."""
    unmounted.mkdir()
    unmounted.chmod(0o755)
    said = ovlfs("bundle", images() / SMALL, unmounted).stdout
    assert "set-uid programs have no effect" in said
    assert os.statvfs(unmounted / "rootfs").f_flag & os.ST_NOSUID
    ovlfs("umount", unmounted / "rootfs")
    unmounted.chmod(0o700)
    for path in (*unmounted.glob("volumes/*/*"), *unmounted.glob("volumes/*")):
        path.rmdir() if path.is_dir() else path.unlink()
    for path in unmounted.iterdir():
        path.rmdir() if path.is_dir() else path.unlink()
    assert "set-uid" not in ovlfs("bundle", images() / SMALL, unmounted).stdout
    flags = os.statvfs(unmounted / "rootfs").f_flag
    assert not flags & os.ST_NOSUID
    assert flags & os.ST_NODEV


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_a_users_bundle(runtime: str, scratch: Path) -> None:
    """Made and run without root: the image's root is the user's, and root inside."""
    with User.at(scratch) as user:
        script = "id -u; stat -c '%u %a' /etc/passwd /srv/app; echo new > /new; stat -c %u /new; touch /srv/data/x"
        words = ["-u", "0", "--entrypoint", "", "--upper", "up", images() / SMALL, "b"]
        user.ovlfs("bundle", *words, "--", "sh", "-c", script)
        hidden = "mount -t tmpfs none /sys/fs/cgroup; " if runtime == "crun" else ""
        hidden += 'exec setpriv --reuid=1000 --regid=1000 --clear-groups "$@"'
        flags = ["--cgroup-manager=disabled"] if runtime == "crun" else []
        result = user.run(
            "unshare", "-m", "sh", "-c", hidden, "sh",
            runtime, "--root", user.home / "state", *flags, "run", "--bundle", user.home / "b", "ovlfs-test",
            as_root=True, code=None,
        )  # fmt: skip
        assert result.stdout == "0\n0 644\n0 755\n0\n", result.stderr
        user.ovlfs("umount", "b/rootfs")
        assert (user.home / "up/new").stat().st_uid == UID
        assert user.ovlfs("mount", "--upper", "up", images() / SMALL, user.directory("mnt")).returncode == 0
        assert user.run("stat", "-c", "%u", "mnt/new").stdout == "0\n"
        user.ovlfs("umount", "mnt")
