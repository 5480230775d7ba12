"""`ovlfs diff`: one line for each path that was changed, and none for what only looks changed."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_commit import Run
from helpers_images import images
from helpers_overlay import docker_archive
from helpers_random import write
from helpers_tree import Tree, look

pytestmark = [pytest.mark.fuse, pytest.mark.root]

Mount = Callable[..., Path]


@pytest.fixture
def stacked(mounted: Mount, scratch: Path) -> Path:
    """A mount over one lower directory."""
    lower = scratch / "lower"
    write(lower / "dir/file", b"content\n")
    write(lower / "dir/sub/deep", b"deep\n")
    write(lower / "other/x", b"x" * 100)
    write(lower / "other/y", b"y" * 50)
    write(lower / "big", b"b" * 70_000)
    (lower / "link").symlink_to("dir/file")
    for place in ("upper", "work"):
        (scratch / place).mkdir()
    return mounted("-o", f"lowerdir={lower},upperdir={scratch}/upper,workdir={scratch}/work")


def lines(ovlfs: Run, *arguments: object) -> list[str]:
    return ovlfs("diff", *arguments).stdout.splitlines()


def test_diff_of_nothing_is_empty(ovlfs: Run, stacked: Path) -> None:
    assert lines(ovlfs, stacked) == []


def test_diff_lists_parents_as_changed(ovlfs: Run, stacked: Path) -> None:
    (stacked / "dir/sub/new").mkdir()
    (stacked / "dir/sub/new/file").touch()
    (stacked / "other/x").unlink()
    (stacked / "big").chmod(0o600)
    assert lines(ovlfs, stacked) == [
        "C /big",
        "C /dir",
        "C /dir/sub",
        "A /dir/sub/new",
        "A /dir/sub/new/file",
        "C /other",
        "D /other/x",
    ]


def test_diff_does_not_list_what_was_copied_up_only(ovlfs: Run, stacked: Path, scratch: Path) -> None:
    """Opened to write, touched and set back, created and removed: in the upperdir, but not changed."""
    with open(stacked / "dir/file", "r+b"):
        pass
    mode = (stacked / "big").stat().st_mode
    (stacked / "big").chmod(0o600)
    (stacked / "big").chmod(mode)
    (stacked / "dir/temporary").touch()
    (stacked / "dir/temporary").unlink()
    assert (scratch / "upper/big").exists()
    assert lines(ovlfs, stacked) == []


def test_diff_sees_content_that_has_the_same_size_and_time(ovlfs: Run, stacked: Path) -> None:
    before = (stacked / "dir/file").stat()
    (stacked / "dir/file").write_bytes(b"CONTENT\n")
    os.utime(stacked / "dir/file", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert lines(ovlfs, stacked) == ["C /dir", "C /dir/file"]
    (described,) = [one for one in json.loads(ovlfs("diff", "--json", stacked).stdout) if one["path"] == "/dir/file"]
    assert described["differs_in"] == ["content"]


def test_diff_of_a_renamed_directory(ovlfs: Run, stacked: Path) -> None:
    """Gone under the old name, added with all that is in it under the new one."""
    (stacked / "dir").rename(stacked / "new")
    assert lines(ovlfs, stacked) == ["D /dir", "A /new", "A /new/file", "A /new/sub", "A /new/sub/deep"]


def test_diff_of_a_replaced_directory(ovlfs: Run, stacked: Path) -> None:
    """An opaque directory: what was in it is deleted, what is the same again is not listed."""
    shutil.copytree(stacked / "other", stacked / "copy", symlinks=True)
    times = (stacked / "other/y").stat()
    shutil.rmtree(stacked / "other")
    (stacked / "copy").rename(stacked / "other")
    (stacked / "other/x").unlink()
    assert times.st_mtime_ns == (stacked / "other/y").stat().st_mtime_ns
    assert lines(ovlfs, stacked) == ["C /other", "D /other/x"]


def test_diff_of_changed_types(ovlfs: Run, stacked: Path) -> None:
    shutil.rmtree(stacked / "dir")
    (stacked / "dir").write_text("a file")
    (stacked / "big").unlink()
    (stacked / "big").mkdir()
    (stacked / "big/in").touch()
    (stacked / "link").unlink()
    (stacked / "link").symlink_to("elsewhere")
    assert lines(ovlfs, stacked) == ["C /big", "A /big/in", "C /dir", "C /link"]


def test_diff_with_sizes(ovlfs: Run, stacked: Path) -> None:
    (stacked / "dir/file").write_bytes(b"more content\n")
    shutil.rmtree(stacked / "other")
    (stacked / "new").write_bytes(b"12345")
    assert lines(ovlfs, "--stat", stacked) == [
        "C /dir",
        "C /dir/file  -8 +13",
        "A /new  +5",
        "D /other  -150",
        "1 added, 2 changed, 1 deleted; -158 +18 bytes",
    ]


def test_diff_as_json(ovlfs: Run, stacked: Path) -> None:
    (stacked / os.fsdecode(b"caf\xe9")).symlink_to("x")
    (stacked / "big").chmod(0o600)
    assert json.loads(ovlfs("diff", "--json", stacked).stdout) == [
        {
            "kind": "C",
            "path": "/big",
            "type": "file",
            "type_before": "file",
            "size": 70_000,
            "size_before": 70_000,
            "differs_in": ["mode"],
        },
        {
            "kind": "A",
            "path": os.fsdecode(b"/caf\xe9"),
            "type": "symlink",
            "type_before": None,
            "size": None,
            "size_before": None,
            "differs_in": [],
        },
    ]


def test_diff_shows_hostile_names_on_one_line(ovlfs: Run, stacked: Path) -> None:
    (stacked / "a\nb\x1b[31m").touch()
    assert lines(ovlfs, stacked) == ["A /a\\nb\\x1b[31m"]


def test_diff_between_images(ovlfs: Run, scratch: Path) -> None:
    """Shared layers below, other layers on top; deletions by whiteouts."""
    base = [("etc/", None), ("etc/hosts", b"h"), ("etc/motd", b"m"), ("usr/", None), ("usr/x", b"x")]
    one = docker_archive(scratch / "one.tar", base, [("etc/only1", b"1"), ("etc/both", b"same")])
    two = docker_archive(scratch / "two.tar", base, [("etc/both", b"same"), ("etc/.wh.hosts", b""), ("usr/new", b"")])
    assert lines(ovlfs, one, two) == ["C /etc", "D /etc/hosts", "D /etc/only1", "C /usr", "A /usr/new"]
    assert lines(ovlfs, two, one) == ["C /etc", "A /etc/hosts", "A /etc/only1", "C /usr", "D /usr/new"]
    assert lines(ovlfs, one, one) == []


def test_diff_between_versions_is_what_their_trees_differ_in(ovlfs: Run, mounted: Mount) -> None:
    """small:v1 and small:v2, against what a walk over both mounts finds."""
    archive = images() / "small-two-docker20.tar.gz"
    listed = json.loads(ovlfs("inspect", "--json", archive).stdout)["images"]
    one, two = (f"{archive}:{image['tags'][0]}" for image in listed)
    before, now = (look(bytes(mounted("--ro", image))) for image in (one, two))
    keys = ("type", "mode", "uid", "gid", "size", "sha256", "target", "rdev", "xattrs")
    changed = {path for path in now if path in before and any(now[path][key] != before[path][key] for key in keys)}
    changed |= {
        path
        for path in now
        if path in before and now[path]["type"] != "dir" and _time(now, path) != _time(before, path)
    }
    added = {path for path in now if path not in before}
    # What was in a deleted directory, or in one that became something else, is not listed.
    gone = {path for path in before if path not in now}
    deleted = {path for path in gone if now.get(os.path.dirname(path) or ".", {}).get("type") == "dir"}
    for path in changed | added | deleted:
        while (path := os.path.dirname(path)) and path not in added:
            changed.add(path)
    changed.discard(".")
    expected = {f"{kind} /{path}" for kind, paths in (("A", added), ("C", changed), ("D", deleted)) for path in paths}
    found = json.loads(ovlfs("diff", "--json", one, two).stdout)
    assert {f"{change['kind']} {change['path']}" for change in found} == expected
    assert len(expected) > 5


def _time(tree: Tree, path: str) -> int:
    return int(tree[path]["mtime_ns"])


def test_diff_of_an_upperdir_that_the_kernel_has_mounted(ovlfs: Run, scratch: Path) -> None:
    lower, mnt = scratch / "lower", scratch / "mnt"
    write(lower / "a/file")
    for place in ("upper", "work", "mnt"):
        (scratch / place).mkdir()
    options = f"lowerdir={lower},upperdir={scratch}/upper,workdir={scratch}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, mnt], check=True)
    try:
        (mnt / "a/file").unlink()
        (mnt / "b").mkdir()
        assert lines(ovlfs, scratch / "upper", "--image", lower) == ["C /a", "D /a/file", "A /b"]
    finally:
        subprocess.run(["umount", mnt], check=True)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 2, "MOUNT|UPPER"),
        (("a", "b", "c"), 2, "should be given"),
        (("missing",), 1, "missing: is neither a mount of ovlfs nor an upperdir"),
        (("lower",), 1, "nothing says over which image its changes were made"),
        (("lower", "--image", "missing"), 1, "missing: no such file or directory"),
        (("a.tar", "b.tar"), 1, "a.tar: no such file or directory"),
    ],
)
def test_diff_says_in_one_line_what_is_wrong(
    ovlfs: Run, stacked: Path, scratch: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    result = ovlfs("diff", *arguments, code=code, cwd=scratch)
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_diff_of_a_read_only_mount_says_why_not(ovlfs: Run, mounted: Mount) -> None:
    mountpoint = mounted("--ro", images() / "small-docker20.tar")
    assert "is mounted read-only" in ovlfs("diff", mountpoint, code=1).stderr


def test_diff_of_a_mount_of_relative_directories(ovlfs: Run, scratch: Path) -> None:
    """The options are as they were typed, and were typed somewhere else."""
    write(scratch / "place/lower/file")
    for name in ("upper", "work", "mnt"):
        (scratch / "place" / name).mkdir()
    ovlfs("mount", "-o", "lowerdir=lower,upperdir=upper,workdir=work", "mnt", cwd=scratch / "place")
    try:
        (scratch / "place/mnt/file").unlink()
        assert lines(ovlfs, scratch / "place/mnt") == ["D /file"]
        assert lines(ovlfs, scratch / "place/upper") == ["D /file"]
    finally:
        ovlfs("umount", scratch / "place/mnt")


def test_diff_finds_the_platform_that_was_mounted(ovlfs: Run, mounted: Mount, scratch: Path) -> None:
    """Of an image for several, by the mount's options, and later by the note."""
    image = images() / "multi.oci.tar"
    mountpoint = mounted("--platform", "linux/arm64", "--upper", scratch / "upper", image)
    (mountpoint / "new").touch()
    assert lines(ovlfs, mountpoint) == ["A /new"]
    ovlfs("umount", mountpoint)
    assert lines(ovlfs, scratch / "upper") == ["A /new"]
