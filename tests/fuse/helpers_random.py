"""Trees of this and that, and operations on them that a seed chooses.

Also a program, for another user: `python helpers_random.py DIRECTORY SEED STEPS`.  It needs only the standard library.
"""

import ctypes
import os
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

AT_FDCWD = -100
RENAME_EXCHANGE = 2


def write(path: Path, content: bytes | str = b"lower\n", mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def renameat2(old: Path, new: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, bytes(old), AT_FDCWD, bytes(new), flags) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def random_run(mnt: Path, seed: int, steps: int) -> None:
    """Do this and that, wherever it is possible."""
    rng = random.Random(seed)

    def somewhere() -> Path:
        found = [Path(at) / name for at, dirs, files in os.walk(mnt) for name in (*dirs, *files)]
        return rng.choice(found) if found and rng.random() < 0.8 else mnt / f"new{rng.randrange(50)}"

    def append(path: Path) -> None:
        with open(path, "ab") as file:
            file.write(rng.randbytes(100))

    actions: list[Callable[[Path], object]] = [
        append,
        append,
        os.unlink,
        os.rmdir,
        shutil.rmtree,
        lambda path: path.mkdir(),
        lambda path: os.chmod(path, rng.randrange(0o1000) | 0o700),
        lambda path: os.chown(path, rng.randrange(9), 9, follow_symlinks=False),
        lambda path: os.truncate(path, rng.randrange(5000)),
        lambda path: os.setxattr(path, "user.x", rng.randbytes(9), follow_symlinks=False),
        lambda path: os.rename(path, somewhere()),
        lambda path: os.rename(path, somewhere()),
        lambda path: os.link(path, somewhere(), follow_symlinks=False),
        lambda path: os.symlink("nowhere", path / "link"),
        lambda path: renameat2(path, somewhere(), RENAME_EXCHANGE),
    ]
    for _ in range(steps):
        with suppress(OSError, shutil.SameFileError):
            rng.choice(actions)(somewhere())


def populate(lower: Path, seed: int) -> None:
    rng = random.Random(seed)
    for number in range(60):
        path = lower / rng.choice(["", "a", "a/b", "a/b/c", "d"]) / f"file{number}"
        write(path, rng.randbytes(rng.randrange(9000)), rng.choice([0o644, 0o600, 0o4755]))
        if rng.random() < 0.2:
            with suppress(OSError):
                os.link(path, lower / "a" / f"link{number}")


if __name__ == "__main__":
    random_run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
