"""How many messages does an operation cost, on a mount that has seen the directory?

Counted by the lane, so exact: what a client has to wait for, that is all but FORGET and RELEASE.  Four things the
kernel (measured: Linux 6.18) asks on top, each for a reason, are kept apart here:

    GETATTR of a directory   once after each change in it, when somebody next walks through (dir.c: fuse_dir_changed())
    GETATTR of a file        by fstat, after it was written past us or read (passthrough.c, file.c: invalidate)
    GETXATTR                 of security.capability, at the first write to an inode (file_remove_privs())
    LOOKUP                   of a new name, also when it is known whether it is there, and of the target of a rename
                             (dir.c: fuse_dentry_revalidate(): LOOKUP_EXCL, LOOKUP_RENAME_TARGET)
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_lane_native import Mount, mounted_by

from ovlfs.fuse.opcodes import name_of

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.timeout(60)]

UNAWAITED = ("forget", "batch_forget", "release")
NEVER = ("flush", "opendir", "releasedir", "access")

Messages = dict[str, int]


@contextmanager
def counted(mount: Mount) -> Iterator[Messages]:
    """What the block makes, filled in at its end; it must not have passed Python."""
    found: Messages = {}
    before, *_ = mount.ask()
    yield found
    after, *_ = mount.ask()
    for opcode, (passed_on, answered) in after.items():
        was = before.get(opcode, (0, 0))
        name = name_of(opcode).lower()
        assert name not in NEVER or passed_on + answered == sum(was)
        if name not in UNAWAITED and passed_on + answered > sum(was):
            assert passed_on == was[0], f"{name} is left to Python"
            found[name] = found.get(name, 0) + passed_on + answered - sum(was)


@pytest.fixture
def mount(scratch: Path) -> Iterator[Mount]:
    """With a directory `d` of lower files that was listed and changed once, so that it is in the upperdir."""
    base = scratch / "stack"
    (base / "lower0/d").mkdir(parents=True)
    for number in range(20):
        (base / f"lower0/d/l{number}").write_bytes(b"x" * 3000)
    with mounted_by(base, "native") as made:
        (made.mnt / "d/warm").touch()
        with pinned(made.mnt / "d", *(made.mnt / "d" / name for name in os.listdir(made.mnt / "d"))):
            yield made


@contextmanager
def pinned(*paths: Path) -> Iterator[None]:
    """What is open (O_PATH: without a message) the kernel does not forget, whoever drops caches meanwhile."""
    fds = [os.open(path, os.O_PATH) for path in paths]
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)


def read(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.read(fd, 4096)
    os.close(fd)


def create(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    os.write(fd, b"x" * 3000)
    os.close(fd)


def test_what_the_kernel_has_been_told_costs_nothing(mount: Mount) -> None:
    """First stat after a listing, a second one, a second listing, and a name that is known to be missing."""
    directory = mount.mnt / "d"
    os.stat(directory)
    with counted(mount) as messages:
        for name in (f"l{number}" for number in range(20)):
            os.stat(directory / name)
            os.stat(directory / name)
        os.listdir(directory)
    assert messages == {}

    with counted(mount) as messages:
        assert not (directory / "none").exists()
    assert messages == {"lookup": 1}
    with counted(mount) as messages:
        assert not (directory / "none").exists()
        assert os.access(directory / "l1", os.R_OK)
    assert messages == {}


def test_file_that_was_read_costs_an_open(mount: Mount) -> None:
    """Its pages are kept."""
    path = mount.mnt / "d/l1"
    read(path)
    os.stat(mount.mnt / "d")
    with counted(mount) as messages:
        read(path)
    assert messages == {"open": 1}


def test_file_that_was_read_costs_nothing_on_a_read_only_mount(scratch: Path) -> None:
    """The kernel does not even ask to open (ENOSYS)."""
    base = scratch / "stack"
    (base / "lower0").mkdir(parents=True)
    (base / "lower0/f").write_bytes(b"x" * 3000)
    (base / "lower0/g").write_bytes(b"x" * 3000)
    with mounted_by(base, "read-only") as mount:
        read(mount.mnt / "f")
        with counted(mount) as messages:
            read(mount.mnt / "f")
        assert messages == {}
        os.stat(mount.mnt / "g")
        with counted(mount) as messages:
            read(mount.mnt / "g")
        assert messages == {"read": 1}


CHANGES: dict[str, tuple[Callable[[Path], object], Messages]] = {
    "create": (lambda at: create(at / "new"), {"lookup": 1, "create": 1, "getxattr": 1}),
    "mkdir": (lambda at: (at / "new").mkdir(), {"lookup": 1, "mkdir": 1}),
    "symlink": (lambda at: (at / "new").symlink_to("target"), {"lookup": 1, "symlink": 1}),
    "link": (lambda at: os.link(at / "upper", at / "new"), {"lookup": 1, "link": 1}),
    "unlink": (lambda at: (at / "upper").unlink(), {"unlink": 1}),
    "unlink lower": (lambda at: (at / "l2").unlink(), {"unlink": 1}),
    "rmdir": (lambda at: (at / "dir").rmdir(), {"rmdir": 1}),
    "rename": (lambda at: (at / "upper").rename(at / "known"), {"lookup": 1, "rename": 1}),
    "chmod": (lambda at: (at / "upper").chmod(0o600), {"setattr": 1}),
    "utime": (lambda at: os.utime(at / "upper", ns=(1, 2)), {"setattr": 1}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_change_costs_one_message_and_one_for_a_new_name(mount: Mount, what: str) -> None:
    """Answered natively: directory and object are in the upperdir.  GETATTR of the directory is paid before."""
    directory = mount.mnt / "d"
    create(directory / "upper")
    create(directory / "known")
    (directory / "dir").mkdir()
    for name in ("upper", "known", "dir", "l2", "."):
        os.stat(directory / name)
    act, expected = CHANGES[what]
    with pinned(*(directory / name for name in ("upper", "known", "dir"))), counted(mount) as messages:
        act(directory)
    assert messages == expected

    with counted(mount) as messages:  # and what the kernel asks for afterwards, once
        os.stat(directory / "warm")
    assert messages in ({}, {"getattr": 1})
    with counted(mount) as messages:
        os.stat(directory / "warm")
    assert messages == {}


def test_data_of_an_open_upper_file_costs_nothing(mount: Mount) -> None:
    """Passthrough; only fsync has to be told, and fstat to ask."""
    path = mount.mnt / "d/upper"
    create(path)
    os.stat(mount.mnt / "d")
    with counted(mount) as messages:
        fd = os.open(path, os.O_RDWR)
    assert messages == {"open": 1}
    try:
        os.write(fd, b"first")
        for act, expected in (
            (lambda: os.write(fd, b"more"), {}),
            (lambda: os.pread(fd, 9, 0), {}),
            (lambda: os.fsync(fd), {"fsync": 1}),
            (lambda: os.fstat(fd), {"getattr": 1}),
            (lambda: os.fstat(fd), {}),
        ):
            with counted(mount) as messages:
                act()
            assert messages == expected
    finally:
        with counted(mount) as messages:
            os.close(fd)
    assert messages == {}
