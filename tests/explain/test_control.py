"""The control socket: who may connect, what a bad client gets, and that the mount does not notice it."""

import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers_explain import Run, explained
from processes import kill, wait_until

from ovlfs.cli.main import main
from ovlfs.errors import MountError
from ovlfs.fuse import client as asking
from ovlfs.fuse.client import find

pytestmark = pytest.mark.fuse

Mount = Callable[..., Path]


@pytest.fixture
def mountpoint(scratch: Path, mounted: Mount) -> Path:
    for name in ("lower/d", "upper", "work"):
        (scratch / name).mkdir(parents=True)
    (scratch / "lower/file").write_bytes(b"content")
    return mounted("-o", f"lowerdir={scratch}/lower,upperdir={scratch}/upper,workdir={scratch}/work")


def sockets() -> list[Path]:
    return sorted(Path(os.environ["OVLFS_RUNTIME_DIR"]).glob("*.sock"))


@contextmanager
def client() -> Iterator[socket.socket]:
    (path,) = sockets()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        yield sock


def answers(sock: socket.socket) -> list[dict[str, Any]]:
    """All that the daemon says until it ends."""
    said = b""
    while piece := sock.recv(1 << 16):
        said += piece
    return [json.loads(line) for line in said.splitlines()]


def test_the_socket_is_private_and_goes_with_the_mount(mountpoint: Path, ovlfs: Run) -> None:
    (path,) = sockets()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

    ovlfs("umount", mountpoint)

    assert sockets() == []


def test_what_a_killed_daemon_left_is_swept_by_the_next_mount(mountpoint: Path, ovlfs: Run) -> None:
    (left,) = sockets()
    record = find(bytes(mountpoint)).record
    assert record is not None
    kill(record.pid)
    assert "its daemon is gone" in ovlfs("stats", mountpoint, code=1).stderr
    ovlfs("umount", mountpoint)
    stray = left.with_name("1-1.sock")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(stray))
    scratch = mountpoint.parent
    ovlfs("mount", "--ro", "-o", f"lowerdir={scratch}/lower", mountpoint)

    assert not left.exists()
    assert not stray.exists()
    assert len(sockets()) == 1


@pytest.mark.parametrize(
    "said",
    [
        b"no json\n",
        b"[1, 2]\n",
        b"{}\n",
        b'{"verb": "explode"}\n',
        b'{"verb": ["stats"]}\n',
        b'{"verb": "explain"}\n',
        b'{"verb": "explain", "path": 5}\n',
        b'{"verb": "trace", "paths": "x"}\n',
        b'{"verb": "trace", "operations": [1]}\n',
        b"[" * 60000 + b"\n",
        b"\xff\xfe\n",
        b"x" * 70000,
    ],
)
def test_a_request_that_is_none_gets_one_error(said: bytes, mountpoint: Path) -> None:
    with client() as sock:
        sock.sendall(said)
        try:
            (answer,) = answers(sock)
        except ConnectionResetError:  # what was not read is still there: so ends a stream
            assert len(said) > 65536
            answer = {"error": ""}

    assert list(answer) == ["error"]
    assert "\n" not in answer["error"]
    assert (mountpoint / "file").read_bytes() == b"content"


def test_clients_that_hang_do_not_stop_the_mount(mountpoint: Path) -> None:
    """As many as there may be say nothing, half a request, or do not read their answer; one more is turned away."""
    socks = []
    try:
        for number in range(16):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(sockets()[0]))
            sock.sendall([b"", b'{"verb"', b'{"verb": "trace"}\n'][number % 3])
            socks.append(sock)
        wait_until(lambda: not has_room(mountpoint), "there is no room left")
        assert (mountpoint / "file").read_bytes() == b"content"
        (mountpoint / "new").write_bytes(b"written")
    finally:
        for sock in socks:
            sock.close()
    wait_until(lambda: has_room(mountpoint), "there is room again")


def has_room(mountpoint: Path) -> bool:
    """Asked from here: half of those who hang are sent away after ten seconds."""
    try:
        explained(mountpoint, "/file")
    except MountError:
        return False
    return True


def test_a_client_that_goes_away_is_forgotten(mountpoint: Path) -> None:
    for _ in range(40):  # more than may be there at once
        with client() as sock:
            sock.sendall(b'{"verb": "trace"}\n')
            assert sock.recv(100)
    wait_until(lambda: explained(mountpoint, "/file")["error"] is None, "the mount answers")


@pytest.mark.parametrize(
    ("words", "message", "missing"),
    [
        (["explain", "/file"], {"ok": {"path": "/file"}}, "'layers' is missing"),
        (["explain", "/file"], {"ok": {"layers": 3}}, "a value is of another kind"),
        (["explain", "/file"], {"ok": [1]}, "a value is of another kind"),
        (["stats"], {"ok": {"lane": True}}, "'requests' is missing"),
        (["stats", "--json"], {"ok": "none"}, "a value is of another kind"),
        (["trace"], {"events": [{"at": 1.0, "us": None}]}, "'path' is missing"),
        (["trace"], {"events": [{"at": 1e300}]}, "a value is of another kind"),
    ],
)
def test_a_daemon_of_another_version_is_named_as_one(
    words: list[str],
    message: dict[str, Any],
    missing: str,
    mountpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(asking, "_lines", lambda *_: iter([message]))
    verb, *more = words
    with monkeypatch.context() as context:
        context.setattr("signal.signal", lambda *_: None)  # a verb that prints ends by SIGPIPE, and we shall not
        assert main([verb, str(mountpoint), *more]) == 1

    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"ovlfs: {mountpoint}: its daemon seems to be another version of ovlfs")
    assert said.err.endswith(f": in its answer {missing}\n")
    assert said.err.count("\n") == 1


def test_unmounting_ends_the_clients(mountpoint: Path, ovlfs: Run) -> None:
    with client() as sock:
        sock.sendall(b'{"verb": "trace"}\n')
        assert sock.recv(100)

        ovlfs("umount", mountpoint)

        answers(sock)  # to its end


def test_a_directory_with_a_long_name_holds_the_socket(
    scratch: Path, mounted: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address has room for 107 bytes."""
    monkeypatch.setenv("OVLFS_RUNTIME_DIR", str(scratch / ("d" * 200)))
    (scratch / "lower").mkdir()
    mountpoint = mounted("--ro", "-o", f"lowerdir={scratch}/lower")

    assert explained(mountpoint, "/")["object"]["kind"] == "directory"
