"""How do the costs grow: with layers, with entries of a directory, with files, with the size of an image, during a
copy-up?

Each section makes what it needs on a tmpfs of its own, mounts it with ovlfs (and kernel overlayfs, where that says
how much of it is the machine), and yields rows: what, how much, the reach, whether it is met.  Rounds alternate
between what is compared.
"""

import argparse
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from benchmark import layers, peers

Row = tuple[str, str, str, bool | None]
"""What, how much, the reach, is it met (None: nothing is asked)."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Where, how often, and how much of everything."""

    directory: Path
    rounds: int
    scale: float
    image: Path | None
    big_bytes: int
    layers: tuple[int, int, int]

    def count(self, number: int) -> int:
        """How many, where the row says `number`."""
        return max(2, int(number * self.scale))

    def mounted(
        self, peer: peers.Peer, lower: Sequence[Path], archive: Path | None = None
    ) -> AbstractContextManager[Path]:
        """`peers.mounted` in here."""
        env = peers.environment(self.directory / "ovlfs")
        return peers.mounted(peer, lower, self.directory / "mounted", archive=archive, env=env)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    sections: dict[str, Callable[[Setting], Iterator[Row]]] = {
        "growth": growth, "listing": listing, "scale": many_files, "start": start, "copy-up": copy_up,
    }  # fmt: skip
    parser = argparse.ArgumentParser(prog="scripts/bench-layers", description=__doc__)
    parser.add_argument("--only", default="", metavar="SECTION,...", help=", ".join(sections))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1, help="do this part of the counts (to try the script)")
    parser.add_argument(
        "--image", type=Path, help="docker-archive to start (default: the nine layers of scripts/bench)"
    )
    parser.add_argument(
        "--big", type=int, default=2048, metavar="MIB", help="size of the file whose copy-up is to disturb"
    )
    parser.add_argument(
        "--layers", type=_three, default=(2, 128, 500), metavar="FEW,MANY,MOST", help="default: 2,128,500"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--tmpfs", type=Path, metavar="DIR", help="mount a tmpfs below DIR (default: /tmp)")
    where.add_argument("--disk", type=Path, metavar="DIR", help="everything lies below DIR, on its file system")
    args = parser.parse_args(argv)
    wanted = args.only.split(",") if args.only else list(sections)
    if os.geteuid() != 0 or any(name not in sections for name in wanted) or args.rounds < 1:
        parser.error("root is needed" if os.geteuid() != 0 else f"--only: the sections are {', '.join(sections)}")
    peers.unmount_when_terminated()
    print("| what | measured | reach | |\n|---|---|---|---|", flush=True)
    for name in wanted:
        with peers.scratch(args.tmpfs, args.disk) as directory:
            setting = Setting(directory, args.rounds, args.scale, args.image, args.big << 20, args.layers)
            try:
                for what, measured, reach, met in sections[name](setting):
                    mark = "" if met is None else "ok" if met else "**miss**"
                    print(f"| {what} | {measured} | {reach} | {mark} |", flush=True)
            except peers.BenchError as error:
                print(f"bench-layers: {name}: {error}", file=sys.stderr)
                return 1
    return 0


def _three(text: str) -> tuple[int, int, int]:
    few, many, most = (int(number) for number in text.split(","))
    return few, many, most


def _timed(what: Callable[[], object]) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


# ---- growth: layers --------------------------------------------------------------------------------------------------

_NAMES, _DIRECTORIES = 5000, 100


def _stack(directory: Path, number: int, names: int) -> list[Path]:
    """`number` layers, topmost first: what is looked up is in the bottom one, each other has a directory of its own."""
    bottom = directory / "layer0"
    for name in range(names):
        path = bottom / f"tree/{name % _DIRECTORIES}/f{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    for layer in range(1, number):
        path = directory / f"layer{layer}" / f"own{layer}/file"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    return [directory / f"layer{layer}" for layer in reversed(range(number))]


def growth(setting: Setting) -> Iterator[Row]:
    """Cold lookups: on a fresh mount, after drop_caches, every name once."""
    names = setting.count(_NAMES)
    stacks, archives = {}, {}
    few, many, most = setting.layers
    for number in setting.layers:
        stacks[number] = _stack(setting.directory / f"s{number}", number, names)
        archives[number] = setting.directory / f"s{number}.tar"
        layers.write_archive(stacks[number], archives[number])

    def look_up(mnt: Path) -> float:
        peers.drop_caches()
        paths = [f"{mnt}/tree/{name % _DIRECTORIES}/f{name}" for name in range(names)]
        return _timed(lambda: [os.stat(path) for path in paths])

    for peer in (peers.ARCHIVE, peers.ovlfs(), peers.KERNEL):
        found: dict[int, list[float]] = {few: [], many: []}
        for _ in range(setting.rounds):
            for number, seconds in found.items():
                # Short names: the paths have to fit a page of the kernel's.
                lower = [_short(setting.directory, layer, at) for at, layer in enumerate(stacks[number])]
                with setting.mounted(peer, lower, archives[number]) as mnt:
                    seconds.append(look_up(mnt))
        one, other = (statistics.median(seconds) / names * 1e6 for seconds in found.values())
        judged = peer != peers.KERNEL
        yield (
            f"cold lookup, {few} / {many} layers, {peer.name}",
            f"{one:.1f} / {other:.1f} us, {other / one:.2f} x",
            "1.15 x" if judged else "",
            other <= 1.15 * one if judged else None,
        )
    for peer in (peers.ARCHIVE, peers.ovlfs()):
        began = time.perf_counter()
        with setting.mounted(peer, stacks[most], archives[most]) as mnt:
            took = time.perf_counter() - began
            met = len(os.listdir(mnt)) == most and all(
                (mnt / f"own{at}/file").read_bytes() == b"x" for at in range(1, most)
            )
        yield f"{most} layers, {peer.name}", f"mounted in {took:.2f} s, all seen: {met}", "mounts", met


def _short(directory: Path, layer: Path, number: int) -> Path:
    link = directory / f"{number}"
    link.unlink(missing_ok=True)
    link.symlink_to(layer)
    return link


# ---- listing: entries of a directory ---------------------------------------------------------------------------------


def listing(setting: Setting) -> Iterator[Row]:
    """First listing on a fresh mount, and the next ones, of directories of 25, 50 and 100 thousand entries."""
    layer = setting.directory / "layer"
    sizes = [setting.count(size) for size in (25_000, 50_000, 100_000)]
    for size in sizes:
        (layer / f"{size}").mkdir(parents=True)
        for number in range(size):
            (layer / f"{size}/entry{number}").touch()
    for peer in (peers.ovlfs(), peers.KERNEL):
        cold: dict[int, list[float]] = {size: [] for size in sizes}
        warm: dict[int, list[float]] = {size: [] for size in sizes}
        for _ in range(setting.rounds):
            for size in sizes:
                with setting.mounted(peer, [layer]) as mnt:
                    peers.drop_caches()
                    cold[size].append(_timed(lambda: os.listdir(mnt / f"{size}")))  # noqa: B023
                    os.listdir(mnt / f"{size}")
                    warm[size].append(_timed(lambda: os.listdir(mnt / f"{size}")))  # noqa: B023
        for what, found in (("first", cold), ("warm", warm)):
            medians = [statistics.median(found[size]) for size in sizes]
            growth = (medians[2] / sizes[2]) / (medians[0] / sizes[0])
            judged = peer != peers.KERNEL
            yield (
                f"list {' / '.join(f'{size:,}' for size in sizes)} entries, {what}, {peer.name}",
                (
                    f"{' / '.join(f'{seconds * 1e3:.1f}' for seconds in medians)} ms; an entry of the largest costs "
                    f"{growth:.2f} x one of the smallest"
                ),
                "linear: 1.25 x" if judged else "",
                growth <= 1.25 if judged else None,
            )


# ---- scale: files of a layer -----------------------------------------------------------------------------------------


def _many_tar(path: Path, files: int) -> None:
    with path.open("wb") as out:
        for number in range(files):
            if number % 100 == 0:
                out.write(_header(f"dir{number // 100:05d}", tarfile.DIRTYPE))
            out.write(_header(f"dir{number // 100:05d}/file{number:07d}", tarfile.REGTYPE))
        out.write(bytes(1024))


def _header(name: str, kind: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.mode = kind, 0o755
    return info.tobuf(tarfile.GNU_FORMAT)


def many_files(setting: Setting) -> Iterator[Row]:
    """One layer of a million empty files: scan, mount, and what the daemon holds."""
    from ovlfs.layer.tar import scan  # noqa: PLC0415

    files = setting.count(1_000_000)
    layer, archive = setting.directory / "many.tar", setting.directory / "image.tar"
    _many_tar(layer, files)
    seconds = []
    with layer.open("rb") as tar:
        for _ in range(min(setting.rounds, 3)):
            began = time.perf_counter()
            index = scan(tar.fileno(), 0, layer.stat().st_size, whiteouts=True, where="many.tar")
            seconds.append(time.perf_counter() - began)
    scanned = statistics.median(seconds)
    yield (
        f"scan of {files:,} files",
        f"{scanned:.2f} s, index of {len(index) / files:.0f} bytes a file",
        "3 s",
        scanned < 3,
    )
    _archive_of(layer, archive)
    layer.unlink()
    time.sleep(0.3)  # a file that has just changed is verified, but not remembered
    for what, reach in (("first", None), ("indexed", 0.5)):
        seconds = []
        for _ in range(1 if reach is None else setting.rounds):
            began = time.perf_counter()
            with setting.mounted(peers.ARCHIVE, [], archive) as mnt:
                os.listdir(mnt)
                seconds.append(time.perf_counter() - began)
        took = statistics.median(seconds)
        yield (
            f"mount of it until ls answers, {what}",
            f"{took:.2f} s",
            f"{reach} s" if reach else "",
            took < reach if reach else None,
        )
    with setting.mounted(peers.ARCHIVE, [], archive) as mnt:
        (pid,) = peers.daemons(mnt)
        fresh = _resident(pid)
        peers.run(["find", mnt, "-size", "+0", "-type", "f"])  # stat of everything
        walked = _resident(pid)
        peers.drop_caches()
        time.sleep(3)  # what the kernel forgets it tells in batches
        dropped = _resident(pid)
    for what, (all_of_it, anonymous), reach in (
        ("freshly mounted", fresh, None), ("after a full walk", walked, 200), ("after drop_caches", dropped, None),
    ):  # fmt: skip
        each = (all_of_it - fresh[0]) / files
        met = None if reach is None else all_of_it / files <= reach
        if what == "after drop_caches":
            met = all_of_it - fresh[0] <= (walked[0] - fresh[0]) / 2
        yield (
            f"resident memory of the daemon, {what}",
            (
                f"{all_of_it >> 20} MiB (anonymous: {anonymous >> 20}), {all_of_it / files:.0f} bytes a file; "
                f"since mount {each:.0f}"
            ),
            f"{reach} bytes a file" if reach else "falls back" if met is not None else "",
            met,
        )


def _archive_of(layer: Path, archive: Path) -> None:
    """A docker-archive of one layer that is a tar already."""
    import hashlib  # noqa: PLC0415

    with layer.open("rb") as file:
        diff_id = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
    manifest = [{"Config": "config.json", "RepoTags": ["many:latest"], "Layers": ["layer.tar"]}]
    with tarfile.open(archive, "w") as tar:
        for name, content in (("config.json", config), ("manifest.json", manifest)):
            text = json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
        tar.add(layer, "layer.tar")


def _resident(pid: int) -> tuple[int, int]:
    """Bytes: resident, and of these anonymous (not of the index, which is a file in the page cache)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    return _kilobytes(text, "Rss") << 10, _kilobytes(text, "Anonymous") << 10


def _kilobytes(text: str, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise peers.BenchError(f"smaps_rollup has no {key}")
    return int(found[1])


# ---- start -----------------------------------------------------------------------------------------------------------


def start(setting: Setting) -> Iterator[Row]:
    """From the command until `ls` of the root has answered; the first time with an empty store.  And `ovlfs --help`."""
    source = setting.image or layers.debian() / "image.tar"
    archive = setting.directory / "image.tar"
    peers.run(["cp", source, archive])
    time.sleep(0.3)  # a file that has just changed is verified, but not remembered
    times: dict[str, list[float]] = {"first": [], "indexed": []}
    for _ in range(setting.rounds):
        peers.run(["rm", "-rf", setting.directory / "ovlfs"])
        for seconds in times.values():
            began = time.perf_counter()
            with setting.mounted(peers.ARCHIVE, [], archive) as mnt:
                peers.run(["ls", mnt])
                seconds.append(time.perf_counter() - began)
    with tarfile.open(archive) as tar:
        member = tar.extractfile("manifest.json")
        number = len(json.load(member)[0]["Layers"]) if member else 0
    for (what, seconds), reach in zip(times.items(), (0.6, 0.4), strict=True):
        took = statistics.median(seconds)
        what_it_is = f"mount of {archive.stat().st_size / 1e6:.0f} MB in {number} layers until ls answers, {what}"
        yield what_it_is, f"{took:.2f} s", f"{reach} s (400 MB)", took <= reach
    helps = [
        _timed(lambda: subprocess.run([peers.OVLFS, "--help"], check=True, stdout=subprocess.DEVNULL))
        for _ in range(2 * setting.rounds)
    ]
    took = statistics.median(helps)
    yield "ovlfs --help", f"{took:.3f} s", "0.1 s", took <= 0.1


# ---- copy-up ---------------------------------------------------------------------------------------------------------


def copy_up(setting: Setting) -> Iterator[Row]:
    """Lookups of names that the kernel does not know yet, while another process opens a big file to write.

    The bytes are real (random), as holes are not copied; the size is less than 10 GB where memory is, see --big.
    """
    layer = setting.directory / "layer"
    layer.mkdir()
    block = random.Random(1).randbytes(1 << 20)
    with (layer / "big").open("wb") as file:
        for _ in range(setting.big_bytes >> 20):
            file.write(block)
    (layer / "elsewhere").mkdir()
    for number in range(100):
        (layer / f"elsewhere/f{number}").touch()
    for peer in (peers.ovlfs(), peers.KERNEL):
        quiet: list[float] = []
        disturbed: list[float] = []
        lasted: list[float] = []
        for _ in range(setting.rounds):
            with setting.mounted(peer, [layer]) as mnt:
                os.listdir(mnt / "elsewhere")
                quiet += _lookups(mnt / "elsewhere/quiet", lambda: False, 2000)
                began = time.perf_counter()
                opener = subprocess.Popen(["sh", "-c", 'exec 3>>"$1"', "sh", mnt / "big"])
                disturbed += _lookups(mnt / "elsewhere/disturbed", lambda: opener.poll() is not None)  # noqa: B023
                lasted.append(time.perf_counter() - began)
                if opener.wait() != 0:
                    raise peers.BenchError(f"{peer.name}: the big file could not be opened")
        calm, during = statistics.median(quiet) * 1e6, statistics.median(disturbed) * 1e6
        judged = peer != peers.KERNEL
        yield (
            f"lookups during the copy-up of {setting.big_bytes >> 20} MiB, {peer.name}",
            (
                f"{calm:.1f} us without, {during:.1f} us during, {during / calm:.2f} x "
                f"({len(disturbed) // setting.rounds} lookups, longest {max(disturbed) * 1e3:.1f} ms; "
                f"copy-up {statistics.median(lasted):.2f} s)"
            ),
            "1.10 x" if judged else "",
            during <= 1.1 * calm if judged else None,
        )


def _lookups(prefix: Path, ended: Callable[[], bool], number: int = 1 << 30) -> list[float]:
    """Seconds of each lookup of a name that is not there and was not asked for before."""
    found = []
    for at in range(number):
        path = f"{prefix}{at}"
        began = time.perf_counter()
        os.path.lexists(path)
        found.append(time.perf_counter() - began)
        if at % 8 == 7 and ended():
            break
    return found


if __name__ == "__main__":
    sys.exit(main())
