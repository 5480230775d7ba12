"""Commits of a user without privileges, whose upperdir keeps owners and devices in xattrs."""

import os
from pathlib import Path

import pytest
from helpers_commit import Run, check_mounts_as
from helpers_images import images
from helpers_tree import Tree, read_lines
from helpers_users import User, interpreter

pytestmark = [pytest.mark.fuse, pytest.mark.root]

IMAGE = "small-docker20.tar"

_CHANGES = """
import os, shutil, stat, sys
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
os.symlink("somewhere", "new/link")
os.chown("new/fifo", 3, 4)
os.chown("new", 77, 88)
os.link("new/file", "new/hard")
os.link("new/char", "new/char2")
os.setxattr("new/file", "user.color", b"blue")
os.chown("opt/links/one", 3, 3)
os.chmod("etc/passwd", 0o600)
os.rename("opt/tree", "opt/moved")
os.unlink("etc/group")
shutil.rmtree("var/cache")
os.mkdir("var/cache")
with open("etc/issue", "a") as file:
    file.write("more")
"""


def look_as_root(user: User, directory: Path) -> Tree:
    program = Path(__file__).parent.parent / "fuse/helpers_tree.py"
    return read_lines(user.run(interpreter(), program, directory, as_root=True).stdout)


def test_a_user_commits_what_root_did_in_the_mount(user: User, ovlfs: Run, scratch: Path) -> None:
    """The image has the owners, modes and devices that the mount shows, whoever commits, mounted or not."""
    allow = "echo user_allow_other > /mnt/fuse.conf && mount --bind /mnt/fuse.conf /etc/fuse.conf"
    user.run("sh", "-c", allow, as_root=True)
    upper = user.home / "upper"
    mnt = user.mount("mnt", "--allow-other", "--upper", upper, images() / IMAGE)
    user.run(interpreter(), "-c", _CHANGES, mnt, as_root=True)
    expected = look_as_root(user, mnt)
    assert expected["new/block"]["rdev"] == [8, 1]
    assert (upper / "new/block").is_file()
    when = ("--source-date-epoch", 2_000_000_000)
    user.ovlfs("commit", mnt, user.home / "mounted.tar", *when)
    diff = user.ovlfs("diff", mnt).stdout
    assert "A /new/char2\n" in diff
    user.ovlfs("umount", mnt)
    user.ovlfs("commit", upper, user.home / "unmounted.tar", *when)
    assert user.ovlfs("diff", upper).stdout == diff
    ovlfs("commit", upper, scratch / "root.tar", *when)
    assert ovlfs("diff", upper).stdout == diff
    assert user.ovlfs("fsck", upper).stdout == ""
    assert ovlfs("fsck", upper).stdout == ""
    archives = [
        path.read_bytes() for path in (user.home / "mounted.tar", user.home / "unmounted.tar", scratch / "root.tar")
    ]
    assert archives[1:] == archives[:1] * 2
    check_mounts_as(ovlfs, user.home / "mounted.tar", expected, scratch)


def test_a_user_repairs_an_upperdir(user: User) -> None:
    """Whiteouts, redirects and override_stat in the user's dialect."""
    upper = user.home / "upper"
    mnt = user.mount("mnt", "--upper", upper, images() / IMAGE)
    user.run("touch", mnt / "tmp/new")
    user.run("mkdir", mnt / "tmp/directory")
    user.ovlfs("umount", mnt)
    os.setxattr(upper / "tmp/new", "user.containers.override_stat", b"x")
    os.removexattr(upper / "tmp/directory", "user.overlay.opaque")
    os.setxattr(upper / "tmp/directory", "user.overlay.redirect", b"/nowhere")
    user.run("mknod", upper / "tmp/directory/gone", "c", 0, 0)
    found = user.ovlfs("fsck", upper, code=1).stdout
    assert [line.split(": ")[1] for line in found.splitlines()] == [
        "broken-redirect",
        "bad-override",
        "whiteout-without-lower",
    ]
    user.ovlfs("fsck", upper, "--repair")
    assert user.ovlfs("fsck", upper).stdout == ""
    assert os.getxattr(upper / "tmp/directory", "user.overlay.opaque") == b"y"


def test_a_user_without_access_is_told_so_in_one_line(user: User, scratch: Path) -> None:
    (scratch / "closed").mkdir(mode=0o700)
    for verb in (("diff",), ("commit",), ("fsck",)):
        out = (user.home / "x.tar",) if verb == ("commit",) else ()
        result = user.ovlfs(*verb, scratch / "closed", *out, "--image", images() / IMAGE, code=1)
        assert "Permission denied" in result.stderr
        assert result.stderr.count("\n") == 1
