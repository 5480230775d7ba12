"""Every case of overlay semantics, mounted for real: what `explain` says is what the mount shows."""

import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_explain import Run, assert_all_agree, explained, hidden_of, layer_of, paths_of, seen, told
from helpers_random import populate, random_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stacks import Content, Dialect, as_directory, stacks

from ovlfs.layer.directory import InoMap

pytestmark = pytest.mark.fuse

Mount = Callable[..., Path]


def write(root: Path, **files: str) -> None:
    """Files by path, in which `__` is a slash."""
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="ascii")


def directories(scratch: Path, *names: str) -> list[Path]:
    made = [scratch / name for name in names]
    for path in made:
        path.mkdir()
    return made


def options(lowers: list[Path], scratch: Path, more: str = "") -> str:
    for name in ("upper", "work"):
        (scratch / name).mkdir(exist_ok=True)
    lowerdir = ":".join(map(str, lowers))
    return f"lowerdir={lowerdir},upperdir={scratch}/upper,workdir={scratch}/work{more}"


def kernel_overlay(scratch: Path, words: str, change: Callable[[Path], None]) -> None:
    """Have kernel overlayfs change the upperdir."""
    mountpoint = scratch / "kernel"
    mountpoint.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", words, mountpoint], check=True)
    try:
        change(mountpoint)
    finally:
        subprocess.run(["umount", mountpoint], check=True)


# ---- whiteouts and opaque directories --------------------------------------------------------------------------------


def char_whiteout(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))


def xattr_whiteout(path: Path) -> None:
    path.touch()
    os.setxattr(path, "trusted.overlay.whiteout", b"y")
    if path.parent.name != "l2":
        os.setxattr(path.parent, "trusted.overlay.opaque", b"x")


def oci_whiteout(path: Path) -> None:
    (path.parent / f".wh.{path.name}").touch()


def xattr_opaque(path: Path) -> None:
    os.setxattr(path, "trusted.overlay.opaque", b"y")


def oci_opaque(path: Path) -> None:
    (path / ".wh..wh..opq").touch()


@pytest.mark.root
@pytest.mark.parametrize("whiteout", [char_whiteout, xattr_whiteout, oci_whiteout])
@pytest.mark.parametrize("opaque", [xattr_opaque, oci_opaque])
def test_whiteouts_and_opaque_directories_are_said_to_hide(
    whiteout: Callable[[Path], None], opaque: Callable[[Path], None], scratch: Path, mounted: Mount
) -> None:
    """In every spelling, and what they hide is named with the layer that has it and the reason."""
    l3, l2, l1 = lowers = directories(scratch, "l3", "l2", "l1")
    write(l1, dir__gone="one", dir__kept="one!", all__old="one!!", all__sub__deep="deep", tree__x="x", top="t")
    write(l2, all__new="two", dir__other="two")
    write(l3, dir__kept="three")
    whiteout(l2 / "dir/gone")
    whiteout(l2 / "tree")
    opaque(l2 / "all")
    mountpoint = mounted("-o", options(lowers, scratch))

    assert_all_agree(mountpoint, paths_of(*lowers))
    gone = explained(mountpoint, "/dir/gone")
    assert gone["reason"] == "whited out in layer 2"
    assert hidden_of(gone) == [(["layer 1"], "/dir/gone", "the whiteout in layer 2")]
    assert explained(mountpoint, "/tree/x")["reason"] == "/tree is whited out in layer 2"
    assert hidden_of(explained(mountpoint, "/tree/x")) == [(["layer 1"], "/tree/x", "the whiteout in layer 2")]
    deep = explained(mountpoint, "/all/sub/deep")
    assert deep["reason"] == "/all/sub is hidden by the opaque directory all in layer 2"
    assert hidden_of(deep) == [(["layer 1"], "/all/sub/deep", "the opaque directory all in layer 2")]
    kept = explained(mountpoint, "/dir/kept")
    assert layer_of(kept, kept["object"]["data_from"]) == "layer 3"
    assert hidden_of(kept) == [(["layer 1"], "/dir/kept", "the regular file in layer 3")]
    assert explained(mountpoint, "/dir/never")["reason"] == "no layer has it"


def test_one_kind_over_another_hides_it(scratch: Path, mounted: Mount) -> None:
    """A file hides a directory, a directory a file; in the middle of a stack, too."""
    l3, l2, l1 = lowers = directories(scratch, "l3", "l2", "l1")
    write(l1, a__x="1", b="1", c__x="1")
    write(l2, a="2", b__y="2", c="22")
    write(l3, c__z="3")
    mountpoint = mounted("-o", options(lowers, scratch))

    assert_all_agree(mountpoint, paths_of(*lowers))
    assert hidden_of(explained(mountpoint, "/a")) == [(["layer 1"], "/a", "the regular file in layer 2")]
    assert hidden_of(explained(mountpoint, "/a/x")) == [(["layer 1"], "/a/x", "the regular file in layer 2")]
    assert hidden_of(explained(mountpoint, "/b")) == [(["layer 1"], "/b", "the directory b in layer 2")]
    assert hidden_of(explained(mountpoint, "/c")) == [
        (["layer 2"], "/c", "the directory c in layer 3"),
        (["layer 1"], "/c", "the regular file in layer 2"),
    ]


# ---- what the kernel writes ------------------------------------------------------------------------------------------


def changes(top: Path) -> None:
    """Redirects, metacopies and both, opaque directories, whiteouts, a replaced file, links."""
    for name in ("here", "near"):
        shutil.rmtree(top / name)
    (top / "moved").rename(top / "here")
    (top / "here/sub").rename(top / "sub2")
    (top / "far/away").rename(top / "near")
    (top / "meta").chmod(0o600)
    (top / "dir/renamed").chmod(0o640)
    (top / "dir/renamed").rename(top / "dir/as")
    shutil.rmtree(top / "fresh")
    (top / "fresh").mkdir()
    write(top, fresh__new="new", replaced="upper wins")
    (top / "removed").unlink()
    (top / "link1").chmod(0o700)


def build(lower: Path) -> None:
    write(lower, moved__a="a", moved__sub__b="bb", far__away__c="ccc", meta="metadata" * 100, dir__renamed="r" * 999)
    write(lower, fresh__old="old", replaced="lower", removed="gone", link1="linked", sub2="was here")
    (lower / "sub2").unlink()
    os.link(lower / "link1", lower / "link2")


@pytest.mark.root
@pytest.mark.parametrize("place", ["upper", "lower"])
def test_what_the_kernel_wrote_is_explained_as_the_mount_shows_it(place: str, scratch: Path, mounted: Mount) -> None:
    """Kernel overlayfs makes redirects and metacopies; then its upperdir is ours, or one lower layer of several."""
    lower, middle, upper, work = directories(scratch, "lower", "middle", "upper", "work")
    build(lower)
    write(middle, moved__m="mm", near__hidden="h", here__hidden="h", other="o")
    words = f"lowerdir={middle}:{lower},upperdir={upper},workdir={work},redirect_dir=on,metacopy=on"
    kernel_overlay(scratch, words, changes)
    if place == "upper":
        lowers = [middle, lower]
        mountpoint = mounted("-o", f"lowerdir={middle}:{lower},upperdir={upper},workdir={work}")
    else:
        (scratch / "upper2").mkdir()
        (scratch / "work2").mkdir()
        lowers = [upper, middle, lower]
        mountpoint = mounted(
            "-o", f"lowerdir={upper}:{middle}:{lower},upperdir={scratch}/upper2,workdir={scratch}/work2"
        )

    assert_all_agree(mountpoint, paths_of(upper, *lowers, mountpoint))
    name = "upper" if place == "upper" else "layer 3"
    here = explained(mountpoint, "/here/a")
    assert layer_of(here, here["object"]["data_from"]) == "layer 1"
    assert [one["redirect"] for one in here["steps"][0]["answers"] if one["redirect"]] == ["moved"]
    assert hidden_of(explained(mountpoint, "/here/hidden")) == [
        (["layer 2"], "/here/hidden", f"the redirect in {name}")
    ]
    near = explained(mountpoint, "/near/c")
    assert [one["redirect"] for one in near["steps"][0]["answers"] if one["redirect"]] == ["/far/away"]
    assert [layer_of(explained(mountpoint, "/meta"), n) for n in explained(mountpoint, "/meta")["object"]["from"]] == [
        name,
        "layer 1",
    ]
    moved = explained(mountpoint, "/dir/as")["object"]
    assert moved["metacopy"]
    if place == "lower":  # a metacopy over a metacopy: the metadata of one, the data of the other's file
        (mountpoint / "meta").chmod(0o644)
        assert_all_agree(mountpoint, ["meta"])
        above = explained(mountpoint, "/meta")
        assert [layer_of(above, n) for n in above["object"]["from"]] == ["upper", "layer 1"]
        assert hidden_of(above) == [([name], "/meta", "the regular file in upper")]
    assert explained(mountpoint, "/fresh/old")["reason"] == f"hidden by the opaque directory fresh in {name}"
    assert explained(mountpoint, "/removed")["reason"] == f"whited out in {name}"


@pytest.mark.root
def test_data_only_layers_are_said_to_have_the_data(scratch: Path, mounted: Mount) -> None:
    """As composefs makes them: metadata in one layer, data by absolute redirect in layers that are never listed."""
    lower, data2, data1, upper, work = directories(scratch, "lower", "data2", "data1", "upper", "work")
    write(data1, store__ab="not this one", store__cd="second")
    write(data2, store__ab="first " * 1000)
    for name, redirect, size in (("file", b"/store/ab", 6000), ("other", b"/store/cd", 6), ("lost", b"/store/no", 6)):
        path = lower / name
        path.touch()
        os.truncate(path, size)
        os.setxattr(path, "trusted.overlay.metacopy", b"")
        os.setxattr(path, "trusted.overlay.redirect", redirect)
    mountpoint = mounted("-o", f"lowerdir={lower}::{data2}::{data1},upperdir={upper},workdir={work}")

    assert_all_agree(mountpoint, ["file", "other", "lost", "store", "store/ab", "never"])
    file, other = explained(mountpoint, "/file"), explained(mountpoint, "/other")
    assert layer_of(file, file["object"]["data_from"]) == "data layer 2"
    assert layer_of(other, other["object"]["data_from"]) == "data layer 1"
    assert explained(mountpoint, "/lost")["error"] == "EIO"
    assert explained(mountpoint, "/store/ab")["reason"] == "no layer has /store"


# ---- hard links ------------------------------------------------------------------------------------------------------


def test_hard_links_of_a_lower_layer_are_named_and_move_up_together(scratch: Path, mounted: Mount) -> None:
    """What the write was said to do is what it does."""
    (l1,) = lowers = directories(scratch, "l1")
    write(l1, a__one="linked", single="s")
    (l1 / "b").mkdir()
    os.link(l1 / "a/one", l1 / "b/two")
    mountpoint = mounted("-o", options(lowers, scratch))

    facts = explained(mountpoint, "/a/one")
    assert facts["object"]["other_names"] == ["/b/two"]
    assert explained(mountpoint, "/single")["object"]["other_names"] == []
    assert sorted(facts["write"]["names"]) == ["a/one", "b/two"]
    assert sorted(facts["write"]["directories"]) == ["a", "b"]
    with (mountpoint / "a/one").open("a", encoding="ascii") as file:
        file.write("!")
    assert sorted(paths_of(scratch / "upper")) == sorted(
        [*("a", "a-not", "a/below", "b", "b-not", "b/below", "never")]
        + [f"{name}{end}" for name in ("a/one", "b/two") for end in ("", "-not", "/below")]
    )
    assert explained(mountpoint, "/b/two")["write"]["in_place"]
    assert_all_agree(mountpoint, paths_of(l1))


def test_link_to_a_lower_layer_in_an_image_is_followed(scratch: Path, mounted: Mount, linked_image: Path) -> None:
    """A tar's hard link whose target only layers below have."""
    mountpoint = mounted("--upper", scratch / "up", linked_image)

    facts = explained(mountpoint, "/link")
    assert layer_of(facts, facts["object"]["data_from"]) == "layer 1"
    assert facts["steps"][0]["answers"][-1]["says"] == "hard link to /dir/target in layer 1, a regular file"
    assert sorted(facts["write"]["names"]) == ["dir/target", "link"]
    assert_all_agree(mountpoint, ["link", "dir", "dir/target", "dir/none", "own", "own2", "absolute"])
    assert explained(mountpoint, "/absolute/target")["resolved"] == "/dir/target"


def test_an_image_whose_data_is_gone_is_explained_with_a_note(
    scratch: Path, mounted: Mount, linked_image: Path
) -> None:
    """Names and rules are in the index; what cannot be copied up any more is said."""
    mountpoint = mounted("--upper", scratch / "up", linked_image)
    os.truncate(linked_image, 5000)

    facts = explained(mountpoint, "/dir/target")
    assert facts["object"]["kind"] == "regular file"
    assert facts["write"] is None
    assert facts["notes"][0].startswith("it could not be copied up now: ")


# ---- symlinks --------------------------------------------------------------------------------------------------------


def test_symlinks_on_the_way_stay_inside_the_root(scratch: Path, mounted: Mount) -> None:
    """Absolute ones begin at the mount's root, `..` ends there, loops end, the last one is explained itself."""
    (l1,) = lowers = directories(scratch, "l1")
    write(l1, etc__hosts="h", usr__bin__sh="sh")
    for name, target in (("bin", "usr/bin"), ("abs", "/etc"), ("up", "../../../../etc"), ("loop", "loop")):
        (l1 / name).symlink_to(target)
    mountpoint = mounted("-o", options(lowers, scratch))

    assert explained(mountpoint, "/bin/sh")["resolved"] == "/usr/bin/sh"
    assert explained(mountpoint, "/abs/hosts")["object"]["kind"] == "regular file"
    assert explained(mountpoint, "/up/hosts")["resolved"] == "/etc/hosts"
    assert explained(mountpoint, "/bin/../../etc/hosts")["resolved"] == "/etc/hosts"
    assert explained(mountpoint, "/bin")["object"]["kind"] == "symlink"
    assert explained(mountpoint, "/bin/")["object"]["kind"] == "directory"
    assert explained(mountpoint, "/loop/x")["error"] == "ELOOP"
    assert explained(mountpoint, "/loop")["object"]["target"] == "loop"
    assert explained(mountpoint, "/abs/passwd")["resolved"] == "/etc/passwd"
    assert explained(mountpoint, "/etc/hosts/")["error"] == "ENOTDIR"
    assert explained(mountpoint, "x" * 300)["error"] == "ENAMETOOLONG"
    assert explained(mountpoint, "x/" * 3000)["error"] == "ENAMETOOLONG"


# ---- what a write would do -------------------------------------------------------------------------------------------


def test_a_write_does_what_was_said(scratch: Path, mounted: Mount, ovlfs: Run) -> None:
    """So many bytes, holes left out; and the mount's own count of what it copied says the same."""
    (l1,) = lowers = directories(scratch, "l1")
    write(l1, d__e__plain="x" * 5000)
    with (l1 / "sparse").open("wb") as file:
        file.write(b"begin")
        file.truncate(10 << 20)
    mountpoint = mounted("-o", options(lowers, scratch))

    plain, sparse = explained(mountpoint, "/d/e/plain")["write"], explained(mountpoint, "/sparse")["write"]
    assert (plain["data_bytes"], plain["directories"], plain["names"]) == (5000, ["d", "d/e"], ["d/e/plain"])
    assert sparse["size_bytes"] == 10 << 20
    assert 0 < sparse["data_bytes"] <= 1 << 20
    for path in ("d/e/plain", "sparse"):
        with (mountpoint / path).open("r+b") as file:
            file.write(b"B")

    stats = json.loads(ovlfs("stats", "--json", mountpoint).stdout)
    assert stats["copied_up_bytes"] == plain["data_bytes"] + sparse["data_bytes"]
    assert stats["decisions"] == {"copy-up": 4}
    assert explained(mountpoint, "/d/e/plain")["write"]["in_place"]


def test_a_metacopy_is_said_to_copy_its_data_when_written(scratch: Path, mounted: Mount) -> None:
    (l1,) = lowers = directories(scratch, "l1")
    write(l1, file="x" * 5000)
    mountpoint = mounted("-o", options(lowers, scratch, ",metacopy=on"))
    assert explained(mountpoint, "/file")["write"]["metadata_alone"]

    (mountpoint / "file").chmod(0o600)

    facts = explained(mountpoint, "/file")
    assert [layer_of(facts, number) for number in facts["object"]["from"]] == ["upper", "layer 1"]
    assert (facts["write"]["completes"], facts["write"]["data_bytes"]) == (True, 5000)
    assert_all_agree(mountpoint, ["file"])


def test_explaining_leaves_the_mount_as_it_was(scratch: Path, mounted: Mount) -> None:
    """Nothing is written to the upperdir or the workdir."""
    l2, l1 = lowers = directories(scratch, "l2", "l1")
    write(l1, a__b__c="1", other="1")
    write(l2, a__b__d="2")
    mountpoint = mounted("-o", options(lowers, scratch))
    before = sorted((path, path.lstat().st_mtime_ns) for path in scratch.rglob("*") if mountpoint not in path.parents)

    for path in paths_of(l1, l2):
        explained(mountpoint, path)

    after = sorted((path, path.lstat().st_mtime_ns) for path in scratch.rglob("*") if mountpoint not in path.parents)
    assert [pair for pair in before if pair[0] != mountpoint] == [pair for pair in after if pair[0] != mountpoint]


def test_a_layer_that_was_changed_behind_the_mount_is_noticed(scratch: Path, mounted: Mount) -> None:
    l2, l1 = lowers = directories(scratch, "l2", "l1")
    write(l1, file="1")
    mountpoint = mounted("-o", options(lowers, scratch))
    assert seen(mountpoint, "file") == told(explained(mountpoint, "file"))

    write(l2, file="22")

    assert explained(mountpoint, "file")["notes"] == [
        "the mount remembers something else: was a layer changed behind its back?"
    ]


# ---- random stacks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("by", ["ovlfs", pytest.param("kernel", marks=pytest.mark.root)])
def test_what_random_operations_leave_is_explained(by: str, seed: int, scratch: Path, mounted: Mount) -> None:
    """Our own upperdir, or the kernel's, after this and that: copy-ups, renames, exchanges, links, removals."""
    l2, l1 = lowers = directories(scratch, "l2", "l1")
    populate(l2, seed)
    populate(l1, seed + 100)
    words = options(lowers, scratch)
    if by == "kernel":
        more = ",redirect_dir=on,metacopy=on"
        kernel_overlay(scratch, words + more, lambda mountpoint: random_run(mountpoint, seed, 120))
        mountpoint = mounted("-o", words)
    else:
        mountpoint = mounted("-o", words)
        random_run(mountpoint, seed, 120)

    assert_all_agree(mountpoint, paths_of(l2, l1, scratch / "upper", mountpoint))


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stacks, st.sampled_from(["oci", "xattr", "kernel"]), st.booleans())
def test_random_stacks_are_explained_as_they_are_mounted(
    scratch: Path, ovlfs: Run, contents: list[Content], dialect: Dialect, writable: bool
) -> None:
    """The mount answers by the tree in C, explain by the reference.  `writable`: the topmost layer is the upperdir."""
    if dialect == "kernel" and os.geteuid() != 0:
        dialect = "xattr"
    base = Path(tempfile.mkdtemp(dir=scratch))
    inos = InoMap()
    for number, content in enumerate(contents):
        as_directory(content, base / f"l{number}", inos, dialect).close()
    mountpoint = base / "mnt"
    mountpoint.mkdir()
    lowers = [base / f"l{number}" for number in range(len(contents))]
    if writable and dialect != "oci" and len(lowers) > 1:
        (base / "work").mkdir()
        words = f"lowerdir={':'.join(map(str, lowers[1:]))},upperdir={lowers[0]},workdir={base}/work"
    else:
        words = options(lowers, base)
    ovlfs("mount", "-o", words + (",userxattr" if dialect == "xattr" else ""), mountpoint)
    try:
        assert_all_agree(mountpoint, {*paths_of(*lowers), *(path for content in contents for path in content)})
    finally:
        ovlfs("umount", mountpoint)


# ---- what is asked ---------------------------------------------------------------------------------------------------


def test_a_path_in_a_mount_is_not_taken_for_another_thing(scratch: Path, mounted: Mount, ovlfs: Run) -> None:
    lower = scratch / "lower"
    write(lower, etc__passwd="root")
    mountpoint = mounted("-o", options([lower], scratch))
    (scratch / "link").symlink_to(mountpoint / "etc")
    lies = f"lies in the mount of ovlfs on {mountpoint}; say `{mountpoint}"

    for typed in (mountpoint / "etc", scratch / "link"):
        for path in ("passwd", "/passwd"):
            assert ovlfs("explain", typed, path, code=1).stderr == f"ovlfs: {typed}: {lies} /etc/passwd`\n"
        for words in (["stats"], ["trace"], ["diff"], ["commit"], ["fsck"]):
            out = [scratch / "out.tar"] if words == ["commit"] else []
            assert ovlfs(*words, typed, *out, code=1).stderr == f"ovlfs: {typed}: {lies}`\n"
    assert f"{lies}`" in ovlfs("diff", mountpoint / "etc/passwd", code=1).stderr


def test_an_image_or_an_upperdir_in_a_mount_is_one(
    scratch: Path, mounted: Mount, ovlfs: Run, layered_image: Path
) -> None:
    mountpoint = mounted("-o", options(directories(scratch, "lower"), scratch))
    shutil.copy(layered_image, mountpoint)
    inner = mounted("--upper", mountpoint / "up", layered_image)
    (inner / "new").touch()
    ovlfs("umount", inner)

    assert "/etc/hosts is a regular file" in ovlfs("explain", mountpoint / layered_image.name, "/etc/hosts").stdout
    assert ovlfs("diff", mountpoint / "up").stdout == "A /new\n"
