"""What is on disk before a copied-up file shows."""

import os
from pathlib import Path

import pytest

from ovlfs.ids import ROOT_NODEID
from ovlfs.overlay import copy_up, namei
from ovlfs.overlay.params import Params
from ovlfs.overlay.stack import Stack, open_stack


def stack_over(scratch: Path, *, volatile: bool) -> Stack:
    """A stack over one directory with a file of three bytes."""
    for name in ("lower", "upper", "work"):
        (scratch / name).mkdir()
    (scratch / "lower" / "file").write_bytes(b"abc")
    return open_stack(
        Params(
            lowerdirs=(bytes(scratch / "lower"),),
            upperdir=bytes(scratch / "upper"),
            workdir=bytes(scratch / "work"),
            volatile=volatile,
        )
    )


@pytest.mark.parametrize("volatile", [False, True])
def test_data_is_synced_before_the_copy_shows_unless_volatile(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, volatile: bool
) -> None:
    """A crash must not leave an empty file where there was a full one (kernel: ovl_copy_up_file())."""
    stack = stack_over(scratch, volatile=volatile)
    inode = namei.get(stack, stack.tree.get(ROOT_NODEID), b"file")
    synced: list[tuple[bytes, bool]] = []

    def fsync(fd: int) -> None:
        synced.append((os.pread(fd, 10, 0), (scratch / "upper" / "file").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    copy = copy_up.begin(stack, inode)
    assert copy is not None
    copy.run()
    copy.finish()

    assert synced == ([] if volatile else [(b"abc", False)])
    assert (scratch / "upper" / "file").read_bytes() == b"abc"
    stack.close()


def test_metacopy_keeps_its_mark_until_its_data_is_synced(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completing a metacopy in place: while the mark is there, the lower data counts."""
    stack = stack_over(scratch, volatile=False)
    inode = namei.get(stack, stack.tree.get(ROOT_NODEID), b"file")
    copy_up.metadata(stack, inode)
    assert inode.metacopy
    marks: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda fd: marks.append(os.listxattr(fd)))

    copy = copy_up.begin(stack, inode)
    assert copy is not None
    copy.run()
    copy.finish()

    assert len(marks) == 1
    assert any(name.endswith("overlay.metacopy") for name in marks[0])
    assert not inode.metacopy
    assert not any(name.endswith("overlay.metacopy") for name in os.listxattr(scratch / "upper" / "file"))
    stack.close()
