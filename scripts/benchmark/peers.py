"""Who is compared, and how is each of them mounted and unmounted?

Every peer gets the same layers, an empty upperdir and an empty workdir, and is mounted with `suid,dev`, because
programs run in the mount need /dev/null.  A mount is unmounted whatever happens, and the next one waits until the
daemon of the last has ended by itself: nothing is killed.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
OVLFS = str(ROOT / ".venv/bin/ovlfs")
_DIRS = "lowerdir={lower},upperdir={upper},workdir={work}"


class BenchError(Exception):
    """What was to be measured cannot be; one line for the user."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to mount the layers.

    Attributes:
        command: the words of the command; {lower} {lower_ro} {upper} {work} {mnt} {archive} are filled in.
        judged: is this what the reach is about?
    """

    name: str
    command: tuple[str, ...]
    judged: bool = False


KERNEL = Peer("kernel", ("mount", "-t", "overlay", "overlay", "-o", _DIRS, "{mnt}"))
FUSE_OVERLAYFS = Peer("fuse-overlayfs", ("fuse-overlayfs", "-o", f"{_DIRS},suid,dev", "{mnt}"))
UNIONFS = Peer("unionfs-fuse", ("unionfs-fuse", "-o", "cow,suid,dev", "{upper}=RW:{lower_ro}", "{mnt}"))
NO_LANE = Peer("ovlfs --no-lane", (OVLFS, "mount", "--no-lane", "-o", f"{_DIRS},suid,dev", "{mnt}"))
ARCHIVE = Peer(
    "ovlfs archive",
    (OVLFS, "mount", "-o", "suid,dev", "--upper", "{upper}", "--work", "{work}", "{archive}", "{mnt}"),
    judged=True,
)


def ovlfs(name: str = "ovlfs", options: str = "") -> Peer:
    """Ovlfs with the lane, and with more mount options."""
    more = f",{options}" if options else ""
    return Peer(name, (OVLFS, "mount", "-o", f"{_DIRS},suid,dev{more}", "{mnt}"), judged=True)


def available(peers: Sequence[Peer]) -> list[Peer]:
    """Those whose program is installed."""
    return [peer for peer in peers if shutil.which(peer.command[0])]


def environment(directory: Path) -> dict[str, str]:
    """A store, a registry and logs of its own for ovlfs, below `directory`."""
    places = {f"OVLFS_{name}": str(directory / name.lower()) for name in ("STORE", "RUNTIME_DIR", "LOG_DIR")}
    return {**os.environ, **places}


@contextlib.contextmanager
def mounted(
    peer: Peer,
    layers: Sequence[Path],
    directory: Path,
    *,
    archive: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Path]:
    """Mount below `directory`, which is made and removed; layers: topmost first.  Raises BenchError if it cannot be."""
    for name in ("upper", "work", "mnt"):
        (directory / name).mkdir(parents=True)
    mnt = directory / "mnt"
    words = {name: str(directory / name) for name in ("upper", "work", "mnt")}
    words["lower"] = ":".join(map(str, layers))
    words["lower_ro"] = ":".join(f"{layer}=RO" for layer in layers)
    words["archive"] = str(archive)
    try:
        run([word.format(**words) for word in peer.command], env=env)
        if not os.path.ismount(mnt):
            raise BenchError(f"{peer.name}: its command succeeded, but nothing is mounted")
        yield mnt
    finally:
        unmount(mnt)
        shutil.rmtree(directory)


def run(command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
    """Run it silently.  Raises BenchError with the last line of what it said."""
    # Output goes to a file, not a pipe: a daemon that stays would keep a pipe open.
    with open(os.path.join("/tmp", f"ovlfs-bench-{os.getpid()}.out"), "w+b") as said:
        os.unlink(said.name)
        code = subprocess.run(
            command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=said, stderr=said, check=False
        ).returncode
        if code != 0:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines() or [""]
            raise BenchError(f"{Path(command[0]).name} failed ({code}): {lines[-1]}")


def unmount(mnt: Path) -> None:
    """Unmount, and wait for the end of the daemon that served it.  Lazily, if somebody holds on to it for 10 s."""
    for _ in range(100):
        if not os.path.ismount(mnt) and not _is_dead(mnt):
            break
        if subprocess.run(["umount", mnt], stderr=subprocess.DEVNULL, check=False).returncode == 0:
            break
        time.sleep(0.1)
    else:
        subprocess.run(["umount", "-l", mnt], check=True)
    for _ in range(1000):
        if not daemons(mnt):
            return
        time.sleep(0.01)
    raise BenchError(f"a process of {mnt} still runs 10 s after it was unmounted")


def _is_dead(mnt: Path) -> bool:
    """A FUSE mount without a daemon: stat says ENOTCONN, and ismount therefore False."""
    try:
        os.stat(mnt)
    except OSError:
        return True
    return False


def daemons(mnt: Path) -> list[int]:
    """Processes that have the mountpoint on their command line."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):  # it has just ended
                if os.fsencode(mnt) in Path("/proc", entry, "cmdline").read_bytes().split(b"\0"):
                    found.append(int(entry))
    return found


def drop_caches() -> None:
    """Page cache, dentries and inodes, of every file system."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")


def unmount_when_terminated() -> None:
    """SIGTERM ends the script as ^C does: what is mounted is unmounted."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)


@contextlib.contextmanager
def scratch(tmpfs: Path | None, disk: Path | None) -> Iterator[Path]:
    """A directory for layers and uppers: a tmpfs of its own, or one below `disk`."""
    base = disk or tmpfs or Path("/tmp")
    directory = base.resolve() / f"ovlfs-bench-{os.getpid()}"
    directory.mkdir()
    try:
        if disk is None:
            run(["mount", "-t", "tmpfs", "-o", "size=90%,mode=0755", "ovlfs-bench", directory])
        yield directory
    finally:
        if os.path.ismount(directory):
            unmount(directory)
        shutil.rmtree(directory)
