"""Mounts whose requests come by io_uring (-o io_uring): what they do, how they end, and what is done without."""

import contextlib
import errno
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import processes
import pytest
from helpers_overlay import Overlay, Run, fingerprint, overlay

from ovlfs.errors import MountError
from ovlfs.fuse import mounting

pytestmark = [pytest.mark.fuse, pytest.mark.uring, pytest.mark.timeout(120)]

MIB = 1 << 20
IN_USE = "requests come by io_uring"
GONE = {errno.ENOTCONN, errno.ECONNABORTED, errno.ECANCELED, errno.ENODEV, errno.ENOENT, errno.EIO}
"""What a client can get when its mount ends under it; ENOENT: the directory below has no such file."""


@pytest.fixture
def made(ovlfs: Run, scratch: Path) -> Iterator[Overlay]:
    with overlay(ovlfs, scratch, options=",io_uring") as found:
        yield found


@pytest.fixture
def on(uring_switch: Callable[[bool], None]) -> None:
    uring_switch(True)


def log_lines() -> list[str]:
    """All that daemons of this test have said of io_uring."""
    return [
        line
        for path in Path(os.environ["OVLFS_LOG_DIR"]).iterdir()
        for line in path.read_text(encoding="utf-8").splitlines()
        if "io_uring" in line
    ]


def daemon_of(made: Overlay) -> int:
    """From the registry; `ovlfs mounts` would ask all mounts of the machine, also those that tests have stopped."""
    return next(one.pid for one in mounting.all_records() if one.mountpoint == str(made.mnt))


def threads_of(pid: int) -> list[str]:
    names = []
    for path in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            names.append((path / "comm").read_text().strip())
    return names


# ---- is it used?


def test_without_the_switch_it_works_by_the_device_and_says_how_to_switch_on(
    made: Overlay, uring_switch: Callable[[bool], None]
) -> None:
    """One line; and the switch stays as it is, for it is the administrator's."""
    uring_switch(False)
    (made.lower / "file").write_bytes(b"content")

    mnt = made.mount()

    assert (mnt / "file").read_bytes() == b"content"
    assert "ovl-uring" not in threads_of(daemon_of(made))
    assert len(log_lines()) == 1
    assert "WARNING" in log_lines()[0]
    assert "echo Y > /sys/module/fuse/parameters/enable_uring" in log_lines()[0]
    assert Path("/sys/module/fuse/parameters/enable_uring").read_text() == "N\n"


@pytest.mark.usefixtures("on")
def test_with_the_switch_every_cpu_has_its_threads(made: Overlay) -> None:
    """And the log says so, in one line.  A mount that does not ask for it has none."""
    made.mount()

    pid = daemon_of(made)
    processes.wait_until(
        lambda: threads_of(pid).count("ovl-uring") >= len(os.sched_getaffinity(0)), "every CPU has a thread"
    )
    assert [IN_USE in line for line in log_lines()] == [True]

    made.umount()
    made.options = ""
    made.mount()
    assert "ovl-uring" not in threads_of(daemon_of(made))


@pytest.mark.usefixtures("on")
def test_without_the_lane_it_is_not_used(made: Overlay) -> None:
    """-o no_lane,io_uring: pyfuse3 reads the device; one line says so."""
    made.options = ",no_lane,io_uring"
    (made.mount() / "file").write_bytes(b"x")

    assert ["needs the lane" in line for line in log_lines()] == [True]


# ---- does it do the same?


def change(root: Path) -> None:
    """Requests of every form: with and without header, names, data; small answers and large ones."""
    big = bytes(range(256)) * (3 * MIB // 256)
    (root / "big").write_bytes(big)
    with open(root / "big", "r+b") as file:
        os.pwrite(file.fileno(), b"middle", MIB + 5)
    os.truncate(root / "big", 2 * MIB + 1)
    with open(root / "lower" / "f7", "ab") as file:
        file.write(b"appended")
    (root / "lower" / "f8").chmod(0o640)
    (root / "lower" / "f9").unlink()
    os.rename(root / "lower" / "f10", root / "renamed")
    os.rename(root / "lower" / "dir", root / "moved")
    os.symlink("t" * 4000, root / "symlink")
    os.link(root / "lower" / "f11", root / "link")
    for number in range(2000):
        (root / "moved" / f"n{number:05}{'x' * 200}").touch()
    os.setxattr(root / "lower" / "f12", "user.large", b"v" * 60000)
    fd = os.open(root, os.O_TMPFILE | os.O_RDWR)
    os.write(fd, b"nameless")
    os.posix_fallocate(fd, 0, 100_000)
    assert os.pread(fd, 9, 0) == b"nameless\0"
    os.close(fd)


@pytest.mark.usefixtures("on")
def test_the_same_changes_leave_the_same_tree(ovlfs: Run, scratch: Path) -> None:
    """By io_uring and by the device; seen through both mounts and in their upperdirs."""
    shown = []
    for name, options in (("ring", ",io_uring"), ("device", "")):
        (scratch / name).mkdir()
        with overlay(ovlfs, scratch / name, options=options) as made:
            (made.lower / "lower/dir").mkdir(parents=True)
            for number in range(20):
                (made.lower / f"lower/f{number}").write_bytes(b"%d" % number * 1000)
            (made.lower / "mapped").write_bytes(bytes(range(256)) * 8192)
            mnt = made.mount()
            change(mnt)
            assert (mnt / "mapped").read_bytes() == (made.lower / "mapped").read_bytes()
            assert len(os.listdir(mnt / "moved")) == 2000
            assert os.getxattr(mnt / "lower/f12", "user.large") == b"v" * 60000
            made.umount()
            shown.append(plain(fingerprint(made.upper)))
            with pytest.raises(FileNotFoundError):
                os.stat(mnt / "big")
    assert sum(IN_USE in line for line in log_lines()) == 1
    assert shown[0] == shown[1]


def plain(tree: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """What two runs have in common: no times and inode numbers."""
    differ = {"ino", "mtime_ns", "xattrs"}
    return {path: {key: value for key, value in line.items() if key not in differ} for path, line in tree.items()}


@pytest.mark.usefixtures("on")
def test_more_clients_wait_for_python_than_there_are_threads(made: Overlay) -> None:
    """Two hundred copy-ups at once, on the CPUs of this machine; those that find no entry wait in the kernel."""
    for number in range(200):
        (made.lower / f"f{number}").write_bytes(b"x" * number)
        os.setxattr(made.lower / f"f{number}", "user.note", b"n")
    mnt = made.mount()

    def append(number: int) -> None:
        with open(mnt / f"f{number}", "ab") as file:
            file.write(b"y")
        os.setxattr(mnt / f"f{number}", "user.more", b"%d" % number)

    with ThreadPoolExecutor(200) as pool:
        list(pool.map(append, range(200), timeout=100))
    for number in range(200):
        assert (mnt / f"f{number}").read_bytes() == b"x" * number + b"y"
        assert os.getxattr(mnt / f"f{number}", "user.more") == b"%d" % number


# ---- load, and how it ends


class Load:
    """Clients that look up, list, read, write, rename and copy up until the mount has gone."""

    def __init__(self, root: Path, clients: int = 6) -> None:
        self.root, self.stop, self.done = root, threading.Event(), 0
        self.wrong: list[BaseException] = []
        self.threads = [threading.Thread(target=self._run, args=(seed,), daemon=True) for seed in range(clients)]
        for thread in self.threads:
            thread.start()
        processes.wait_until(lambda: self.done > 100 or bool(self.wrong), "there is load")

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        mine = self.root / f"client{seed}"
        try:
            while not self.stop.is_set():
                name = f"f{rng.randrange(40)}"
                mine.write_bytes(os.urandom(rng.randrange(300_000)))
                os.rename(mine, self.root / f"{name}-{seed}")
                assert not (self.root / f"missing{rng.random()}").exists()
                assert name in os.listdir(self.root)
                with open(self.root / name, "r+b" if rng.random() < 0.2 else "rb") as file:
                    assert len(file.read()) == 50_000
                self.done += 1
        except OSError as error:
            if not self.stop.is_set() or error.errno not in GONE:
                self.wrong.append(error)
        except AssertionError as error:
            if not self.stop.is_set():
                self.wrong.append(error)

    def end(self) -> None:
        """All clients end, and soon; what went wrong before `stop` was set, or is no end of a mount, is told."""
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive(), "a client hangs"
        assert self.wrong == []


@pytest.fixture
def loaded(made: Overlay, on: None) -> Overlay:  # the switch is on before the mount
    for number in range(40):
        (made.lower / f"f{number}").write_bytes(os.urandom(50_000))
    made.mount()
    return made


def wait_for_end(pid: int) -> None:
    processes.wait_until(lambda: not processes.is_running(pid), "the daemon ended")


def test_load_then_an_orderly_end(loaded: Overlay) -> None:
    """A race without an end in the middle: everything is there afterwards, also for the next mount."""
    pid, load = daemon_of(loaded), Load(loaded.mnt)
    time.sleep(2)
    load.stop.set()
    load.end()
    before = {path.name: path.read_bytes() for path in loaded.mnt.iterdir()}
    loaded.umount()
    wait_for_end(pid)
    loaded.mount()
    assert {path.name: path.read_bytes() for path in loaded.mnt.iterdir()} == before


@pytest.mark.parametrize("how", ["lazy", "forced", "aborted", "killed", "stopped"])
def test_an_end_under_load(loaded: Overlay, scratch: Path, how: str) -> None:
    """No client hangs, the daemon ends, and the mount can be made anew."""
    pid, load = daemon_of(loaded), Load(loaded.mnt)
    load.stop.set()
    if how == "lazy":
        mounting.unmount(os.fsencode(loaded.mnt), lazy=True)
    elif how == "forced":
        subprocess.run(["umount", "-f", loaded.mnt], check=False, capture_output=True, timeout=30)
        with contextlib.suppress(MountError):  # it was not busy, or its daemon has taken it away
            mounting.unmount(os.fsencode(loaded.mnt), lazy=True)
    elif how == "aborted":
        control = scratch / "control"
        control.mkdir()
        subprocess.run(["mount", "-t", "fusectl", "none", control], check=True, timeout=30)
        try:
            minor = os.minor(os.stat(loaded.mnt).st_dev)
            (control / str(minor) / "abort").write_text("1", encoding="ascii")
        finally:
            subprocess.run(["umount", "-l", control], check=True, timeout=30)
    elif how == "killed":
        os.kill(pid, signal.SIGKILL)
    else:
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
        with contextlib.suppress(ProcessLookupError):  # it was not busy
            os.kill(pid, signal.SIGTERM)  # the second one detaches
    load.end()
    wait_for_end(pid)
    loaded.take_away()
    loaded.mount()
    assert len((loaded.mnt / "f1").read_bytes()) == 50_000
