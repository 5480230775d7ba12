"""Running programs as an unprivileged user, and as the root of a user namespace.  For tests that run as root."""

import functools
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers_tree import Tree, read_lines

ROOT = Path(__file__).parent.parent.parent
UID = GID = 1000
FIRST_LENT = 200_000
"""The first of the ids that lend_ids() lends."""


@functools.cache
def interpreter() -> str:
    """A Python that uid 1000 can run: this one, or the system's of the same version, which our modules fit."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for path in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        try:
            result = subprocess.run(
                [path, "-c", "import pyfuse3, ovlfs._native"],
                env=_environment(Path("/")),
                user=UID,
                group=GID,
                extra_groups=[],
                capture_output=True,
            )
        except OSError:
            continue
        if result.returncode == 0:
            return path
    pytest.fail(f"uid {UID} can run neither {sys.executable} nor a {version} of the system")


def _environment(home: Path) -> dict[str, str]:
    site = sysconfig.get_path("purelib")
    return {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/bin:/bin:/usr/sbin:/sbin",
        "PYTHONPATH": f"{ROOT}:{site}:{sysconfig.get_path('platlib')}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(home),
        "XDG_DATA_HOME": str(home / ".local/share"),
        "XDG_STATE_HOME": str(home / ".local/state"),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "XDG_RUNTIME_DIR": str(home / "run"),
        "LANG": "C.UTF-8",
    }


def as_user(script: str, *arguments: object) -> str:
    """What Python code prints that runs as uid 1000, of no other group, in our own namespace.  Its imports are made."""
    become = f"import ctypes, mmap, os, sys; os.setgroups([]); os.setgid({GID}); os.setuid({UID})\n"
    result = subprocess.run(
        [sys.executable, "-S", "-c", become + script, *map(str, arguments)], capture_output=True, text=True, timeout=30
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@dataclass(frozen=True)
class User:
    """uid 1000 with a home and a mount namespace of its own.

    In the namespace /dev/fuse has mode 0666, as udev makes it, whatever this machine has.
    """

    home: Path
    namespace: str

    @classmethod
    @contextmanager
    def at(cls, scratch: Path) -> Iterator["User"]:
        """A user whose home is below a scratch directory; at the end, what is mounted in the namespace is unmounted."""
        for directory in (scratch, scratch.parent):
            os.chmod(directory, 0o711)
        home = scratch / "home"
        for path in (home, home / "run"):
            path.mkdir(exist_ok=True)
            os.chown(path, UID, GID)
            os.chmod(path, 0o700)
        script = (
            "mount -t tmpfs -o mode=755 tmpfs /mnt && mknod -m 666 /mnt/fuse c 10 229 && "
            "mount --bind /mnt/fuse /dev/fuse && echo ready && cat && umount -a -l -t fuse.ovlfs"
        )
        with subprocess.Popen(
            ["unshare", "-m", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder:
            assert holder.stdin is not None
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            yield cls(home, f"/proc/{holder.pid}/ns/mnt")
            holder.stdin.close()  # `cat` ends, and what is still mounted is unmounted

    def run(
        self, *arguments: object, code: int | None = 0, as_root: bool = False, **keywords: Any
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program as the user (or as root, where the user's mounts are)."""
        settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60, "cwd": self.home} | keywords
        prefix = ["nsenter", f"--mount={self.namespace}", "sh", "-c", 'cd "$0" && exec "$@"', str(settings.pop("cwd"))]
        if not as_root:
            prefix += ["setpriv", f"--reuid={UID}", f"--regid={GID}", "--clear-groups"]
        result: subprocess.CompletedProcess[str] = subprocess.run(
            [*prefix, *(str(argument) for argument in arguments)], env=_environment(self.home), **settings
        )
        if code is not None:
            assert result.returncode == code, f"exit code {result.returncode}: {result.stdout}{result.stderr}"
        return result

    def python(self, script: str, *arguments: object, **keywords: Any) -> "subprocess.CompletedProcess[str]":
        """Run Python code as the user."""
        return self.run(interpreter(), "-c", script, *arguments, **keywords)

    def ovlfs(self, *arguments: object, **keywords: Any) -> "subprocess.CompletedProcess[str]":
        """Run the command as the user."""
        return self.run(interpreter(), "-m", "ovlfs.cli.main", *arguments, **keywords)

    def mount(self, name: str, *arguments: object) -> Path:
        """Mount on `name` in the home; who calls this unmounts."""
        mountpoint = self.directory(name)
        self.ovlfs("mount", *arguments, mountpoint)
        return mountpoint

    def directory(self, name: str) -> Path:
        """A directory of the user."""
        path = self.home / name
        path.mkdir(exist_ok=True)
        os.chown(path, UID, GID)
        return path

    def look(self, directory: Path) -> Tree:
        """What the user sees of a tree."""
        program = Path(__file__).with_name("helpers_tree.py")
        return read_lines(self.run(interpreter(), program, directory).stdout)

    def lend_ids(self) -> None:
        """Have /etc/subuid and /etc/subgid, where the user's mounts are, lend the user 65536 ids."""
        script = 'echo "$1" > /mnt/lent && mount --bind /mnt/lent /etc/subuid && mount --bind /mnt/lent /etc/subgid'
        self.run("sh", "-c", script, "sh", f"{UID}:{FIRST_LENT}:65536", as_root=True)

    def in_namespace(self, script: str, *arguments: object, **keywords: Any) -> "subprocess.CompletedProcess[str]":
        """Run a shell script as root of a new user and mount namespace (`unshare -Urm`).

        In the script $PYTHON is an interpreter and $OVLFS the command.  Mounts end with the namespace.
        """
        words = f"PYTHON='{interpreter()}' OVLFS='{interpreter()} -m ovlfs.cli.main'\n"
        return self.run("unshare", "-Urm", "sh", "-euc", words + script, "sh", *arguments, **keywords)
