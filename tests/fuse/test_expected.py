"""Every fixture image, mounted by the real command, equals what the kernel's overlayfs showed (EXPECTED.jsonl).

As root, read-only and with an upperdir; as a user with fusermount3; as the root of a user namespace.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_images import expected, images
from helpers_tree import SHOWN, Tree, differences, inode_numbers_that_differ, look, read_lines
from helpers_users import GID, UID, User

pytestmark = [pytest.mark.fuse, pytest.mark.root]

Mount = Callable[..., Path]

FORMS = [
    ("small-docker20.tar", "v1"),
    ("small-two-docker20.tar.gz:v1", "v1"),
    ("small-two-docker20.tar.gz:v2", "v2"),
    ("small-two-docker20.tar:v1", "v1"),
    ("small-two-docker20.tar:v2", "v2"),
    ("small-skopeo.tar", "v1"),
    ("small-podman.tar", "v1"),
    ("small-oci.tar", "v1"),
    ("small-zstd.oci.tar", "v1"),
    ("small-zstdchunked.oci.tar", "v1"),
    ("small-plain.oci.tar", "v1"),
    ("multi.oci.tar linux/amd64", "v1"),
    ("multi.oci.tar linux/arm64/v8", "v1"),
    ("multi.oci.tar linux/arm/v7", "v1"),
    ("multi.oci.tar linux/386", "v1"),
    ("small-export.tar", "export"),
    ("rootfs.tar.xz", "rootfs"),
]
_QUICK = ("small-docker20.tar", "small-two-docker20.tar:v2", "small-oci.tar", "small-export.tar")
"""One in place, one with the tenth layer, one decompressed, one root file system."""
FORMS_ELSEWHERE = [
    pytest.param(form, what, marks=[] if form in _QUICK else [pytest.mark.slow], id=f"{form}-{what}")
    for form, what in FORMS
]
"""All forms once more, for what hardly depends on the form."""


def arguments(form: str) -> list[str]:
    name, _, platform = form.partition(" ")
    return [*(["--platform", platform] if platform else []), f"{images()}/{name}"]


def expected_tree(what: str) -> Tree:
    return exported() if what == "export" else expected(what)


def exported() -> Tree:
    """`docker export` of small:v1: what docker puts into every container, and without user.* xattrs."""
    tree = expected("v1")
    for line in tree.values():
        line["xattrs"] = {name: value for name, value in line["xattrs"].items() if not name.startswith("user.")}
    return tree


ADDED_BY_DOCKER = {".dockerenv", "dev/console", "dev/pts", "dev/shm", "etc/hostname", "etc/mtab", "etc/resolv.conf"}
CHANGED_BY_DOCKER = {"dev", "etc", "etc/hosts", "."}


def compare(
    found: Tree, what: str, *, keys: tuple[str, ...] = SHOWN, seen: Callable[[Tree], Tree] = lambda tree: tree
) -> None:
    """Fail with the differences between a mount and the truth; `seen`: the part of it that is visible."""
    assert inode_numbers_that_differ(found) == []
    if what == "rootfs":
        compare_base(found, keys)
        return
    tree = seen(expected_tree(what))
    if what == "export":
        assert set(found) >= ADDED_BY_DOCKER
        found = {path: line for path, line in found.items() if path not in ADDED_BY_DOCKER}
        for path in CHANGED_BY_DOCKER:
            tree[path] = {"type": tree[path]["type"]}
        assert found["etc/hosts"]["size"] == 0
        # The first layer's times before 1970 and empty xattrs are docker's disk's, not the archive's.
        tree["opt/zoo/t1969"]["mtime_ns"] = 0
        tree["opt/links/xattr-only"]["xattrs"] = {}
    assert differences(found, tree, keys) == []


def compare_base(found: Tree, keys: tuple[str, ...]) -> None:
    """rootfs.tar.xz is the first layer alone: nothing is hidden yet, and what no layer changed is as in small:v1."""
    assert found["usr/bin/busybox"]["links"] == 268
    tree = expected("v1")
    changed = ("etc", "opt", "srv", "usr/local", "usr/share/zoneinfo/Europe", "root", "home", "var", "tmp")
    same = {
        path: {key: value for key, value in line.items() if key not in ("links", "hardlink")}
        for path, line in tree.items()
        if path != "." and not path.startswith(changed) and not (line["type"] == "dir" and path not in found)
    }
    same = {path: line for path, line in same.items() if line["type"] != "dir"}
    assert len(same) > 300
    assert [text for text in differences(found, same, keys) if "should not be there" not in text] == []


@pytest.mark.parametrize(("form", "what"), FORMS)
def test_mount_read_only_equals_expected(mounted: Mount, form: str, what: str) -> None:
    """Root sees what the kernel's overlayfs shows of the same layers."""
    found = look(bytes(mounted("--ro", *arguments(form))))
    compare(found, what)


@pytest.mark.parametrize(("form", "what"), FORMS_ELSEWHERE)
def test_mount_with_upper_equals_expected(mounted: Mount, scratch: Path, form: str, what: str) -> None:
    """A new upperdir changes nothing in what is seen, not even the root directory."""
    found = look(bytes(mounted("--upper", scratch / "upper", *arguments(form))))
    compare(found, what)
    assert os.listdir(scratch / "upper") == []


# ---- without privileges ----------------------------------------------------------------------------------------------


def may(line: dict[str, object], bit: int) -> bool:
    """Whether uid 1000 has a permission (4 read, 2 write, 1 search), by mode and owner alone."""
    mode = int(str(line["mode"]), 8)
    shift = 6 if line["uid"] == UID else 3 if line["gid"] == GID else 0
    return bool(mode >> shift & bit)


def seen_by_user(tree: Tree) -> Tree:
    """What of a tree uid 1000 can see: nothing below directories that he may not list."""
    out: Tree = {}
    for path, line in sorted(tree.items(), key=lambda item: os.fsencode(item[0])):
        parent = path.rpartition("/")[0] or "."
        while path != "." and parent in tree:
            if not (may(tree[parent], 4) and may(tree[parent], 1)):
                break
            if parent == ".":
                break
            parent = parent.rpartition("/")[0] or "."
        if path == "." or parent == ".":
            out[path] = line
    return out


def check_denied(found: Tree) -> None:
    """What was denied is what the modes deny, and the other way round."""
    for path, line in found.items():
        assert ("sha256" in line["denied"]) == (line["type"] == "file" and not may(line, 4)), path
        assert ("names" in line["denied"]) == (line["type"] == "dir" and not may(line, 4)), path


@pytest.mark.parametrize(("form", "what"), FORMS_ELSEWHERE)
def test_mount_as_user_equals_expected(user: User, form: str, what: str) -> None:
    """A user sees the same tree, root-owned files included; the modes deny him what they say, and nothing else."""
    found = user.look(user.mount("mnt", "--ro", *arguments(form)))
    check_denied(found)
    compare(found, what, seen=seen_by_user)
    if what != "rootfs":
        assert any("sha256" in line["denied"] for line in found.values())


@pytest.mark.parametrize(("form", "what"), FORMS_ELSEWHERE)
def test_mount_as_user_with_upper_equals_expected(user: User, form: str, what: str) -> None:
    """With an upperdir of his own it is the same, and the root directory is still root's."""
    found = user.look(user.mount("mnt", *arguments(form)))
    check_denied(found)
    compare(found, what, seen=seen_by_user)


_LOOK_IN_NAMESPACE = """
program=$1; shift
mkdir -p mnt
$OVLFS mount --ro "$@" mnt >/dev/null
$PYTHON "$program" mnt
$OVLFS umount mnt
"""


@pytest.mark.parametrize(("form", "what"), FORMS_ELSEWHERE)
def test_mount_in_user_namespace_equals_expected(user: User, form: str, what: str) -> None:
    """Root of a user namespace (`unshare -Urm`) sees it too; ids that the namespace does not map are 65534."""
    program = Path(__file__).with_name("helpers_tree.py")
    found = read_lines(user.in_namespace(_LOOK_IN_NAMESPACE, program, *arguments(form)).stdout)
    ids = ("uid", "gid")
    keys = tuple(key for key in SHOWN if key not in ids)
    compare(found, what, keys=keys)
    if what in ("v1", "v2"):
        tree = {
            path: {"type": line["type"]} | {key: line[key] if line[key] == 0 else 65534 for key in ids}
            for path, line in expected(what).items()
        }
        assert differences(found, tree, ("type", *ids)) == []


# ---- inode numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["small-docker20.tar", "small-oci.tar"])
def test_inode_numbers_stay_over_copy_up_and_remount(
    ovlfs: Callable[..., object], mounted: Mount, scratch: Path, form: str
) -> None:
    """st_ino is the same before a copy-up (of metadata, of data), after it, and in the next mount; and is d_ino."""
    words = ["--upper", scratch / "upper", *arguments(form)]
    mountpoint = mounted(*words)
    before = look(bytes(mountpoint))
    changed = [path for path, line in before.items() if line["type"] in ("file", "dir", "fifo", "char")][::7]
    for path in changed:
        os.chmod(mountpoint / path, 0o755)
        if before[path]["type"] == "file":
            with open(mountpoint / path, "ab") as file:
                file.write(b"more\n")
    after = look(bytes(mountpoint))
    assert inode_numbers_that_differ(after) == []
    assert {path: line["ino"] for path, line in after.items()} == {path: line["ino"] for path, line in before.items()}
    ovlfs("umount", mountpoint)
    again = look(bytes(mounted(*words)))
    assert inode_numbers_that_differ(again) == []
    assert {path: line["ino"] for path, line in again.items()} == {path: line["ino"] for path, line in before.items()}
    assert differences(again, after, SHOWN) == []
