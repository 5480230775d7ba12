"""Whatever step of a copy-up fails: the error comes out, the lower object stays in force, and the next try succeeds.

A Stack without FUSE; one after the other, every call that the copy-up makes is made to fail once with EIO.
"""

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ovlfs.ids import ROOT_NODEID
from ovlfs.layer import sys
from ovlfs.layer.tree import Inode
from ovlfs.overlay import attr, copy_up, namei
from ovlfs.overlay.params import Params
from ovlfs.overlay.stack import Stack, open_stack

_OS_CALLS = (
    *("open", "write", "pwrite", "mkdir", "mknod", "symlink", "link", "chown", "chmod", "setxattr", "utime"),
    *("truncate", "ftruncate", "fsync", "copy_file_range", "pread", "readlink", "lseek"),
)
_SYS_CALLS = ("renameat2", "open_beneath", "name_to_handle")


def data(stack: Stack, inode: Inode) -> None:
    """What an open for writing does."""
    _bring(stack, inode, truncate=False)


def truncated(stack: Stack, inode: Inode) -> None:
    """What an open with O_TRUNC does."""
    _bring(stack, inode, truncate=True)


def _bring(stack: Stack, inode: Inode, *, truncate: bool) -> None:
    copy = copy_up.begin(stack, inode, truncate=truncate)
    assert copy is not None
    try:
        copy.run()
    except BaseException:
        copy.abort()
        raise
    copy.finish()


@dataclass(frozen=True)
class Case:
    path: str
    what: Callable[[Stack, Inode], None]
    names: tuple[str, ...] = ()
    first_metadata: bool = False


CASES = {
    "data": Case("deep/er/file", data),
    "sparse": Case("sparse", data),
    "truncate": Case("deep/er/file", truncated),
    "metadata": Case("deep/er/file", copy_up.metadata),
    "empty": Case("deep/empty", copy_up.metadata),
    "directory": Case("deep/er", copy_up.metadata),
    "symlink": Case("deep/link", copy_up.metadata),
    "fifo": Case("deep/fifo", copy_up.metadata),
    "data of a metacopy": Case("deep/er/file", data, first_metadata=True),
    "truncated metacopy": Case("deep/er/file", truncated, first_metadata=True),
    "hard links": Case("hard", data, names=("hard", "deep/hard", "deep/er/hard")),
    "hard links, metadata": Case("hard", copy_up.metadata, names=("hard", "deep/hard", "deep/er/hard")),
}


@pytest.fixture
def lower(scratch: Path) -> Path:
    root = scratch / "lower"
    (root / "deep/er").mkdir(parents=True)
    (root / "deep/er/file").write_bytes(b"content\n" * 1000)
    os.setxattr(root / "deep/er/file", "user.color", b"blue")
    os.chmod(root / "deep/er/file", 0o640)
    (root / "deep/empty").touch()
    os.symlink("target", root / "deep/link")
    os.mkfifo(root / "deep/fifo", 0o600)
    with open(root / "sparse", "wb") as file:
        file.write(b"head")
        file.seek(1 << 20)
        file.write(b"tail")
    (root / "hard").write_bytes(b"linked\n")
    for name in ("deep/hard", "deep/er/hard"):
        os.link(root / "hard", root / name)
    for path in (root / "deep/er/file", root / "deep/er", root / "deep"):
        os.utime(path, ns=(10**18, 10**18))
    return root


def describe(root: Path) -> dict[str, tuple[Any, ...]]:
    found = {}
    for path in sorted(root.rglob("*")):
        st = os.lstat(path)
        content = path.read_bytes() if stat.S_ISREG(st.st_mode) else None
        found[str(path.relative_to(root))] = (st.st_mode, st.st_uid, st.st_ino, st.st_nlink, st.st_mtime_ns, content)
    return found


@contextmanager
def opened(scratch: Path, lower: Path, *, override: bool, again: bool = False) -> Iterator[Stack]:
    """A Stack over `lower`, with a new upperdir, or the one of the last time."""
    for name in ("upper", "work"):
        if not again:
            shutil.rmtree(scratch / name, ignore_errors=True)
            (scratch / name).mkdir()
    params = Params(
        lowerdirs=(bytes(lower),),
        upperdir=bytes(scratch / "upper"),
        workdir=bytes(scratch / "work"),
        metacopy=True,
        xattr_permissions=2 if override else 0,
    )
    stack = open_stack(params)
    try:
        yield stack
    finally:
        stack.close()


class Failing:
    """Counts calls of the operating system, and fails the one that it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fail_at: int | None = None
        self.counting = False
        for module, names in ((os, _OS_CALLS), (sys, _SYS_CALLS)):
            for name in names:
                monkeypatch.setattr(module, name, self._wrap(name, getattr(module, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            if self.counting:
                self.calls.append(name)
                if len(self.calls) - 1 == self.fail_at:
                    self.counting = False  # what cleans up works
                    raise OSError(errno.EIO, "injected")
            return real(*args, **keywords)

        return call

    @contextmanager
    def at(self, number: int | None) -> Iterator[None]:
        self.calls, self.fail_at, self.counting = [], number, True
        try:
            yield
        finally:
            self.counting = False


def get(stack: Stack, path: str) -> Inode:
    inode = namei.walk(stack, path.encode())
    assert inode is not None
    return inode


def content(stack: Stack, inode: Inode) -> bytes:
    """A regular file's content as the mount would show it."""
    if inode.upper and not inode.metacopy:
        with stack.object(inode) as path:
            return Path(os.fsdecode(path)).read_bytes()
    fd, extents = copy_up.data_of(stack, inode)
    try:
        out = bytearray(inode.attr.size)
        for extent in extents:
            out[extent.logical : extent.logical + extent.length] = os.pread(fd, extent.length, extent.physical)
        return bytes(out)
    finally:
        os.close(fd)


def leftovers(scratch: Path) -> list[str]:
    return [name for name in os.listdir(scratch / "work/work") if name != "#whiteout"]


@pytest.mark.root
@pytest.mark.parametrize("override", [False, True], ids=["direct", "override"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_copy_up_with_a_failing_step(
    scratch: Path, lower: Path, monkeypatch: pytest.MonkeyPatch, case: Case, override: bool
) -> None:
    monkeypatch.setenv("OVLFS_PURE_PYTHON", "1")  # a tree that keeps no directories open: descriptors are counted
    before = describe(lower)
    failing = Failing(monkeypatch)
    number = 0
    while True:
        with opened(scratch, lower, override=override) as stack:
            inode = get(stack, case.path)
            if case.first_metadata:
                copy_up.metadata(stack, inode)
            shown, was = inode.attr, (inode.upper, inode.metacopy)
            descriptors = len(os.listdir("/proc/self/fd"))
            error = None
            with failing.at(number):
                try:
                    case.what(stack, inode)
                except OSError as caught:
                    error = caught
            injected = len(failing.calls) > number
            where = f"call {number}, {failing.calls[-1]}" if injected else "no call failed"
            assert leftovers(scratch) == [], where
            assert len(os.listdir("/proc/self/fd")) == descriptors, where
            assert describe(lower) == before, where
            if error is not None:
                assert error.errno == errno.EIO, where
                assert (inode.upper, inode.metacopy) == was, where
                assert inode.attr.size == shown.size, where
                if stat.S_ISREG(shown.mode):
                    assert content(stack, inode) == (lower / case.path).read_bytes(), where
                for name in case.names:
                    assert get(stack, name).nodeid == inode.nodeid, where
                case.what(stack, get(stack, case.path))
            times = "utime" not in where  # a parent's are restored as well as can be: the file is there by then
            check_done(stack, case, lower, where, parent_times=times)
        with opened(scratch, lower, override=override, again=True) as stack:
            check_done(stack, case, lower, f"{where}, mounted again", parent_times=times)
        if not injected:
            break
        number += 1
    assert number >= 3


def check_done(stack: Stack, case: Case, lower: Path, where: str, *, parent_times: bool) -> None:
    """The copy is what it should be: attributes, xattrs, content, all names."""
    inode = get(stack, case.path)
    st = os.lstat(lower / case.path)
    assert inode.upper, where
    empty = case.what is truncated
    shown = inode.attr
    assert (shown.mode, shown.uid, shown.gid) == (st.st_mode, st.st_uid, st.st_gid), where
    if not empty and not case.first_metadata:
        assert shown.mtime_ns == st.st_mtime_ns, where
    if stat.S_ISREG(st.st_mode):
        assert content(stack, inode) == (b"" if empty else (lower / case.path).read_bytes()), where
    for name in case.names:
        other = get(stack, name)
        assert other.upper, where
        assert other.ino == inode.ino, where
        assert other.upper_ino == inode.upper_ino, where
    if case.names:
        assert shown.nlink == len(case.names), where
    for parent in Path(case.path).parents:
        if str(parent) != "." and parent_times:
            assert get(stack, str(parent)).attr.mtime_ns == os.lstat(lower / parent).st_mtime_ns, where


@pytest.mark.root
def test_setattr_of_a_removed_lower_file_is_refused(scratch: Path, lower: Path) -> None:
    """There is no place for its copy any more; the error is the kernel's."""
    from ovlfs.overlay import dir as directory_ops

    with opened(scratch, lower, override=False) as stack:
        inode = get(stack, "sparse")
        stack.tree.ref(inode.nodeid)
        directory_ops.unlink(stack, stack.tree.get(ROOT_NODEID), b"sparse")
        with pytest.raises(OSError) as caught:
            attr.set_(stack, inode, attr.Change(permissions=0o600))
        assert caught.value.errno == errno.EEXIST
        assert leftovers(scratch) == []
