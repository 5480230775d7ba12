"""One overlay of directories or of an image, mounted by the real command, or by the kernel, as often as wanted."""

import json
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import archives
import processes
from helpers_tree import SHOWN, Tree, look

from ovlfs.fuse import mounting

Run = Callable[..., "subprocess.CompletedProcess[str]"]
KERNEL_OPTIONS = "redirect_dir=on,metacopy=on"


@dataclass
class Overlay:
    """Directories `lower` (the topmost first), `upper` and `work` below a scratch directory, and a mount of them.

    Attributes:
        image: what is mounted instead of `lower`, if it is set.
        how: who mounts: "lane", "no_lane" (both are ovlfs), or "kernel", with redirects and metacopies, too.
    """

    ovlfs: Run
    base: Path
    layers: int = 1
    options: str = ""
    image: Path | None = None
    how: str = "lane"
    _lowers: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lowers = [self.base / f"lower{number}" for number in range(self.layers)]
        for directory in (*self._lowers, self.upper, self.work, self.mnt):
            directory.mkdir(exist_ok=True)

    @property
    def lowers(self) -> list[Path]:
        return self._lowers

    @property
    def lower(self) -> Path:
        """The topmost lower directory."""
        return self._lowers[0]

    @property
    def upper(self) -> Path:
        return self.base / "upper"

    @property
    def work(self) -> Path:
        return self.base / "work"

    @property
    def mnt(self) -> Path:
        return self.base / "mnt"

    def words(self) -> list[str]:
        """The command line of `ovlfs mount`, without the mountpoint."""
        if self.image is not None:
            return ["--upper", str(self.upper), "--work", str(self.work), str(self.image)]
        return [*(["--no-lane"] if self.how == "no_lane" else []), "-o", f"{self._directories()}{self.options}"]

    def _directories(self) -> str:
        lowerdir = ":".join(map(str, self._lowers))
        return f"lowerdir={lowerdir},upperdir={self.upper},workdir={self.work}"

    def mount(self) -> Path:
        if self.how == "kernel":
            kernel_mount(self.mnt, f"{self._directories()}{self.options},{KERNEL_OPTIONS}")
        else:
            self.ovlfs("mount", *self.words(), self.mnt)
        return self.mnt

    def umount(self) -> None:
        """In order, and until the daemon has let go of everything."""
        if self.how == "kernel":
            mounting.unmount(os.fsencode(self.mnt))
        else:
            self.ovlfs("umount", self.mnt)

    def remount(self) -> Path:
        self.umount()
        return self.mount()

    @property
    def mounted(self) -> bool:
        return mounting.find_mount(os.fsencode(self.mnt)) is not None

    def record(self) -> dict[str, Any]:
        """What `ovlfs mounts --json` says of the mount."""
        found = json.loads(self.ovlfs("mounts", "--json").stdout)
        return next(one for one in found if one["mountpoint"] == str(self.mnt))

    @property
    def pid(self) -> int:
        """The daemon's."""
        return int(self.record()["pid"])

    def take_away(self) -> None:
        """Unmount, whatever state it is in."""
        if self.mounted and (self.how == "kernel" or self.ovlfs("umount", self.mnt, code=None).returncode != 0):
            mounting.unmount(os.fsencode(self.mnt), lazy=True)

    def kill(self) -> None:
        """SIGKILL the daemon, and take away what it leaves."""
        processes.kill(self.pid)
        self.take_away()

    # ---- what is in the upperdir

    def own(self, path: str, name: str) -> bytes | None:
        """An xattr of the overlay's own on an upper object."""
        try:
            return os.getxattr(self.upper / path, f"trusted.overlay.{name}", follow_symlinks=False)
        except OSError:
            return None

    def is_whiteout(self, path: str) -> bool:
        st = os.lstat(self.upper / path)
        return (st.st_mode & 0o170000, st.st_rdev) == (0o020000, 0)

    def upper_bytes(self) -> int:
        """What is allocated in the upperdir for regular files."""
        return sum(
            os.lstat(path).st_blocks * 512 for path in self.upper.rglob("*") if path.is_file() and not path.is_symlink()
        )

    def temps(self) -> list[str]:
        """What is in the workdir, but for the whiteout that is shared."""
        return [name for name in os.listdir(self.work / "work") if name != "#whiteout"]

    @contextmanager
    def by_kernel(self, options: str = KERNEL_OPTIONS, *, read_only: bool = False) -> Iterator[Path]:
        """The same directories mounted by kernel overlayfs, in another place; ours must not be mounted meanwhile."""
        assert not self.mounted
        mountpoint = self.base / "kernel"
        mountpoint.mkdir(exist_ok=True)
        layers = ":".join(map(str, [self.upper, *self._lowers]))
        kernel_mount(mountpoint, f"{f'ro,lowerdir={layers}' if read_only else self._directories()},{options}")
        try:
            yield mountpoint
        finally:
            mounting.unmount(os.fsencode(mountpoint))


def kernel_mount(mountpoint: Path, words: str) -> None:
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", words, mountpoint], check=True, timeout=30)


@contextmanager
def overlay(ovlfs: Run, base: Path, **settings: Any) -> Iterator[Overlay]:
    """An Overlay that is unmounted at the end."""
    found = Overlay(ovlfs, base, **settings)
    try:
        yield found
    finally:
        found.take_away()


def fingerprint(*directories: Path) -> Tree:
    """All that a change would show in, of directories: also times, inode numbers and link counts."""
    tree: Tree = {}
    for directory in directories:
        for path, line in look(bytes(directory)).items():
            tree[f"{directory.name}/{path}"] = {key: line[key] for key in (*SHOWN, "ino", "nlink")}
    return tree


def state(path: Path) -> tuple[Any, ...]:
    """All of one file that a change would show in, but for atime."""
    st = os.lstat(path)
    return (path.read_bytes(), st.st_mode, st.st_uid, st.st_gid, st.st_nlink, st.st_mtime_ns, st.st_ctime_ns, st.st_ino,
            sorted(os.listxattr(path)))  # fmt: skip


def docker_archive(path: Path, *layers: Iterable[tuple[str, bytes | str | None]]) -> Path:
    """Write an image of layers, the bottom one first.

    A member is (name, content): None is a directory, a str the path that a hard link leads to.
    """

    def linked(name: str, content: bytes | str | None) -> archives.Content:
        return archives.hard_link(name, content) if isinstance(content, str) else content

    raw = [archives.tar_of((name, linked(name, content)) for name, content in layer) for layer in layers]
    return archives.docker_archive(path, raw)
