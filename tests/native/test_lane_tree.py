"""What the lane answers from a native tree, message by message; and its handlers under sanitizers."""

import errno
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_lane import (
    BATCH_FORGET,
    FORGET,
    IN,
    INIT,
    INIT_IN,
    INIT_OUT,
    LOOKUP,
    OUT,
    READDIR,
    READDIRPLUS,
    Bench,
    is_readable,
    laned,
    reply,
    request,
)

from ovlfs._native import Lane, Tree
from ovlfs.ids import ROOT_NODEID, Name
from ovlfs.layer.directory import TRUSTED, DirLayer, InoMap

NATIVE = Path(__file__).resolve().parents[2] / "native"
GETATTR, READLINK, REMOVEXATTR, OPENDIR, FSYNCDIR, ACCESS, RENAME2 = 3, 5, 24, 27, 30, 34, 45
READ_IN = struct.Struct("=QQIIQII")
DIRENT = struct.Struct("=QQII")
ENTRY_BYTES, ATTR_BYTES = 128, 88
NO_OPENDIR, PARALLEL_DIROPS, CACHE_SYMLINKS, READDIRPLUS_AUTO, DO_READDIRPLUS = (
    1 << 24,
    1 << 18,
    1 << 23,
    1 << 14,
    1 << 13,
)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    lower = tmp_path / "lower"
    (lower / "d").mkdir(parents=True)
    (lower / "f").write_bytes(b"12345")
    layer = DirLayer(bytes(lower), InoMap(), prefixes=(TRUSTED,))
    yield Tree([None, layer])
    layer.close()


@pytest.fixture
def bench(tree: Tree) -> Iterator[Bench]:
    with laned(tree=tree) as made:
        yield made


def ask(bench: Bench, opcode: int, body: bytes = b"", nodeid: int = 1) -> tuple[int, bytes]:
    """The errno and the body of a native answer."""
    bench.kernel.send(request(opcode, 2, body, nodeid))
    message = bench.kernel.recv(1 << 20)
    length, error, unique = OUT.unpack_from(message)
    assert (length, unique) == (len(message), 2)
    return -error, message[OUT.size :]


def passed_on(bench: Bench) -> bytes:
    return bench.session.recv(1 << 20)


def agree(bench: Bench, offered: int) -> int:
    """The flags that the kernel is told in INIT when it offers these, and libfuse wants none."""
    bench.kernel.send(request(INIT, 4, INIT_IN.pack(7, 38, 65536, offered, 0)))
    passed_on(bench)
    bench.session.send(reply(4, 0, INIT_OUT.pack(7, 38, 65536, 0, 0, 0, 65536, 0, 0, 0, 0)))
    return int(INIT_OUT.unpack_from(bench.kernel.recv(4096), OUT.size)[3])


def test_lookup_is_counted_and_a_missing_name_is_negative(bench: Bench, tree: Tree) -> None:
    """Each positive answer is one lookup; a negative one has nodeid 0 and a lifetime."""
    for _ in range(2):
        error, body = ask(bench, LOOKUP, b"f\0")
        assert (error, len(body)) == (0, ENTRY_BYTES)
    nodeid, _, entry_valid, attr_valid, _, _, ino, size = struct.unpack_from("=QQQQIIQQ", body)
    assert (nodeid, size) == (ino, 5)
    assert entry_valid == attr_valid == 86400
    assert tree.get(tree.lookup(ROOT_NODEID, Name(b"f"))).nlookup == 2

    error, body = ask(bench, LOOKUP, b"none\0")
    assert (error, struct.unpack_from("=QQQQ", body)) == (0, (0, 0, 86400, 0))
    assert ask(bench, LOOKUP, b"x\0", nodeid) == (errno.ENOTDIR, b"")
    assert ask(bench, LOOKUP, b"n" * 256 + b"\0") == (errno.ENAMETOOLONG, b"")
    assert ask(bench, LOOKUP, b"x\0", 12345) == (errno.ESTALE, b"")
    assert bench.lane.stats()[0] == {LOOKUP: (0, 0, 6)}


@pytest.mark.parametrize(
    ("opcode", "body"),
    [(LOOKUP, b""), (LOOKUP, b"\0"), (LOOKUP, b"no end"), (LOOKUP, b"a\0b\0"), (LOOKUP, b"a/b\0"), (GETATTR, b"x" * 15),
     (READDIR, b"x" * 39), (READDIRPLUS, b""), (FSYNCDIR, b"x" * 15)],
)  # fmt: skip
def test_malformed_request_is_answered_eio(bench: Bench, opcode: int, body: bytes) -> None:
    """Nothing is read beyond a message, and the session does not see it."""
    assert ask(bench, opcode, body) == (errno.EIO, b"")
    assert not is_readable(bench.session.fileno(), 0)


def test_forget_is_done_here_only_while_python_has_nothing(bench: Bench, tree: Tree) -> None:
    """Python holds nodeids across its steps; what it holds must not be dropped."""
    nodeid = struct.unpack_from("=Q", ask(bench, LOOKUP, b"f\0")[1])[0]
    bench.kernel.send(request(REMOVEXATTR, 4, b"user.x\0"))
    passed_on(bench)
    forget = request(FORGET, 0, struct.pack("=Q", 1), nodeid)
    bench.kernel.send(forget)
    assert passed_on(bench) == forget

    bench.session.send(reply(4))
    bench.kernel.recv(4096)
    batch = struct.pack("=IIQQ", 1, 0, nodeid, 1)
    bench.kernel.send(request(BATCH_FORGET, 0, batch))
    assert ask(bench, ACCESS, b"x" * 8) == (errno.ENOSYS, b"")  # so the one before is done
    assert [inode.nodeid for inode in tree] == [ROOT_NODEID]


def test_forget_of_what_lost_a_name_is_done_here_too(bench: Bench, tree: Tree) -> None:
    """The tree itself keeps what leads to such inodes, so Python need not hear of them; unknown nodeids are ignored."""
    first = struct.unpack_from("=Q", ask(bench, LOOKUP, b"f\0")[1])[0]
    second = struct.unpack_from("=Q", ask(bench, LOOKUP, b"d\0")[1])[0]
    tree.remove(ROOT_NODEID, Name(b"f"))
    bench.kernel.send(request(BATCH_FORGET, 0, struct.pack("=IIQQQQQQ", 3, 0, second, 1, first, 1, 999, 1)))

    assert ask(bench, ACCESS, b"x" * 8) == (errno.ENOSYS, b"")  # so the one before is done
    assert not is_readable(bench.session.fileno(), 0)
    assert {inode.nodeid for inode in tree} == {ROOT_NODEID}


def test_no_layer_is_asked_while_a_rename_is_under_way(bench: Bench) -> None:
    """The path of a directory may not be what the tree thinks; what is in memory is answered all the same."""
    nodeid = struct.unpack_from("=Q", ask(bench, LOOKUP, b"d\0")[1])[0]
    bench.kernel.send(request(RENAME2, 6, b"x" * 16 + b"a\0b\0"))
    passed_on(bench)
    assert ask(bench, LOOKUP, b"d\0")[0] == 0
    bench.kernel.send(request(LOOKUP, 8, b"x\0", nodeid))
    assert passed_on(bench) == request(LOOKUP, 8, b"x\0", nodeid)

    for unique in (8, 6):
        bench.session.send(reply(unique, errno.EIO))
        assert bench.kernel.recv(4096) == reply(unique, errno.EIO)
    assert ask(bench, LOOKUP, b"x\0", nodeid)[0] == 0


@pytest.mark.parametrize("opcode", [READDIR, READDIRPLUS])
def test_listing_has_dots_then_names_in_the_order_of_their_cookies(bench: Bench, tree: Tree, opcode: int) -> None:
    """Offsets can be gone on from; READDIRPLUS counts what it gives, but for the dots."""
    plus = ENTRY_BYTES if opcode == READDIRPLUS else 0
    found = []
    offset = 0
    while True:
        error, body = ask(bench, opcode, READ_IN.pack(0, offset, plus + 40, 0, 0, 0, 0))
        assert error == 0
        if not body:
            break
        ino, offset, length, kind = DIRENT.unpack_from(body, plus)
        found.append((body[plus + DIRENT.size :][:length], offset, kind))
        assert len(body) == (plus + DIRENT.size + length + 7) // 8 * 8
        assert tree.get(ROOT_NODEID).ino == ino or length == 1
    assert [(name, offset) for name, offset, _ in found[:2]] == [(b".", 1), (b"..", 2)]
    assert {(name, kind) for name, _, kind in found[2:]} == {(b"d", 4), (b"f", 8)}
    assert [offset for _, offset, _ in found] == [1, 2, 3, 4]
    counted = {inode.nlookup for inode in tree if inode.nodeid != ROOT_NODEID}
    assert counted == ({1} if plus else {0})


def test_opendir_is_refused_for_good_where_the_kernel_knows_that(tree: Tree) -> None:
    """ENOSYS with NO_OPENDIR_SUPPORT, else a handle whose listing may be cached."""
    for offered, expected in ((0, (0, struct.pack("=QII", 1, 10, 0))), (NO_OPENDIR, (errno.ENOSYS, b""))):
        with laned(tree=tree) as bench:
            agree(bench, offered)
            assert ask(bench, OPENDIR, b"x" * 8) == expected


def test_init_gets_what_native_answers_need(tree: Tree) -> None:
    """Only what the kernel offers, and only with native answers."""
    offered = PARALLEL_DIROPS | CACHE_SYMLINKS | DO_READDIRPLUS | READDIRPLUS_AUTO
    for one, expected in ((tree, offered), (None, 0)):
        with laned(tree=one) as bench:
            assert agree(bench, offered) == expected


def test_handle_of_a_directory_is_its_nodeid_for_the_session(bench: Bench) -> None:
    """There was no OPENDIR, so the kernel has no handle; an inode that the tree does not know is Python's."""
    bench.kernel.send(request(READDIRPLUS, 4, READ_IN.pack(0, 3, 512, 0, 0, 0, 0), nodeid=7))
    assert passed_on(bench)[IN.size :] == READ_IN.pack(7, 3, 512, 0, 0, 0, 0)


def test_fsync_of_a_lower_directory_has_nothing_to_do(bench: Bench) -> None:
    """What is not in the upperdir cannot have changed."""
    assert ask(bench, FSYNCDIR, bytes(16)) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tree": object()}, "native Tree"),
        ({"trace": object()}, "Trace is needed"),
        ({"upper": (1,)}, "upper"),
        ({"upper": (-1, "other.", True, True, True, True, True)}, "two namespaces"),
        ({"max_write": 1}, "Invalid argument"),
    ],
)
def test_what_is_refused_closes_both_descriptors(tree: Tree, arguments: dict[str, Any], message: str) -> None:
    """They are the lane's from the call on, whatever becomes of it: nobody else would close them."""
    device, kernel = socket.socketpair()
    ours, session = socket.socketpair()
    if "upper" in arguments:
        arguments = {"tree": tree, **arguments}
    fds = device.detach(), ours.detach()
    with kernel, session:
        with pytest.raises((TypeError, ValueError, OSError), match=message):
            Lane(*fds, **arguments)
        for fd in fds:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)


# ---- sanitizers ------------------------------------------------------------------------------------------------------

SOURCES = [
    NATIVE / f"{name}.c"
    for name in (
        *("fuzz_lane", "fuzz_place", "lane_tree", "lane_file", "lane_data", "lane_change", "lane_copy_up"),
        *("lane_xattr", "lane_ioctl", "uring", "lane_trace", "lane", "gate"),
        *("tree", "tree_data", "merge", "dirlayer", "index", "tarscan", "build"),
    )
]
FLAGS = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-pthread", f"-I{NATIVE}"]


def compile_with(compiler: str, out: Path, *flags: str) -> Path:
    done = subprocess.run([compiler, *FLAGS, *flags, "-o", out, *SOURCES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(("sanitizers", "threads"), [("address,undefined", 1), ("address,undefined", 4), ("thread", 4)])
def test_handlers_on_random_and_damaged_messages_are_clean(scratch: Path, sanitizers: str, threads: int) -> None:
    """No access out of bounds, no leak of memory or descriptors, no race of readers, writers and what Python does;
    the tree's invariants hold, and all handles of an inode agree about passthrough.
    """
    program = compile_with("gcc", scratch / "fuzz", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
    for seed in range(1, 5):
        done = subprocess.run(
            [program, str(seed), "60000", str(threads)],
            capture_output=True, text=True, timeout=60, check=False, cwd=scratch, env=os.environ | {"LD_PRELOAD": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "inodes at the end" in done.stdout
        assert os.listdir(scratch) == ["fuzz"]


def session_of_messages() -> bytes:
    """One of each kind, in the form of the fuzz target; nodeids from 2 on are those that were given, in order."""
    handle = struct.Struct("=QQIIQII")  # READ, WRITE
    messages = [
        request(LOOKUP, 2, b"n2\0"),
        request(14, 2, struct.pack("=II", os.O_RDWR, 0), 2),
        request(16, 2, handle.pack(1, 100, 5, 4, 0, 0, 0) + b"hello", 2),
        request(15, 2, handle.pack(1, 0, 4096, 0, 0, 0, 0), 2),
        request(43, 2, struct.pack("=QQQII", 1, 0, 4096, 3, 0), 2),
        request(46, 2, struct.pack("=QQII", 1, 0, 4, 0), 2),
        request(20, 2, struct.pack("=QII", 1, 1, 0), 2),
        request(35, 2, struct.pack("=IIII", os.O_RDWR, 0o100644, 0o22, 0) + b"n70\0"),
        request(47, 2, struct.pack("=QQQQQQQ", 1, 0, 0, 2, 0, 300, 0), 2),
        request(4, 2, struct.pack("=II10QIIIIIII4x", 1 << 3, 0, 0, 77, *[0] * 8, 0, 0, 0, 0, 0, 0, 0)[:88], 2),
        request(22, 2, struct.pack("=II", 100, 0) + b"user.some\0", 2),
        request(23, 2, struct.pack("=II", 0, 0), 2),
        request(9, 2, struct.pack("=II", 0o755, 0) + b"n71\0"),
        request(6, 2, b"n72\0target\0"),
        request(5, 2, b"", 5),
        request(13, 2, struct.pack("=Q", 1) + b"n73\0"),
        request(RENAME2, 2, struct.pack("=QII", 1, 0, 0) + b"n70\0n74\0"),
        request(10, 2, b"n74\0"),
        request(11, 2, b"n71\0"),
        request(READDIRPLUS, 2, READ_IN.pack(0, 0, 8000, 0, 0, 0, 0)),
        request(READDIR, 2, READ_IN.pack(0, 0, 8000, 0, 0, 0, 0)),
        request(18, 2, struct.pack("=QIIQ", 1, 0, 0, 0), 2),
        request(17, 2),
        request(FORGET, 2, struct.pack("=Q", 1), 2),
    ]
    return b"\x01" + b"".join(struct.pack("=H", len(one)) + one for one in messages)


@pytest.mark.skipif(shutil.which("clang") is None, reason="no clang")
def test_fuzz_target_of_the_lane_runs_under_libfuzzer(scratch: Path) -> None:
    """The same handlers, driven by coverage, for a few seconds."""
    program = compile_with(
        "clang",
        scratch / "fuzz",
        "-fsanitize=fuzzer,address,undefined",
        "-fno-sanitize-recover=all",
        "-DOVL_LIBFUZZER",
    )
    (scratch / "seeds").mkdir()
    (scratch / "seeds/all").write_bytes(session_of_messages())
    done = subprocess.run(
        [program, "-max_total_time=5", "-seed=1", "-max_len=4096", "seeds"],
        capture_output=True, text=True, check=False, cwd=scratch, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
