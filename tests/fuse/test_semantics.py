"""What kernel overlayfs does, one test for one rule that a comparison of trees does not show.

How much is copied, what the upperdir holds, what an open file sees, what a remount keeps.
"""

import errno
import fcntl
import mmap
import os
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from helpers_overlay import Overlay, Run, docker_archive, fingerprint, overlay
from helpers_random import populate, random_run, renameat2, write
from helpers_tree import SHOWN, differences, look

pytestmark = [pytest.mark.fuse, pytest.mark.root]

MIB = 1 << 20
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4


@pytest.fixture
def made(ovlfs: Run, scratch: Path) -> Iterator[Overlay]:
    """Two lower directories, not yet mounted."""
    with overlay(ovlfs, scratch, layers=2) as found:
        yield found


@contextmanager
def failing(code: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[code]


def bytes_written(pid: int) -> int:
    """What a process has asked write(2) and its like to write so far."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    raise AssertionError


# ---- what is copied up, and what is not (1c) -------------------------------------------------------------------------


def test_reading_copies_nothing(made: Overlay) -> None:
    """Open to read, stat, readdir, mmap to read, atime: the upperdir stays empty (rows 35, 65)."""
    write(made.lower / "dir/file")
    os.utime(made.lower / "dir/file", ns=(10**9, 10**9))
    mnt = made.mount()
    with open(mnt / "dir/file", "rb") as file:
        assert mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)[:] == b"lower\n"
    assert os.listdir(mnt / "dir") == ["file"]
    assert os.stat(made.lower / "dir/file").st_atime_ns == 10**9
    assert os.listdir(made.upper) == []


def test_unlink_lower_file_copies_nothing(made: Overlay) -> None:
    """A whiteout is all that a removal costs (row 35)."""
    write(made.lower / "big", bytes(8 * MIB))
    mnt = made.mount()
    pid = made.pid
    before = bytes_written(pid)
    os.unlink(mnt / "big")
    assert bytes_written(pid) - before < MIB
    assert made.is_whiteout("big")
    assert not (mnt / "big").exists()
    assert os.listdir(mnt) == []


@pytest.mark.parametrize("how", ["O_TRUNC", "truncate"])
def test_truncate_to_zero_copies_nothing(made: Overlay, how: str) -> None:
    """Nobody will miss the data (row 36)."""
    write(made.lower / "big", bytes(8 * MIB), 0o640)
    mnt = made.mount()
    pid = made.pid
    before = bytes_written(pid)
    if how == "O_TRUNC":
        os.close(os.open(mnt / "big", os.O_WRONLY | os.O_TRUNC))
    else:
        os.truncate(mnt / "big", 0)
    assert bytes_written(pid) - before < MIB
    assert os.stat(mnt / "big").st_size == 0
    assert os.stat(made.upper / "big").st_size == 0
    assert stat.S_IMODE(os.stat(mnt / "big").st_mode) == 0o640
    assert made.own("big", "metacopy") is None


def _set_user_xattr(path: Path) -> None:
    os.setxattr(path, "user.color", b"blue")


_METADATA_CHANGES: dict[str, Callable[[Path], None]] = {
    "chmod": lambda path: os.chmod(path, 0o711),
    "chown": lambda path: os.chown(path, 12, 34),
    "utimes": lambda path: os.utime(path, ns=(1, 2)),
    "setxattr": _set_user_xattr,
    "rename": lambda path: os.rename(path, path.with_name("renamed")),
    "link": lambda path: os.link(path, path.with_name("linked")),
}


@pytest.mark.parametrize("how", _METADATA_CHANGES)
def test_metadata_change_copies_no_data(made: Overlay, how: str) -> None:
    """The upper file is a metacopy: no blocks, the lower's size and st_blocks shown, its data read (rows 10, 32)."""
    write(made.lower / "big", b"x" * (4 * MIB))
    blocks = os.stat(made.lower / "big").st_blocks
    mnt = made.mount()
    _METADATA_CHANGES[how](mnt / "big")
    name = "renamed" if how == "rename" else "big"
    assert os.stat(made.upper / name).st_blocks == 0
    assert made.own(name, "metacopy") is not None
    for _ in range(2):
        st = os.stat(mnt / name)
        assert (st.st_size, st.st_blocks) == (4 * MIB, blocks)
        assert (mnt / name).read_bytes() == b"x" * (4 * MIB)
        made.remount()
    with open(mnt / name, "ab") as file:
        file.write(b"y")
    assert made.own(name, "metacopy") is None
    assert (made.upper / name).read_bytes() == b"x" * (4 * MIB) + b"y"


def test_metacopy_off_copies_data(made: Overlay) -> None:
    """`metacopy=off` is believed."""
    write(made.lower / "file", b"x" * 5000)
    made.options = ",metacopy=off"
    mnt = made.mount()
    os.chmod(mnt / "file", 0o600)
    assert made.own("file", "metacopy") is None
    assert (made.upper / "file").read_bytes() == b"x" * 5000


@pytest.mark.parametrize("form", ["directory", "image"])
def test_copy_up_keeps_holes(made: Overlay, form: str) -> None:
    """A sparse lower file is as sparse in the upperdir (row 42)."""
    sparse = made.lower / "sparse"
    with open(sparse, "wb") as file:
        file.truncate(64 * MIB)
        file.seek(40 * MIB)
        file.write(b"data")
    if form == "image":
        tar = made.base / "rootfs.tar"
        subprocess.run(["tar", "-S", "-C", made.lower, "-cf", tar, "sparse"], check=True)
        made.image = tar
    content = sparse.read_bytes()
    mnt = made.mount()
    with open(mnt / "sparse", "r+b") as file:
        file.seek(20 * MIB)
        file.write(b"more")
    assert os.stat(made.upper / "sparse").st_blocks * 512 <= 2 * MIB
    assert (mnt / "sparse").read_bytes() == content[: 20 * MIB] + b"more" + content[20 * MIB + 4 :]


def test_copy_up_takes_parents_and_everything_of_the_file(made: Overlay) -> None:
    """Parents first, each with owner, mode, times and xattrs; the file too, its capability included (rows 37, 40)."""
    path = write(made.lower / "a/b/file", b"data", 0o4755)
    os.setxattr(made.lower / "a/b", "user.dir", b"d")
    os.chown(made.lower / "a", 7, 8)
    os.chmod(made.lower / "a", 0o1770)
    os.setxattr(path, "user.file", b"f")
    os.setxattr(path, "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    for at, when in ((path, 3), (path.parent, 2), (path.parent.parent, 1)):
        os.utime(at, ns=(when * 10**9 + 7, when * 10**9 + 7))
    before = look(bytes(made.lower))
    mnt = made.mount()
    os.close(os.open(mnt / "a/b/file", os.O_RDWR))
    seen = look(bytes(mnt))
    assert differences(seen, before | {".": {}}, SHOWN) == []
    upper = look(bytes(made.upper))
    keys = tuple(key for key in SHOWN if key != "xattrs")
    assert differences(upper, {path: line for path, line in before.items() if path != "."} | {".": {}}, keys) == []


@pytest.mark.parametrize("kind", ["fifo", "socket", "char", "block", "symlink"])
def test_copy_up_of_special_files(made: Overlay, kind: str) -> None:
    """They are copied as such (row 45)."""
    path = made.lower / "special"
    if kind == "symlink":
        os.symlink("target", path)
    else:
        types = {"fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "char": stat.S_IFCHR, "block": stat.S_IFBLK}
        os.mknod(path, types[kind] | 0o640, os.makedev(5, 6) if kind in ("char", "block") else 0)
    before = look(bytes(made.lower))["special"]
    mnt = made.mount()
    os.chown(mnt / "special", 5, 6, follow_symlinks=False)
    for _ in range(2):
        found = look(bytes(mnt))["special"]
        for key in ("type", "mode", "target", "rdev", "mtime_ns"):
            assert found[key] == before[key]
        assert (found["uid"], found["gid"]) == (5, 6)
        made.remount()


# ---- what an open file sees (1c, 1e) ---------------------------------------------------------------------------------


def test_read_only_descriptor_sees_later_writes(made: Overlay) -> None:
    """Opened before the copy-up, it reads the upper file after it (row 46)."""
    write(made.lower / "file", "lower data\n")
    mnt = made.mount()
    with open(mnt / "file", "rb", buffering=0) as reader:
        assert reader.read() == b"lower data\n"
        with open(mnt / "file", "r+b") as writer:
            writer.write(b"UPPER")
        reader.seek(0)
        assert reader.read() == b"UPPER data\n"


def test_shared_mapping_sees_later_writes_and_writes_through(made: Overlay) -> None:
    """MAP_SHARED of a lower file shows what is written later (better than the kernel, row 46), and its stores last."""
    write(made.lower / "file", b"a" * 8192)
    mnt = made.mount()
    with open(mnt / "file", "rb") as reader:
        mapped = mmap.mmap(reader.fileno(), 8192, prot=mmap.PROT_READ)
        assert mapped[5000:5003] == b"aaa"
        with open(mnt / "file", "r+b") as writer:
            stores = mmap.mmap(writer.fileno(), 8192)
            writer.seek(5000)
            writer.write(b"bbb")
            writer.flush()
            assert mapped[5000:5003] == b"bbb"
            stores[0:3] = b"ccc"
            stores.flush()
            stores.close()
        mapped.close()
    made.remount()
    assert (mnt / "file").read_bytes() == b"ccc" + b"a" * 4997 + b"bbb" + b"a" * 3189


@pytest.mark.parametrize("where", ["upper", "lower"])
def test_file_stays_usable_after_unlink(made: Overlay, where: str) -> None:
    """Read, write, fchmod, ftruncate and fstat of what has no name any more (row 56)."""
    if where == "lower":
        write(made.lower / "file", b"0123456789")
    mnt = made.mount()
    if where == "upper":
        write(mnt / "file", b"0123456789")
    fd = os.open(mnt / "file", os.O_RDWR)
    try:
        os.unlink(mnt / "file")
        assert os.pread(fd, 100, 0) == b"0123456789"
        os.pwrite(fd, b"abc", 5)
        os.fchmod(fd, 0o600)
        os.fchown(fd, 3, 4)
        os.ftruncate(fd, 7)
        os.setxattr(fd, "user.x", b"y")
        assert os.pread(fd, 100, 0) == b"01234ab"
        st = os.fstat(fd)
        assert (st.st_nlink, st.st_size, st.st_mode & 0o777, st.st_uid, st.st_gid) == (0, 7, 0o600, 3, 4)
        assert os.getxattr(fd, "user.x") == b"y"
        write(mnt / "file", b"another")
        assert os.pread(fd, 100, 0) == b"01234ab"
        assert (mnt / "file").read_bytes() == b"another"
    finally:
        os.close(fd)
    assert made.temps() == []


def test_lower_file_opened_to_read_stays_readable_after_unlink_and_rename_over(made: Overlay) -> None:
    """Without a copy-up: the descriptor goes on reading the lower file."""
    write(made.lower / "one", b"one")
    write(made.lower / "two", b"two")
    mnt = made.mount()
    with open(mnt / "one", "rb", buffering=0) as one, open(mnt / "two", "rb", buffering=0) as two:
        os.unlink(mnt / "one")
        write(mnt / "new", b"new")
        os.rename(mnt / "new", mnt / "two")
        assert (one.read(), two.read()) == (b"one", b"two")
        assert (mnt / "two").read_bytes() == b"new"


def test_two_appenders_lose_nothing(made: Overlay) -> None:
    """O_APPEND by two processes on one lower file: every line is there, whole."""
    write(made.lower / "log", b"first\n")
    mnt = made.mount()
    script = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)\n"
        "for n in range(200): os.write(fd, f'{sys.argv[2]} {n}\\n'.encode())\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, mnt / "log", name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    lines = (mnt / "log").read_text().splitlines()
    assert sorted(lines) == sorted(["first", *(f"{name} {n}" for name in "ab" for n in range(200))])


def test_locks_survive_copy_up(made: Overlay) -> None:
    """Locks of flock(2) are those of the overlay's inode (row 63)."""
    write(made.lower / "file")
    mnt = made.mount()
    with open(mnt / "file", "rb") as first, open(mnt / "file", "rb") as second:
        fcntl.flock(first, fcntl.LOCK_EX)
        os.chmod(mnt / "file", 0o600)
        with open(mnt / "file", "ab") as third:
            third.write(b"more")
            with failing(errno.EAGAIN):
                fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with failing(errno.EAGAIN):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(first, fcntl.LOCK_UN)
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_running_program_is_busy(made: Overlay) -> None:
    """Writing a program that runs is ETXTBSY (row 62)."""
    shutil.copy2("/bin/sleep", made.lower / "sleep")
    mnt = made.mount()
    with subprocess.Popen([mnt / "sleep", "60"]) as running:
        try:
            with failing(errno.ETXTBSY):
                os.open(mnt / "sleep", os.O_WRONLY)
        finally:
            running.kill()


def test_fallocate_and_punch_hole(made: Overlay) -> None:
    """They reach the upper file (rows 59, 61)."""
    write(made.lower / "file", b"x" * (256 << 10))
    mnt = made.mount()
    subprocess.run(["fallocate", "--punch-hole", "--offset", "65536", "--length", "65536", mnt / "file"], check=True)
    with open(mnt / "file", "rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 65536
        assert os.lseek(file.fileno(), 65536, os.SEEK_DATA) == 131072
        file.seek(0)
        assert file.read() == b"x" * 65536 + bytes(65536) + b"x" * 131072
    subprocess.run(["fallocate", "--offset", "0", "--length", "524288", mnt / "file"], check=True)
    assert os.stat(mnt / "file").st_size == os.stat(made.upper / "file").st_size == 524288


def test_nameless_file_can_be_linked(made: Overlay) -> None:
    """O_TMPFILE (row 55)."""
    write(made.lower / "dir/file")
    mnt = made.mount()
    fd = os.open(mnt / "dir", os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"nameless")
    assert os.listdir(mnt / "dir") == ["file"]
    directory = os.open(mnt / "dir", os.O_PATH)
    os.link(f"/proc/self/fd/{fd}", "named", dst_dir_fd=directory, follow_symlinks=True)
    os.close(directory)
    os.close(fd)
    made.remount()
    assert (mnt / "dir/named").read_bytes() == b"nameless"


# ---- names and directories (1b, 1d) ----------------------------------------------------------------------------------


def test_whiteouts_are_one_inode_and_device_0_0_is_refused(made: Overlay) -> None:
    """The whiteouts of the upperdir are hard links of one device 0:0, which nobody can make by hand (rows 1, 45)."""
    for name in "abc":
        write(made.lower / name)
    mnt = made.mount()
    for name in "abc":
        os.unlink(mnt / name)
    assert len({os.lstat(made.upper / name).st_ino for name in "abc"}) == 1
    assert os.listdir(mnt) == []
    with failing(errno.EPERM):
        os.mknod(mnt / "d", stat.S_IFCHR | 0o600, 0)
    with failing(errno.ENOENT):
        os.lstat(mnt / "a")


def test_xattr_whiteouts_and_opaque_x_are_read(made: Overlay) -> None:
    """Zero-size files with overlay.whiteout hide, in directories marked x, which still merge (rows 2, 5)."""
    for name in ("gone", "stays", "zero"):
        write(made.lowers[1] / "dir" / name)
    write(made.lowers[0] / "dir/gone", b"")
    write(made.lowers[0] / "dir/zero", b"")
    os.setxattr(made.lowers[0] / "dir/gone", "trusted.overlay.whiteout", b"")
    os.setxattr(made.lowers[0] / "dir", "trusted.overlay.opaque", b"x")
    mnt = made.mount()
    assert sorted(os.listdir(mnt / "dir")) == ["stays", "zero"]
    assert (mnt / "dir/zero").read_bytes() == b""
    write(mnt / "dir/gone", b"new")
    made.remount()
    assert (mnt / "dir/gone").read_bytes() == b"new"


def test_opaque_directory_hides_what_is_below(made: Overlay) -> None:
    """A mkdir over a whiteout is opaque, and stays so (rows 4, 50)."""
    write(made.lower / "dir/old")
    mnt = made.mount()
    os.unlink(mnt / "dir/old")
    os.rmdir(mnt / "dir")
    assert made.is_whiteout("dir")
    os.mkdir(mnt / "dir")
    assert made.own("dir", "opaque") == b"y"
    for _ in range(2):
        assert os.listdir(mnt / "dir") == []
        made.remount()


def test_rmdir_of_merged_directory_with_whiteouts(made: Overlay) -> None:
    """Empty to the eye is empty; one whiteout remains (row 49)."""
    for name in "abc":
        write(made.lower / "dir" / name)
    mnt = made.mount()
    write(mnt / "dir/d")
    with failing(errno.ENOTEMPTY):
        os.rmdir(mnt / "dir")
    for name in "abcd":
        os.unlink(mnt / "dir" / name)
    assert sorted(os.listdir(made.upper / "dir")) == ["a", "b", "c"]
    os.rmdir(mnt / "dir")
    assert made.is_whiteout("dir")
    assert os.listdir(made.upper) == ["dir"]
    assert made.temps() == []


def test_wh_names_are_ordinary(made: Overlay) -> None:
    """`.wh.x` is a name as any other in a mounted tree (row 3)."""
    write(made.lower / "x")
    mnt = made.mount()
    write(mnt / ".wh.x", b"ordinary")
    os.mkdir(mnt / ".wh..wh..opq")
    for _ in range(2):
        assert sorted(os.listdir(mnt)) == [".wh..wh..opq", ".wh.x", "x"]
        assert (mnt / ".wh.x").read_bytes() == b"ordinary"
        assert (mnt / "x").read_bytes() == b"lower\n"
        made.remount()
    os.rename(mnt / ".wh.x", mnt / ".wh.y")
    os.unlink(mnt / ".wh.y")
    assert sorted(os.listdir(mnt)) == [".wh..wh..opq", "x"]


def test_names_of_255_bytes(made: Overlay) -> None:
    """All of them can be used, copied up, removed; 256 are ENAMETOOLONG; statfs says 255 (rows 3, 31)."""
    long = "n" * 255
    write(made.lower / long)
    mnt = made.mount()
    with open(mnt / long, "ab") as file:
        file.write(b"more")
    os.rename(mnt / long, mnt / ("m" * 255))
    os.mkdir(mnt / ("é" * 127 + "d"))
    made.remount()
    assert (mnt / ("m" * 255)).read_bytes() == b"lower\nmore"
    os.unlink(mnt / ("m" * 255))
    with failing(errno.ENAMETOOLONG):
        os.mkdir(mnt / ("n" * 256))
    assert os.statvfs(mnt).f_namemax == 255
    assert os.statvfs(mnt).f_blocks == os.statvfs(made.upper).f_blocks


def test_link_counts_of_directories(made: Overlay) -> None:
    """A merged directory says 1, one of a single layer what it has there (row 28)."""
    for number in range(2):
        (made.lowers[number] / "merged" / f"sub{number}").mkdir(parents=True)
    for name in "abc":
        (made.lower / "pure" / name).mkdir(parents=True)
    mnt = made.mount()
    assert os.stat(mnt / "merged").st_nlink == 1
    assert os.stat(mnt / "pure").st_nlink == 5
    (mnt / "own/sub").mkdir(parents=True)
    assert os.stat(mnt / "own").st_nlink == 3


def test_rename_of_lower_directory_leaves_a_redirect(made: Overlay) -> None:
    """In its parent one name, elsewhere an absolute path; both are found again (rows 9, 51)."""
    write(made.lower / "dir/sub/file")
    write(made.lowers[1] / "dir/sub/below")
    (made.lower / "other").mkdir()
    mnt = made.mount()
    os.rename(mnt / "dir", mnt / "moved")
    assert made.own("moved", "redirect") == b"dir"
    assert made.is_whiteout("dir")
    os.rename(mnt / "moved/sub", mnt / "other/sub")
    assert made.own("other/sub", "redirect") == b"/dir/sub"
    for _ in range(2):
        assert sorted(os.listdir(mnt / "other/sub")) == ["below", "file"]
        assert os.listdir(mnt / "moved") == []
        made.remount()


def test_rename_of_lower_directory_with_redirect_off_is_exdev(made: Overlay) -> None:
    """Then programs copy; a directory without anything below still moves (row 51)."""
    write(made.lower / "dir/file")
    made.options = ",redirect_dir=off,metacopy=off"
    mnt = made.mount()
    with failing(errno.EXDEV):
        os.rename(mnt / "dir", mnt / "moved")
    os.mkdir(mnt / "new")
    os.rename(mnt / "new", mnt / "moved")


def test_rename_flags(made: Overlay) -> None:
    """NOREPLACE and EXCHANGE, in any pair of layers; WHITEOUT is EINVAL (row 52)."""
    write(made.lower / "low", b"low")
    write(made.lower / "dir/inside", b"inside")
    mnt = made.mount()
    write(mnt / "up", b"up")
    with failing(errno.EEXIST):
        renameat2(mnt / "up", mnt / "low", RENAME_NOREPLACE)
    renameat2(mnt / "up", mnt / "free", RENAME_NOREPLACE)
    renameat2(mnt / "free", mnt / "low", RENAME_EXCHANGE)
    renameat2(mnt / "low", mnt / "dir", RENAME_EXCHANGE)
    with failing(errno.ENOENT):
        renameat2(mnt / "low", mnt / "missing", RENAME_EXCHANGE)
    with failing(errno.EINVAL):
        renameat2(mnt / "low", mnt / "x", RENAME_WHITEOUT)
    with failing(errno.EINVAL):
        renameat2(mnt / "low", mnt / "x", RENAME_NOREPLACE | RENAME_EXCHANGE)
    for _ in range(2):
        assert (mnt / "free").read_bytes() == b"low"
        assert (mnt / "dir").read_bytes() == b"up"
        assert (mnt / "low/inside").read_bytes() == b"inside"
        made.remount()


def test_setgid_directory_is_inherited(made: Overlay) -> None:
    """Files take the group, directories the bit as well; also where the directory is a lower one."""
    (made.lower / "shared").mkdir()
    os.chown(made.lower / "shared", 0, 50)
    os.chmod(made.lower / "shared", 0o2775)
    mnt = made.mount()
    write(mnt / "shared/file")
    os.mkdir(mnt / "shared/dir")
    os.symlink("x", mnt / "shared/link")
    for _ in range(2):
        assert {os.lstat(mnt / "shared" / name).st_gid for name in ("file", "dir", "link")} == {50}
        assert os.stat(mnt / "shared/dir").st_mode & stat.S_ISGID
        assert not os.stat(mnt / "shared/file").st_mode & stat.S_ISGID
        made.remount()


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def test_default_acl_stands_in_for_the_umask(made: Overlay) -> None:
    """With a default ACL the umask does not count; without one it does (row 58)."""
    none = 0xFFFFFFFF
    default = acl((1, 7, none), (2, 7, 1234), (4, 5, none), (16, 7, none), (32, 0, none))
    for name in ("with", "without"):
        (made.lower / name).mkdir()
    os.setxattr(made.lower / "with", "system.posix_acl_default", default)
    mnt = made.mount()
    before = os.umask(0o077)
    try:
        for name in ("with", "without"):
            os.close(os.open(mnt / name / "file", os.O_CREAT | os.O_WRONLY, 0o666))
            os.mkdir(mnt / name / "dir", 0o777)
    finally:
        os.umask(before)
    for _ in range(2):
        assert stat.S_IMODE(os.stat(mnt / "with/file").st_mode) == 0o660
        assert stat.S_IMODE(os.stat(mnt / "with/dir").st_mode) == 0o770
        assert os.getxattr(mnt / "with/dir", "system.posix_acl_default") == default
        assert b"system.posix_acl_access" in map(os.fsencode, os.listxattr(mnt / "with/file"))
        assert stat.S_IMODE(os.stat(mnt / "without/file").st_mode) == 0o600
        assert stat.S_IMODE(os.stat(mnt / "without/dir").st_mode) == 0o700
        made.remount()


def test_readdir_sees_changes_after_rewind(made: Overlay) -> None:
    """What is removed while a listing is under way does not shift the rest; what is new shows in the next one (22)."""
    names = [f"file{number:04}" for number in range(1000)]
    for name in names:
        write(made.lower / name)
    mnt = made.mount()
    seen = []
    with os.scandir(mnt) as entries:
        for entry in entries:
            seen.append(entry.name)
            with suppress(FileNotFoundError):
                os.unlink(entry.path)
    assert sorted(seen) == names
    assert os.listdir(mnt) == []


# ---- xattrs and nesting (1a) -----------------------------------------------------------------------------------------


def test_own_xattrs_are_hidden_and_escaped(made: Overlay) -> None:
    """The overlay's xattrs do not show; a user's of the same name are stored escaped (rows 7, 8)."""
    write(made.lower / "dir/file")
    mnt = made.mount()
    os.rename(mnt / "dir", mnt / "moved")
    os.chmod(mnt / "moved/file", 0o600)
    assert os.listxattr(mnt / "moved") == os.listxattr(mnt / "moved/file") == []
    with failing(errno.ENODATA):
        os.getxattr(mnt / "moved", "trusted.overlay.redirect")
    os.setxattr(mnt / "moved", "trusted.overlay.opaque", b"mine")
    assert os.getxattr(made.upper / "moved", "trusted.overlay.overlay.opaque") == b"mine"
    for _ in range(2):
        assert os.getxattr(mnt / "moved", "trusted.overlay.opaque") == b"mine"
        assert os.listxattr(mnt / "moved") == ["trusted.overlay.opaque"]
        assert os.listdir(mnt / "moved") == ["file"]
        made.remount()
    os.removexattr(mnt / "moved", "trusted.overlay.opaque")
    assert os.listxattr(mnt / "moved") == []


def test_kernel_overlay_works_on_layers_made_in_a_mount(made: Overlay) -> None:
    """Nesting: the marks that a kernel overlay needs can be set through ours, and it honours them (row 8)."""
    mnt = made.mount()
    for name in ("gone", "stays"):
        write(mnt / "below/dir" / name)
    write(mnt / "above/dir/gone", b"")
    os.setxattr(mnt / "above/dir/gone", "trusted.overlay.whiteout", b"")
    os.setxattr(mnt / "above/dir", "trusted.overlay.opaque", b"x")
    target = made.base / "nested"
    target.mkdir()
    words = f"ro,lowerdir={mnt}/above:{mnt}/below"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", words, target], check=True)
    try:
        assert os.listdir(target / "dir") == ["stays"]
    finally:
        subprocess.run(["umount", target], check=True)


def test_overlay_on_overlay(made: Overlay, ovlfs: Run) -> None:
    """Layers can lie in a mount, with the marks that were made there (row 68)."""
    write(made.lower / "tree/dir/file", b"file")
    write(made.lower / "tree/dir/gone")
    outer = made.mount()
    write(outer / "above/dir/gone", b"")
    os.setxattr(outer / "above/dir/gone", "trusted.overlay.whiteout", b"")
    os.setxattr(outer / "above/dir", "trusted.overlay.opaque", b"x")
    inner_base = made.base / "inner"
    inner_base.mkdir()
    with overlay(ovlfs, inner_base, layers=2) as inner:
        for number, name in enumerate(("above", "tree")):
            inner.lowers[number].rmdir()
            inner.lowers[number].symlink_to(outer / name)
        mnt = inner.mount()
        assert os.listdir(mnt / "dir") == ["file"]
        os.rename(mnt / "dir", mnt / "moved")
        os.chmod(mnt / "moved/file", 0o600)
        write(mnt / "new", b"new")
        seen = look(bytes(mnt))
        inner.remount()
        assert differences(look(bytes(mnt)), seen, SHOWN) == []
        assert (mnt / "moved/file").read_bytes() == b"file"


def test_three_hundred_layers(ovlfs: Run, scratch: Path) -> None:
    """More than a page of lowerdir, and more than a string option of the kernel takes (row 17)."""
    with overlay(ovlfs, scratch, layers=300) as many:
        for number, lower in enumerate(many.lowers):
            write(lower / f"dir/file{number}", str(number))
            write(lower / "dir/same", str(number))
        mnt = many.mount()
        assert len(os.listdir(mnt / "dir")) == 301
        assert (mnt / "dir/same").read_text() == "0"
        assert (mnt / "dir/file299").read_text() == "299"
        write(mnt / "dir/file299", b"new")
        assert (mnt / "dir/file299").read_bytes() == b"new"


# ---- upperdir and workdir (1a, 1c) -----------------------------------------------------------------------------------


def test_volatile_leaves_the_mark_and_the_next_mount_refuses(made: Overlay) -> None:
    """After a volatile mount that was not ended well the user has to decide (row 47)."""
    made.options = ",volatile"
    mnt = made.mount()
    mark = made.work / "work/incompat/volatile/dirty"
    assert mark.exists()
    write(mnt / "file")
    fd = os.open(mnt / "file", os.O_WRONLY)
    os.fsync(fd)
    os.close(fd)
    made.kill()
    made.options = ""
    said = made.ovlfs("mount", *made.words(), mnt, code=1).stderr
    assert "volatile" in said
    assert str(mark) in said
    os.unlink(mark)
    made.mount()
    assert (mnt / "file").read_bytes() == b"lower\n"


def test_temps_of_a_killed_daemon_are_removed(made: Overlay) -> None:
    """Whatever is in workdir/work is ours, and goes at the next mount (row 39)."""
    (made.work / "work/#1/deep/er").mkdir(parents=True)
    write(made.work / "work/#1/deep/file")
    os.mknod(made.work / "work/#2", stat.S_IFCHR, 0)
    made.mount()
    assert made.temps() == []


@pytest.mark.parametrize("wrong", ["same", "work-in-upper", "upper-in-work", "upper-is-lower", "no-upper", "other-fs"])
def test_wrong_upper_and_work_are_refused(made: Overlay, wrong: str) -> None:
    """One line says what is wrong, and nothing is mounted or made (row 19)."""
    upper, work, lower = made.upper, made.work, made.lower
    if wrong == "same":
        work = upper
    elif wrong == "work-in-upper":
        work = upper / "work"
        work.mkdir()
    elif wrong == "upper-in-work":
        upper = work / "upper"
        upper.mkdir()
    elif wrong == "upper-is-lower":
        upper = lower
    elif wrong == "no-upper":
        upper = made.base / "missing"
    else:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", work], check=True)
    try:
        result = made.ovlfs("mount", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}", made.mnt, code=1)
        assert len(result.stderr.splitlines()) == 1
        assert str(upper) in result.stderr or str(work) in result.stderr
        assert not made.mounted
    finally:
        if wrong == "other-fs":
            subprocess.run(["umount", work], check=True)


def test_upper_and_work_in_use_are_refused(made: Overlay) -> None:
    """Two mounts of one upperdir or workdir would destroy each other's work (row 19)."""
    made.mount()
    other = made.base / "other"
    for name in ("mnt", "upper", "work"):
        (other / name).mkdir(parents=True)
    for upper, work in ((made.upper, other / "work"), (other / "upper", made.work)):
        words = f"lowerdir={made.lower},upperdir={upper},workdir={work}"
        said = made.ovlfs("mount", "-o", words, other / "mnt", code=1).stderr
        assert "in use by another mount" in said


def test_lower_layers_are_never_modified(made: Overlay) -> None:
    """After hundreds of operations nothing in a lower directory is different; nor after a remount."""
    for number, lower in enumerate(made.lowers):
        populate(lower, number)
    before = fingerprint(*made.lowers)
    mnt = made.mount()
    random_run(mnt, 1, 300)
    seen = look(bytes(mnt))
    made.remount()
    assert differences(look(bytes(mnt)), seen, SHOWN) == []
    random_run(mnt, 2, 150)
    made.umount()
    assert fingerprint(*made.lowers) == before


def test_image_file_is_never_modified(made: Overlay) -> None:
    """The same of an image: its file is what it was."""
    made.image = docker_archive(
        made.base / "image.tar",
        [("etc", None), *((f"etc/file{n}", f"{n}".encode() * 999) for n in range(40)), ("hard", "etc/file3")],
        [("etc", None), ("etc/.wh.file1", b""), ("etc/file2", b"second"), ("srv", None)],
    )
    before = (made.image.read_bytes(), os.stat(made.image).st_mtime_ns)
    mnt = made.mount()
    random_run(mnt, 3, 300)
    seen = look(bytes(mnt))
    made.remount()
    assert differences(look(bytes(mnt)), seen, SHOWN) == []
    made.umount()
    assert (made.image.read_bytes(), os.stat(made.image).st_mtime_ns) == before


def test_upper_holds_no_file_of_ours(made: Overlay) -> None:
    """Every name in the upperdir is one of the tree, or hides one; every xattr is known (row 7)."""
    populate(made.lower, 5)
    below = {str(path.relative_to(made.lower)) for path in made.lower.rglob("*")}
    mnt = made.mount()
    random_run(mnt, 6, 200)
    shown = look(bytes(mnt))
    made.umount()
    known = {f"trusted.overlay.{name}" for name in ("opaque", "redirect", "metacopy", "origin", "impure")}
    for path in made.upper.rglob("*"):
        name = str(path.relative_to(made.upper))
        if name not in shown:
            assert made.is_whiteout(name), name
            parent = path.parent
            assert (
                name in below
                or made.own(str(parent.relative_to(made.upper)), "redirect") is not None
                or any(
                    made.own(str(above.relative_to(made.upper)), "redirect") is not None
                    for above in path.parents
                    if above.is_relative_to(made.upper)
                )
            ), name
        assert set(os.listxattr(path, follow_symlinks=False)) <= known | {"user.x"}, name
    assert made.temps() == []
