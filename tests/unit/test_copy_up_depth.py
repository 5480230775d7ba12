"""Copy-up of what lies deep: as deep as a path can be walked, and no recursion in it."""

import os
from pathlib import Path

from ovlfs.ids import ROOT_NODEID
from ovlfs.overlay import copy_up, namei
from ovlfs.overlay.params import Params
from ovlfs.overlay.stack import open_stack

DEPTH = 600


def test_copy_up_below_600_directories(scratch: Path) -> None:
    """All ancestors come up, topmost first."""
    for name in ("lower", "upper", "work"):
        (scratch / name).mkdir()
    here = os.open(scratch / "lower", os.O_RDONLY)
    for _ in range(DEPTH):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    stack = open_stack(
        Params(
            lowerdirs=(bytes(scratch / "lower"),),
            upperdir=bytes(scratch / "upper"),
            workdir=bytes(scratch / "work"),
        )
    )
    inode = stack.tree.get(ROOT_NODEID)
    for part in [b"d"] * DEPTH + [b"file"]:
        inode = namei.get(stack, inode, part)

    copy_up.metadata(stack, inode)

    assert inode.upper
    path = b"/".join([b"d"] * DEPTH + [b"file"])
    assert stack.upper_path(inode.nodeid) == path
    with stack.object(inode) as at:
        assert os.stat(at).st_size == 0
    stack.close()
