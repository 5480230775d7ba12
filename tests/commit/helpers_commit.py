"""Changing a mounted tree in every way there is, and reading what a commit has made of it."""

import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

from helpers_tree import SHOWN, Tree, differences, look

Run = Callable[..., "subprocess.CompletedProcess[str]"]

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
"""security.capability: cap_net_raw+ep, as setcap(8) writes it."""


def change_everything(root: Path) -> None:
    """All kinds of changes to the tree of the fixture `small` image.  As root."""
    (root / "etc/motd").write_text("hello\n")
    with open(root / "etc/issue", "a") as file:
        file.write("more\n")
    (root / "etc/hosts").unlink()
    (root / "etc/passwd").chmod(0o600)  # metadata only
    (root / "opt/tree").rename(root / "opt/moved tree")  # a lower directory
    (root / "usr/share/zoneinfo").rename(root / "zones")
    os.chown(root / "zones", 4_000_000_000, 3_000_000_000)
    shutil.rmtree(root / "var/cache")
    (root / "var/cache").mkdir()
    (root / "var/cache/new").write_bytes(b"")  # in an opaque directory
    shutil.rmtree(root / "var/spool")
    (root / "var/spool").write_text("was a directory")
    (root / "etc/timezone").unlink()
    (root / "etc/timezone").mkdir()
    (root / "etc/timezone/was").symlink_to("a file")
    os.link(root / "etc/group", root / "etc/group2")
    os.link(root / "etc/group", root / "opt/group3")
    (root / "empty").mkdir(mode=0o1777)
    (root / "sparse").touch()
    with open(root / "sparse", "r+b") as file:
        file.seek(1 << 20)
        file.write(b"in the middle")
        file.truncate(3 << 20)
    for name, kind, rdev in (
        ("null", stat.S_IFCHR, (1, 3)),
        ("sda1", stat.S_IFBLK, (8, 1)),
        ("big", stat.S_IFCHR, (4095, 99999)),
    ):
        os.mknod(root / "dev" / name, kind | 0o640, os.makedev(*rdev))
    os.mkfifo(root / "run/fifo", 0o622)
    (root / "ping").write_bytes(b"\x7fELF")
    os.setxattr(root / "ping", "security.capability", CAPABILITY)
    os.setxattr(root / "ping", "user.binary", b"\0=\n\xff")
    os.setxattr(root / "home", "user.on a directory", b"yes")
    os.setxattr(root / "opt/zoo/README", "user.x", b"metadata only")
    subprocess.run(["setfacl", "-m", "u:1:rwx,g:2:r,m::rx", root / "opt"], check=True)
    # Of a directory in which docker has nothing to unpack: there it lets what it makes inherit the ACL.
    subprocess.run(["setfacl", "-m", "d:u:3:rw", root / "empty"], check=True)
    (root / "suid").write_bytes(b"#!")
    (root / "suid").chmod(0o6755)
    (root / os.fsdecode(b"latin-\xe9\xff")).write_text("not UTF-8")
    (root / ("long" * 60) / ("n" * 250)).parent.mkdir()
    (root / ("long" * 60) / ("n" * 250)).symlink_to("t" * 3000)
    os.link(root / ("long" * 60) / ("n" * 250), root / "link to a symlink", follow_symlinks=False)
    (root / "old").write_text("old")
    os.utime(root / "old", ns=(0, -1_500_000_001))
    os.utime(root / "suid", ns=(0, 1_234_567_890_123_456_789))
    os.utime(root / "home", ns=(0, 999_999_999))


def check_same(found: Tree, expected: Tree, keys: tuple[str, ...] = SHOWN) -> None:
    """Fail with the differences, in words."""
    wrong = differences(found, expected, keys)
    assert not wrong, "\n".join(wrong[:40])


def check_mounts_as(ovlfs: Run, image: object, expected: Tree, scratch: Path, keys: tuple[str, ...] = SHOWN) -> None:
    """The image, mounted read-only, is the tree."""
    mountpoint = scratch / "again"
    mountpoint.mkdir(exist_ok=True)
    ovlfs("mount", "--ro", image, mountpoint)
    try:
        check_same(look(bytes(mountpoint)), expected, keys)
    finally:
        ovlfs("umount", mountpoint)
