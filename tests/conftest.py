"""What all tests share: which of them can run here, where they may write, and that no mount is left behind.

    def test_x(mounted, scratch): ...     `mounted("-o", "lowerdir=...")` mounts, and unmounts at the end
    def test_y(ovlfs, scratch): ...       `ovlfs("mount", ...)` runs the command; nothing may stay mounted below scratch

Every test has its own store, registry and logs: OVLFS_STORE, OVLFS_RUNTIME_DIR and OVLFS_LOG_DIR point below its
scratch directory.
"""

import contextlib
import fcntl
import gzip
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import archives
import pytest

from ovlfs.errors import MountError
from ovlfs.fuse import mounting

if TYPE_CHECKING:
    from helpers_users import User

ROOT = Path(__file__).parent.parent
URING_SWITCH = Path("/sys/module/fuse/parameters/enable_uring")
_SESSION = pytest.StashKey[Path]()


# ---- which tests run -------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests, too")


def pytest_configure(config: pytest.Config) -> None:
    # What is started in the background or by nohup ignores these, and so would all that the tests start, who send them.
    # A handler that does nothing is not inherited by other programs.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    # tmpfs where there is one: faster, and with user.* xattrs since Linux 6.6.
    config.stash[_SESSION] = Path(tempfile.mkdtemp(prefix="ovlfs-test-", dir=_scratch_base()))


def _scratch_base() -> str | None:
    """A directory whose file system can be an upperdir: it has xattrs.  None: the default for temporary files."""
    for base in (os.environ.get("TMPDIR"), "/dev/shm", tempfile.gettempdir(), "/var/tmp"):
        if base is not None and os.path.isdir(base) and os.access(base, os.W_OK) and _has_xattrs(base):
            return base
    return None


def _has_xattrs(directory: str) -> bool:
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        try:
            os.setxattr(file.name, "user.ovlfs.probe", b"y")
            if os.geteuid() == 0:
                os.setxattr(file.name, "trusted.ovlfs.probe", b"y")
        except OSError:
            return False
    return True


def why_no_fuse() -> str | None:
    """Why nothing can be mounted here, or None."""
    if not os.path.exists("/dev/fuse"):
        return "/dev/fuse is missing"
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return "fusermount3 is missing (Debian: apt-get install fuse3)"
    if os.geteuid() == 0 and not _may_mount():
        return "this root may not mount (no CAP_SYS_ADMIN)"
    return None


def _may_mount() -> bool:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) & (1 << 21))
    return False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_fuse = why_no_fuse()
    if os.environ.get("CI") == "true" and (no_fuse is not None or os.geteuid() != 0):
        # Skipped tests would make a green run that has shown nothing.
        pytest.exit(f"CI must run all tests: {no_fuse or 'root is needed'}", returncode=1)
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))
        if item.get_closest_marker("root") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root"))
        if item.get_closest_marker("uring") and (os.geteuid() != 0 or not URING_SWITCH.exists()):
            item.add_marker(pytest.mark.skip(reason="needs root and a kernel with FUSE over io_uring"))
        if item.get_closest_marker("fuse") and no_fuse is not None:
            item.add_marker(pytest.mark.skip(reason=no_fuse))


# ---- no mount is left behind -----------------------------------------------------------------------------------------


def mounts_below(directory: Path) -> list[Path]:
    """FUSE mounts below a directory, topmost first."""
    prefix = os.fsencode(directory.resolve()) + b"/"
    return [
        Path(os.fsdecode(entry.mountpoint))
        for entry in reversed(mounting.mount_table())
        if entry.mountpoint.startswith(prefix) and entry.fstype.startswith(b"fuse")
    ]


def unmount_below(directory: Path) -> list[Path]:
    """Unmount all FUSE mounts below a directory, and return them."""
    found = mounts_below(directory)
    for mountpoint in found:
        with contextlib.suppress(MountError):
            mounting.unmount(os.fsencode(mountpoint), lazy=True)
    return found


def pytest_sessionfinish(session: pytest.Session) -> None:
    directory = session.config.stash[_SESSION]
    left = unmount_below(directory)
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        names = ", ".join(map(str, left))
        print(f"\nFAILED: mounts were left behind (now unmounted): {names}", file=sys.stderr)
    _remove(directory)


def _remove(directory: Path) -> None:
    """Remove a scratch directory, also what a test has made unreadable; never across a mount."""
    if mounts_below(directory):
        return
    with contextlib.suppress(FileNotFoundError):
        subprocess.run(["chmod", "-R", "u+rwX", "--", directory], check=False, capture_output=True)
        shutil.rmtree(directory, ignore_errors=True)


# ---- where tests write -----------------------------------------------------------------------------------------------


@pytest.fixture
def scratch(request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory on a file system that can be an upperdir.  What is mounted in it is unmounted at the end."""
    directory = Path(tempfile.mkdtemp(dir=request.config.stash[_SESSION]))
    yield directory
    left = unmount_below(directory)
    _remove(directory)
    if left:
        pytest.fail(f"mounts were left behind: {', '.join(map(str, left))}")


@pytest.fixture(autouse=True)
def _own_places(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's own store, registry and logs."""
    places = Path(tempfile.mkdtemp(prefix="places-", dir=request.config.stash[_SESSION]))
    for variable, name in (
        ("OVLFS_STORE", "store"),
        ("OVLFS_RUNTIME_DIR", "run"),
        ("OVLFS_LOG_DIR", "log"),
    ):
        monkeypatch.setenv(variable, str(places / name))


# ---- commands --------------------------------------------------------------------------------------------------------

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def ovlfs() -> Run:
    """`ovlfs(VERB, ...)` runs the command and returns what subprocess.run does; `code` is what it must end with.

    `module` is another program of ovlfs.cli; other keywords go to subprocess.run.
    """

    def run(
        *arguments: object, code: int | None = 0, module: str = "main", **keywords: object
    ) -> "subprocess.CompletedProcess[str]":
        settings = {"capture_output": True, "text": True, "timeout": 60, "check": False} | keywords
        result: subprocess.CompletedProcess[str] = subprocess.run(  # type: ignore[call-overload]
            [sys.executable, "-m", f"ovlfs.cli.{module}", *map(str, arguments)],
            env=settings.pop("env", None) or os.environ | {"PYTHONPATH": str(ROOT)},
            **settings,
        )
        if code is not None:
            assert result.returncode == code, f"exit code {result.returncode}: {result.stdout}{result.stderr}"
        return result

    return run


@pytest.fixture
def mounted(ovlfs: Run, scratch: Path) -> Iterator[Callable[..., Path]]:
    """`mounted(SOURCE, *arguments)` mounts below scratch and returns the mountpoint; all is unmounted at the end."""
    mountpoints: list[Path] = []

    def mount(*arguments: object) -> Path:
        mountpoint = scratch / f"mnt{len(mountpoints)}"
        mountpoint.mkdir()
        mountpoints.append(mountpoint)
        ovlfs("mount", *arguments, mountpoint)
        return mountpoint

    yield mount
    for mountpoint in reversed(mountpoints):
        if mounting.find_mount(os.fsencode(mountpoint)) is not None:
            ovlfs("umount", mountpoint, code=None)


@pytest.fixture
def user(scratch: Path) -> Iterator["User"]:
    """An unprivileged user, whose home and mounts are below scratch.  For rooms that have tests/fuse on their path."""
    from helpers_users import User

    with User.at(scratch) as found:
        yield found


@pytest.fixture
def uring_switch() -> Iterator[Callable[[bool], None]]:
    """`uring_switch(True)`: the kernel offers FUSE over io_uring to mounts from now on, until the end of the test.

    It is the machine's switch, so tests that need it wait for each other, also those of other test runs.
    """
    with open(URING_SWITCH, encoding="ascii") as switch:
        fcntl.flock(switch, fcntl.LOCK_EX)
        before = switch.read()

        def turn(on: bool) -> None:  # the switch has two positions and no other name
            URING_SWITCH.write_text("Y" if on else "N", encoding="ascii")

        yield turn
        URING_SWITCH.write_text(before, encoding="ascii")


# ---- an image --------------------------------------------------------------------------------------------------------

SmallImage = Callable[..., Path]


@pytest.fixture
def small_image(scratch: Path) -> SmallImage:
    """`small_image({"etc/hosts": b"..."}, {...}, name="image.tar")` writes a docker archive, a dict for each layer.

    The bottom layer comes first; a content of None is a directory, a str a symlink's target.
    """

    def build(
        *layers: dict[str, bytes | str | None],
        name: str = "image.tar",
        tag: str = "small:latest",
        compress: bool = False,
        permissions: int | None = None,
    ) -> Path:
        fields = {} if permissions is None else {"mode": permissions}
        default = {"etc": None, "etc/hosts": b"localhost\n", "etc/motd": b"hello\n"}
        raw = [archives.tar(layer, **fields) for layer in layers or (default,)]
        stored = [gzip.compress(layer, 1) for layer in raw] if compress else None
        return archives.docker_archive(scratch / name, raw, tag=tag, stored=stored)

    return build
