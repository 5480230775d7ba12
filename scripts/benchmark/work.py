"""What work is measured?

A group is done on one fresh mount (empty upperdir, a daemon that knows nothing), one step after the other; the steps
that come before a measured one are done also when they are not asked for.  `cold` steps come right after `sync` and
writing 3 to /proc/sys/vm/drop_caches.  So *cold* is, for every peer: nothing in the page cache, no dentries and no
inodes (of the mount, and of the layers below; what lies on tmpfs stays, it has no other place).  The first step of a
group is colder still: the daemon has not seen the tree.  *warm* is the same step once more.

Reading and copying up follow a walk over everything, so that they are what is measured: names are known then,
contents are not.  The rows *first touch* do the same work on a mount that nobody has walked, the lookups in all layers
included.
"""

import contextlib
import mmap
import os
import random
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmark.peers import KERNEL as REFERENCE
from benchmark.peers import BenchError, mounted, run

_BLOCK = 4096
_CHROOT_ENV = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/tmp",
    "LC_ALL": "C",
    "DEBIAN_FRONTEND": "noninteractive",
}

Action = Callable[[Path], int | None]
"""Does it below a mountpoint.  A number that comes back is the same for all who did the same work."""


@dataclass(frozen=True, slots=True)
class Step:
    """A row of the table.  before: done before, and not measured."""

    name: str
    action: Action
    cold: bool = False
    before: Action | None = None


@dataclass(frozen=True, slots=True)
class Supplies:
    """What the workloads need and what is not measured: made once, outside of the mounts.

    Attributes:
        scale: part of the counts that is done; 1 but for tests.
        files: the regular files of the layers, relative to the mountpoint, sorted.
        small: those among them that are changed.
        debs: directory of packages to install.
    """

    scale: float
    directory: Path
    files: tuple[str, ...]
    small: tuple[str, ...]
    debs: Path | None
    block: bytes = field(default_factory=lambda: random.Random(5).randbytes(1 << 20), repr=False)

    def count(self, number: int) -> int:
        """How many, where the table says `number`."""
        return max(4, int(number * self.scale))


def supplies(directory: Path, layers: tuple[Path, ...], debs: Path | None, scale: float) -> Supplies:
    """Make them below `directory`."""
    files = []
    with mounted(REFERENCE, layers, directory / "reference") as mnt:
        for where, _, names in os.walk(mnt):
            for name in names:
                st = os.lstat(f"{where}/{name}")
                if stat.S_ISREG(st.st_mode):
                    files.append((os.path.relpath(f"{where}/{name}", mnt), st.st_size))
    files.sort()
    # Spread over the tree, and not what programs need to run.
    small = [path for path, size in files if 100 < size < 20000 and not path.startswith(("etc/", "usr/lib/", "var/"))]
    random.Random(3).shuffle(small)
    found = Supplies(scale, directory, tuple(path for path, _ in files), tuple(small), debs)
    _make_tar(directory / "many.tar", found.count(8000))
    _make_tar(directory / "part.tar", found.count(2000))
    _make_sources(directory / "sources", found.count(100))
    if shutil.which("git"):
        _make_repository(directory / "repository", found.count(20), found.count(1500))
    return found


def _make_tar(tar: Path, count: int) -> None:
    rng = random.Random(7)
    with tempfile.TemporaryDirectory(dir=tar.parent) as temporary:
        for number in range(count):
            path = Path(temporary) / f"bench/{number % 40}/{number % 7}/f{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(rng.randbytes(rng.randrange(200, 6000)))
        run(["tar", "cf", tar, "-C", temporary, "bench"])


def _make_sources(directory: Path, count: int) -> None:
    directory.mkdir()
    head = "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include <unistd.h>\n#include <sys/stat.h>\n"
    for number in range(count):
        body = "".join(f'int f{number}_{i}(int x) {{ return printf("%d", x * {i}); }}\n' for i in range(20))
        (directory / f"s{number}.c").write_text(head + body, encoding="ascii")


def _make_repository(directory: Path, commits: int, files: int) -> None:
    """A bare repository; every commit changes a tenth of the files."""
    rng = random.Random(11)
    who = [f"{role}_{what}" for role in ("GIT_AUTHOR", "GIT_COMMITTER") for what in ("NAME", "EMAIL")]
    env = {**os.environ, **dict.fromkeys(who, "bench@example.org"), "GIT_CONFIG_GLOBAL": "/dev/null"}
    tree = directory.with_name("tree")
    run(["git", "init", "-q", "-b", "main", tree])
    for commit in range(commits):
        for number in range(files):
            if commit == 0 or rng.random() < 0.1:
                path = tree / f"{number % 30}/{number}.txt"
                path.parent.mkdir(exist_ok=True)
                path.write_text("".join(f"{rng.random()}\n" for _ in range(rng.randrange(5, 100))), encoding="ascii")
        run(["git", "-C", tree, "add", "."])
        run(["git", "-C", tree, "commit", "-q", "--allow-empty", "-m", f"{commit}"], env=env)
    run(["git", "clone", "-q", "--bare", "--no-local", tree, directory])
    shutil.rmtree(tree)


def groups(made: Supplies) -> list[list[Step]]:
    """All of the work."""
    do = _Actions(made)
    first, second = made.small[: made.count(750)], made.small[made.count(750) : made.count(1500)]
    return [
        [
            Step("walk cold", walk, cold=True),
            Step("walk warm", walk),
            Step("read every file cold", do.read_all),
            Step("read every file warm", do.read_all),
            Step("5000 missing names cold", do.missing),
            Step("5000 missing names warm", do.missing),
        ],
        [Step("first touch: read every file", do.read_all, cold=True)],
        [Step("40 x chroot ls -lR + cat", do.list_in_chroot, cold=True)],
        [Step("untar 8000 files", do.untar), Step("rm -rf 8000 files", do.remove)],
        [
            Step("chmod 750 lower files", lambda mnt: do.each(mnt, first, _chmod), before=walk),
            Step("append to 750 lower files", lambda mnt: do.each(mnt, second, _append)),
            Step("rename 750 chmodded files", lambda mnt: do.each(mnt, first, _rename)),
            Step("unlink 750 appended files", lambda mnt: do.each(mnt, second, os.unlink)),
        ],
        [
            Step("rename 750 lower files", lambda mnt: do.each(mnt, first, _rename), before=walk),
            Step("unlink 750 lower files", lambda mnt: do.each(mnt, second, os.unlink)),
        ],
        [
            Step("first touch: chmod 750 files", lambda mnt: do.each(mnt, first, _chmod), cold=True),
            Step("first touch: append to 750 files", lambda mnt: do.each(mnt, second, _append)),
        ],
        [
            Step("write 512 MiB + fsync", do.write_big),
            Step("read 512 MiB cold", do.read_big, cold=True),
            Step("read 512 MiB warm", do.read_big),
            Step("random 4 KiB write", do.write_randomly),
            Step("random 4 KiB read", do.read_randomly),
            Step("mmap read-write", do.map_randomly),
        ],
        [Step("create + write 2000", do.create), Step("create + write + fsync 200", do.create_synced)],
        [Step("4 parallel finds cold", do.find, cold=True)],
        [Step("4 parallel untars", do.untar_parallel)],
        [Step("git clone", do.clone, before=do.bring_repository)],
        [Step("gcc of 100 files", do.compile, before=do.bring_sources)],
        [Step("apt-get install", do.install, before=do.bring_debs)],
    ]


def walk(mnt: Path) -> int:
    """Stat of every entry; the number of them."""
    count = 0
    for directory, names, files in os.walk(mnt):
        for name in names + files:
            os.lstat(f"{directory}/{name}")
        count += len(names) + len(files)
    return count


def _chmod(path: str) -> None:
    os.chmod(path, 0o640)


def _append(path: str) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


def _rename(path: str) -> None:
    os.rename(path, path + ".r")


@dataclass(frozen=True, slots=True)
class _Actions:
    made: Supplies

    def read_all(self, mnt: Path) -> int:
        total = 0
        for path in self.made.files:
            with open(mnt / path, "rb", buffering=0) as file:
                while block := file.read(1 << 17):
                    total += len(block)
        return total

    def missing(self, mnt: Path) -> None:
        for number in range(self.made.count(5000)):
            with contextlib.suppress(FileNotFoundError):
                os.stat(f"{mnt}/usr/lib/missing{number}")

    def list_in_chroot(self, mnt: Path) -> None:
        for _ in range(self.made.count(40)):
            self.in_chroot(mnt, "sh", "-c", "ls -lR /usr/lib >/dev/null; cat /etc/passwd >/dev/null")

    def in_chroot(self, mnt: Path, *command: str) -> None:
        if not os.path.lexists(mnt / "usr/bin" / command[0]) and not os.path.lexists(mnt / "bin" / command[0]):
            raise BenchError(f"{command[0]} is not in the image")
        run(["chroot", mnt, *command], env=_CHROOT_ENV)

    def untar(self, mnt: Path) -> None:
        run(["tar", "xf", self.made.directory / "many.tar", "-C", _tmp(mnt)])

    def remove(self, mnt: Path) -> None:
        run(["rm", "-rf", mnt / "tmp/bench"])

    @staticmethod
    def each(mnt: Path, paths: tuple[str, ...], what: Callable[[str], None]) -> int:
        for path in paths:
            what(f"{mnt}/{path}")
        return len(paths)

    def write_big(self, mnt: Path) -> None:
        with open(_tmp(mnt) / "big", "wb", buffering=0) as file:
            file.writelines(self.made.block for _ in range(self.made.count(512)))
            os.fsync(file.fileno())

    @staticmethod
    def read_big(mnt: Path) -> int:
        total = 0
        with open(mnt / "tmp/big", "rb", buffering=0) as file:
            while block := file.read(1 << 20):
                total += len(block)
        return total

    def write_randomly(self, mnt: Path) -> None:
        rng = random.Random(1)
        with open(mnt / "tmp/big", "r+b", buffering=0) as file:
            blocks = self.made.count(512) * 256
            for _ in range(self.made.count(20000)):
                os.pwrite(file.fileno(), self.made.block[:_BLOCK], rng.randrange(blocks) * _BLOCK)

    def read_randomly(self, mnt: Path) -> None:
        rng = random.Random(2)
        with open(mnt / "tmp/big", "rb", buffering=0) as file:
            blocks = self.made.count(512) * 256
            for _ in range(self.made.count(40000)):
                os.pread(file.fileno(), _BLOCK, rng.randrange(blocks) * _BLOCK)

    def map_randomly(self, mnt: Path) -> None:
        rng = random.Random(3)
        with open(mnt / "tmp/big", "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            blocks = self.made.count(512) * 256
            for _ in range(self.made.count(40000)):
                offset = rng.randrange(blocks) * _BLOCK
                view[offset] = (view[offset] + 1) & 255
            view.flush()

    def create(self, mnt: Path) -> None:
        tmp = _tmp(mnt)
        for number in range(self.made.count(2000)):
            with open(f"{tmp}/new{number}", "wb", buffering=0) as file:
                file.write(self.made.block[:3000])

    def create_synced(self, mnt: Path) -> None:
        tmp = _tmp(mnt)
        for number in range(self.made.count(200)):
            with open(f"{tmp}/synced{number}", "wb", buffering=0) as file:
                file.write(self.made.block[:3000])
                os.fsync(file.fileno())

    @staticmethod
    def find(mnt: Path) -> None:
        _parallel([["find", mnt / "usr", "-type", "f", "-size", "+1"] for _ in range(4)])

    def untar_parallel(self, mnt: Path) -> None:
        for number in range(4):
            (_tmp(mnt) / f"{number}").mkdir()
        _parallel([["tar", "xf", self.made.directory / "part.tar", "-C", mnt / f"tmp/{number}"] for number in range(4)])

    def bring_repository(self, mnt: Path) -> None:
        run(["cp", "-a", self.made.directory / "repository", _tmp(mnt)])

    def bring_sources(self, mnt: Path) -> None:
        run(["cp", "-a", self.made.directory / "sources", _tmp(mnt)])

    def bring_debs(self, mnt: Path) -> None:
        if self.made.debs is None:
            raise BenchError("no packages for this image")
        run(["cp", "-a", self.made.debs, _tmp(mnt) / "debs"])

    def clone(self, mnt: Path) -> None:
        self.in_chroot(mnt, "git", "clone", "-q", "/tmp/repository", "/tmp/clone")

    def install(self, mnt: Path) -> None:
        self.in_chroot(mnt, "sh", "-c", "exec apt-get -qq install -y --no-install-recommends /tmp/debs/*.deb")

    def compile(self, mnt: Path) -> int:
        self.in_chroot(mnt, "gcc", "--version")
        self.in_chroot(mnt, "sh", "-ec", 'cd /tmp/sources; for source in *.c; do gcc -O1 -c "$source"; done')
        return len(list((mnt / "tmp/sources").glob("*.o")))


def _tmp(mnt: Path) -> Path:
    (mnt / "tmp").mkdir(exist_ok=True)
    return mnt / "tmp"


def _parallel(commands: list[list[str | Path]]) -> None:
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    codes = [process.wait() for process in running]
    if any(codes):
        raise BenchError(f"{commands[0][0]} failed ({max(codes)})")
