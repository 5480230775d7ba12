"""The store: ours alone, complete files only, one worker for each blob, nothing left by crashes."""

import hashlib
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from ovlfs.errors import ImageError
from ovlfs.image.files import FileIdentity
from ovlfs.image.store import Store, default_path, write_all

DIGEST = "sha256:" + "ab" * 32


def files_of(store: Store) -> list[str]:
    root = Path(os.fsdecode(store.path))
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_store_directories_are_private(store: Store) -> None:
    for directory, _, _ in os.walk(store.path):
        assert os.stat(directory).st_mode & 0o777 == 0o700


def test_create_then_commit_gives_the_file_its_name(store: Store) -> None:
    """Nothing is visible before the commit, and no temp after it."""
    name = store.layer_name(DIGEST)
    with store.create(name) as temp:
        write_all(temp.fd, b"content")
        assert store.open(name) is None
        store.commit(temp)

    assert files_of(store) == [f"layers/sha256/{'ab' * 32}.tar"]
    assert os.stat(store.full_path(name)).st_mode & 0o777 == 0o600


def test_create_without_commit_leaves_nothing(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.create(b"x") as temp:
        write_all(temp.fd, b"content")
        raise ZeroDivisionError

    assert files_of(store) == []


def test_open_store_sweeps_temps_of_crashed_writers_only(store: Store) -> None:
    """A temp without a lock holder is what a crash left; one that is being written stays."""
    (Path(os.fsdecode(store.path)) / "tmp" / "crashed").write_bytes(b"half")
    with store.create(b"x") as temp:
        Store(store.path)
        left = files_of(store)

        assert left == [os.fsdecode(temp.name)]


def test_store_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """H45: a store that another user owns could serve that user's files."""
    Store(bytes(tmp_path / "s"))
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(ImageError, match=r"store .*/s: belongs to uid \d+, not to uid 4242"):
        Store(bytes(tmp_path / "s"))


def test_store_writable_by_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s").chmod(0o777)
    with pytest.raises(ImageError, match=r"store .*/s: others can write to it \(mode 0777\)"):
        Store(bytes(tmp_path / "s"))


def test_store_readable_by_others_becomes_private(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o755)
    Store(bytes(tmp_path / "s"))

    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700


def test_file_of_somebody_else_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """H45: an index that another user planted is not read."""
    name = store.index_name(DIGEST, "1", "layer")
    store.save_index(name, b"index")
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    with pytest.raises(ImageError, match=r"index/1/layer/sha256/.*\.idx belongs to uid"):
        store.load_index(name)


@pytest.mark.parametrize("plant", ["symlink", "directory", "fifo", "writable"])
def test_file_that_is_no_private_regular_file_is_refused(store: Store, tmp_path: Path, plant: str) -> None:
    """H45: links, fifos and files that others can write do not take the place of an index."""
    name = store.index_name(DIGEST, "1", "layer")
    path = Path(os.fsdecode(store.full_path(name)))
    path.parent.mkdir(parents=True)
    if plant == "symlink":
        (tmp_path / "evil").write_bytes(b"evil")
        path.symlink_to(tmp_path / "evil")
    elif plant == "directory":
        path.mkdir()
    elif plant == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(b"evil")
        path.chmod(0o666)
    with pytest.raises(ImageError, match="store "):
        store.load_index(name)


@pytest.mark.parametrize(
    "damage", [b"", b"short", hashlib.sha256(b"other").digest() + bytes(65504), bytes(65536) + b"index"]
)
def test_load_index_damaged_is_made_again(store: Store, damage: bytes) -> None:
    """A torn or changed index is removed and counts as absent."""
    name = store.index_name(DIGEST, "1", "layer")
    store.save_index(name, b"index")
    loaded = store.load_index(name)
    assert loaded is not None
    assert loaded[:] == b"index"
    path = Path(os.fsdecode(store.full_path(name)))
    path.write_bytes(damage)

    assert store.load_index(name) is None
    assert not path.exists()


def test_index_name_differs_by_version_and_dialect(store: Store) -> None:
    names = {store.index_name(DIGEST, version, dialect) for version in "12" for dialect in ("layer", "rootfs")}

    assert len(names) == 4


def test_recall_only_for_the_same_identity(store: Store, tmp_path: Path) -> None:
    """Any change of the file forgets what was verified."""
    path = tmp_path / "f"
    path.write_bytes(b"content")
    with path.open("rb") as file:
        identity = FileIdentity.of(file.fileno())
        store.remember("what", identity, DIGEST)
        assert store.recall("what", identity) == DIGEST
        assert store.recall("other", identity) is None
        os.utime(path, ns=(1, 1))

        assert store.recall("what", FileIdentity.of(file.fileno())) is None


def test_recall_torn_fact_is_no_fact(store: Store, tmp_path: Path) -> None:
    identity = FileIdentity(1, 2, 3, 4, 5)
    store.remember("what", identity, DIGEST)
    path = Path(os.fsdecode(store.path)) / "verified" / "1-2-what"
    for text in ("", "ovlfs-verified-1 3 4", "ovlfs-verified-0 3 4 5 x", "\xff"):
        path.write_text(text)
        assert store.recall("what", identity) is None


def test_lock_second_thread_waits(store: Store) -> None:
    """Of two threads one does the work; the second is told that it waits."""
    order = []
    held = threading.Event()

    def second() -> None:
        held.wait()
        with store.lock(DIGEST, lambda: order.append("waiting")):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with store.lock(DIGEST):
        held.set()
        while "waiting" not in order:
            time.sleep(0.001)
        order.append("first done")
    thread.join()

    assert order == ["waiting", "first done", "second"]


def _hold(path: bytes, ready: "multiprocessing.synchronize.Event") -> None:
    with Store(path).lock(DIGEST):
        ready.set()
        time.sleep(60)


def test_lock_of_a_killed_process_is_free(store: Store) -> None:
    """A crash releases the lock; nobody has to clean up."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(store.path, ready))
    process.start()
    assert ready.wait(30)
    process.kill()
    process.join()
    with store.lock(DIGEST):
        pass


def test_default_path_follows_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OVLFS_STORE")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "access", lambda _path, _mode: True)
    assert default_path() == b"/var/lib/ovlfs"
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)  # root of a user namespace
    assert default_path() == b"/home/u/.local/share/ovlfs"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_path() == b"/home/u/.local/share/ovlfs"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert default_path() == b"/home/u/.local/share/ovlfs"
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_path() == b"/data/ovlfs"
    monkeypatch.setenv("OVLFS_STORE", "/elsewhere")
    assert default_path() == b"/elsewhere"


def test_store_that_cannot_be_made_names_path_and_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match=r"store .*/file/s: cannot be used: Not a directory"):
        Store(bytes(tmp_path / "file" / "s"))
