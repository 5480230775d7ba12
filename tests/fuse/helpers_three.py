"""The same three directories mounted by ovlfs with the lane, by ovlfs without it, or by kernel overlayfs."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovlfs.fuse import mounting

Run = Callable[..., "subprocess.CompletedProcess[str]"]
USER = 1000


@dataclass
class Three:
    """`how`: lane, no_lane, or kernel.  The upperdir is on a file system that a file can be passed through to."""

    ovlfs: Run
    base: Path
    how: str
    options: str = ""

    def __post_init__(self) -> None:
        for directory in (self.lower, self.upper, self.work, self.mnt):
            directory.mkdir(exist_ok=True)

    @property
    def lower(self) -> Path:
        return self.base / "lower"

    @property
    def upper(self) -> Path:
        return self.base / "upper"

    @property
    def work(self) -> Path:
        return self.base / "work"

    @property
    def mnt(self) -> Path:
        return self.base / "mnt"

    def mount(self) -> Path:
        words = f"lowerdir={self.lower},upperdir={self.upper},workdir={self.work}{self.options}"
        if self.how == "kernel":
            words += ",redirect_dir=on,metacopy=on"
            subprocess.run(["mount", "-t", "overlay", "overlay", "-o", words, self.mnt], check=True, timeout=30)
        else:
            self.ovlfs("mount", *(["--no-lane"] if self.how == "no_lane" else []), "-o", words, self.mnt)
        return self.mnt

    def umount(self) -> None:
        """In order, and until the daemon has let go of the upperdir: nothing may keep it busy."""
        if self.how == "kernel":
            subprocess.run(["umount", self.mnt], check=True, timeout=30)
        else:
            self.ovlfs("umount", self.mnt)

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        """A mount that is gone at the end, whatever happens."""
        try:
            yield self.mount()
        finally:
            if mounting.find_mount(os.fsencode(self.mnt)) is not None:
                subprocess.run(["umount", "-l", self.mnt], check=True, timeout=30)


def as_user(script: str, *arguments: object, code: int = 0) -> str:
    """What Python code prints that runs as an unprivileged user of no other group; its imports are made before."""
    become = f"import ctypes, mmap, os, sys; os.setgroups([]); os.setgid({USER}); os.setuid({USER})\n"
    result: subprocess.CompletedProcess[str] = subprocess.run(
        [sys.executable, "-S", "-c", become + script, *map(str, arguments)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert result.returncode == code, result.stderr
    return result.stdout.strip()


def state(path: Path) -> tuple[Any, ...]:
    """All of a file that a change would show in, but for atime."""
    st = os.lstat(path)
    return (path.read_bytes(), st.st_mode, st.st_uid, st.st_gid, st.st_nlink, st.st_mtime_ns, st.st_ctime_ns, st.st_ino,
            sorted(os.listxattr(path)))  # fmt: skip
