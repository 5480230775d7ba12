"""What a mount does under load, when the disk is full, when layers are damaged, and when its daemon is killed."""

import errno
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import processes
import pytest
from helpers_overlay import Overlay, Run, docker_archive, overlay

pytestmark = [pytest.mark.fuse, pytest.mark.root]

MIB = 1 << 20
BIG = 1024 * MIB


@pytest.fixture
def made(ovlfs: Run, scratch: Path) -> Iterator[Overlay]:
    with overlay(ovlfs, scratch) as found:
        yield found


def pattern(number: int) -> bytes:
    """A MiB that differs from the others."""
    return hashlib.sha256(b"%d" % number).digest() * (MIB // 32)


def make_big(path: Path, size: int = BIG) -> None:
    with open(path, "wb") as file:
        file.writelines(pattern(number) for number in range(size // MIB))


def check_big(path: Path, size: int = BIG, *, changed: int = 0) -> None:
    """All of it is there; `changed` bytes at the start are not looked at."""
    assert os.stat(path).st_size == size
    with open(path, "rb", buffering=0) as file:
        for number in range(size // MIB):
            piece = file.read(MIB)
            start = changed if number == 0 else 0
            assert piece[start:] == pattern(number)[start:], f"MiB {number}"


class Thread(threading.Thread):
    """A thread whose exception comes out of `result`."""

    def __init__(self, function: object, *args: object) -> None:
        super().__init__(daemon=True)
        self._function, self._args = function, args
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._function(*self._args)  # type: ignore[operator]
        except BaseException as error:
            self.error = error

    def result(self, seconds: float = 120) -> None:
        self.join(seconds)
        assert not self.is_alive(), "still waiting"
        if self.error is not None:
            raise self.error


def write_start(path: Path, content: bytes) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.write(content)


def read_start(path: Path, length: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read(length)


def temp_bytes(made: Overlay) -> int:
    """How much of a copy has arrived in the workdir."""
    total = 0
    for name in os.listdir(made.work / "work"):
        with suppress(FileNotFoundError):
            total += os.lstat(made.work / "work" / name).st_blocks * 512
    return total


def wait_for_copy(made: Overlay) -> None:
    processes.wait_until(lambda: temp_bytes(made) > 0 or made.upper_bytes() >= BIG, "the copy has begun")


# ---- a long copy-up


def test_others_are_served_while_a_big_file_is_copied_up(made: Overlay) -> None:
    """Listing, stat, reading and writing elsewhere go on; and the copy is right."""
    make_big(made.lower / "big")
    for number in range(50):
        (made.lower / f"file{number}").write_bytes(b"%d" % number)
    mnt = made.mount()
    copier = Thread(write_start, mnt / "big", b"CHANGED")
    wait_for_copy(made)
    rounds = 0
    while copier.is_alive():
        assert len(os.listdir(mnt)) >= 51
        assert os.stat(mnt / "big").st_size == BIG
        assert (mnt / f"file{rounds % 50}").exists()
        (mnt / f"new{rounds}").write_bytes(b"new")
        with open(mnt / f"file{rounds % 50}", "ab") as file:
            file.write(b"more")
        rounds += 1
    copier.result()
    assert rounds > 3  # whoever had to wait for the copy would be done once
    assert read_start(mnt / "big", 8)[:7] == b"CHANGED"
    check_big(mnt / "big", changed=7)
    made.remount()
    check_big(mnt / "big", changed=7)


def test_two_writers_open_the_same_lower_file_at_once(made: Overlay) -> None:
    """It is copied up once, and has what both wrote."""
    make_big(made.lower / "big", 256 * MIB)
    mnt = made.mount()

    def write_at(offset: int) -> None:
        fd = os.open(mnt / "big", os.O_WRONLY)
        os.pwrite(fd, b"mine", offset)
        os.close(fd)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_at, range(0, 64, 8)))
    assert read_start(mnt / "big", 64)[::8] == b"m" * 8
    check_big(mnt / "big", 256 * MIB, changed=64)
    assert made.temps() == []


@pytest.mark.parametrize("what", ["unlink", "rename", "rename-directory"])
def test_name_changes_during_a_copy_up(made: Overlay, what: str) -> None:
    """The writer's descriptor is good; the file is where it was moved to, or nowhere."""
    (made.lower / "dir").mkdir()
    make_big(made.lower / "dir/big")
    mnt = made.mount()
    read_back = []

    def write() -> None:
        with open(mnt / "dir/big", "r+b", buffering=0) as file:
            file.write(b"CHANGED")
            file.seek(0)
            read_back.append(file.read(7))

    copier = Thread(write)
    wait_for_copy(made)
    where: Path | None = None
    if what == "unlink":
        os.unlink(mnt / "dir/big")
    elif what == "rename":
        where = mnt / "moved"
        os.rename(mnt / "dir/big", where)
    else:
        where = mnt / "moved/big"
        os.rename(mnt / "dir", mnt / "moved")
    try:
        copier.result()
        assert read_back == [b"CHANGED"]
    except FileNotFoundError:
        assert what == "unlink"  # the open had not been answered yet
    for _ in range(2):
        assert not (mnt / "dir/big").exists()
        if where is not None:
            check_big(where, changed=7)
        made.remount()
    assert made.temps() == []


@contextmanager
def small_tmpfs(made: Overlay, size: str) -> Iterator[None]:
    """Upper and work on a file system of their own that is soon full."""
    full = made.base / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", full], check=True)
    try:
        for path in (made.upper, made.work):
            path.rmdir()
            (full / path.name).mkdir()
            path.symlink_to(full / path.name)
        yield
    finally:
        made.take_away()
        subprocess.run(["umount", "-l", full], check=True)


def test_disk_full_in_a_copy_up(made: Overlay) -> None:
    """ENOSPC comes out, the lower file stays in force, nothing is left in the workdir, and the mount lives on."""
    make_big(made.lower / "big", 64 * MIB)
    (made.lower / "small").write_bytes(b"small")
    with small_tmpfs(made, "32m"):
        mnt = made.mount()
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                os.close(os.open(mnt / "big", os.O_RDWR))
            assert caught.value.errno == errno.ENOSPC
            check_big(mnt / "big", 64 * MIB)
            assert made.temps() == []
            assert os.listdir(made.upper) == []
        (mnt / "small").write_bytes(b"changed")
        os.truncate(mnt / "big", 0)
        made.remount()
        assert (mnt / "small").read_bytes() == b"changed"
        assert (mnt / "big").read_bytes() == b""


# ---- the daemon is killed


def test_kill_in_a_copy_up_leaves_the_lower_in_force(made: Overlay) -> None:
    """The next mount removes what is half done, and goes on."""
    make_big(made.lower / "big")
    mnt = made.mount()
    (mnt / "before").write_bytes(b"before")
    copier = Thread(write_start, mnt / "big", b"CHANGED")
    wait_for_copy(made)
    made.kill()
    with suppress(OSError):
        copier.result()
    made.mount()
    assert made.temps() == []
    check_big(mnt / "big", changed=7)
    assert (mnt / "before").read_bytes() == b"before"
    write_start(mnt / "big", b"CHANGED")
    made.remount()
    assert read_start(mnt / "big", 7) == b"CHANGED"


def test_what_fsync_returned_for_survives_a_kill(made: Overlay) -> None:
    """It is in the upperdir, under its name."""
    (made.lower / "lower").write_bytes(b"lower")
    mnt = made.mount()
    for name in ("lower", "new"):
        fd = os.open(mnt / name, os.O_RDWR | os.O_CREAT, 0o644)
        os.pwrite(fd, b"written", 0)
        os.fsync(fd)
        os.close(fd)
    made.kill()
    assert (made.upper / "lower").read_bytes() == (made.upper / "new").read_bytes() == b"written"
    made.mount()
    assert (mnt / "lower").read_bytes() == (mnt / "new").read_bytes() == b"written"


# ---- damage


def test_damaged_overlay_xattr_is_euclean_for_that_name_only(made: Overlay) -> None:
    """The rest of the tree is served, and nothing is made up."""
    made.lowers.append(made.base / "lower1")
    for lower in made.lowers:
        for name in ("bad", "good"):
            (lower / name).mkdir(parents=True)
            (lower / name / "file").write_bytes(b"content")
    os.setxattr(made.lower / "bad", "trusted.overlay.redirect", b"/not//clean")
    mnt = made.mount()
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            os.stat(mnt / "bad")
        assert caught.value.errno == errno.EUCLEAN
        assert (mnt / "good/file").read_bytes() == b"content"
    (mnt / "good/new").write_bytes(b"new")


def test_image_truncated_while_mounted_is_eio(made: Overlay) -> None:
    """Never zeros; the names and attributes are still served, and so is what is in the upperdir."""
    made.image = docker_archive(made.base / "image.tar", [("first", b"f" * 300_000), ("last", b"l" * 300_000)])
    mnt = made.mount()
    (mnt / "new").write_bytes(b"new")
    os.truncate(made.image, 100_000)
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            (mnt / "last").read_bytes()
        assert caught.value.errno == errno.EIO
    with pytest.raises(OSError) as caught:
        os.close(os.open(mnt / "last", os.O_RDWR))
    assert caught.value.errno == errno.EIO
    assert made.temps() == []
    assert os.stat(mnt / "last").st_size == 300_000
    assert sorted(os.listdir(mnt)) == ["first", "last", "new"]
    assert (mnt / "new").read_bytes() == b"new"


# ---- many and deep


def test_hundreds_of_clients(made: Overlay) -> None:
    """Two hundred at once, each with files of its own and one that all append to."""
    (made.lower / "shared").write_bytes(b"")
    for number in range(200):
        (made.lower / f"lower{number}").write_bytes(b"x" * number)
    mnt = made.mount()

    def client(number: int) -> None:
        directory = mnt / f"client{number}"
        directory.mkdir()
        for at in range(5):
            (directory / f"{at}").write_bytes(b"%d" % at)
        with open(mnt / f"lower{number}", "ab") as file:
            file.write(b"y")
        fd = os.open(mnt / "shared", os.O_WRONLY | os.O_APPEND)
        os.write(fd, b"%03d\n" % number)
        os.close(fd)
        os.rename(directory, mnt / f"done{number}")
        assert len(os.listdir(mnt / f"done{number}")) == 5

    with ThreadPoolExecutor(200) as pool:
        list(pool.map(client, range(200), timeout=120))
    assert sorted((mnt / "shared").read_bytes().split()) == [b"%03d" % number for number in range(200)]
    for number in range(200):
        assert (mnt / f"lower{number}").read_bytes() == b"x" * number + b"y"


def test_directories_deeper_than_path_max(made: Overlay) -> None:
    """A path of more than 4096 bytes, made in steps: list, write, rename on top, remount, remove."""
    mnt = made.mount()
    name, depth = "d" * 200, 30

    with ExitStack() as stack:
        at = os.open(mnt, os.O_RDONLY)
        stack.callback(os.close, at)
        for _ in range(depth):
            os.mkdir(name, dir_fd=at)
            at = os.open(name, os.O_RDONLY, dir_fd=at)
            stack.callback(os.close, at)
        fd = os.open("file", os.O_CREAT | os.O_RDWR, 0o600, dir_fd=at)
        os.write(fd, b"deep")
        os.rename("file", "renamed", src_dir_fd=at, dst_dir_fd=at)
        os.fchmod(fd, 0o640)
        os.close(fd)
        assert os.listdir(at) == ["renamed"]
    os.rename(mnt / name, mnt / "top")
    made.remount()
    with ExitStack() as stack:
        at = os.open(mnt / "top", os.O_RDONLY)
        stack.callback(os.close, at)
        fds = [at]
        for _ in range(depth - 1):
            fds.append(os.open(name, os.O_RDONLY, dir_fd=fds[-1]))
            stack.callback(os.close, fds[-1])
        with open(os.open("renamed", os.O_RDONLY, dir_fd=fds[-1]), "rb") as file:
            assert file.read() == b"deep"
        os.unlink("renamed", dir_fd=fds[-1])
        for above in reversed(fds[:-1]):
            os.rmdir(name, dir_fd=above)
    os.rmdir(mnt / "top")
    assert os.listdir(mnt) == os.listdir(made.upper) == []


def test_directory_of_twenty_thousand_entries(made: Overlay) -> None:
    """Half of them in a lower layer: listed, some more made, all removed."""
    (made.lower / "many").mkdir()
    for number in range(10_000):
        (made.lower / "many" / f"lower{number}").touch()
    mnt = made.mount()
    for number in range(10_000):
        os.mknod(mnt / "many" / f"upper{number}", 0o100644)
    names = os.listdir(mnt / "many")
    assert len(names) == len(set(names)) == 20_000
    for name in names:
        os.unlink(mnt / "many" / name)
    assert os.listdir(mnt / "many") == []
    os.rmdir(mnt / "many")
    assert made.is_whiteout("many")


# ---- nothing grows


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError


def busy(mnt: Path, turn: int) -> None:
    """All that takes a descriptor or a node."""
    for number in range(100):
        path = mnt / f"turn{turn}-{number}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.write(fd, b"x" * 100)
        os.unlink(path)
        os.fchmod(fd, 0o640)
        os.close(fd)
        fd = os.open(mnt / f"file{number}", os.O_RDONLY)
        os.chmod(mnt / f"file{number}", 0o600 + turn)
        with open(mnt / f"file{number}", "ab") as file:
            file.write(b"y")
        os.pread(fd, 10, 0)
        os.close(fd)
        with suppress(OSError):
            os.open(mnt / "missing" / str(number), os.O_RDONLY)
    os.listdir(mnt)


def drop_caches(mnt: Path) -> None:
    """Have the kernel forget what it knows of this mount (and of others: it only costs time)."""
    os.stat(mnt)
    Path("/proc/sys/vm/drop_caches").write_text("2\n")


def test_no_descriptor_leaks(made: Overlay) -> None:
    """After any amount of work as many are open as before, open-unlinked files included."""
    for number in range(100):
        (made.lower / f"file{number}").write_bytes(b"z" * 1000)
    mnt = made.mount()
    pid = made.pid
    busy(mnt, 0)
    before = descriptors(pid)
    for turn in range(1, 4):
        busy(mnt, turn)

    def given_back() -> bool:
        drop_caches(mnt)
        return descriptors(pid) <= before

    processes.wait_until(given_back, "descriptors were given back")


def test_memory_falls_back_after_drop_caches(made: Overlay) -> None:
    """Nodes that the kernel has forgotten cost nothing: a second walk needs no more than the first."""
    for directory in range(100):
        (made.lower / f"dir{directory}").mkdir()
        for number in range(100):
            (made.lower / f"dir{directory}" / f"file{number}").touch()
    mnt = made.mount()
    pid = made.pid

    def walk() -> int:
        script = "import os, sys\nfor at, d, f in os.walk(sys.argv[1]): [os.stat(os.path.join(at, n)) for n in f]"
        subprocess.run([sys.executable, "-c", script, mnt], check=True)
        walked = resident_kib(pid)
        drop_caches(mnt)
        return walked

    first = walk()
    for _ in range(3):
        last = walk()
    assert last < first + 4096
