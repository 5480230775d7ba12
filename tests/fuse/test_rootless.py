"""Mounts of an unprivileged user: what they show, and what lies in the upperdir; and uppers that the kernel reads."""

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_images import expected, images
from helpers_overlay import Overlay, Run, overlay
from helpers_random import populate, random_run
from helpers_tree import SHOWN, Tree, differences, inode_numbers_that_differ, look, read_lines
from helpers_users import GID, UID, User, interpreter

pytestmark = [pytest.mark.fuse, pytest.mark.root]

IMAGE = "small-docker20.tar"
HERE = Path(__file__).parent


def allow_others(user: User) -> None:
    """In the user's namespace, `user_allow_other` is in fuse.conf."""
    script = "echo user_allow_other > /mnt/fuse.conf && mount --bind /mnt/fuse.conf /etc/fuse.conf"
    user.run("sh", "-c", script, as_root=True)


def look_as_root(user: User, directory: Path) -> Tree:
    return read_lines(user.run(interpreter(), HERE / "helpers_tree.py", directory, as_root=True).stdout)


_ALL_THAT_ROOT_CAN_DO = """
import os, socket, stat, sys
os.umask(0)
os.chdir(sys.argv[1])
os.mkdir("new", 0o750)
for name, uid, gid, mode in (("file", 12, 34, 0o640), ("setuid", 0, 50, 0o6755), ("closed", 1000, 1000, 0)):
    with open(f"new/{name}", "w") as file:
        file.write(name)
    os.chown(f"new/{name}", uid, gid)
    os.chmod(f"new/{name}", mode)
os.mknod("new/char", stat.S_IFCHR | 0o620, os.makedev(4, 7))
os.mknod("new/block", stat.S_IFBLK | 0o660, os.makedev(8, 1))
os.mkfifo("new/fifo", 0o600)
os.mkfifo("new/fifo1000", 0o404)
os.chown("new/fifo1000", 1000, 1000)
server = socket.socket(socket.AF_UNIX)
server.bind("new/socket")
os.symlink("somewhere", "new/link")
os.symlink("somewhere/else", "new/link1000")
os.chown("new/link1000", 1000, 1000, follow_symlinks=False)
os.chown("new/fifo", 3, 4)
os.chown("new", 77, 88)
os.link("new/file", "new/hard")
os.link("new/char", "new/char2")
os.setxattr("new/file", "user.color", b"blue")
os.chown("opt/links/one", 3, 3)
os.chmod("etc/passwd", 0o600)
os.chown("bin", 5, 5, follow_symlinks=False)
os.rename("opt/tree", "opt/moved")
os.rename("usr/share/zoneinfo", "zones")
os.unlink("etc/group")
os.unlink("opt/zoo/README")
with open("etc/issue", "a") as file:
    file.write("more")
os.chmod(".", 0o711)
"""


def check_upper(upper: Path) -> None:
    """All of it is the user's, closed to nobody who must read it, and holds nothing of our own."""
    kinds = set()
    for path in (upper, *upper.rglob("*")):
        st = os.lstat(path)
        kinds.add(stat.S_IFMT(st.st_mode))
        assert (st.st_uid, st.st_gid) == (UID, GID), path
        if stat.S_ISCHR(st.st_mode):
            assert st.st_rdev == 0, path
            continue
        assert stat.S_ISLNK(st.st_mode) or not st.st_mode & (stat.S_ISUID | stat.S_ISGID) or st.st_uid == UID
        for name in os.listxattr(path, follow_symlinks=False):
            assert (
                name == "user.containers.override_stat"
                or name.startswith("user.overlay.")
                or name in (*("user.color", "user.comment", "user.binary", "user.dir", "user.empty"),)
            ), (path, name)
    assert stat.S_IFBLK not in kinds


def test_everything_root_does_in_a_users_mount_is_kept(user: User, ovlfs: Run, scratch: Path) -> None:
    """Owners, modes, devices, links, renames: shown, found again by the next mount, and by a mount of root's."""
    allow_others(user)
    words = ["--upper", user.home / "upper", "--work", user.home / "work", images() / IMAGE]
    mnt = user.mount("mnt", "--allow-other", *words)
    before = look_as_root(user, mnt)
    assert differences(before, expected("v1"), SHOWN) == []
    user.run(interpreter(), "-c", _ALL_THAT_ROOT_CAN_DO, mnt, as_root=True)
    seen = look_as_root(user, mnt)
    assert inode_numbers_that_differ(seen) == []
    check_changes(seen)
    user.ovlfs("umount", mnt)
    check_upper(user.home / "upper")

    user.ovlfs("mount", "--allow-other", *words, mnt)
    again = look_as_root(user, mnt)
    assert differences(again, seen, (*SHOWN, "ino")) == []
    user.ovlfs("umount", mnt)

    root = scratch / "root"
    root.mkdir()
    ovlfs("mount", *words, root)
    try:
        assert differences(look(bytes(root)), seen, SHOWN) == []
    finally:
        ovlfs("umount", root)
    check_upper(user.home / "upper")


def check_changes(seen: Tree) -> None:
    def shown(path: str) -> tuple[object, ...]:
        line = seen[path]
        return line["type"], line["mode"], line["uid"], line["gid"]

    assert shown(".") == ("dir", "0711", 0, 0)
    assert shown("new") == ("dir", "0750", 77, 88)
    assert shown("new/file") == ("file", "0640", 12, 34)
    assert shown("new/setuid") == ("file", "6755", 0, 50)
    assert shown("new/closed") == ("file", "0000", 1000, 1000)
    assert shown("new/char") == ("char", "0620", 0, 0)
    assert seen["new/char"]["rdev"] == seen["new/char2"]["rdev"] == [4, 7]
    assert shown("new/block") == ("block", "0660", 0, 0)
    assert seen["new/block"]["rdev"] == [8, 1]
    assert shown("new/fifo") == ("fifo", "0600", 3, 4)
    assert shown("new/fifo1000") == ("fifo", "0404", 1000, 1000)
    assert seen["new/socket"]["type"] == "socket"
    assert shown("new/link") == ("symlink", "0777", 0, 0)
    assert shown("new/link1000") == ("symlink", "0777", 1000, 1000)
    assert seen["new/link1000"]["target"] == "somewhere/else"
    assert seen["new/file"]["links"] == seen["new/file"]["nlink"] == 2
    assert shown("bin") == ("symlink", "0777", 5, 5)
    assert seen["bin"]["target"] == "usr/bin"
    assert seen["opt/links/one"]["uid"] == seen["opt/links/sub/four"]["uid"] == 3
    assert seen["opt/links/one"]["xattrs"]["user.binary"] == "00ff1080"
    assert "etc/group" not in seen
    assert "zones/iso3166.tab" in seen
    assert not any(path.startswith(("opt/tree", "usr/share/zoneinfo")) for path in seen)


_ALL_THAT_A_USER_CAN_DO = """
import os, sys
os.chdir(sys.argv[1])
os.chdir("tmp")
open("file", "w").write("mine")
os.mkdir("dir")
os.symlink("file", "link")
os.mkfifo("fifo", 0o440)
os.link("file", "hard")
os.chmod("file", 0)
os.rename("dir", "moved")
os.setxattr("moved", "user.x", b"y")
for call in (
    lambda: os.chown("file", 0, 0),
    lambda: os.unlink("../etc/passwd"),
    lambda: open("../etc/passwd", "a"),
    lambda: os.mkdir("../new"),
    lambda: os.listdir("../root"),
):
    try:
        call()
    except PermissionError:
        continue
    sys.exit("allowed what the modes forbid")
"""


def test_what_a_user_does_in_his_mount(user: User) -> None:
    """He may do what the modes in the image allow, and it is his."""
    words = ["--upper", user.home / "upper", images() / IMAGE]
    mnt = user.mount("mnt", *words)
    user.python("import warnings; warnings.simplefilter('ignore')\n" + _ALL_THAT_A_USER_CAN_DO, mnt)
    for _ in range(2):
        seen = user.look(mnt)
        mine = {path: (line["type"], line["mode"]) for path, line in seen.items() if path.startswith("tmp/")}
        assert mine == {
            "tmp/file": ("file", "0000"),
            "tmp/hard": ("file", "0000"),
            "tmp/moved": ("dir", "0755"),
            "tmp/link": ("symlink", "0777"),
            "tmp/fifo": ("fifo", "0440"),
        }
        assert {(seen[path]["uid"], seen[path]["gid"]) for path in mine} == {(UID, GID)}
        assert (seen["."]["uid"], seen["."]["mode"]) == (0, "0755")
        user.ovlfs("umount", mnt)
        user.ovlfs("mount", *words, mnt)
    user.ovlfs("umount", mnt)


def test_allow_other_without_user_allow_other_is_refused(user: User) -> None:
    """The error names the word that is missing, and where."""
    result = user.ovlfs("mount", "--allow-other", "--ro", images() / IMAGE, user.directory("mnt"), code=1)
    assert "user_allow_other" in result.stderr
    assert "/etc/fuse.conf" in result.stderr
    assert len(result.stderr.splitlines()) == 1


_IN_NAMESPACE = """
image=$1 program=$2
mkdir -p mnt
$OVLFS mount --upper up "$image" mnt >/dev/null
cd mnt
mkdir new; echo content > new/file; chmod 4755 new/file; ln new/file new/hard; mkfifo new/fifo
ln -s target new/link; mv etc moved; rm opt/zoo/README; chmod 600 moved/passwd; echo more >> moved/issue
cd ..
$PYTHON "$program" mnt > first
$OVLFS umount mnt
$OVLFS mount --upper up "$image" mnt >/dev/null
$PYTHON "$program" mnt > second
$OVLFS umount mnt
"""


def test_writes_in_a_user_namespace_are_kept(user: User) -> None:
    """As fake root in `unshare -Urm`: the same in the next mount, in an upperdir that is the user's."""
    user.in_namespace(_IN_NAMESPACE, images() / IMAGE, HERE / "helpers_tree.py")
    first, second = (read_lines((user.home / name).read_text()) for name in ("first", "second"))
    assert differences(second, first, (*SHOWN, "ino")) == []
    assert (first["new/file"]["mode"], first["new/file"]["uid"], first["new/file"]["links"]) == ("4755", 0, 2)
    assert first["moved/passwd"]["mode"] == "0600"
    assert first["opt/links/one"]["uid"] == 65534
    assert "etc" not in first
    for path in (user.home / "up").rglob("*"):
        assert os.lstat(path).st_uid == UID


# ---- the kernel reads what we write, and the other way round


@pytest.fixture
def layered(ovlfs: Run, scratch: Path) -> Iterator[Overlay]:
    with overlay(ovlfs, scratch, layers=2) as found:
        for number, lower in enumerate(found.lowers):
            populate(lower, number + 7)
        yield found


def test_kernel_shows_what_ovlfs_wrote(layered: Overlay) -> None:
    """Redirects, metacopies, whiteouts, opaque directories and hard links of an upperdir written by root."""
    mnt = layered.mount()
    random_run(mnt, 11, 400)
    seen = look(bytes(mnt))
    layered.umount()
    with layered.by_kernel() as kernel:
        assert differences(look(bytes(kernel)), seen, SHOWN) == []


def test_ovlfs_shows_what_the_kernel_wrote(layered: Overlay) -> None:
    """The other way round; and after a run of ours on top of it the kernel still shows the same."""
    with layered.by_kernel() as kernel:
        random_run(kernel, 12, 400)
        seen = look(bytes(kernel))
    mnt = layered.mount()
    assert differences(look(bytes(mnt)), seen, SHOWN) == []
    random_run(mnt, 13, 200)
    seen = look(bytes(mnt))
    layered.umount()
    with layered.by_kernel() as kernel:
        assert differences(look(bytes(kernel)), seen, SHOWN) == []


def test_kernel_userxattr_shows_what_a_user_wrote(user: User) -> None:
    """Written unprivileged over directories of the user, mounted by the kernel with `userxattr`."""
    lower = user.home / "lower"
    populate(lower, 5)
    for path in (lower, *lower.rglob("*")):
        os.chown(path, UID, GID, follow_symlinks=False)
    for name in ("upper", "work"):
        user.directory(name)
    words = f"lowerdir={lower},upperdir={user.home}/upper,workdir={user.home}/work"
    mnt = user.mount("mnt", "-o", words)
    user.run(interpreter(), HERE / "helpers_random.py", mnt, 21, 300)
    seen = user.look(mnt)
    assert all(line["uid"] == UID for line in seen.values())
    user.ovlfs("umount", mnt)
    check_upper_plain(user.home / "upper")
    kernel = user.home / "kernel"
    kernel.mkdir()
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", f"{words},userxattr", kernel], check=True)
    try:
        found = look(bytes(kernel))
    finally:
        subprocess.run(["umount", kernel], check=True)
    assert differences(found, seen, SHOWN) == []


def check_upper_plain(upper: Path) -> None:
    """Nothing needed an override: only the kernel's own marks."""
    for path in upper.rglob("*"):
        names = set(os.listxattr(path, follow_symlinks=False))
        assert names <= {"user.overlay.opaque", "user.overlay.origin", "user.overlay.impure", "user.x"}, path
