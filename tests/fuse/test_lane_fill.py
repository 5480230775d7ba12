"""A small file of a layer is in the page cache when its first open returns (native/lane_file.c: filling)."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_overlay import Run, docker_archive
from test_lane_messages import counted, pinned
from test_lane_native import Mount, mounted_by

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.timeout(90)]

FILL_MAX = 65536  # lane_file.c
SIZES = (1, 4095, 4096, 4097, 20000, FILL_MAX)
RACES = 300


def content(size: int) -> bytes:
    """Different in each place, and in each size."""
    return b"".join(b"%d of %d, " % (at, size) for at in range(size // 5 + 1))[:size]


@pytest.fixture
def mount(scratch: Path) -> Iterator[Mount]:
    """Over one layer: files of all sizes, one that is too large, one with a hole, and many to race for."""
    base = scratch / "stack"
    (base / "lower0/race").mkdir(parents=True)
    for size in (*SIZES, FILL_MAX + 1):
        (base / f"lower0/f{size}").write_bytes(content(size))
    with open(base / "lower0/hole", "wb") as file:
        file.seek(30000)
        file.write(b"end")
    for number in range(RACES):
        (base / f"lower0/race/{number}").write_bytes(b"a" * 3000)
    with mounted_by(base, "native") as made:
        os.listdir(made.mnt)
        yield made


def read(path: Path) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()


@pytest.mark.parametrize("size", SIZES)
def test_first_read_costs_the_open_and_the_next_stat_nothing(mount: Mount, size: int) -> None:
    """After a READ the kernel would ask for the access time."""
    path = mount.mnt / f"f{size}"
    path.stat()
    with pinned(path), counted(mount) as messages:
        found = read(path)
        size_told = path.stat().st_size
    assert messages == {"open": 1}
    assert (found, size_told) == (content(size), size)


def test_larger_file_is_read_when_it_is_read(mount: Mount) -> None:
    """Nobody knows whether it will be."""
    path = mount.mnt / f"f{FILL_MAX + 1}"
    path.stat()
    with pinned(path):
        with counted(mount) as messages:
            os.close(os.open(path, os.O_RDONLY))
        assert messages == {"open": 1}
        with counted(mount) as messages:
            assert read(path) == content(FILL_MAX + 1)
    assert messages["read"] >= 1


def test_hole_and_what_was_copied_up_without_its_data(mount: Mount) -> None:
    """The data of a metacopy is still the layer's."""
    assert read(mount.mnt / "hole") == bytes(30000) + b"end"
    path = mount.mnt / "f20000"
    path.chmod(0o600)
    with pinned(path), counted(mount) as messages:
        assert read(path) == content(20000)
    assert messages == {"open": 1}
    assert path.stat().st_mode & 0o777 == 0o600
    upper = mount.base / "upper/f20000"
    assert upper.stat().st_blocks == 0


def test_files_of_a_saved_image(ovlfs: Run, scratch: Path) -> None:
    """A layer that is a piece of a file is read, and filled, like a directory."""
    members = [(f"f{size}", content(size)) for size in SIZES]
    image, mnt = docker_archive(scratch / "image.tar", members), scratch / "mnt"
    mnt.mkdir()
    ovlfs("mount", "--ephemeral", image, mnt)
    for size in SIZES:
        with pinned(mnt / f"f{size}"):
            assert read(mnt / f"f{size}") == content(size)
    operations = json.loads(ovlfs("stats", mnt, "--json").stdout)["operations"]
    ovlfs("umount", mnt)
    assert operations["OPEN"]["native"] == len(SIZES)
    assert "READ" not in operations


def test_pages_that_were_dropped_are_read_again(mount: Mount) -> None:
    """The cache is filled once; who reads later asks."""
    path = mount.mnt / "f20000"
    with open(path, "rb", buffering=0) as file:
        assert file.readall() == content(20000)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert read(path) == content(20000)


def test_nothing_is_filled_over_what_is_in_the_upperdir(mount: Mount) -> None:
    """Open for writing first, then for reading."""
    path = mount.mnt / "f4097"
    with open(path, "r+b", buffering=0) as writer:
        writer.write(b"new")
        assert read(path) == b"new" + content(4097)[3:]
    with open(mount.mnt / "f4096", "rb", buffering=0) as reader:
        with open(mount.mnt / "f4096", "r+b", buffering=0) as writer:
            writer.write(b"new")
        assert reader.readall() == b"new" + content(4096)[3:]
    assert (mount.base / "lower0/f4096").read_bytes() == content(4096)


def test_first_readers_race_with_a_writer(mount: Mount) -> None:
    """Once a write has returned nobody reads what was there before."""
    start = threading.Barrier(3)
    wrong: list[str] = []
    written = [threading.Event() for _ in range(RACES)]

    def write() -> None:
        for number in range(RACES):
            start.wait()
            fd = os.open(mount.mnt / f"race/{number}", os.O_RDWR)
            os.pwrite(fd, b"b" * 3000, 0)
            written[number].set()
            os.close(fd)

    def look() -> None:
        for number in range(RACES):
            start.wait()
            fd = os.open(mount.mnt / f"race/{number}", os.O_RDONLY)
            written[number].wait()
            found = os.pread(fd, 4096, 0)  # by a descriptor from before: a new open would drop old pages
            os.close(fd)
            if found != b"b" * 3000:
                wrong.append(f"{number}: {found[:10]!r}, {len(found)} bytes")

    threads = [threading.Thread(target=what) for what in (write, look, look)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
