"""What the lane answers from the live tree in C: the same as Python, with fewer messages, while everything changes."""

import contextlib
import ctypes
import errno
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers_overlay import docker_archive
from helpers_tree import Tree, look

from ovlfs.fuse import mounting

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.timeout(90)]

ROOT = Path(__file__).parent.parent.parent
LOOKUP, GETATTR, READLINK, OPENDIR, RELEASEDIR, READDIR, READDIRPLUS = 1, 3, 5, 27, 29, 28, 44
RACE_S = 10.0
# What one of several threads asks for, another has just taken away; EPERM: a hard link of a directory.
GONE = frozenset(
    (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR, errno.EINVAL, errno.EXDEV, errno.EPERM)
)

# Arguments: base; "native", "python", or "read-only" (native, without upperdir).  Prints "ready"; after each line of
# stdin the messages by opcode (forwarded + extra, answered), nodes, and descriptors of files without a name.  At the
# end checks the tree.
SERVER = """
import json, os, sys, threading, time
from ovlfs.fuse import session
from ovlfs.overlay.params import Params
from ovlfs.overlay.stack import open_stack
base, native = os.fsencode(sys.argv[1]), sys.argv[2] != "python"
lanes = []
make = session.Lane
def keep(*arguments, **settings):
    lanes.append(make(*arguments, **settings))
    return lanes[0]
session.Lane = keep
if not native:
    session._tree_for_lane = lambda stack, operations: None
lowers = tuple(base + b"/" + name for name in sorted(os.listdir(base)) if name.startswith(b"lower"))
above = {} if sys.argv[2] == "read-only" else {"upperdir": base + b"/upper", "workdir": base + b"/work"}
stack = open_stack(Params(lowerdirs=lowers, metacopy=True, **above))
def tell():
    for line in sys.stdin:
        before = None
        while before != lanes[0].stats():  # a request is counted after its reply
            before = lanes[0].stats()
            time.sleep(0.02)
        by_opcode = {code: (one + two, three) for code, (one, two, three) in lanes[0].stats()[0].items()}
        fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        files = [os.readlink(fd) for fd in fds if os.path.islink(fd)]
        print(json.dumps([by_opcode, len(stack.tree), sum(file.endswith(" (deleted)") for file in files)]), flush=True)
threading.Thread(target=tell, daemon=True).start()
session.serve(stack, base + b"/mnt", session.MountOptions(), lambda: print("ready", flush=True))
stack.tree.check()
print("checked", flush=True)
os._exit(0)
"""


@dataclass
class Mount:
    """A stack below `base`, mounted at its mnt by a process of its own."""

    base: Path
    daemon: "subprocess.Popen[str]"

    @property
    def mnt(self) -> Path:
        return self.base / "mnt"

    @property
    def errors(self) -> str:
        """What the daemon has to say: in a file, as a pipe that nobody reads would stop it."""
        return (self.base / "errors").read_text()

    def ask(self) -> tuple[dict[int, tuple[int, int]], int, int]:
        """Messages so far, inodes that are known, descriptors of inodes without a name."""
        assert self.daemon.stdin is not None
        assert self.daemon.stdout is not None
        self.daemon.stdin.write("\n")
        self.daemon.stdin.flush()
        by_opcode, nodes, orphans = json.loads(self.daemon.stdout.readline())
        return {int(code): (one, other) for code, (one, other) in by_opcode.items()}, nodes, orphans

    def unmount(self) -> None:
        """In order; the tree's invariants must hold."""
        mounting.unmount(os.fsencode(self.mnt))
        out, _ = self.daemon.communicate(timeout=20)
        assert (out, self.errors, self.daemon.returncode) == ("checked\n", "", 0)


@contextlib.contextmanager
def mounted_by(base: Path, answers: str) -> Iterator[Mount]:
    for name in ("upper", "work", "mnt"):
        (base / name).mkdir(parents=True, exist_ok=True)
    with open(base / "errors", "wb") as errors:
        daemon = subprocess.Popen(
            [sys.executable, "-c", SERVER, base, answers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    mount = Mount(base, daemon)
    try:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == "ready\n", mount.errors
        yield mount
        if daemon.poll() is None:
            mount.unmount()
    finally:
        if mounting.find_mount(os.fsencode(mount.mnt)) is not None:
            mounting.unmount(os.fsencode(mount.mnt), lazy=True)
        daemon.kill()
        daemon.communicate()


def drop_caches() -> None:
    """Have the kernel forget what it does not use."""
    Path("/proc/sys/vm/drop_caches").write_text("2")


def make_layers(base: Path) -> None:
    """Two lower directories: every type, hard links, merged and hidden names, odd names, times before 1970."""
    first, second = base / "lower0", base / "lower1"
    for directory in (first / "both/deep", first / "one", second / "both/deep/er", second / "two", second / "many"):
        directory.mkdir(parents=True)
    for number in range(700):
        (second / f"many/{number:03}-{'n' * (number % 200)}").touch()
    (first / "both/a").write_bytes(b"upper a")
    (second / "both/a").write_bytes(b"a")
    (second / "both/b").write_bytes(b"b" * 5000)
    os.link(second / "both/b", second / "two/b")
    os.utime(second / "both/b", ns=(-1_500_000_001, -7))
    (first / "one/link").symlink_to("x" * 300)
    (second / "two/\udcff\n").write_bytes(b"odd")
    (second / ("n" * 255)).mkdir()
    os.mkfifo(second / "two/fifo", 0o640)
    os.mknod(second / "two/null", 0o600 | 0o020000, os.makedev(1, 3))
    os.mknod(first / "both/deep/gone", 0o020000, 0)
    (second / "both/deep/gone").touch()
    os.setxattr(first / "one", "trusted.overlay.opaque", b"y")


def use(mnt: Path) -> None:
    """Change things, so that there are copy-ups, metacopies, redirects, whiteouts."""
    (mnt / "both/b").chmod(0o4711)
    (mnt / "two/b").rename(mnt / "two/c")
    (mnt / "both/deep").rename(mnt / "moved")
    (mnt / "both/a").write_bytes(b"written")
    (mnt / "many/000-").unlink()
    (mnt / "new").mkdir()
    (mnt / "new/file").write_bytes(b"new")


def shown(mnt: Path) -> Tree:
    tree = look(bytes(mnt))
    for line in tree.values():
        del line["d_ino"]  # of ".." and mountpoints
    return tree


def errors(mnt: Path) -> list[Any]:
    """What is answered for what is not there."""
    found: list[Any] = []
    for path in ("none", "both/a/none", "n" * 256, "n" * 1000, "both/deep/gone", "many/000-", "two/../nothing/x"):
        try:
            found.append(os.lstat(mnt / path).st_size)
        except OSError as error:
            found.append(error.errno)
    return found


# ---- the same answers ------------------------------------------------------------------------------------------------


def test_native_answers_are_those_of_python(scratch: Path) -> None:
    """Every attribute, name, target and error is the same, from layers, after changes, and after a new mount."""
    seen: dict[str, list[Any]] = {}
    base = scratch / "stack"
    base.mkdir()
    make_layers(base)
    for answers in ("native", "python", "native"):
        with mounted_by(base, answers) as mount:
            if answers == "native" and "native" not in seen:
                lower = shown(mount.mnt), errors(mount.mnt)
                use(mount.mnt)
                changed = shown(mount.mnt), errors(mount.mnt)
                drop_caches()
                assert (shown(mount.mnt), errors(mount.mnt)) == changed
                assert lower != changed
            seen.setdefault(answers, []).append((shown(mount.mnt), errors(mount.mnt)))
    # nothing of ours says what st_ino the root has without native answers
    for one in (seen["native"][0], seen["native"][1], seen["python"][0]):
        del one[0]["."]["ino"]
    assert seen["native"][0] == seen["native"][1] == seen["python"][0]


def test_native_answers_from_a_tar_layer_are_those_of_python(ovlfs: Callable[..., Any], scratch: Path) -> None:
    """The index of a tar, its symlinks, and --debug, under which Python answers everything."""
    archive = docker_archive(scratch / "image.tar", [("d", None), ("d/f", b"x" * 100), ("d/h", "d/f"), ("e", None)])
    with tarfile.open(scratch / "plain.tar", "w") as tar:
        info = tarfile.TarInfo("s")
        info.type, info.linkname = tarfile.SYMTYPE, "d/f"
        tar.addfile(info)
    trees = []
    for number, more in enumerate(([], ["--no-lane"])):
        mnt = scratch / f"mnt{number}"
        mnt.mkdir()
        ovlfs("mount", *more, archive, mnt)
        try:
            trees.append(shown(mnt))
        finally:
            ovlfs("umount", mnt)
        del trees[-1]["."]["ino"]
    assert trees[0] == trees[1]
    assert trees[0]["d/f"]["sha256"] == trees[0]["d/h"]["sha256"] is not None


def test_stat_of_the_root_shows_the_same_inode_whoever_answers(scratch: Path) -> None:
    """SETATTR is Python's, which shows the nodeid; the lane puts the tree's number there."""
    base = scratch / "stack"
    (base / "lower0").mkdir(parents=True)
    with mounted_by(base, "native") as mount:
        before = mount.mnt.stat().st_ino
        mount.mnt.chmod(0o711)
        assert mount.mnt.stat().st_ino == before


# ---- messages --------------------------------------------------------------------------------------------------------


def test_walk_and_missing_names_do_not_reach_python(scratch: Path) -> None:
    """Known layers: all is answered natively, listings are kept, there is no OPENDIR but the first."""
    base = scratch / "stack"
    base.mkdir()
    make_layers(base)
    with mounted_by(base, "native") as mount:
        shown(mount.mnt)
        errors(mount.mnt)
        messages, *_ = mount.ask()
        for opcode in (LOOKUP, GETATTR, READDIRPLUS):
            assert messages[opcode][0] == 0
        assert messages[OPENDIR] == (0, 1)
        assert RELEASEDIR not in messages

        os.listdir(mount.mnt / "many")
        before, *_ = mount.ask()
        os.listdir(mount.mnt / "many")
        after, *_ = mount.ask()
        assert {code: after[code] for code in (READDIR, READDIRPLUS)} == {
            code: before[code] for code in (READDIR, READDIRPLUS)
        }


def test_forgotten_inodes_are_dropped(scratch: Path) -> None:
    """drop_caches: the tree falls back to what is in use, and descriptors of removed files are closed."""
    base = scratch / "stack"
    base.mkdir()
    make_layers(base)
    with mounted_by(base, "native") as mount:
        shown(mount.mnt)
        assert mount.ask()[1] > 700
        (mount.mnt / "x").write_bytes(b"x")
        os.link(mount.mnt / "x", mount.mnt / "y")
        with open(mount.mnt / "x", "rb"):
            (mount.mnt / "x").unlink()
            (mount.mnt / "y").unlink()
            assert mount.ask()[2] >= 1
        until = time.monotonic() + 10
        nodes = orphans = -1
        while time.monotonic() < until and not (0 < nodes < 10 and orphans == 0):
            drop_caches()
            time.sleep(0.05)
            _, nodes, orphans = mount.ask()
        assert nodes < 10  # a directory whose listing is in the page cache can stay
        assert orphans == 0


# ---- while everything changes ----------------------------------------------------------------------------------------

AT_FDCWD, RENAME_EXCHANGE = -100, 2


def exchange(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) != 0:
        raise OSError(ctypes.get_errno(), "exchange")


class Race:
    """Threads that do random things on a mount until the time is over; unexpected errors are kept.

    On a slow machine it goes on until `enough` is done, but not for ever.
    """

    def __init__(self, mnt: Path, enough: int = 20) -> None:
        self.mnt = mnt
        self.enough = enough
        self.until = time.monotonic() + RACE_S
        self.wrong: list[BaseException] = []
        self.done = 0

    def any_path(self, rng: random.Random) -> Path:
        parts = [rng.choice("abcd")]
        while len(parts) < 3 and rng.random() < 0.6:
            parts.append(rng.choice("abcd"))
        return self.mnt.joinpath(*parts)

    def read(self, rng: random.Random) -> None:
        path = self.any_path(rng)
        match rng.randrange(4):
            case 0:
                with os.scandir(path) as entries:
                    for entry in entries:
                        entry.stat(follow_symlinks=False)
            case 1:
                os.listdir(path)
            case 2:
                st = os.lstat(path)
                assert st.st_nlink >= 1 or st.st_mode
            case _:
                os.lstat(path / "none")

    def change(self, rng: random.Random) -> None:
        path, other = self.any_path(rng), self.any_path(rng)
        match rng.randrange(11):
            case 0:
                path.mkdir()
            case 1 | 2:
                path.write_bytes(b"w" * rng.randrange(5000))
            case 3:
                path.unlink()
            case 4:
                path.rmdir()
            case 5 | 6:
                path.rename(other)
            case 7:
                exchange(path, other)
            case 8:
                os.link(path, other, follow_symlinks=False)
            case 9:
                path.chmod(rng.choice((0o700, 0o755, 0o777)))
            case _:
                os.close(os.open(path, os.O_TMPFILE | os.O_RDWR))

    def forget(self, rng: random.Random) -> None:
        drop_caches()
        time.sleep(rng.random() / 5)

    def is_over(self) -> bool:
        late = time.monotonic() - self.until
        return late > 10 * RACE_S or (late > 0 and self.done > self.enough)

    def run(self, action: Callable[[random.Random], None], seed: int) -> None:
        rng = random.Random(seed)
        while not self.is_over() and not self.wrong:
            try:
                action(rng)
            except OSError as error:
                if error.errno not in GONE:
                    self.wrong.append(error)
            except BaseException as error:
                self.wrong.append(error)
            self.done += 1


def test_race_of_readers_and_writers_leaves_the_tree_as_it_is_on_disk(scratch: Path) -> None:
    """Lookups, listings and stats while others create, rename, exchange, unlink, copy up and drop caches."""
    base = scratch / "stack"
    for path in ("a/a", "a/b", "b/a/c", "b/d", "c"):
        (base / "lower0" / path).mkdir(parents=True)
        (base / "lower1" / path).mkdir(parents=True)
        (base / "lower1" / path / "d").write_bytes(b"lower")
    os.link(base / "lower1/a/a/d", base / "lower1/c/b")
    with mounted_by(base, "native") as mount:
        race = Race(mount.mnt, enough=1000)
        actions = [race.read, race.read, race.read, race.change, race.change, race.forget]
        threads = [threading.Thread(target=race.run, args=(one, seed)) for seed, one in enumerate(actions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert race.wrong == []
        assert race.done > race.enough  # in a tenth of the time, where nothing is slow
        known = shown(mount.mnt)
        drop_caches()
        anew = shown(mount.mnt)
    with mounted_by(base, "native") as mount:
        fresh = shown(mount.mnt)
    assert known == anew
    assert without_identity(known) == without_identity(fresh)


# Arguments: mountpoint, what of Race it does, seed.  Prints what went wrong.
RACER = """
import sys
from pathlib import Path
from test_lane_native import Race
race = Race(Path(sys.argv[1]))
race.run(getattr(race, sys.argv[2]), int(sys.argv[3]))
assert race.done > race.enough
print(race.wrong)
"""


@pytest.mark.slow
def test_race_of_processes_leaves_what_the_kernel_shows(scratch: Path) -> None:
    """Creates, writes, renames, exchanges, links, chmods, removals and copy-ups by several processes: at the end the
    mount, a new mount and kernel overlayfs over the same directories show one tree.
    """
    base = scratch / "stack"
    for path in ("a/a", "a/b", "b/a/c", "b/d", "c"):
        (base / "lower0" / path).mkdir(parents=True)
        (base / "lower1" / path).mkdir(parents=True)
        for name in "cd":
            with contextlib.suppress(IsADirectoryError):
                (base / "lower1" / path / name).write_bytes(b"lower " * 1000)
    with mounted_by(base, "native") as mount:
        search = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/fuse")))
        racers = [
            subprocess.Popen(
                [sys.executable, "-c", RACER, mount.mnt, action, str(seed)],
                env=os.environ | {"PYTHONPATH": search}, stdout=subprocess.PIPE, text=True,
            )
            for seed, action in enumerate(("change", "change", "change", "read", "forget"))
        ]  # fmt: skip
        assert [racer.communicate(timeout=60)[0] for racer in racers] == ["[]\n"] * len(racers)
        known = shown(mount.mnt)
    with mounted_by(base, "native") as mount:
        fresh = shown(mount.mnt)
    words = (
        f"lowerdir={base}/lower0:{base}/lower1,upperdir={base}/upper,workdir={base}/work,redirect_dir=on,metacopy=on"
    )
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", words, base / "mnt"], check=True)
    try:
        kernel = shown(base / "mnt")
    finally:
        subprocess.run(["umount", base / "mnt"], check=True)
    assert without_identity(known) == without_identity(fresh)
    assert without_identity(fresh) == without_identity(kernel)
    assert len(known) > 10


def without_identity(tree: Tree) -> Tree:
    """What a new mount must show again; the number of links of a lower file is only known as far as names are."""
    return {path: {key: value for key, value in line.items() if key != "ino"} for path, line in tree.items()}


def every_reader_sees(mount: Mount, check: Callable[[], None], change: Callable[[int], None]) -> None:
    """Two threads `check` while one changes, for a while."""
    until = time.monotonic() + RACE_S / 2
    wrong: list[BaseException] = []

    def run(act: Callable[[int], None]) -> None:
        number = 0
        try:
            while time.monotonic() < until and not wrong:
                number += 1
                act(number)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(act,)) for act in (lambda _: check(), lambda _: check(), change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.fixture(params=["/dev/shm", "/var/tmp"])
def somewhere(request: pytest.FixtureRequest) -> Iterator[Path]:
    """In memory, where one thread does nearly everything, and on a disk, where several do."""
    with tempfile.TemporaryDirectory(prefix="ovlfs-test-", dir=request.param) as base:
        yield Path(base)


@pytest.mark.slow
def test_replacing_a_file_by_rename_is_atomic_for_readers(somewhere: Path) -> None:
    """An open finds one version, whole: never none, never the size of one with the data of another."""
    (somewhere / "lower0").mkdir()
    with mounted_by(somewhere, "native") as mount:
        name, new = mount.mnt / "name", mount.mnt / "new"
        name.write_bytes(b"000000")

        def check() -> None:
            found = name.read_bytes()
            assert found == found[:6] * (1 + int(found[:6]) % 50)

        def change(number: int) -> None:
            new.write_bytes((b"%06d" % number) * (1 + number % 50))
            new.rename(name)

        every_reader_sees(mount, check, change)


@pytest.mark.slow
def test_directory_that_is_exchanged_keeps_its_files(somewhere: Path) -> None:
    """What a directory's descriptor leads to is in that directory, whatever its name is by now."""
    for name in ("A", "B"):
        (somewhere / "lower0" / name).mkdir(parents=True)
    with mounted_by(somewhere, "native") as mount, contextlib.ExitStack() as files:
        at: dict[str, int] = {}
        for name in ("A", "B"):
            (mount.mnt / name / "f").write_bytes(name.encode())
            (mount.mnt / name / "s").symlink_to(name)
            os.setxattr(mount.mnt / name / "f", "user.name", name.encode())
            at[name] = os.open(mount.mnt / name, os.O_RDONLY)
            files.callback(os.close, at[name])

        def check() -> None:
            for name, directory in at.items():
                fd = os.open("f", os.O_RDONLY, dir_fd=directory)
                try:
                    assert (os.read(fd, 10), os.getxattr(fd, "user.name")) == (name.encode(), name.encode())
                finally:
                    os.close(fd)
                assert os.readlink("s", dir_fd=directory) == name

        every_reader_sees(mount, check, lambda _: exchange(mount.mnt / "A", mount.mnt / "B"))
