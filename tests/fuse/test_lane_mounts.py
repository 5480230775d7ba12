"""Mounts through the lane: what pyfuse3 does not bind against the kernel's own, large requests, and every way to end.

Nothing here deletes by walking: every test has a scratch directory of its own, and what is mounted is unmounted.
"""

import contextlib
import errno
import fcntl
import gc
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import processes
import pytest

from ovlfs.errors import MountError
from ovlfs.fuse import lane as lane_module
from ovlfs.fuse import mounting
from ovlfs.fuse.lane import MountRequest, open_and_mount
from ovlfs.layer import sys as layer_sys

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(60)]

ROOT = Path(__file__).parent.parent.parent
NOBODY = 65534
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
MIB = 1 << 20

# The interpreter may lie where only root can read it, so it becomes another user once everything is imported.
BECOME = """
import ctypes, errno, os, signal, sys
from ovlfs.fuse.session import MountOptions, MountRequest, open_and_mount, serve
from ovlfs.errors import MountError
from ovlfs.overlay.params import Params
from ovlfs.overlay.stack import open_stack
uid = int(sys.argv[1])
if uid != os.geteuid():
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self is ours again
"""

# A mount namespace in which everybody may open /dev/fuse, as on most machines; argument: an empty directory.
OPEN_DEVICE = """
set -e
mount -t tmpfs none "$1"
mknod -m 666 "$1/fuse" c 10 229
mount --bind "$1/fuse" /dev/fuse
shift
exec "$@"
"""
PRIVATE = ["unshare", "--mount", "--propagation", "private", "sh", "-c", OPEN_DEVICE, "sh"]

SERVER = (
    BECOME
    + """
base, lane = os.fsencode(sys.argv[2]), sys.argv[3] == "lane"
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the real daemon: outside serve() it means nothing
stack = open_stack(Params(lowerdirs=(base + b"/lower",), upperdir=base + b"/upper", workdir=base + b"/work"))
serve(stack, base + b"/mnt", MountOptions(allow_other=os.geteuid() == 0), lambda: print("ready", flush=True), lane=lane)
print("ended", flush=True)
"""
)


@dataclass
class Served:
    """One mount and the process that serves it."""

    base: Path
    daemon: "subprocess.Popen[str]"

    @property
    def mnt(self) -> Path:
        return self.base / "mnt"

    def is_mounted(self) -> bool:
        return mounting.find_mount(os.fsencode(self.mnt)) is not None

    def unmount(self) -> None:
        mounting.unmount(os.fsencode(self.mnt))

    def wait(self) -> str:
        """What the daemon says until its end; it must end well, and soon."""
        out, err = self.daemon.communicate(timeout=20)
        assert self.daemon.returncode == 0, err
        assert err == ""
        return out


Serve = Callable[..., Served]


@pytest.fixture
def serving(scratch: Path) -> Iterator[Serve]:
    """`serving(lane=True, uid=None)` serves lower, upper and work below a new directory at its mnt."""
    running: list[Served] = []

    def start(*, lane: bool = True, uid: int | None = None, files: dict[str, bytes] | None = None) -> Served:
        base = scratch / f"served{len(running)}"
        for name in ("lower", "upper", "work", "mnt"):
            (base / name).mkdir(parents=True)
        for name, content in (files or {}).items():
            (base / "lower" / name).write_bytes(content)
        if uid is not None:
            scratch.parent.chmod(0o755)
            scratch.chmod(0o755)
            for path in (base, *base.iterdir()):
                os.chown(path, uid, uid)
            (base / "dev").mkdir()
        daemon = subprocess.Popen(
            [
                *([] if uid is None else [*PRIVATE, str(base / "dev")]),
                sys.executable,
                "-c",
                SERVER,
                str(os.geteuid() if uid is None else uid),
                base,
                "lane" if lane else "session",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        served = Served(base, daemon)
        running.append(served)
        assert daemon.stdout is not None
        line = daemon.stdout.readline()
        if line != "ready\n":
            daemon.kill()
            pytest.fail(f"not mounted: {line}{daemon.communicate()[1]}")
        return served

    yield start
    for served in running:
        if served.is_mounted():
            mounting.unmount(os.fsencode(served.mnt), lazy=True)
        if served.daemon.poll() is None and (served.base / "dev").exists():
            served.daemon.terminate()
        try:
            served.daemon.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            served.daemon.kill()
            served.daemon.communicate()
            pytest.fail("the daemon did not end after its unmount")


def entry_minor(served: Served) -> str:
    """The number of the mount's connection."""
    entry = mounting.find_mount(os.fsencode(served.mnt))
    assert entry is not None
    return entry.device.partition(":")[2]


def on_both(served: Served, name: str, work: Callable[[int], object], content: bytes = b"") -> tuple[object, object]:
    """(what `work` gives on a file in the mount, the same on one of the file system below)."""
    results: list[object] = []
    for directory in (served.mnt, served.base):
        (directory / name).write_bytes(content)
        fd = os.open(directory / name, os.O_RDWR)
        try:
            results.append(work(fd))
        finally:
            os.close(fd)
    return results[0], results[1]


def errno_of(call: Callable[..., object], *args: object) -> object:
    try:
        return call(*args)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def as_user(code: str, uid: int | None, *arguments: object, stdin: bytes = b"", prefix: Sequence[object] = ()) -> str:
    """Run Python code as another user; what it printed."""
    done = subprocess.run(
        [
            *map(str, prefix), sys.executable, "-c", BECOME + code,
            str(os.geteuid() if uid is None else uid), *map(str, arguments),
        ],
        input=stdin, capture_output=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


# ---- what pyfuse3 does not bind --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "offset", "length"),
    [
        (0, 0, 100_000),
        (0, 50_000, 10 * MIB),
        (KEEP_SIZE, 0, MIB),
        (PUNCH_HOLE | KEEP_SIZE, 4096, 8192),
        (PUNCH_HOLE, 0, 4096),
        (ZERO_RANGE, 10_000, 20_000),
        (ZERO_RANGE | KEEP_SIZE, 10_000, 200_000),
        (8, 4096, 4096),
        (0x20, 4096, 4096),
        (0, -1, 10),
        (0, 0, 0),
    ],
)
def test_fallocate_does_what_the_file_system_below_does(serving: Serve, mode: int, offset: int, length: int) -> None:
    """Same errno, size, blocks and content as on the upperdir's own file system (FUSE itself refuses to collapse)."""

    def work(fd: int) -> tuple[object, int, int, bytes]:
        said = errno_of(layer_sys.fallocate, fd, mode, offset, length)
        status = os.fstat(fd)
        return said, status.st_size, status.st_blocks, os.pread(fd, 1 << 18, 0)

    ours, below = on_both(serving(), "file", work, b"d" * 65536)

    if mode & (8 | 0x20):
        assert isinstance(ours, tuple)
        assert ours[0] == errno.errorcode[errno.EOPNOTSUPP]
    else:
        assert ours == below


def test_fallocate_changes_mtime(serving: Serve) -> None:
    """The attributes that the kernel asks for afterwards are new."""
    served = serving()
    path = served.mnt / "file"
    path.write_bytes(b"x")
    os.utime(path, (1, 1))
    with path.open("r+b") as file:
        layer_sys.fallocate(file.fileno(), 0, 0, 8192)

    assert path.stat().st_size == 8192
    assert path.stat().st_mtime > 1e9


def _map(fd: int) -> list[tuple[str, int, object]]:
    found: list[tuple[str, int, object]] = []
    for offset in (0, 1, 4096, MIB - 1, MIB, 2 * MIB, 3 * MIB, 3 * MIB + 5, 1 << 40):
        found.append(("data", offset, errno_of(os.lseek, fd, offset, os.SEEK_DATA)))
        found.append(("hole", offset, errno_of(os.lseek, fd, offset, os.SEEK_HOLE)))
    return found


def _write_sparse(fd: int) -> None:
    os.pwrite(fd, b"a" * 4096, 0)
    os.pwrite(fd, b"b" * 4096, MIB)
    os.ftruncate(fd, 3 * MIB)


def test_seek_of_an_upper_file_finds_its_holes(serving: Serve) -> None:
    """SEEK_DATA and SEEK_HOLE as below."""

    def work(fd: int) -> object:
        _write_sparse(fd)
        return _map(fd)

    ours, below = on_both(serving(), "sparse", work)

    assert ours == below


@pytest.mark.parametrize("metacopy", [False, True])
def test_seek_of_a_lower_file_finds_its_holes(serving: Serve, metacopy: bool) -> None:
    """Also when only the metadata was copied up."""
    served = serving()
    lower = os.open(served.base / "lower" / "sparse", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _write_sparse(lower)
        if metacopy:
            (served.mnt / "sparse").chmod(0o600)
        with (served.mnt / "sparse").open("rb") as ours:
            assert _map(ours.fileno()) == _map(lower)
    finally:
        os.close(lower)


@pytest.mark.parametrize("source", ["lower", "upper", "metacopy"])
def test_copy_file_range_copies_from_lower_and_upper(serving: Serve, source: str) -> None:
    """Content, count, size and offsets are right, whoever serves the source."""
    content = os.urandom(3 * MIB + 77)
    served = serving(files={"from": content})
    if source == "upper":
        (served.mnt / "from").write_bytes(content)
    if source == "metacopy":
        (served.mnt / "from").chmod(0o600)
    with (served.mnt / "from").open("rb") as reader, (served.mnt / "to").open("w+b") as writer:
        one = os.copy_file_range(reader.fileno(), writer.fileno(), MIB, 1000, 5)
        two = os.copy_file_range(reader.fileno(), writer.fileno(), 100 * MIB, 1000 + one, 5 + one)
        end = os.copy_file_range(reader.fileno(), writer.fileno(), 100, len(content), 0)

    assert (one, one + two, end) == (MIB, len(content) - 1000, 0)
    assert (served.mnt / "to").read_bytes() == b"\0" * 5 + content[1000:]
    assert (served.base / "upper" / "to").read_bytes() == b"\0" * 5 + content[1000:]


def test_copy_file_range_drops_what_was_cached_of_the_target(serving: Serve) -> None:
    """A reader that has the target's old pages sees the new bytes."""
    served = serving(files={"from": b"n" * 8192})
    target = served.mnt / "to"
    target.write_bytes(b"o" * 8192)
    assert target.read_bytes() == b"o" * 8192
    with (served.mnt / "from").open("rb") as reader, target.open("r+b") as writer:
        os.copy_file_range(reader.fileno(), writer.fileno(), 4096, 0, 0)

    assert target.read_bytes() == b"n" * 4096 + b"o" * 4096


def test_tmpfile_is_a_file_without_a_name(serving: Serve) -> None:
    """Owner, mode and umask as of any new file; nothing shows in the directory, nothing is left in the workdir."""
    served = serving()
    before = os.umask(0o027)
    try:
        fd = os.open(served.mnt, os.O_TMPFILE | os.O_RDWR, 0o666)
    finally:
        os.umask(before)
    try:
        os.write(fd, b"content")
        status = os.fstat(fd)
        assert (stat.S_IMODE(status.st_mode), status.st_nlink, status.st_size) == (0o640, 0, 7)
        assert os.pread(fd, 10, 0) == b"content"
        assert list(served.mnt.iterdir()) == []
    finally:
        os.close(fd)
    assert list((served.base / "work" / "work").iterdir()) == []
    assert list((served.base / "upper").iterdir()) == []


def test_ioctl_is_refused_as_unknown(serving: Serve) -> None:
    """FS_IOC_GETVERSION: ENOTTY, not a hanging client."""
    served = serving(files={"file": b"x"})
    with (served.mnt / "file").open("rb") as file, pytest.raises(OSError, match=r"Inappropriate ioctl"):
        fcntl.ioctl(file.fileno(), 0x80087601, b"\0" * 8)


def test_umask_is_applied_and_a_default_acl_replaces_it(serving: Serve) -> None:
    """With DONT_MASK the umask is ours; a directory's default ACL stands in for it (acl(5))."""
    served = serving()
    acl = b"\x02\0\0\0" + b"".join(
        tag.to_bytes(2, "little") + perm.to_bytes(2, "little") + b"\xff" * 4
        for tag, perm in ((1, 7), (4, 6), (0x20, 4))
    )
    (served.mnt / "plain").mkdir()
    (served.mnt / "acl").mkdir()
    os.setxattr(served.mnt / "acl", "system.posix_acl_default", acl)
    before = os.umask(0o077)
    try:
        for directory in ("plain", "acl"):
            os.close(os.open(served.mnt / directory / "file", os.O_CREAT | os.O_WRONLY, 0o666))
    finally:
        os.umask(before)

    assert stat.S_IMODE((served.mnt / "plain/file").stat().st_mode) == 0o600
    assert stat.S_IMODE((served.mnt / "acl/file").stat().st_mode) == 0o664


@pytest.mark.root
def test_write_by_another_user_clears_suid(serving: Serve) -> None:
    """No HANDLE_KILLPRIV: the kernel clears suid itself."""
    served = serving()
    path = served.mnt / "suid"
    path.write_bytes(b"x")
    path.chmod(0o6777)
    for directory in (served.base.parent.parent, served.base.parent):
        directory.chmod(0o755)
    as_user("with open(sys.argv[2], 'r+b') as file: file.write(b'y')", NOBODY, path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o777


# ---- large requests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["us", pytest.param("nobody", marks=pytest.mark.root), "session"])
def test_large_writes_and_reads_arrive_whole(serving: Serve, who: str) -> None:
    """5 MiB in pieces of 1 MiB, through the lane as root and by fusermount3, and without the lane."""
    served = serving(lane=who != "session", uid=NOBODY if who == "nobody" else None)
    content = os.urandom(5 * MIB + 3)
    code = (
        "data = sys.stdin.buffer.read()\n"
        "with open(sys.argv[2], 'wb', buffering=0) as file:\n"
        "    for at in range(0, len(data), 1 << 20):\n"
        "        piece = data[at : at + (1 << 20)]\n"
        "        assert file.write(piece) == len(piece)\n"
        "with open(sys.argv[2], 'rb') as file:\n"
        "    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)\n"
        "    assert file.read() == data\n"
    )
    if who == "nobody":
        inside = ["nsenter", "-t", served.daemon.pid, "-m"]
        as_user(code, NOBODY, served.mnt / "large", stdin=content, prefix=inside)
    else:
        as_user(code, None, served.mnt / "large", stdin=content)

    assert (served.base / "upper" / "large").read_bytes() == content
    if who == "nobody":
        served.daemon.terminate()  # unmounts by fusermount3
    else:
        served.unmount()
    assert served.wait() == "ended\n"


def test_large_directory_lists_whole(serving: Serve) -> None:
    """Listings come in pieces that fit a message, each name once."""
    served = serving()
    names = {f"{number:04}" + "n" * 200 for number in range(1500)}
    for name in names:
        (served.base / "lower" / name).touch()

    assert sorted(os.listdir(served.mnt)) == sorted(names)


def test_xattr_of_the_largest_size_passes(serving: Serve) -> None:
    """64 KiB is what the kernel allows, and the largest message that goes through the socket."""
    served = serving(files={"file": b"x"})
    value = os.urandom(65536)
    try:
        os.setxattr(served.base / "upper", "user.probe", value)
    except OSError as error:
        pytest.skip(f"the file system below holds no such xattr: {error}")
    os.setxattr(served.mnt / "file", "user.large", value)

    assert os.getxattr(served.mnt / "file", "user.large") == value


def test_many_forgets_at_once_do_not_stop_the_mount(serving: Serve) -> None:
    """After a walk the kernel drops everything in one BATCH_FORGET, which is cut."""
    served = serving()
    for number in range(3000):
        (served.base / "lower" / f"{number}").touch()
    assert len([entry.stat() for entry in os.scandir(served.mnt)]) == 3000
    fd = os.open(served.mnt, os.O_RDONLY)
    os.close(fd)
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("2", encoding="ascii")

    assert len(os.listdir(served.mnt)) == 3000


# ---- ends ------------------------------------------------------------------------------------------------------------


class Load:
    """Threads that write, read, list and stat in a mount until it fails under them."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.stopping = False
        self.rounds = 0
        self.threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(4)]
        for thread in self.threads:
            thread.start()
        processes.wait_until(lambda: self.rounds >= 8, "there is load")

    def _run(self, number: int) -> None:
        path = self.served.mnt / f"load{number}"
        while not self.stopping:
            try:
                path.write_bytes(b"x" * 300_000)
                path.read_bytes()
                os.listdir(self.served.mnt)
                errno_of(os.stat, self.served.mnt / f"missing{self.rounds}")
                self.rounds += 1
            except OSError as error:
                if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENOENT):
                    raise

    def end(self) -> None:
        """No thread may hang."""
        self.stopping = True
        for thread in self.threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in self.threads)


def test_unmount_ends_the_daemon_in_order(serving: Serve) -> None:
    """umount(2) of an idle mount: it ends well, at once."""
    served = serving()
    served.unmount()

    assert served.wait() == "ended\n"


def test_lazy_unmount_under_load_ends_when_the_last_file_is_closed(serving: Serve) -> None:
    """Nothing hangs, no process stays."""
    served = serving()
    load = Load(served)
    mounting.unmount(os.fsencode(served.mnt), lazy=True)
    time.sleep(0.2)
    load.end()

    assert served.wait() == "ended\n"


def test_sigterm_under_load_ends_in_order(serving: Serve) -> None:
    """The first signal may find it busy, the second detaches."""
    served = serving()
    load = Load(served)
    served.daemon.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    if served.is_mounted():
        served.daemon.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    load.end()

    out, _ = served.daemon.communicate(timeout=20)
    assert (served.daemon.returncode, out) == (0, "ended\n")
    assert not served.is_mounted()


def test_killed_daemon_leaves_no_process_hanging(serving: Serve) -> None:
    """SIGKILL: the kernel aborts the connection, clients get ENOTCONN."""
    served = serving()
    load = Load(served)
    served.daemon.kill()
    served.daemon.wait(10)
    load.end()

    with pytest.raises(OSError, match=r"not connected|abort"):
        os.statvfs(served.mnt)  # nothing that the kernel has in its caches


@pytest.mark.root
def test_aborted_connection_ends_the_daemon_and_its_mount(serving: Serve, scratch: Path) -> None:
    """/sys/fs/fuse/connections/N/abort: the daemon ends, and takes the dead mount away."""
    served = serving()
    load = Load(served)
    control = scratch / "control"
    control.mkdir()
    if subprocess.run(["mount", "-t", "fusectl", "none", control], check=False).returncode != 0:
        pytest.skip("no fusectl here")
    try:
        (control / entry_minor(served) / "abort").write_text("1", encoding="ascii")
    finally:
        subprocess.run(["umount", "-l", control], check=True)
    load.end()

    out, _ = served.daemon.communicate(timeout=20)
    assert (served.daemon.returncode, out) == (0, "ended\n")
    assert not served.is_mounted()


def test_without_the_lane_everything_but_the_unbound_works(serving: Serve) -> None:
    """lane=False: pyfuse3 mounts by itself; fallocate is refused, files work."""
    served = serving(lane=False, files={"file": b"hello"})
    assert (served.mnt / "file").read_bytes() == b"hello"
    (served.mnt / "new").write_bytes(b"new")
    with (served.mnt / "new").open("r+b") as file, pytest.raises(OSError, match="not supported"):
        layer_sys.fallocate(file.fileno(), KEEP_SIZE, 0, 100)
    served.unmount()

    assert served.wait() == "ended\n"
    assert (served.base / "upper" / "new").read_bytes() == b"new"


# ---- mounts that cannot be made --------------------------------------------------------------------------------------


def failing(mountpoint: Path, **changes: object) -> MountRequest:
    fields: dict[str, object] = {"source": "s", "allow_other": False, "read_only": False, "flags": ()} | changes
    return MountRequest(mountpoint=os.fsencode(mountpoint), **fields)  # type: ignore[arg-type]


def test_mount_without_mountpoint_fails_with_one_line(scratch: Path) -> None:
    """The line names the mountpoint; no descriptor leaks."""
    gc.collect()  # what earlier tests have left would be closed now or then
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(MountError, match="missing") as caught:
        open_and_mount(failing(scratch / "missing"))

    assert "\n" not in str(caught.value)
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.root
def test_unknown_flag_is_refused_by_name(scratch: Path) -> None:
    """No word is swallowed."""
    with pytest.raises(MountError, match="nonsense"):
        open_and_mount(failing(scratch, flags=("nonsense",)))


def test_missing_helper_is_named(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CAP_SYS_ADMIN and without fusermount3 there is no mount."""
    monkeypatch.setattr(lane_module, "_may_mount", lambda: False)
    monkeypatch.setenv("PATH", str(scratch))
    with pytest.raises(MountError, match="fusermount3 is missing"):
        open_and_mount(failing(scratch))


@pytest.mark.root
def test_helper_refusal_is_told_in_its_words(scratch: Path) -> None:
    """allow_other without user_allow_other, a mountpoint of somebody else: fusermount3's own line."""
    code = (
        "try:\n"
        "    open_and_mount(MountRequest(os.fsencode(sys.argv[2]), 's', sys.argv[3] == 'other', False, ()))\n"
        "except MountError as error:\n"
        "    print(error)\n"
    )
    mine, theirs = scratch / "mine", scratch / "theirs"
    scratch.parent.chmod(0o755)
    scratch.chmod(0o755)
    theirs.mkdir(mode=0o755)
    mine.mkdir()
    os.chown(mine, NOBODY, NOBODY)
    (scratch / "dev").mkdir()
    prefix = [*PRIVATE, scratch / "dev"]
    said = [as_user(code, NOBODY, path, other, prefix=prefix) for path, other in ((theirs, "no"), (mine, "other"))]

    assert "write access" in said[0] or "ermission denied" in said[0]
    assert "user_allow_other" in said[1] or said[1] == ""
    for line in said:
        assert line.count("\n") <= 1
