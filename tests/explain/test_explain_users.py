"""Explaining, counting and tracing without privileges, and of mounts that are another user's."""

import json
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_users import User, interpreter
from processes import wait_until

pytestmark = [pytest.mark.fuse, pytest.mark.root]


@pytest.fixture
def mountpoint(user: User, layered_image: Path) -> Iterator[Path]:
    layered_image.chmod(0o644)
    mounted = user.mount("mnt", layered_image)
    yield mounted
    user.ovlfs("umount", mounted, code=None)


def test_a_user_asks_his_own_mount(user: User, mountpoint: Path) -> None:

    shown = user.ovlfs("explain", mountpoint, "/etc/motd").stdout
    assert shown.startswith("/etc/motd does not exist: whited out in layer 3\n")
    facts = json.loads(user.ovlfs("explain", "--json", mountpoint, "/etc/hosts").stdout)
    assert facts["object"]["uid"] == 0
    assert facts["write"]["names"] == ["etc/hosts"]
    assert json.loads(user.ovlfs("stats", "--json", mountpoint).stdout)["operations"]["INIT"]["requests"] == 1


def test_a_mount_whose_record_is_elsewhere_cannot_be_asked(
    user: User, mountpoint: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket is beside the record, in a directory that only its user may enter.  One line says so."""
    asked = user.run(interpreter(), "-m", "ovlfs.cli.main", "stats", mountpoint, as_root=True, code=None)
    assert asked.returncode == 1  # root's own registry is another: it is one line, and no traceback
    assert asked.stderr.count("\n") == 1

    for name in ("lower", "roots"):
        (scratch / name).mkdir()
    monkeypatch.delenv("OVLFS_RUNTIME_DIR")
    script = f"$0 -m ovlfs.cli.main mount --ro -o lowerdir={scratch}/lower,allow_other {scratch}/roots"
    user.run("sh", "-c", script, interpreter(), as_root=True)
    try:
        refused = user.ovlfs("explain", scratch / "roots", "/", code=1)
    finally:
        user.run("umount", scratch / "roots", as_root=True)
    assert refused.stderr == (
        f"ovlfs: {scratch}/roots: its daemon is not known here; another user may have mounted it\n"
    )


def test_a_user_traces_his_own_mount(user: User, mountpoint: Path) -> None:
    command = ["nsenter", f"--mount={user.namespace}", "setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"]
    environment = {
        "PATH": os.environ["PATH"],
        "XDG_RUNTIME_DIR": str(user.home / "run"),
        "HOME": str(user.home),
        "PYTHONPATH": _pythonpath(),
    }
    with subprocess.Popen(
        [*command, interpreter(), "-m", "ovlfs.cli.main", "trace", mountpoint],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", env=environment,
    ) as process:  # fmt: skip
        try:
            wait_until(lambda: _listeners(user, mountpoint) == 1, "trace listens")
            user.run("ls", "mnt/usr/bin")
            user.ovlfs("umount", mountpoint)
            output, errors = process.communicate(timeout=20)
        finally:
            process.kill()

    assert (process.returncode, errors) == (0, "")
    assert "/usr/bin" in output


def _listeners(user: User, mountpoint: Path) -> int:
    return int(json.loads(user.ovlfs("stats", "--json", mountpoint).stdout)["listeners"])


def _pythonpath() -> str:
    return f"{Path(__file__).parents[2]}:{sysconfig.get_path('purelib')}:{sysconfig.get_path('platlib')}"
