"""ovlfs does what kernel overlayfs does: a few seeds of the oracle for each spelling of the lower layers.

`scripts/conformance` runs 200 seeds of each.  A failing seed prints its first difference; `--shrink` finds the
shortest list of operations that still differs.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ORACLE = Path(__file__).parent / "oracle" / "overlay_oracle.py"
OVLFS = f"{sys.executable} -m ovlfs.cli.main"
CLASSES = ("tmpfile", "xattrovl", "collapse", "seekhole", "rename-whiteout", "acl", "whname", "mknod0", "statfs")


def oracle(base: Path, *args: str, options: str = "dev,suid") -> None:
    """Run the oracle; fails with what it printed when ovlfs and the kernel differ."""
    command = [
        sys.executable,
        str(ORACLE),
        "--ref=kernel-full",
        f"--peer={OVLFS} mount -o {options},lowerdir={{lower}},upperdir={{upper}},workdir={{work}} {{mnt}}",
        f"--umount={OVLFS} umount {{mnt}}",
        f"--base={base}",
        *args,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed, 0 failed" in result.stdout


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.parametrize("encoding", ["kernel", "oci", "userxattr", "xwhiteout", "mixed"])
def test_seeds_of_each_encoding_show_no_difference(encoding: str, scratch: Path) -> None:
    """However the lower layers spell whiteouts, the tree behaves as the kernel's."""
    oracle(scratch, "--seeds=0-7", "--ops=300", f"--encoding={encoding}")


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.parametrize("name", CLASSES)
def test_rarer_operations_show_no_difference(name: str, scratch: Path) -> None:
    """Each class of operations that the oracle leaves out by default, beside all the others."""
    oracle(scratch, "--seeds=0-2", "--ops=200", f"--with={name}")


@pytest.mark.fuse
@pytest.mark.uring
def test_seeds_by_io_uring_show_no_difference(scratch: Path, uring_switch: Callable[[bool], None]) -> None:
    """The same requests by another way: what is read, written and answered is the same."""
    uring_switch(True)
    oracle(scratch, "--seeds=0-9", "--ops=300", options="dev,suid,io_uring")
