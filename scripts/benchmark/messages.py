"""How many FUSE messages does one operation take?

Each operation is done once in each of 20 directories that the mount has seen, and what the kernel sent meanwhile is
divided by 20; then, on a fresh mount, 20 times in each, because an operation may leave work to the next one (a new name
changes the directory, whose attributes are then asked for).  Counted are the messages that the caller waits for;
FORGET, RELEASE and RELEASEDIR are sent without waiting.  That is exact and free of noise, other than times.  The kernel
counts with the tracepoint fuse:fuse_request_send, for any FUSE file system; `ovlfs stats` counts what the daemon got.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmark import peers
from benchmark.compare import chosen_peers
from ovlfs.fuse.opcodes import name_of

NOT_WAITED_FOR = frozenset({"FORGET", "BATCH_FORGET", "RELEASE", "RELEASEDIR", "INTERRUPT", "NOTIFY_REPLY"})
NEVER = frozenset({"FLUSH", "GETXATTR", "OPENDIR", "RELEASEDIR", "ACCESS"})
"""Not even once for each operation; one that is answered ENOSYS is never sent again."""

_DIRECTORIES, _FILES = 20, 20
_CONTENT = b"y" * 3000
_NOTE = """\
Before a rename the kernel always looks the new name up, also one that it knows to be missing (fs/fuse/dir.c:
fuse_dentry_revalidate(), LOOKUP_RENAME_TARGET): 2 is the least here."""
_TRACING = Path("/sys/kernel/tracing")

Action = Callable[[Path, int], None]
"""Does something below a mountpoint, some times in every directory."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What is done.

    Attributes:
        before: brings the mount to know the names; is not counted.
        allowed: messages one operation may take; None: nothing is said of it.
        allowed_read_only: on a mount without an upperdir; None: not done there.
    """

    name: str
    what: Action
    before: Action
    allowed: int | None
    allowed_read_only: int | None = None


# ---- counting --------------------------------------------------------------------------------------------------------

Count = Callable[[], Counter[str]]
"""What was sent since the mount, by opcode."""


CountAt = Callable[[Path], contextlib.AbstractContextManager[Count]]
"""Begins to count at a mountpoint."""


def _kernel_counter(tracing: Path) -> CountAt:
    """By the tracepoint, in a trace instance of its own, only for this connection."""

    @contextlib.contextmanager
    def counter(mnt: Path) -> Iterator[Count]:
        instance = tracing / f"instances/ovlfs-bench-{os.getpid()}"
        instance.mkdir()
        event = instance / "events/fuse/fuse_request_send"
        try:
            (instance / "buffer_size_kb").write_text("8192", encoding="ascii")
            (event / "filter").write_text(f"connection == {os.stat(mnt).st_dev}", encoding="ascii")
            (event / "enable").write_text("1", encoding="ascii")

            def count() -> Counter[str]:
                lines = (instance / "trace").read_text(encoding="ascii").splitlines()
                opcodes = [line.partition(" opcode ")[2].split() for line in lines if " opcode " in line]
                return Counter(name_of(int(words[0])) for words in opcodes)

            yield count
        finally:
            (event / "enable").write_text("0", encoding="ascii")
            instance.rmdir()

    return counter


@contextlib.contextmanager
def _tracing() -> Iterator[Path]:
    """Where tracefs is mounted; mounted there while it is needed, if it is not."""
    mount = not (_TRACING / "instances").exists()
    if mount:
        peers.run(["mount", "-t", "tracefs", "tracefs", _TRACING])
    try:
        if not (_TRACING / "events/fuse/fuse_request_send").exists():
            raise peers.BenchError("this kernel has no tracepoint fuse:fuse_request_send; use --count stats")
        yield _TRACING
    finally:
        if mount:
            peers.run(["umount", _TRACING])


@contextlib.contextmanager
def stats_counter(mnt: Path) -> Iterator[Count]:
    """By `ovlfs stats`."""

    def count() -> Counter[str]:
        told = subprocess.run([peers.OVLFS, "stats", "--json", mnt], capture_output=True, check=False, text=True)
        if told.returncode != 0:
            raise peers.BenchError(f"ovlfs stats failed: {told.stderr.strip()}")
        operations = json.loads(told.stdout)["operations"]
        return Counter({name: one["requests"] for name, one in operations.items()})

    yield count


# ---- operations ------------------------------------------------------------------------------------------------------


def make_layers(directory: Path) -> tuple[Path, Path]:
    """Two layers that both have every directory: many files in the lower, one in the upper of them."""
    top, bottom = directory / "top", directory / "bottom"
    for number in range(_DIRECTORIES):
        for layer, files in ((top, 1), (bottom, _FILES)):
            (layer / f"d{number}").mkdir(parents=True)
            for file in range(files):
                (layer / f"d{number}/f{file}").write_bytes(_CONTENT)
    return top, bottom


def _each(what: Callable[[str], object], name: str = "f") -> Action:
    """For the files NAME0, NAME1, ... of every directory."""

    def do(mnt: Path, times: int) -> None:
        for directory in range(_DIRECTORIES):
            for file in range(times):
                what(f"{mnt}/d{directory}/{name}{file}")

    return do


def _with_open_file(what: Callable[[int], object]) -> Action:
    """For one upper file, that `_open` has opened."""

    def do(mnt: Path, times: int) -> None:
        fd = int((mnt.parent / "fd").read_text(encoding="ascii"))
        for _ in range(_DIRECTORIES * times):
            what(fd)

    return do


def _open(mnt: Path, _: int = 0) -> None:
    """The descriptor is remembered beside the mountpoint, and closed by `_close`."""
    fd = os.open(mnt / "opened", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, _CONTENT, 0)
    os.fsync(fd)
    (mnt.parent / "fd").write_text(str(fd), encoding="ascii")


def _close(mnt: Path) -> None:
    if (mnt.parent / "fd").exists():
        os.close(int((mnt.parent / "fd").read_text(encoding="ascii")))


# No open(): it asks for the attributes, too.


def _read(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.read(fd, 1 << 16)
    os.close(fd)


def _write(path: str, flags: int, content: bytes) -> None:
    fd = os.open(path, flags | os.O_WRONLY)
    os.write(fd, content)
    os.close(fd)


def _create(path: str) -> None:
    _write(path, os.O_CREAT | os.O_EXCL, _CONTENT)


def _append(path: str) -> None:
    _write(path, os.O_APPEND, b"x")


def _write_and_sync(fd: int) -> None:
    os.pwrite(fd, _CONTENT, 0)
    os.fsync(fd)


def _rename(path: str) -> None:
    os.rename(path, path + ".new")


def _chmod(path: str) -> None:
    os.chmod(path, 0o640)


def _absent(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.stat(path)


def _no_xattr(path: str) -> None:
    with contextlib.suppress(OSError):  # it has none
        os.getxattr(path, "user.none")


def _list(mnt: Path, times: int = 1) -> None:
    for number in range(_DIRECTORIES):
        for _ in range(times):
            os.listdir(f"{mnt}/d{number}")


def _list_once(mnt: Path, _: int) -> None:
    _list(mnt)


def _stat_directories(mnt: Path, _: int = 0) -> None:
    for number in range(_DIRECTORIES):
        os.stat(f"{mnt}/d{number}")


def _stat_all(mnt: Path, times: int) -> None:
    _list(mnt)
    _each(os.stat)(mnt, times)
    _stat_directories(mnt)


def _make(mnt: Path, times: int) -> None:
    """Files n0, ... in the upperdir, whose names the kernel knows."""
    _list(mnt)
    _each(_create, "n")(mnt, times)
    _each(os.stat, "n")(mnt, times)
    _stat_directories(mnt)


def _first_use(mnt: Path) -> None:
    """What the kernel asks once a mount and, told that it is not done, never again."""
    with contextlib.suppress(OSError):  # read-only
        _create(f"{mnt}/first")
        os.unlink(mnt / "first")
    os.listdir(mnt)
    os.access(mnt, os.R_OK)


OPERATIONS = (
    Operation("stat of a known name", _each(os.stat), _stat_all, 0, 0),
    Operation("stat of a name known to be missing", _each(_absent, "missing"), _each(_absent, "missing"), 0, 0),
    Operation("first stat after the directory was listed", _each(os.stat), _list_once, 0, 0),
    Operation("listing a directory", _list, _stat_directories, None),
    Operation("listing again", _list, _list_once, 0, 0),
    Operation("open, read, close of a small file, first time", _each(_read), _stat_all, None),
    Operation("open, read, close of a file already read", _each(_read), _each(_read), 1, 0),
    Operation("create, write 3 KB, close", _each(_create, "new"), _stat_all, 2),
    Operation("mkdir", _each(os.mkdir, "dir"), _stat_all, 2),
    Operation("unlink (upper file)", _each(os.unlink, "n"), _make, 1),
    Operation("unlink (lower file)", _each(os.unlink), _stat_all, 1),
    Operation("rename (upper file)", _each(_rename, "n"), _make, 1),
    Operation("rename (lower file)", _each(_rename), _stat_all, 1),
    Operation("chmod (upper file)", _each(_chmod, "n"), _make, 1),
    Operation("chmod (lower file)", _each(_chmod), _stat_all, 1),
    Operation("write to an open upper file", _with_open_file(lambda fd: os.pwrite(fd, b"x", 7)), _open, 0),
    Operation("fsync of an open upper file", _with_open_file(os.fsync), _open, 1),
    Operation("write and fsync", _with_open_file(_write_and_sync), _open, 1),
    Operation("open, append, close (upper file)", _each(_append, "n"), _make, None),
    Operation("open, append, close (lower file)", _each(_append), _stat_all, None),
    Operation("getxattr", _each(_no_xattr), _stat_all, None),
)


# ---- the table -------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> int:
    """Count and print: a table for each FUSE peer that was asked for, of itself for ovlfs."""
    if not args.peers:
        args.peers = ",".join(["ovlfs", *(f"ovlfs {variant.partition('=')[0]}" for variant in args.variant)])
    if args.pin is not None:
        os.sched_setaffinity(0, {args.pin})
    taking_part = [peer for peer in chosen_peers(args) if peer != peers.KERNEL]
    with contextlib.ExitStack() as stack:
        counter = stats_counter if args.count == "stats" else _kernel_counter(stack.enter_context(_tracing()))
        directory = stack.enter_context(peers.scratch(args.tmpfs, args.disk))
        env = peers.environment(directory / "ovlfs")
        os.environ.update({name: value for name, value in env.items() if name.startswith("OVLFS_")})
        layers = make_layers(directory)
        for peer in taking_part:
            print(f"## {peer.name}\n\n| operation | messages | allowed | | by opcode | 20 times | by opcode |")
            print("|---|---:|---:|---|---|---:|---|")
            for mounted_as, suffix in _modes(peer):
                for operation in OPERATIONS:
                    allowed = operation.allowed_read_only if suffix else operation.allowed
                    if (suffix and allowed is None) or not _wanted(operation.name, args.only):
                        continue
                    try:
                        once = _count(operation, 1, mounted_as, layers, directory, counter)
                        often = _count(operation, _FILES, mounted_as, layers, directory, counter)
                    except (OSError, peers.BenchError) as error:
                        print(f"# {peer.name}: {operation.name}{suffix}: {error}", file=sys.stderr)
                        print(f"| {operation.name}{suffix} | - | | | | | |")
                        continue
                    print(_row(operation.name + suffix, once, often, allowed), flush=True)
            print(f"\n{_NOTE}\n")
    return 0


def _modes(peer: peers.Peer) -> list[tuple[peers.Peer, str]]:
    """Mounted as it is; and ovlfs without an upperdir, too."""
    return [(peer, "")] + ([(_read_only(peer), " (read-only mount)")] if peer.judged else [])


def _wanted(name: str, only: str) -> bool:
    return not only or any(word in name for word in only.split(","))


def _read_only(peer: peers.Peer) -> peers.Peer:
    command = tuple(word.replace(",upperdir={upper},workdir={work}", "") for word in peer.command)
    return replace(peer, command=command)


def _count(
    operation: Operation, times: int, peer: peers.Peer, layers: tuple[Path, Path], directory: Path, counter: CountAt
) -> Counter[str]:
    """What the kernel sent while it was done `times` times in every directory of a fresh mount."""
    env = peers.environment(directory / "ovlfs")
    with peers.mounted(peer, layers, directory / "mounted", env=env) as mnt:
        _first_use(mnt)
        with counter(mnt) as count:
            try:
                operation.before(mnt, times)
                time.sleep(0.05)  # what is sent without waiting
                before = count()
                operation.what(mnt, times)
                time.sleep(0.05)
                after = count()
            finally:
                _close(mnt)
    after.subtract(before)
    return +after


def _row(name: str, once: Counter[str], often: Counter[str], allowed: int | None) -> str:
    met = _waited_for(once) <= (allowed or 0) * _DIRECTORIES and not any(once[opcode] for opcode in NEVER)
    cells = (
        name,
        _number(_waited_for(once) / _DIRECTORIES),
        "" if allowed is None else str(allowed),
        "" if allowed is None else "ok" if met else "**miss**",
        _by_opcode(once, _DIRECTORIES),
        _number(_waited_for(often) / (_DIRECTORIES * _FILES)),
        _by_opcode(often, _DIRECTORIES * _FILES),
    )
    return f"| {' | '.join(cells)} |"


def _waited_for(sent: Counter[str]) -> int:
    return sum(number for opcode, number in sent.items() if opcode not in NOT_WAITED_FOR)


def _by_opcode(sent: Counter[str], times: int) -> str:
    return ", ".join(f"{opcode} {_number(number / times)}" for opcode, number in sent.most_common())


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")
