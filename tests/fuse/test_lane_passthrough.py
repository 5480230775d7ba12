"""The traps of passthrough, each on a real mount: beside the same without the lane, and by kernel overlayfs.

A file whose data is in the upperdir is read and written by the kernel itself (native/lane_file.c); lower files, and
inodes that somebody has open through the page cache, are not.  What can go wrong at that border: the lower layer is
written to, opens fail with EIO, readers see old data, sizes and times are those of before, privileges stay.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import resource
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
from helpers_overlay import Overlay, Run, overlay, state
from helpers_users import GID, UID, User, as_user
from test_lane_native import Mount, drop_caches, mounted_by

from ovlfs.layer import sys as layer_sys

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.timeout(90)]

READ, WRITE = 15, 16
KEEP_SIZE, PUNCH_HOLE = 1, 2
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service+ep
PAGE = 4096
TEXT = b"lower data " * 2000


def mounted_how(*hows: str) -> Callable[[Any], Any]:
    """By whom the test's overlay is mounted (helpers_overlay.py)."""
    return pytest.mark.parametrize("stack", hows, indirect=True)


everywhere = mounted_how("lane", "no_lane", "kernel")
with_unbound = mounted_how("lane", "kernel")
"""What pyfuse3 does not bind works with the lane only."""


@pytest.fixture
def stack(request: pytest.FixtureRequest, ovlfs: Run, scratch: Path) -> Iterator[Overlay]:
    """Mounted, over a lower directory with `f` (text), `g` (text) and the directory `d`."""
    for directory in (scratch, scratch.parent):
        directory.chmod(0o711)  # for other users
    with overlay(ovlfs, scratch, how=request.param) as made:
        for name in ("f", "g"):
            (made.lower / name).write_bytes(TEXT)
        (made.lower / "d").mkdir()
        made.mount()
        yield made


@contextlib.contextmanager
def opened(path: Path, flags: int, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def sizes(path: Path, fd: int) -> set[int]:
    """Of one file, by every way that tells it."""
    with os.scandir(path.parent) as entries:
        listed = next(entry.stat(follow_symlinks=False).st_size for entry in entries if entry.name == path.name)
    return {os.fstat(fd).st_size, os.stat(path).st_size, listed}


# ---- is it used at all? ----------------------------------------------------------------------------------------------


def data_messages(mount: Mount) -> int:
    counts, *_ = mount.ask()
    return sum(sum(counts.get(opcode, (0, 0))) for opcode in (READ, WRITE))


def test_data_of_upper_files_makes_no_messages(scratch: Path) -> None:
    """A new file and one that was copied up are passed through; so is a mapping of them."""
    base = scratch / "stack"
    (base / "lower0").mkdir(parents=True)
    (base / "lower0/f").write_bytes(TEXT)
    with mounted_by(base, "native") as mount:
        (mount.mnt / "new").write_bytes(TEXT)
        with open(mount.mnt / "f", "r+b") as file:
            file.write(b"UPPER")
        assert data_messages(mount) == 0
        for name in ("new", "f"):
            with open(mount.mnt / name, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
                memory[:2] = b"by"
                assert file.read(2) == b"by"
        assert data_messages(mount) == 0
        assert (base / "lower0/f").read_bytes() == TEXT


def test_inode_stays_in_the_page_cache_while_a_reader_of_the_lower_file_has_it_open(scratch: Path) -> None:
    """The kernel refuses to mix; passthrough begins with the first open after the last one that was cached."""
    base = scratch / "stack"
    (base / "lower0").mkdir(parents=True)
    (base / "lower0/f").write_bytes(TEXT)
    with mounted_by(base, "native") as mount:
        path = mount.mnt / "f"
        with open(path, "rb", buffering=0) as reader:
            assert reader.read(10) == TEXT[:10]
            with open(path, "r+b", buffering=0) as writer, open(path, "rb", buffering=0) as another:
                before = data_messages(mount)
                assert writer.write(b"UPPER") == 5
                assert another.read(10) == b"UPPER" + TEXT[5:10]
                assert data_messages(mount) > before
        before = data_messages(mount)
        with open(path, "r+b", buffering=0) as writer:
            assert writer.read(10) == b"UPPER" + TEXT[5:10]
            assert writer.write(b"AGAIN") == 5
        assert data_messages(mount) == before
        assert path.read_bytes() == b"UPPER" + TEXT[5:10] + b"AGAIN" + TEXT[15:]


# ---- a lower file that somebody reads --------------------------------------------------------------------------------


@everywhere
def test_writer_beside_a_reader_of_the_lower_file_leaves_the_lower_file_alone(stack: Overlay) -> None:
    """Both see what is written, also through the old descriptor (kernel: since 4.19); no open fails."""
    before = state(stack.lower / "f")
    path = stack.mnt / "f"
    with opened(path, os.O_RDONLY) as reader:
        assert os.pread(reader, 5, 0) == TEXT[:5]
        for number, flags in enumerate((os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND)):
            with opened(path, flags) as writer, opened(path, os.O_RDONLY) as another:
                text = b"new %d" % number
                os.pwrite(writer, text, 0) if not flags & os.O_APPEND else os.write(writer, text)
                for fd in (reader, another):
                    seen = os.pread(fd, 1 << 20, 0)
                    assert seen.startswith(b"new 1") if flags & os.O_APPEND else seen.startswith(text)
                    assert not flags & os.O_APPEND or seen.endswith(text)
        assert os.fstat(reader).st_size == len(TEXT) + 5
    assert state(stack.lower / "f") == before
    assert path.read_bytes() == (stack.upper / "f").read_bytes() == b"new 1" + TEXT[5:] + b"new 2"


@everywhere
def test_mapping_of_a_lower_file_survives_a_copy_up(stack: Overlay) -> None:
    """It shows the old data or the new, page by page, and the lower file does not change; what is private stays so."""
    before = state(stack.lower / "f")
    path = stack.mnt / "f"
    with opened(path, os.O_RDONLY) as reader:
        shared = mmap.mmap(reader, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        private = mmap.mmap(reader, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        private[:4] = b"mine"
        assert shared[:5] == TEXT[:5]
        with opened(path, os.O_RDWR) as writer:
            os.pwrite(writer, b"NEWER", 0)
            with mmap.mmap(writer, 0) as written:
                written[PAGE : PAGE + 6] = b"mapped"
                written.flush()
            assert os.pread(writer, 6, PAGE) == b"mapped"
        # kernel overlayfs maps another inode than the one that was copied up: overlayfs.rst, "Non-standard behavior"
        expected = (TEXT[:5], TEXT[PAGE : PAGE + 6]) if stack.how == "kernel" else (b"NEWER", b"mapped")
        assert (shared[:5], shared[PAGE : PAGE + 6]) == expected
        assert private[:4] == b"mine"
        shared.close()
        private.close()
    assert state(stack.lower / "f") == before
    assert path.read_bytes() == b"NEWER" + TEXT[5:PAGE] + b"mapped" + TEXT[PAGE + 6 :]


@everywhere
def test_shared_mapping_for_writing_does_not_reach_the_lower_file(stack: Overlay) -> None:
    """It needs a descriptor that was opened for writing, which is the upper file's."""
    before = state(stack.lower / "f")
    with opened(stack.mnt / "f", os.O_RDWR) as fd, mmap.mmap(fd, 0) as memory:
        memory[:6] = b"mapped"
        memory.flush()
        assert os.pread(fd, 6, 0) == b"mapped"
    drop_caches()
    assert (stack.mnt / "f").read_bytes() == b"mapped" + TEXT[6:]
    assert state(stack.lower / "f") == before


# ---- sizes and times -------------------------------------------------------------------------------------------------


@everywhere
def test_size_and_mtime_follow_who_writes(stack: Overlay) -> None:
    """stat, fstat and a listing agree after each write, truncation and append, also when the kernel forgot."""
    path = stack.mnt / "new"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd, opened(path, os.O_WRONLY | os.O_APPEND) as appender:
        last = os.stat(path).st_mtime_ns
        for number in range(1, 40):
            processes.wait_for_a_tick()
            match number % 4:
                case 0:
                    os.ftruncate(fd, number * 100)
                    expected = number * 100
                case 1:
                    expected = max(os.fstat(fd).st_size, number * 1000 + 3)
                    os.pwrite(fd, b"abc", number * 1000)
                case 2:
                    expected = os.fstat(fd).st_size + 7
                    os.write(appender, b"at end\n")
                case _:
                    os.truncate(path, number)
                    expected = number
            if number % 5 == 0:
                drop_caches()
            assert sizes(path, fd) == {expected}
            now = os.stat(path)
            assert now.st_mtime_ns > last
            assert (now.st_mtime_ns, now.st_blocks) == (os.fstat(fd).st_mtime_ns, os.fstat(fd).st_blocks)
            last = now.st_mtime_ns
        size = os.fstat(fd).st_size
    assert (os.stat(path).st_size, os.stat(path).st_mtime_ns) == (size, last)
    upper = os.stat(stack.upper / "new")
    assert (upper.st_size, upper.st_mtime_ns) == (size, last)


@everywhere
def test_o_trunc_of_a_file_that_is_open_empties_it_for_all(stack: Overlay) -> None:
    """Lower or upper, through the page cache or past it; O_TRUNC alone sets mtime."""
    for name in ("f", "g"):
        path = stack.mnt / name
        if name == "g":
            os.truncate(path, 1000)  # an upper file from now on
        before = state(stack.lower / name)
        with opened(path, os.O_RDONLY) as reader:
            assert os.pread(reader, 4, 0) == TEXT[:4]
            old = os.stat(path).st_mtime_ns
            processes.wait_for_a_tick()
            with opened(path, os.O_WRONLY | os.O_TRUNC) as writer:
                assert sizes(path, reader) == {0}
                assert os.stat(path).st_mtime_ns > old
                assert os.pread(reader, 4, 0) == b""
                os.write(writer, b"abc")
            assert sizes(path, reader) == {3}
            assert os.pread(reader, 10, 0) == b"abc"
        assert state(stack.lower / name) == before
    old = os.stat(stack.mnt / "f").st_mtime_ns
    os.truncate(stack.mnt / "f", 0)
    processes.wait_for_a_tick()
    os.close(os.open(stack.mnt / "f", os.O_WRONLY | os.O_TRUNC))
    assert os.stat(stack.mnt / "f").st_mtime_ns > old


@everywhere
def test_truncating_what_is_empty(stack: Overlay) -> None:
    """truncate(2) leaves the times alone, ftruncate(2) sets them, also while the file is open (fs/open.c)."""
    path = stack.mnt / "f"
    os.truncate(path, 0)
    with opened(path, os.O_WRONLY) as writer:
        old = os.stat(path).st_mtime_ns
        processes.wait_for_a_tick()
        os.truncate(path, 0)
        assert os.stat(path).st_mtime_ns == old
        os.ftruncate(writer, 0)
        assert os.stat(path).st_mtime_ns > old


@everywhere
def test_two_appenders_lose_nothing(stack: Overlay) -> None:
    """O_APPEND is resolved where the file is written."""
    path = stack.mnt / "log"
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as one, opened(path, os.O_WRONLY | os.O_APPEND) as other:
        for number in range(200):
            os.write(one if number % 2 else other, b"%05d\n" % number)
    assert path.read_bytes() == b"".join(b"%05d\n" % number for number in range(200))


# ---- names that go ---------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("name", ["f", "new"])
def test_unlinked_file_is_read_and_written_until_it_is_closed(stack: Overlay, name: str) -> None:
    """It has no links, and nothing to do with a new file of the same name."""
    path = stack.mnt / name
    if name == "new":
        path.write_bytes(TEXT)
    with opened(path, os.O_RDWR) as fd, opened(path, os.O_RDONLY) as reader:
        path.unlink()
        assert os.fstat(fd).st_nlink == os.fstat(reader).st_nlink == 0
        path.write_bytes(b"another")
        os.pwrite(fd, b"still", 0)
        os.ftruncate(fd, 100)
        os.fchmod(fd, 0o600)
        os.fsync(fd)
        assert os.pread(reader, 200, 0) == b"still" + TEXT[5:100]
        assert (os.fstat(reader).st_size, stat.S_IMODE(os.fstat(reader).st_mode)) == (100, 0o600)
        drop_caches()
        assert os.pread(reader, 5, 0) == b"still"
        assert path.read_bytes() == b"another"
    assert (stack.lower / "f").read_bytes() == TEXT


@everywhere
def test_file_that_another_was_renamed_over_stays_what_it_was(stack: Overlay) -> None:
    """Descriptors follow the inode, the name the new one; over an upper and over a lower file."""
    for name in ("f", "upper"):
        path, new = stack.mnt / name, stack.mnt / "new"
        if name == "upper":
            path.write_bytes(TEXT)
        with opened(path, os.O_RDONLY) as reader:
            new.write_bytes(b"new content")
            with opened(new, os.O_RDWR) as writer:
                new.rename(path)
                os.pwrite(writer, b"NEW", 0)
                assert os.pread(reader, 1 << 20, 0) == TEXT
                assert os.fstat(reader).st_nlink == (1 if name == "f" else 0)  # the lower file's own number
                assert path.read_bytes() == b"NEW content"
                assert os.fstat(writer).st_ino == os.stat(path).st_ino
    assert (stack.lower / "f").read_bytes() == TEXT


@with_unbound
def test_tmpfile_gets_a_name_by_linkat(stack: Overlay) -> None:
    """O_TMPFILE in a merged directory, written, linked, and written again through the old descriptor."""
    fd = os.open(stack.mnt / "d", os.O_TMPFILE | os.O_RDWR, 0o640)
    try:
        os.write(fd, b"no name yet")
        assert os.listdir(stack.mnt / "d") == []
        with opened(Path("/proc/self/fd"), os.O_RDONLY) as own:  # so that os.link() calls linkat(2)
            os.link(str(fd), stack.mnt / "d/named", src_dir_fd=own, follow_symlinks=True)
        os.pwrite(fd, b"NO", 0)
        assert (stack.mnt / "d/named").read_bytes() == b"NO name yet"
        st = os.fstat(fd)
        assert (st.st_nlink, st.st_ino, stat.S_IMODE(st.st_mode)) == (1, os.stat(stack.mnt / "d/named").st_ino, 0o640)
    finally:
        os.close(fd)
    assert os.listdir(stack.upper / "d") == ["named"]


# ---- holes and copies ------------------------------------------------------------------------------------------------


@with_unbound
def test_holes_of_a_passed_through_file(stack: Overlay) -> None:
    """fallocate, punch and SEEK_HOLE act on the file that is written; sizes and data are right at once."""
    path = stack.mnt / "new"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd, mmap.mmap(-1, PAGE) as _:
        os.write(fd, b"x" * 4 * PAGE)
        layer_sys.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, PAGE, PAGE)
        assert os.pread(fd, PAGE + 2, PAGE - 1) == b"x" + bytes(PAGE) + b"x"
        assert (os.lseek(fd, 0, os.SEEK_HOLE), os.lseek(fd, PAGE, os.SEEK_DATA)) == (PAGE, 2 * PAGE)
        layer_sys.fallocate(fd, 0, 4 * PAGE, PAGE)
        assert sizes(path, fd) == {5 * PAGE}
        layer_sys.fallocate(fd, KEEP_SIZE, 5 * PAGE, PAGE)
        assert sizes(path, fd) == {5 * PAGE}
        with mmap.mmap(fd, 5 * PAGE) as memory:
            assert memory[PAGE - 1 : PAGE + 1] == b"x\0"
            layer_sys.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, PAGE)
            assert memory[PAGE - 1 : PAGE + 1] == b"\0\0"


@with_unbound
def test_copy_file_range_between_all_kinds(stack: Overlay) -> None:
    """From a lower file and from one that is passed through, into one that is; also within a file."""
    source, target = stack.mnt / "src", stack.mnt / "new"
    source.write_bytes(b"upper " * 1000)
    with opened(target, os.O_RDWR | os.O_CREAT) as to, opened(stack.mnt / "g", os.O_RDONLY) as lower:
        assert os.copy_file_range(lower, to, 5000, 10, 0) == 5000
        with opened(source, os.O_RDWR) as upper:
            assert os.copy_file_range(upper, to, 600, 0, 5000) == 600
            assert os.copy_file_range(upper, upper, 100, 0, 6000) == 100
            assert sizes(source, upper) == {6100}
        assert sizes(target, to) == {5600}
        assert os.pread(to, 6000, 0) == TEXT[10:5010] + b"upper " * 100
    assert not (stack.upper / "g").exists()


# ---- privileges ------------------------------------------------------------------------------------------------------

WAYS = {
    "write": "fd = os.open(sys.argv[1], os.O_WRONLY); os.write(fd, b'x')",
    "append": "fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND); os.write(fd, b'x')",
    "truncate": "os.truncate(sys.argv[1], 3)",
    "ftruncate": "fd = os.open(sys.argv[1], os.O_WRONLY); os.ftruncate(fd, 3)",
    "o_trunc": "os.open(sys.argv[1], os.O_WRONLY | os.O_TRUNC)",
    "mapped": "fd = os.open(sys.argv[1], os.O_RDWR); m = mmap.mmap(fd, 0); m[0] = 1; m.flush()",
}


def privileges(path: Path) -> tuple[str, bool]:
    with contextlib.suppress(OSError):
        return oct(stat.S_IMODE(os.stat(path).st_mode)), bool(os.getxattr(path, "security.capability"))
    return oct(stat.S_IMODE(os.stat(path).st_mode)), False


@everywhere
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["lower", "upper", "upper, open by a writer"])
def test_unprivileged_writer_takes_privileges_away(stack: Overlay, way: str, where: str) -> None:
    """Set-user-ID, set-group-ID and capabilities go with the first write by somebody else; a mapping keeps them."""
    file = (stack.lower if where == "lower" else stack.mnt) / "prog"
    for number in range(2):
        path = stack.mnt / f"prog{number}"
        file = (stack.lower if where == "lower" else stack.mnt) / path.name
        if where == "lower":
            stack.umount()
        file.write_bytes(b"program " * 100)
        if number == 0:
            file.chmod(0o6777)
        else:
            file.chmod(0o777)
            os.setxattr(file, "security.capability", CAPABILITY)
        if where == "lower":
            stack.mount()
        privileges(path)
        writer = os.open(path, os.O_RDWR) if "open" in where else None
        as_user(WAYS[way], path)
        drop = way != "mapped"
        expected = ("0o777" if drop else "0o6777", False) if number == 0 else ("0o777", not drop)
        assert privileges(path) == expected
        if writer is not None:
            os.close(writer)
        drop_caches()
        assert privileges(path) == expected


@with_unbound
def test_unprivileged_fallocate_takes_privileges_away(stack: Overlay) -> None:
    """FALLOCATE and COPY_FILE_RANGE do not say so; the caller's uid does."""
    path = stack.mnt / "prog"
    for way in (
        "libc.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(5000))",
        "os.copy_file_range(os.open(sys.argv[2], os.O_RDONLY), fd, 10)",
    ):
        path.write_bytes(b"program " * 100)
        path.chmod(0o6777)
        os.setxattr(path, "security.capability", CAPABILITY)
        as_user(
            f"libc = ctypes.CDLL(None, use_errno=True); fd = os.open(sys.argv[1], os.O_WRONLY)\n{way}",
            path, stack.mnt / "g",
        )  # fmt: skip
        assert privileges(path) == ("0o777", False)


@everywhere
def test_chown_takes_privileges_away(stack: Overlay) -> None:
    """By root too (fs/open.c: chown_common()); set-group-ID without group execution is a mark, and stays."""
    for mode, left in ((0o6755, 0o755), (0o2745, 0o2745)):
        path = stack.mnt / f"prog{mode:o}"
        path.write_bytes(b"program")
        path.chmod(mode)
        os.setxattr(path, "security.capability", CAPABILITY)
        os.chown(path, UID, GID)
        assert privileges(path) == (oct(left), False)


@everywhere
def test_root_writes_without_taking_bits_away(stack: Overlay) -> None:
    """CAP_FSETID keeps the mode; capabilities go with any write (security/commoncap.c: cap_inode_need_killpriv())."""
    path = stack.mnt / "prog"
    path.write_bytes(b"program")
    path.chmod(0o6755)
    os.setxattr(path, "security.capability", CAPABILITY)
    with opened(path, os.O_WRONLY) as fd:
        os.write(fd, b"x")
    assert privileges(path) == ("0o6755", False)


# ---- durability, and ends --------------------------------------------------------------------------------------------


@mounted_how("lane", "no_lane")
def test_killed_daemon_keeps_what_was_synced(stack: Overlay) -> None:
    """SIGKILL while files are open: the lower layer is whole, what fsync returned for is there, a remount goes on."""
    with contextlib.ExitStack() as files:
        new = files.enter_context(opened(stack.mnt / "new", os.O_RDWR | os.O_CREAT))
        copied = files.enter_context(opened(stack.mnt / "f", os.O_RDWR))
        files.enter_context(opened(stack.mnt / "g", os.O_RDONLY))
        os.write(new, b"synced")
        os.pwrite(copied, b"SYNCED", 0)
        os.fsync(new)
        os.fdatasync(copied)
        (stack.mnt / "f").rename(stack.mnt / "d/moved")
        (stack.mnt / "g").unlink()
        stack.kill()
    stack.mount()
    assert (stack.mnt / "new").read_bytes() == b"synced"
    assert (stack.mnt / "d/moved").read_bytes() == b"SYNCED" + TEXT[6:]
    assert sorted(os.listdir(stack.mnt)) == ["d", "new"]
    assert (stack.lower / "f").read_bytes() == (stack.lower / "g").read_bytes() == TEXT


@everywhere
def test_volatile_mount_says_that_it_synced(stack: Overlay) -> None:
    """All of them return at once, and report no error."""
    stack.options = ",volatile"
    mnt = stack.remount()
    with opened(mnt / "f", os.O_RDWR) as fd, opened(mnt, os.O_RDONLY) as directory:
        os.write(fd, b"UPPER")
        os.fsync(fd)
        os.fdatasync(fd)
        os.fsync(directory)
        assert (mnt / "f").read_bytes() == b"UPPER" + TEXT[5:]


@everywhere
def test_lazy_unmount_leaves_open_files_working(stack: Overlay) -> None:
    """After umount -l, what is open is read, written and synced as before; the end comes with the last close."""
    with opened(stack.mnt / "new", os.O_RDWR | os.O_CREAT) as fd, opened(stack.mnt / "f", os.O_RDONLY) as reader:
        os.write(fd, b"before ")
        subprocess.run(["umount", "-l", stack.mnt], check=True)
        os.write(fd, b"after")
        os.fsync(fd)
        assert os.pread(fd, 100, 0) == b"before after"
        assert os.fstat(fd).st_size == 12
        assert os.pread(reader, len(TEXT), 0) == TEXT
        fcntl.flock(fd, fcntl.LOCK_EX)
    assert (stack.upper / "new").read_bytes() == b"before after"


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_running_out_of_descriptors_is_an_errno_and_passes(scratch: Path) -> None:
    """EMFILE or ENFILE for those who open too many; what is open works on, and so does all once there is room again."""
    base = scratch / "stack"
    (base / "lower0").mkdir(parents=True)
    for number in range(100):
        (base / f"lower0/l{number}").write_bytes(b"lower %d" % number)
    with mounted_by(base, "native") as mount:
        for number in range(300):
            (mount.mnt / f"u{number}").write_bytes(b"upper %d" % number)
        resource.prlimit(mount.daemon.pid, resource.RLIMIT_NOFILE, (150, 150))
        with contextlib.ExitStack() as files:
            fds: dict[str, int] = {}
            refused = set()
            for number in range(300):
                for name, flags in (
                    (f"u{number}", os.O_RDWR),
                    (f"l{number}", os.O_RDONLY),
                    (f"new{number}", os.O_RDWR),
                ):
                    if name[0] == "l" and number >= 100:
                        continue
                    try:
                        create = os.O_CREAT if name[0] == "n" else 0
                        fds[name] = files.enter_context(opened(mount.mnt / name, flags | create))
                    except OSError as error:
                        refused.add(error.errno)
            assert refused <= {errno.EMFILE, errno.ENFILE}
            assert refused
            assert len(fds) > 30
            for name, fd in fds.items():
                if name[0] == "l":  # opened when it is read: it may have to wait for room
                    with contextlib.suppress(OSError):
                        assert os.pread(fd, 1, 0) == b"l"
                else:
                    os.pwrite(fd, b"u", 0)
                    assert os.pread(fd, 1, 0) == b"u"
        for number in range(300):
            assert (mount.mnt / f"u{number}").read_bytes() == b"upper %d" % number
        (mount.mnt / "l5").write_bytes(b"copied up")
        assert (mount.mnt / "l5").read_bytes() == b"copied up"


@everywhere
def test_thousands_of_open_files(stack: Overlay) -> None:
    """Far more than the 1024 that a process may have by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8000), hard))
    try:
        with contextlib.ExitStack() as files:
            fds = [
                files.enter_context(opened(stack.mnt / f"d/n{number}", os.O_RDWR | os.O_CREAT))
                for number in range(3000)
            ]
            for number, fd in enumerate(fds):
                os.write(fd, b"%d" % number)
            for number, fd in enumerate(fds):
                assert os.pread(fd, 10, 0) == b"%d" % number
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- where it cannot be used -----------------------------------------------------------------------------------------


def test_upper_on_a_stacked_file_system_falls_back(scratch: Path) -> None:
    """max_stack_depth 1: no backing file may lie on another overlay.  Data goes through the page cache then."""
    below = scratch / "below"
    for name in ("lower", "upper", "work", "mnt"):
        (below / name).mkdir(parents=True)
    words = f"lowerdir={below}/lower,upperdir={below}/upper,workdir={below}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", words, below / "mnt"], check=True)
    try:
        base = below / "mnt/stack"
        (base / "lower0").mkdir(parents=True)
        (base / "lower0/f").write_bytes(TEXT)
        with mounted_by(base, "native") as mount:
            (mount.mnt / "new").write_bytes(b"new")
            with opened(mount.mnt / "f", os.O_RDWR) as fd:
                os.pwrite(fd, b"UPPER", 0)
                assert sizes(mount.mnt / "f", fd) == {len(TEXT)}
                assert os.pread(fd, 10, 0) == b"UPPER" + TEXT[5:10]
            assert (mount.mnt / "new").read_bytes() == b"new"
            assert data_messages(mount) > 0
            assert (base / "lower0/f").read_bytes() == TEXT
    finally:
        subprocess.run(["umount", "-l", below / "mnt"], check=True)


def test_unprivileged_mount_works_without_passthrough(scratch: Path) -> None:
    """FUSE_DEV_IOC_BACKING_OPEN is root's; everything else is the same."""
    with User.at(scratch) as user:
        for name in ("lower", "upper", "work"):
            user.directory(name)
        user.python("open('lower/f', 'wb').write(b'lower data' * 1000)")
        words = ",".join(f"{key}dir={user.home / key}" for key in ("lower", "upper", "work"))
        mnt = user.mount("mnt", "-o", words)
        try:
            out = user.python(
                "import os\n"
                "r = os.open('mnt/f', os.O_RDONLY)\n"
                "w = os.open('mnt/f', os.O_RDWR)\n"
                "os.pwrite(w, b'UPPER', 0); os.fsync(w)\n"
                "n = os.open('mnt/n', os.O_RDWR | os.O_CREAT, 0o640); os.write(n, b'new')\n"
                "os.ftruncate(n, 2); os.rename('mnt/n', 'mnt/m'); os.link('mnt/m', 'mnt/k')\n"
                "print(os.pread(r, 10, 0), os.fstat(w).st_size, os.pread(n, 9, 0), os.stat('mnt/k').st_nlink)\n"
            ).stdout
            assert out == "b'UPPER data' 10000 b'ne' 2\n"
            assert user.python("print(open('lower/f', 'rb').read()[:5])").stdout == "b'lower'\n"
        finally:
            user.ovlfs("umount", mnt)
