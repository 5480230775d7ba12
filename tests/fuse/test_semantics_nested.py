"""An upperdir that lies in another mount of ours: it takes no character device 0:0, so whiteouts are xattrs there."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.fuse, pytest.mark.root]


def test_upper_in_a_mount_has_xattr_whiteouts(
    mounted: Callable[..., Path], ovlfs: Callable[..., object], scratch: Path
) -> None:
    """Deleting and renaming work, survive a remount, and are spelled as the kernel reads them (SEMANTICS row 2)."""
    for name in ("lower", "upper", "work", "below/dir"):
        (scratch / name).mkdir(parents=True)
    (scratch / "below/gone").write_text("a")
    (scratch / "below/dir/file").write_text("b")
    outer = mounted("-o", f"lowerdir={scratch}/lower,upperdir={scratch}/upper,workdir={scratch}/work")
    for name in ("upper", "work"):
        (outer / name).mkdir()
    options = f"lowerdir={scratch}/below,upperdir={outer}/upper,workdir={outer}/work"
    inner = mounted("-o", options)

    (inner / "gone").unlink()
    (inner / "dir").rename(inner / "moved")

    assert sorted(os.listdir(inner)) == ["moved"]
    assert (inner / "moved/file").read_text() == "b"
    for name in ("gone", "dir"):
        assert os.getxattr(outer / "upper" / name, "trusted.overlay.whiteout") == b"y"
    assert os.getxattr(outer / "upper", "trusted.overlay.opaque") == b"x"
    ovlfs("umount", inner)
    again = mounted("-o", options)
    assert sorted(os.listdir(again)) == ["moved"]
    (again / "gone").write_text("new")
    assert (again / "gone").read_text() == "new"
