"""The lane between a device, a session and what is extra; the device is a socket pair, so every message is seen."""

import contextlib
import errno
import os
import select
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ovlfs._native import Lane, Trace, Tree

NATIVE = Path(__file__).resolve().parents[2] / "native"

IN = struct.Struct("=IIQQIIIHH")
OUT = struct.Struct("=IiQ")
INIT_IN = struct.Struct("=IIIII44x")
INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
LOOKUP, FORGET, READ, WRITE, INIT, READDIR, INTERRUPT, BATCH_FORGET = 1, 2, 15, 16, 26, 28, 36, 42
FALLOCATE, READDIRPLUS, LSEEK, TMPFILE, STATX = 43, 44, 46, 51, 52
DONT_MASK, MAX_PAGES, INIT_EXT = 1 << 6, 1 << 22, 1 << 30
WAIT_S = 5.0


def request(opcode: int, unique: int, body: bytes = b"", nodeid: int = 1) -> bytes:
    return IN.pack(IN.size + len(body), opcode, unique, nodeid, 0, 0, 1, 0, 0) + body


def reply(unique: int, error: int = 0, body: bytes = b"") -> bytes:
    return OUT.pack(OUT.size + len(body), -error, unique) + body


@dataclass
class Bench:
    """A lane, the kernel's side of its device and pyfuse3's side of its socket."""

    lane: Lane
    kernel: socket.socket
    session: socket.socket
    buffer: int = 8 << 20
    seen: list[bytes] = field(default_factory=list)

    def extra(self) -> tuple[int, int, int, int, int, int, bytes, bytes]:
        assert is_readable(self.lane.extra_fd)
        received = self.lane.receive()
        assert received is not None
        return received


def is_readable(fd: int, wait_s: float = WAIT_S) -> bool:
    return bool(select.select([fd], [], [], wait_s)[0])


def counted(bench: Bench) -> dict[int, tuple[int, int, int]]:
    """Requests by opcode, once they no longer grow: one is counted after its reply."""
    before = None
    while before != bench.lane.stats()[0] or not before:
        before = bench.lane.stats()[0]
        time.sleep(0.02)
    return before


def until(holds: Callable[[], bool]) -> None:
    """Wait for what is counted after a reply was written."""
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def laned(
    *, start: bool = True, tree: Tree | None = None, trace: Trace | None = None, **limits: Any
) -> Iterator[Bench]:
    device, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours, session = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel, session:
        for sock in (kernel, device):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            sock.settimeout(WAIT_S)
        session.settimeout(WAIT_S)
        lane = Lane(device.detach(), ours.detach(), tree=tree, trace=trace, **limits)
        try:
            if start:
                lane.start()
            yield Bench(lane, kernel, session)
        finally:
            lane.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with laned() as made:
        yield made


# ---- routes ----------------------------------------------------------------------------------------------------------


def test_lookup_goes_to_the_session_and_its_reply_to_the_kernel(bench: Bench) -> None:
    """What has no handler is forwarded unchanged, and so is its reply."""
    bench.kernel.send(request(LOOKUP, 2, b"name\0"))
    assert bench.session.recv(4096) == request(LOOKUP, 2, b"name\0")

    bench.session.send(reply(2, errno.ENOENT))

    assert bench.kernel.recv(4096) == reply(2, errno.ENOENT)
    assert counted(bench) == {LOOKUP: (1, 0, 0)}
    until(lambda: bench.lane.stats()[1]["replies"] == 1)


@pytest.mark.parametrize("opcode", [READ, FALLOCATE, LSEEK, TMPFILE])
def test_extra_opcode_is_queued_and_answered_from_python(bench: Bench, opcode: int) -> None:
    """What pyfuse3 does not bind, and READ, comes out of receive()."""
    bench.kernel.send(request(opcode, 4, b"x" * 40, nodeid=7))

    assert bench.extra() == (opcode, 4, 7, 0, 0, 1, b"x" * 40, b"")
    assert bench.lane.receive() is None
    assert not is_readable(bench.lane.extra_fd, 0)
    bench.lane.reply(4, 0, b"answer")
    assert bench.kernel.recv(4096) == reply(4, 0, b"answer")
    assert counted(bench) == {opcode: (0, 1, 0)}


def test_write_of_the_largest_size_arrives_whole_with_its_data_apart(bench: Bench) -> None:
    """1 MiB of data does not pass through a socket that could refuse it."""
    data = os.urandom(1 << 20)
    bench.kernel.send(request(WRITE, 6, b"a" * 40 + data))

    received = bench.extra()

    assert received[6] == b"a" * 40
    assert received[7] == data


def test_read_of_the_largest_size_is_answered_whole(bench: Bench) -> None:
    """The reply leaves by writev, not by a socket buffer."""
    data = os.urandom(1 << 20)
    bench.kernel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    bench.kernel.send(request(READ, 8, b"r" * 40))
    bench.extra()

    bench.lane.reply(8, 0, data)

    assert bench.kernel.recv(2 << 20) == reply(8, 0, data)


@pytest.mark.parametrize("opcode", [STATX, INTERRUPT])
def test_opcode_without_use_is_answered_enosys_at_once(bench: Bench, opcode: int) -> None:
    """After ENOSYS the kernel does not ask again."""
    bench.kernel.send(request(opcode, 10, b"x" * 24))

    assert bench.kernel.recv(4096) == reply(10, errno.ENOSYS)
    assert counted(bench) == {opcode: (0, 0, 1)}


@pytest.mark.parametrize("opcode", [READDIR, READDIRPLUS])
def test_listing_is_asked_for_in_pieces_that_fit_a_message(bench: Bench, opcode: int) -> None:
    """The session sees a size of at most 64 KiB, and everything else as it was."""
    body = struct.Struct("=QQIIQII")
    bench.kernel.send(request(opcode, 12, body.pack(1, 2, 1 << 20, 3, 4, 5, 6)))

    assert bench.session.recv(4096)[IN.size :] == body.pack(1, 2, 65536, 3, 4, 5, 6)


@pytest.mark.parametrize("number", [0, 1, 2048, 2049, 65000])
def test_batch_forget_is_cut_into_messages_that_fit(bench: Bench, number: int) -> None:
    """Every pair of a BATCH_FORGET arrives once, in order, however long it is; nothing is answered."""
    pairs = [(index + 1, index % 7 + 1) for index in range(number)]
    body = struct.pack("=II", number, 0) + b"".join(struct.pack("=QQ", *pair) for pair in pairs)
    bench.kernel.send(request(BATCH_FORGET, 14, body))

    got: list[tuple[int, int]] = []
    while len(got) < number:
        message = bench.session.recv(1 << 20)
        length, opcode, *_ = IN.unpack_from(message)
        assert (length, opcode) == (len(message), BATCH_FORGET)
        assert length <= 73728
        (count, _) = struct.unpack_from("=II", message, IN.size)
        got += struct.iter_unpack("=QQ", message[IN.size + 8 :])
        assert len(message) == IN.size + 8 + 16 * count

    assert got == pairs
    bench.kernel.send(request(LOOKUP, 16, b"after\0"))
    assert IN.unpack_from(bench.session.recv(1 << 20))[1] == LOOKUP


def test_batch_forget_that_promises_more_than_it_has_is_cut_to_what_is_there(bench: Bench) -> None:
    """The count is not believed."""
    bench.kernel.send(request(BATCH_FORGET, 14, struct.pack("=IIQQ", 1 << 31, 0, 5, 6)))

    message = bench.session.recv(4096)

    assert message[IN.size :] == struct.pack("=IIQQ", 1, 0, 5, 6)


# ---- INIT ------------------------------------------------------------------------------------------------------------


def init(bench: Bench, offered: int, answered: int) -> tuple[int, ...]:
    """What the session saw as flags, and what the kernel got: flags, max_write, max_pages."""
    bench.kernel.send(request(INIT, 2, INIT_IN.pack(7, 45, 131072, offered & 0xFFFFFFFF, offered >> 32)))
    seen = INIT_IN.unpack_from(bench.session.recv(4096), IN.size)
    out = INIT_OUT.pack(7, 38, 131072, answered, 12, 9, 131072, 1, 32, 0, 0)
    bench.session.send(reply(2, 0, out))
    message = bench.kernel.recv(4096)
    assert OUT.unpack_from(message) == (OUT.size + INIT_OUT.size, 0, 2)
    *_, flags, _, _, max_write, _, max_pages, _, _ = INIT_OUT.unpack_from(message, OUT.size)
    return seen[3], flags, max_write, max_pages


def test_init_gets_dont_mask_and_large_requests_and_the_session_small_buffers(bench: Bench) -> None:
    """The kernel is told DONT_MASK and 1 MiB; pyfuse3 believes in 128 KiB."""
    seen, flags, max_write, max_pages = init(bench, DONT_MASK | MAX_PAGES | 1, 1)

    assert seen == DONT_MASK | 1
    assert flags == DONT_MASK | MAX_PAGES | 1
    assert (max_write, max_pages) == (1 << 20, 256)


def test_init_flag_that_the_kernel_does_not_offer_is_not_set(bench: Bench) -> None:
    """An old kernel gets no flag that it does not know, and requests of the size that it can."""
    seen, flags, max_write, max_pages = init(bench, 1, 1)

    assert (seen, flags) == (1, 1)
    assert (max_write, max_pages) == (131072, 32)


def test_init_reply_of_another_length_passes_unchanged(bench: Bench) -> None:
    """An error or an answer in an older form is none of our business."""
    bench.kernel.send(request(INIT, 2, INIT_IN.pack(7, 45, 131072, DONT_MASK, 0)))
    bench.session.recv(4096)
    bench.session.send(reply(2, 0, b"\0" * 24))

    assert bench.kernel.recv(4096) == reply(2, 0, b"\0" * 24)


@pytest.mark.parametrize("length", [0, 4, 12, 16, 63])
def test_init_that_is_cut_short_is_forwarded(bench: Bench, length: int) -> None:
    """Fields that are not there are not read."""
    bench.kernel.send(request(INIT, 2, b"\xff" * length))

    assert len(bench.session.recv(4096)) == IN.size + length


# ---- what must not happen --------------------------------------------------------------------------------------------


def test_message_with_a_wrong_length_is_answered_eio(bench: Bench) -> None:
    """Nothing that contradicts itself is passed on."""
    bench.kernel.send(request(LOOKUP, 18, b"name\0") + b"more")
    bench.kernel.send(b"short")

    assert bench.kernel.recv(4096) == reply(18, errno.EIO)
    assert not is_readable(bench.session.fileno(), 0.05)
    until(lambda: bench.lane.stats()[1]["dropped"] == 2)


def test_reply_with_a_wrong_length_becomes_eio(bench: Bench) -> None:
    """The client gets an answer even when the session's is none."""
    bench.kernel.send(request(LOOKUP, 20, b"name\0"))
    bench.session.recv(4096)
    bench.session.send(OUT.pack(999, 0, 20))

    assert bench.kernel.recv(4096) == reply(20, errno.EIO)


def test_request_too_large_for_the_socket_is_answered_eio(bench: Bench) -> None:
    """A message that cannot be forwarded is answered here."""
    opcode = 60  # no handler, so forwarded
    ours = 3 << 19
    with laned(max_write=4 << 20) as large:
        large.session.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        large.kernel.send(request(opcode, 22, b"x" * ours))
        message = large.session.recv(4 << 20) if is_readable(large.session.fileno(), 0.5) else b""
        if not message:
            assert large.kernel.recv(4096)[:16] == reply(22, errno.EIO)
            until(lambda: large.lane.stats()[1]["undeliverable"] == 1)


def test_requests_after_the_session_is_gone_are_answered(bench: Bench) -> None:
    """Nobody hangs because pyfuse3 has ended."""
    bench.session.close()
    bench.kernel.send(request(LOOKUP, 24, b"name\0"))
    bench.kernel.send(request(FORGET, 26, b"\0" * 8))
    bench.kernel.send(request(LOOKUP, 28, b"name\0"))

    assert bench.kernel.recv(4096) == reply(24, errno.EIO)
    assert bench.kernel.recv(4096) == reply(28, errno.EIO)


def test_reply_with_an_impossible_errno_is_refused(bench: Bench) -> None:
    """The kernel would not take it, and the client would wait for ever."""
    for error in (-1, 512):
        with pytest.raises(OSError, match="Invalid argument"):
            bench.lane.reply(4, error)
    with pytest.raises(OSError, match="Invalid argument"):
        bench.lane.reply(4, errno.EIO, b"data")


def test_notifications_pass_beside_replies(bench: Bench) -> None:
    """Unique 0 is passed on; a reply after it arrives, whoever comes first."""
    note = OUT.pack(OUT.size + 4, 3, 0) + b"note"
    bench.kernel.send(request(LOOKUP, 30, b"name\0"))
    bench.session.recv(4096)
    bench.session.send(note)
    bench.session.send(reply(30))

    assert sorted((bench.kernel.recv(4096), bench.kernel.recv(4096))) == sorted((note, reply(30)))


# ---- full ------------------------------------------------------------------------------------------------------------


def test_full_session_socket_holds_requests_back_and_loses_none() -> None:
    """Readers wait for a slow session, in no order among them; extra replies and the session's pass meanwhile."""
    with laned() as bench:
        bench.kernel.send(request(READ, 2, b"r" * 40))
        bench.extra()
        sent = 0
        bench.kernel.setblocking(False)
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:  # until both the socket and the device are full
            try:
                bench.kernel.send(request(LOOKUP, 100 + sent, b"n" * 60000 + b"\0"))
                sent += 1
            except BlockingIOError:
                if not select.select([], [bench.kernel], [], 0.3)[1]:
                    break
        assert sent > 20
        bench.kernel.settimeout(WAIT_S)

        bench.lane.reply(2, 0, b"while full")
        assert bench.kernel.recv(4096) == reply(2, 0, b"while full")
        bench.session.send(reply(100))
        assert bench.kernel.recv(4096) == reply(100)

        uniques = sorted(IN.unpack_from(bench.session.recv(1 << 20))[2] for _ in range(sent))
        assert uniques == [100 + number for number in range(sent)]


def test_full_queue_holds_requests_back_and_loses_none() -> None:
    """Readers wait for a slow Python, in no order among them; then everything comes, once."""
    with laned(queue_count=4, queue_bytes=1 << 20) as bench:
        for number in range(40):
            bench.kernel.send(request(FALLOCATE, 2 + number, b"f" * 32))
        assert is_readable(bench.lane.extra_fd)

        got = sorted(bench.extra()[1] for _ in range(40))

        assert got == [2 + number for number in range(40)]
        assert bench.lane.receive() is None


def test_queue_takes_a_request_larger_than_its_limit_when_it_is_empty() -> None:
    """A limit below one message must not stop the mount."""
    with laned(queue_bytes=10) as bench:
        for unique in (2, 4):
            bench.kernel.send(request(WRITE, unique, b"a" * 40 + b"data"))
        assert sorted((bench.extra()[1], bench.extra()[1])) == [2, 4]


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_end_of_the_device_is_told_and_the_session_is_drained_after_it(bench: Bench) -> None:
    """After the unmount a session that still answers must not block."""
    bench.kernel.close()
    assert is_readable(bench.lane.ended_fd)
    assert bench.lane.end_reason == 0

    for number in range(2000):
        bench.session.send(reply(2 + number, 0, b"x" * 4096))


@pytest.mark.parametrize("blocked", ["idle", "socket", "queue"])
def test_stop_ends_a_reader_that_waits(blocked: str) -> None:
    """Wherever the reader waits, stop() comes back at once."""
    with laned(queue_count=1) as bench:
        bench.kernel.setblocking(False)
        opcode = {"idle": None, "socket": LOOKUP, "queue": FALLOCATE}[blocked]
        with contextlib.suppress(BlockingIOError):
            while opcode is not None:
                bench.kernel.send(request(opcode, 2, b"n" * 60000))
        time.sleep(0.05)

        started = time.monotonic()
        bench.lane.stop()
        bench.lane.stop()

        assert time.monotonic() - started < 1
        assert is_readable(bench.lane.ended_fd, 0)


def test_close_without_start_gives_the_descriptors_back() -> None:
    """Nothing leaks from a lane that never ran, nor from one that could not be made."""
    before = sorted(os.listdir("/proc/self/fd"))
    with laned(start=False):
        pass
    for max_write, queue_count in ((5, 1), (0, 1), (4096, 0), (64 << 20, 1)):
        with pytest.raises(OSError, match="Invalid argument"), laned(max_write=max_write, queue_count=queue_count):
            pass

    assert sorted(os.listdir("/proc/self/fd")) == before


def test_use_after_close_is_an_error() -> None:
    """ValueError, not a crash."""
    with laned() as bench:
        bench.lane.close()
        bench.lane.close()
        for use in (bench.lane.start, bench.lane.stop, bench.lane.receive, bench.lane.stats):
            with pytest.raises(ValueError, match="closed"):
                use()


# ---- errors of the device --------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_lane_survives_every_error_of_the_device(tmp_path: Path, sanitizer: str) -> None:
    """EINTR, EAGAIN, ENOENT from read; ENOBUFS from send; EINVAL, ENOENT from writev: as lane.h says."""
    here = Path(__file__).parent
    program = tmp_path / "lane_faults"
    compiled = subprocess.run(
        [
            "cc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", f"-fsanitize={sanitizer}",
            "-I", NATIVE, here / "test_lane_faults.c", NATIVE / "gate.c", NATIVE / "lane_trace.c", NATIVE / "uring.c",
            "-o", program, "-lpthread",
        ],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if compiled.returncode != 0 and "sanitize" in compiled.stderr:
        pytest.skip(f"no {sanitizer} sanitizer here")
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([program], check=False, capture_output=True, text=True, timeout=60)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run here")
    assert done.returncode == 0, done.stdout + done.stderr
