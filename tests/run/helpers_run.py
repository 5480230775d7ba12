"""Images to run, ways to run them, and proof that nothing is left."""

import functools
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
from archives import Members, docker_archive, tar
from helpers_images import images

from ovlfs.fuse import mounting

ROOT = Path(__file__).parent.parent.parent
Run = Callable[..., "subprocess.CompletedProcess[str]"]
ENGINES = ("crun", "runc", "chroot")


@functools.cache
def _busybox_layer() -> bytes:
    """A root file system with busybox: what the fixture images have as their first layer."""
    return lzma.decompress((images() / "rootfs.tar.xz").read_bytes())


def make_image(
    path: Path,
    config: dict[str, Any] | None = None,
    members: Members | None = None,
    *,
    architecture: str | None = None,
    system: str = "linux",
) -> Path:
    """A docker archive of busybox, `members` above it, and `config`."""
    layers = [_busybox_layer(), *([tar(members, mode=0o755)] if members else [])]
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    docker_archive(path, layers, tag="it:latest", architecture=architecture or machine, os=system, config=config or {})
    path.chmod(0o644)
    return path


def engine_environment(engine: str, scratch: Path) -> dict[str, str]:
    """An environment in which `ovlfs run` finds this runtime, and no other."""
    programs = scratch / "programs"
    if not programs.exists():
        programs.mkdir()
        for directory in ("/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"):
            for program in Path(directory).iterdir():
                if program.name not in {"crun", "runc"} and not (programs / program.name).is_symlink():
                    (programs / program.name).symlink_to(program)
        found = shutil.which(engine) if engine != "chroot" else None
        if found is not None:
            (programs / engine).symlink_to(found)
        elif engine != "chroot":
            pytest.fail(f"{engine} is missing (scripts/setup --slow installs it)")
    return os.environ | {"PYTHONPATH": str(ROOT), "PATH": str(programs)}


def command_line(engine: str, *arguments: object) -> list[str]:
    """`ovlfs run ...` by this engine."""
    words = [sys.executable, "-m", "ovlfs.cli.main", "run", *(["--chroot"] if engine == "chroot" else [])]
    return [*words, *map(str, arguments)]


def holders(scratch: Path) -> set[int]:
    """The processes of this machine, in whatever namespace, that see a FUSE mount below a directory or its root there.

    A container's own view counts: its root is the same super block, named by its device.
    """
    found = set()
    prefix = os.fsencode(scratch)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            raw = Path(f"/proc/{pid}/mountinfo").read_bytes()
        except (FileNotFoundError, ProcessLookupError, OSError):
            continue
        for entry in mounting.mount_table(raw):
            if entry.fstype == mounting.FSTYPE and (entry.mountpoint.startswith(prefix) or prefix in entry.source):
                found.add(int(pid))
    return found


def nothing_is_left(scratch: Path, store: Path) -> None:
    """Wait until no process holds a mount of ours and nothing temporary is in the store."""
    processes.wait_until(lambda: not holders(scratch), "all mounts and their processes are gone")

    def swept() -> bool:
        return not any(os.listdir(store / name) for name in ("runs", "ephemeral") if (store / name).exists())

    processes.wait_until(swept, "nothing temporary is left in the store")
    processes.wait_until(lambda: not any(record.alive for record in mounting.all_records()), "all daemons have ended")
