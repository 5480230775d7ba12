"""Hard links of lower layers: one file before a copy-up, after it, and in every mount that follows (row 30)."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers_overlay import Overlay, Run, docker_archive, overlay

pytestmark = [pytest.mark.fuse, pytest.mark.root]

NAMES = ("a", "dir/b", "dir/deep/c")


@pytest.fixture(params=["directories", pytest.param("tar", marks=pytest.mark.slow), "tar-link-below"])
def linked(request: pytest.FixtureRequest, ovlfs: Run, scratch: Path) -> Iterator[Overlay]:
    """A mount in which `a`, `dir/b` and `dir/deep/c` are one file."""
    with ExitStack() as stack:
        image = None
        if request.param == "tar":
            members = [("a", b"old\n"), ("dir", None), ("dir/b", "a"), ("dir/deep", None), ("dir/deep/c", "a")]
            image = docker_archive(scratch / "image.tar", members)
        elif request.param == "tar-link-below":
            # docker commit after `ln`: the upper layer says "a link to a", the file is in the lower one.
            image = docker_archive(
                scratch / "image.tar",
                [("a", b"old\n"), ("dir", None), ("dir/b", "a")],
                [("dir", None), ("dir/deep", None), ("dir/deep/c", "a")],
            )
        found = stack.enter_context(overlay(ovlfs, scratch, image=image))
        if image is None:
            (found.lower / "dir/deep").mkdir(parents=True)
            (found.lower / "a").write_bytes(b"old\n")
            for name in NAMES[1:]:
                os.link(found.lower / "a", found.lower / name)
        found.mount()
        yield found


def check_one_file(mnt: Path, content: bytes, names: tuple[str, ...] = NAMES, *, counted: bool = True) -> None:
    """All names are one inode with this content, and (when it is in the upperdir) its link count says so."""
    stats = [os.lstat(mnt / name) for name in names]
    assert {(mnt / name).read_bytes() for name in names} == {content}
    assert len({st.st_ino for st in stats}) == 1
    assert len({st.st_nlink for st in stats}) == 1
    if counted:
        assert stats[0].st_nlink == len(names)


def test_links_of_a_lower_file_are_one_inode(linked: Overlay) -> None:
    """Before anything is written; the link count is that of the file's layer."""
    check_one_file(linked.mnt, b"old\n", counted=False)


@pytest.mark.parametrize("name", ["a", "dir/deep/c"])
def test_write_through_one_name_shows_in_all_also_after_remount(linked: Overlay, name: str) -> None:
    """Nothing that was written through one name is missing from the others."""
    ino = os.lstat(linked.mnt / "a").st_ino
    with open(linked.mnt / name, "ab") as file:
        file.write(b"new\n")
    check_one_file(linked.mnt, b"old\nnew\n")
    linked.remount()
    check_one_file(linked.mnt, b"old\nnew\n")
    assert os.lstat(linked.mnt / "a").st_ino == ino


def test_chmod_through_one_name_shows_in_all_also_after_remount(linked: Overlay) -> None:
    """A copy-up of metadata alone keeps the links, too; so does the copy of the data after it."""
    os.chmod(linked.mnt / "dir/b", 0o600)
    check_one_file(linked.mnt, b"old\n")
    linked.remount()
    check_one_file(linked.mnt, b"old\n")
    assert {os.lstat(linked.mnt / name).st_mode & 0o777 for name in NAMES} == {0o600}
    (linked.mnt / "dir/deep/c").write_bytes(b"later\n")
    linked.remount()
    check_one_file(linked.mnt, b"later\n")


def test_unlink_then_write_keeps_the_other_names(linked: Overlay) -> None:
    """A removed name does not come back when the file is copied up."""
    os.unlink(linked.mnt / "a")
    (linked.mnt / "dir/b").write_bytes(b"new\n")
    for _ in range(2):
        assert not (linked.mnt / "a").exists()
        check_one_file(linked.mnt, b"new\n", NAMES[1:])
        linked.remount()


def test_write_then_unlink_counts_links(linked: Overlay) -> None:
    """The link count of the rest is right, in this mount and the next."""
    (linked.mnt / "a").write_bytes(b"new\n")
    os.unlink(linked.mnt / "dir/b")
    for _ in range(2):
        check_one_file(linked.mnt, b"new\n", ("a", "dir/deep/c"))
        linked.remount()


@pytest.mark.parametrize("remount", [False, True], ids=["live", "remounted"])
@pytest.mark.parametrize("writer", ["a", "moved/deep/c"])
def test_links_survive_the_rename_of_a_directory(linked: Overlay, writer: str, remount: bool) -> None:
    """A directory with some of the names was renamed before the copy-up: they are all found."""
    os.rename(linked.mnt / "dir", linked.mnt / "moved")
    if remount:
        linked.remount()
    (linked.mnt / writer).write_bytes(b"new\n")
    for _ in range(2):
        check_one_file(linked.mnt, b"new\n", ("a", "moved/b", "moved/deep/c"))
        linked.remount()


@pytest.mark.parametrize("remount", [pytest.param(False, marks=pytest.mark.slow), True], ids=["live", "remounted"])
def test_links_survive_nested_renames(linked: Overlay, remount: bool) -> None:
    """Also when the directory in the renamed directory was renamed, and moved out of it."""
    os.rename(linked.mnt / "dir/deep", linked.mnt / "dir/deeper")
    os.rename(linked.mnt / "dir", linked.mnt / "moved")
    if remount:
        linked.remount()
    os.rename(linked.mnt / "moved/deeper", linked.mnt / "out")
    if remount:
        linked.remount()
    (linked.mnt / "a").write_bytes(b"new\n")
    for _ in range(2):
        check_one_file(linked.mnt, b"new\n", ("a", "moved/b", "out/c"))
        linked.remount()


def test_rename_of_one_name_keeps_the_links(linked: Overlay) -> None:
    """A renamed name is still a name of the same file."""
    os.rename(linked.mnt / "a", linked.mnt / "dir/renamed")
    for _ in range(2):
        check_one_file(linked.mnt, b"old\n", ("dir/renamed", "dir/b", "dir/deep/c"))
        linked.remount()
    (linked.mnt / "dir/renamed").write_bytes(b"new\n")
    linked.remount()
    check_one_file(linked.mnt, b"new\n", ("dir/renamed", "dir/b", "dir/deep/c"))


def test_new_link_to_a_lower_file_joins_the_others(linked: Overlay) -> None:
    """link(2) copies the source up first, with its names (row 54)."""
    os.link(linked.mnt / "dir/b", linked.mnt / "fourth")
    names = (*NAMES, "fourth")
    check_one_file(linked.mnt, b"old\n", names)
    linked.remount()
    check_one_file(linked.mnt, b"old\n", names)
    (linked.mnt / "a").write_bytes(b"new\n")
    linked.remount()
    check_one_file(linked.mnt, b"new\n", names)
