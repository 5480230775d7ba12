"""`ovlfs fsck`: each rule by its name, what a repair does, and that nobody loses anything by it."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_commit import Run, check_same
from helpers_images import images
from helpers_random import random_run, write
from helpers_tree import Tree, look

pytestmark = [pytest.mark.fuse, pytest.mark.root]

Mount = Callable[..., Path]


@pytest.fixture
def upper(scratch: Path) -> Path:
    """An upperdir over the directory `lower`, as a mount has left it."""
    lower = scratch / "lower"
    write(lower / "dir/file", b"content\n")
    write(lower / "dir/sub/deep", b"deep\n")
    write(lower / "file", b"12345")
    for place in ("upper", "upper.work", "upper.work/work"):
        (scratch / place).mkdir()
    return scratch / "upper"


def findings(ovlfs: Run, upper: Path, *options: object, code: int = 1) -> list[tuple[str, str, str]]:
    """(path, rule, what becomes of it) of every line."""
    out = ovlfs("fsck", upper, "--image", upper.parent / "lower", *options, code=code).stdout
    found = []
    for line in out.splitlines():
        path, rule, text = line.split(": ", 2)
        found.append((os.path.relpath(path, upper.parent), rule, text.partition("; ")[2]))
    return found


def repaired(ovlfs: Run, upper: Path, rule: str, path: str, remedy: str) -> None:
    """The rule is found, told the same twice, repaired, and then clean."""
    would = [(path, rule, f"would be {remedy} (--repair)")]
    assert findings(ovlfs, upper) == would
    assert findings(ovlfs, upper) == would
    assert findings(ovlfs, upper, "--repair", code=0) == [(path, rule, remedy)]
    assert findings(ovlfs, upper, "--repair", code=0) == []
    assert findings(ovlfs, upper, code=0) == []


def tell(upper: Path, name: str, value: bytes) -> None:
    os.setxattr(upper, f"trusted.overlay.{name}", value, follow_symlinks=False)


def whiteout(path: Path) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    os.mknod(path, 0o020000)


def seen(mounted: Mount, upper: Path) -> Tree:
    mountpoint = mounted("-o", f"lowerdir={upper.parent}/lower,upperdir={upper},workdir={upper}.work")
    tree = look(bytes(mountpoint))
    subprocess.run(["umount", mountpoint], check=True)
    return tree


def test_what_mounts_leave_is_clean(ovlfs: Run, mounted: Mount, scratch: Path) -> None:
    """Whatever was done in a mount: its upperdir breaks no rule."""
    mountpoint = mounted("--upper", scratch / "upper", images() / "small-docker20.tar")
    random_run(mountpoint, 5, 400)
    ovlfs("umount", mountpoint)
    assert ovlfs("fsck", scratch / "upper").stdout == ""


def test_stale_temps(ovlfs: Run, upper: Path) -> None:
    """Files, trees and symlinks that a killed mount left in workdir; what symlinks lead to stays."""
    precious = write(upper.parent / "precious")
    work = Path(f"{upper}.work/work")
    (work / "#2").symlink_to(precious)
    repaired(ovlfs, upper, "stale-temp", "upper.work/work/#2", "removed")
    write(work / "#3/sub/file")
    (work / "#3/link").symlink_to(upper.parent / "lower")
    repaired(ovlfs, upper, "stale-temp", "upper.work/work/#3", "removed")
    assert precious.exists()
    assert (upper.parent / "lower/file").exists()


def test_a_volatile_mark_is_told_and_kept(ovlfs: Run, upper: Path) -> None:
    mark = Path(f"{upper}.work/work/incompat/volatile/dirty")
    write(mark)
    for options in ((), ("--repair",)):
        assert findings(ovlfs, upper, *options) == [("upper.work/work/incompat", "volatile-mark", "")]
    assert mark.exists()


def test_whiteout_without_lower(ovlfs: Run, mounted: Mount, upper: Path) -> None:
    whiteout(upper / "dir/nothing")
    whiteout(upper / "dir/file")
    before = seen(mounted, upper)
    repaired(ovlfs, upper, "whiteout-without-lower", "upper/dir/nothing", "removed")
    assert (upper / "dir/file").is_char_device()
    check_same(seen(mounted, upper), before)


def test_whiteout_in_opaque(ovlfs: Run, mounted: Mount, upper: Path) -> None:
    """Also further down in an opaque directory; times of the directory stay."""
    whiteout(upper / "dir/sub/deep")
    tell(upper / "dir", "opaque", b"y")
    before = seen(mounted, upper)
    repaired(ovlfs, upper, "whiteout-in-opaque", "upper/dir/sub/deep", "removed")
    check_same(seen(mounted, upper), before)


def test_xattr_whiteouts_are_whiteouts(ovlfs: Run, upper: Path) -> None:
    write(upper / "dir/nothing", b"")
    tell(upper / "dir/nothing", "whiteout", b"y")
    tell(upper / "dir", "opaque", b"x")
    repaired(ovlfs, upper, "whiteout-without-lower", "upper/dir/nothing", "removed")


@pytest.mark.parametrize("value", [b"", b"nonsense", b"0:0:0644:block-x", b"0:0:0755:dir", b"99999999999:0:0644"])
def test_bad_override(ovlfs: Run, upper: Path, value: bytes) -> None:
    """Of a file: damaged, or it says that the file is a directory.  The content stays."""
    os.setxattr(upper, "user.containers.override_stat", b"0:0:0755")
    write(upper / "new", b"precious")
    os.setxattr(upper / "new", "user.containers.override_stat", value)
    repaired(ovlfs, upper, "bad-override", "upper/new", "freed of the xattr")
    assert (upper / "new").read_bytes() == b"precious"


def test_override_is_an_ordinary_xattr_where_owners_are_stored_directly(ovlfs: Run, upper: Path) -> None:
    write(upper / "new")
    os.setxattr(upper / "new", "user.containers.override_stat", b"nonsense")
    assert findings(ovlfs, upper, code=0) == []


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (b"", "bad-redirect"),
        (b"a/b", "bad-redirect"),
        (b"/a/../b", "bad-redirect"),
        (b"/" + b"x" * 5000, "bad-redirect"),
        (b"/nowhere", "broken-redirect"),
        (b"nowhere", "broken-redirect"),
        (b"/file", "broken-redirect"),
    ],
)
def test_redirects_that_lead_nowhere(ovlfs: Run, mounted: Mount, upper: Path, value: bytes, rule: str) -> None:
    """The directory shows what is in it, and not all of a sudden what a directory below has under its name."""
    write(upper / "dir/kept")
    tell(upper / "dir", "redirect", value)
    repaired(ovlfs, upper, rule, "upper/dir", "made opaque, and freed of the redirect")
    tree = seen(mounted, upper)
    assert {path for path in tree if path.startswith("dir")} == {"dir", "dir/kept"}


def test_a_redirect_that_leads_somewhere_is_fine(ovlfs: Run, upper: Path) -> None:
    (upper / "moved").mkdir()
    tell(upper / "moved", "redirect", b"/dir/sub")
    whiteout(upper / "moved/deep")
    assert findings(ovlfs, upper, code=0) == []


def test_whiteouts_below_a_bad_redirect_are_found_too(ovlfs: Run, upper: Path) -> None:
    whiteout(upper / "dir/sub/deep")
    tell(upper / "dir", "redirect", b"a/b")
    assert len(findings(ovlfs, upper, "--repair", code=0)) == 2
    assert findings(ovlfs, upper, code=0) == []


@pytest.mark.parametrize("name", ["new", "file", "dir/sub"])
def test_broken_metacopies_cannot_be_repaired(ovlfs: Run, upper: Path, name: str) -> None:
    """No data below, data of another size, a directory instead of data: told, and left alone."""
    path = upper / name
    write(path, b"")
    tell(path, "metacopy", b"")
    os.truncate(path, 3)
    for options in ((), ("--repair",)):
        assert findings(ovlfs, upper, *options) == [(f"upper/{name}", "broken-metacopy", "")]
    assert path.stat().st_size == 3


def test_a_metacopy_whose_data_is_there_is_fine(ovlfs: Run, upper: Path) -> None:
    write(upper / "moved", b"")
    os.truncate(upper / "moved", 5)
    tell(upper / "moved", "metacopy", b"")
    tell(upper / "moved", "redirect", b"/file")
    assert findings(ovlfs, upper, code=0) == []


def test_wh_names_are_told_and_kept(ovlfs: Run, upper: Path) -> None:
    """They may be a user's own."""
    write(upper / "dir/.wh.file")
    (upper / ".wh..wh.plnk").mkdir()
    expected = [("upper/.wh..wh.plnk", "wh-name", ""), ("upper/dir/.wh.file", "wh-name", "")]
    assert findings(ovlfs, upper, "--repair") == expected
    assert findings(ovlfs, upper) == expected


def test_all_at_once_in_order(ovlfs: Run, upper: Path) -> None:
    """Each finding once, whatever else is wrong above it; a repair leaves what it cannot repair."""
    write(Path(f"{upper}.work/work/#1"))
    whiteout(upper / "dir/a")
    tell(upper / "dir", "redirect", b"/nowhere")
    write(upper / "dir/.wh.b")
    whiteout(upper / "z")
    assert [(path, rule) for path, rule, _ in findings(ovlfs, upper)] == [
        ("upper.work/work/#1", "stale-temp"),
        ("upper/dir", "broken-redirect"),
        ("upper/z", "whiteout-without-lower"),
        ("upper/dir/.wh.b", "wh-name"),
        ("upper/dir/a", "whiteout-without-lower"),
    ]
    findings(ovlfs, upper, "--repair")
    assert findings(ovlfs, upper) == [("upper/dir/.wh.b", "wh-name", "")]


def test_a_repair_that_fails_does_not_keep_the_others(ovlfs: Run, upper: Path) -> None:
    work = Path(f"{upper}.work/work")
    for name in ("#1", "#2", "#3"):
        (work / name).mkdir()
    whiteout(upper / "nothing")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", work / "#2"], check=True)
    try:
        found = findings(ovlfs, upper, "--repair")
    finally:
        subprocess.run(["umount", work / "#2"], check=True)
    (failed,) = [one for one in found if one[2] != "removed"]
    assert failed[:2] == ("upper.work/work/#2", "stale-temp")
    assert failed[2].startswith("could not be removed: ")
    assert [path for path, _, _ in found] == [*(f"upper.work/work/#{number}" for number in (1, 2, 3)), "upper/nothing"]
    assert findings(ovlfs, upper, "--repair", code=0) == [("upper.work/work/#2", "stale-temp", "removed")]


def test_names_are_shown_on_one_line(ovlfs: Run, upper: Path) -> None:
    whiteout(upper / "a\nb")
    out = ovlfs("fsck", upper, "--image", upper.parent / "lower", code=1).stdout
    assert out.count("\n") == 1
    assert "a\\nb" in out


def test_symlinks_are_not_followed(ovlfs: Run, upper: Path, scratch: Path) -> None:
    """Neither in the upperdir nor as the workdir."""
    outside = scratch / "outside"
    whiteout(outside / "w")
    write(outside / "work/#9")
    (upper / "link").symlink_to(outside)
    assert findings(ovlfs, upper, code=0) == []
    (scratch / "elsewhere").symlink_to(outside)
    result = ovlfs("fsck", upper, "--repair", "--image", scratch / "lower", "--work", scratch / "elsewhere", code=1)
    assert result.stderr.count("\n") == 1
    assert (outside / "work/#9").exists()
    assert (outside / "w").is_char_device()


def test_a_mounted_upperdir_is_refused(ovlfs: Run, mounted: Mount, upper: Path) -> None:
    """By its own name and by its mountpoint, whoever has mounted it."""
    lower = upper.parent / "lower"
    mountpoint = mounted("-o", f"lowerdir={lower},upperdir={upper},workdir={upper}.work")
    for place in (upper, mountpoint):
        result = ovlfs("fsck", place, "--repair", code=1)
        assert f"Device or resource busy: it is mounted on {mountpoint}" in result.stderr
        assert result.stderr.count("\n") == 1
    ovlfs("umount", mountpoint)
    options = f"lowerdir={lower},upperdir={upper},workdir={upper}.work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, mountpoint], check=True)
    try:
        result = ovlfs("fsck", upper, "--repair", "--image", lower, code=1)
        assert f"Device or resource busy: it is mounted on {mountpoint}" in result.stderr
    finally:
        subprocess.run(["umount", mountpoint], check=True)


def test_an_upperdir_of_a_mount_that_is_not_listed_is_refused(ovlfs: Run, mounted: Mount, upper: Path) -> None:
    """A registry of another user, another namespace: the lock on the upperdir is what counts."""
    mounted("-o", f"lowerdir={upper.parent}/lower,upperdir={upper},workdir={upper}.work")
    environment = os.environ | {"OVLFS_RUNTIME_DIR": str(upper.parent / "run"), "PYTHONPATH": os.getcwd()}
    result = ovlfs("fsck", upper, "--image", upper.parent / "lower", code=1, env=environment)
    assert "is in use by another mount" in result.stderr


def test_the_upperdir_of_a_killed_mount_can_be_checked(ovlfs: Run, mounted: Mount, scratch: Path) -> None:
    """What was mounted from the store's own place is found by its note."""
    mountpoint = mounted("--upper", scratch / "upper", images() / "small-docker20.tar")
    (mountpoint / "new").touch()
    ovlfs("umount", mountpoint)
    write(scratch / "upper.work/work/#7")
    assert "stale-temp" in ovlfs("fsck", scratch / "upper", code=1).stdout
    ovlfs("fsck", scratch / "upper", "--repair")
    assert ovlfs("fsck", scratch / "upper").stdout == ""
