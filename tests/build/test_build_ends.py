"""However a build ends, no mount, no process and no temporary file is left."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
from helpers_build import Builds, Ovlfs, rootfs
from helpers_run import holders

pytestmark = [pytest.mark.fuse, pytest.mark.root]

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def builds(scratch: Path, ovlfs: Ovlfs) -> Iterator[Builds]:
    found = Builds(scratch, ovlfs)
    (found.context / "rootfs.tar.xz").write_bytes(rootfs().read_bytes())
    yield found
    store = Path(os.environ["OVLFS_STORE"])
    processes.wait_until(
        lambda: not holders(store / "builds") - {os.getpid()}, "all mounts and their processes are gone"
    )
    processes.wait_until(lambda: os.listdir(store / "tmp") == [], "no temporary file is left")
    processes.wait_until(lambda: os.listdir(store / "builds") == [], "no upperdir is left")


def started(builds: Builds, command: str) -> "subprocess.Popen[str]":
    """A build whose RUN has said `ready`, in a process group of its own."""
    (builds.context / "Dockerfile").write_text(f"FROM scratch\nADD rootfs.tar.xz /\nRUN {command}\n")
    build = subprocess.Popen(
        [sys.executable, "-m", "ovlfs.cli.main", "build", builds.context],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert build.stderr is not None
    for line in build.stderr:
        if line == "ready\n":
            return build
    raise AssertionError(f"the build ended with {build.wait()}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_a_build_at_once(builds: Builds, number: signal.Signals) -> None:
    """Also where the command ignores it; after SIGKILL the janitor cleans up."""
    with started(builds, "trap '' TERM INT; echo ready; while :; do sleep 0.1; done") as build:
        build.send_signal(number)
        code = build.wait(timeout=60)
        assert build.stderr is not None
        said = build.stderr.read()
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert (code, said) == (130, "ovlfs: interrupted\n")


def test_a_background_process_does_not_hold_the_mount(builds: Builds) -> None:
    builds.run("FROM scratch\nADD rootfs.tar.xz /\nRUN sleep 600 & echo started\n")


def open_files(pid: str) -> set[str]:
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed just now
            found.add(os.readlink(fd))
    return found


def test_a_dead_server_fails_the_step(builds: Builds) -> None:
    """The mount's daemon is killed: the command is, too, and the error says so."""
    with started(builds, "echo ready; while :; do sleep 0.1; done") as build:
        children = Path(f"/proc/{build.pid}/task/{build.pid}/children").read_text().split()
        (server,) = [pid for pid in children if "/dev/fuse" in open_files(pid)]
        os.kill(int(server), signal.SIGKILL)
        assert build.wait(timeout=60) == 1
        assert build.stderr is not None
        assert "Dockerfile:3: RUN: the daemon that serves the root" in build.stderr.read()
