"""What does a running mount say about itself?  The asking side of control.py, for commands.

A mountpoint leads to its record (mounting.py), the record to the socket beside it.  The one who answers must be the
process that the record names.  Another user's daemon is not trusted by root either: what it sends is bounded, and
made printable.
"""

import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ovlfs import __version__
from ovlfs.errors import MountError, printable
from ovlfs.fuse import mounting

_MAX_LINE_BYTES = 16 << 20
_PATIENCE_S = 30.0
_PEERCRED = struct.Struct("=iII")


def find(path: bytes) -> mounting.Mounted:
    """The mount of ours at `path`.  Raises MountError: there is none, or nobody serves it."""
    mountpoint = mounting.resolve_mountpoint(path)
    found = next((one for one in reversed(mounting.mounts()) if one.entry.mountpoint == mountpoint), None)
    if found is None:
        mounting.refuse_inside(path)
        raise MountError(f"{printable(path)}: no ovlfs is mounted there")
    if found.record is None:
        raise MountError(f"{printable(path)}: its daemon is not known here; another user may have mounted it")
    if not found.alive:
        raise MountError(f"{printable(path)}: its daemon is gone; `ovlfs umount` removes the mount")
    return found


def ask(mounted: mounting.Mounted, verb: str, **arguments: Any) -> Any:
    """The one answer to a request.  Raises MountError, also with what the daemon says."""
    with connected(mounted, verb, **arguments) as lines:
        for message in lines:
            if "ok" in message:
                return message["ok"]
    raise MountError(f"{_name(mounted)}: its daemon gave no answer")


@contextmanager
def connected(mounted: mounting.Mounted, verb: str, **arguments: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """The answers to a request, as they come, until the daemon ends."""
    record = mounted.record
    assert record is not None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_PATIENCE_S)
        try:
            _connect(sock, mounting.control_socket(record))
            pid, _, _ = _PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
            if record.visible and pid != record.pid:
                raise MountError(f"{_name(mounted)}: process {pid} answers for its daemon {record.pid}")
            sock.sendall(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
        except TimeoutError:
            raise MountError(f"{_name(mounted)}: its daemon does not answer") from None
        except OSError as error:
            raise MountError(f"{_name(mounted)}: its daemon cannot be asked: {error.strerror}") from error
        yield _lines(sock, mounted)


@contextmanager
def understanding(mounted: mounting.Mounted) -> Iterator[None]:
    """Raise MountError where the block fails on what the daemon said: another version of ovlfs says other things."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else "a value is of another kind"
        raise MountError(
            f"{_name(mounted)}: its daemon seems to be another version of ovlfs than this one ({__version__}): "
            f"in its answer {what}"
        ) from error


def _connect(sock: socket.socket, path: bytes) -> None:
    """By way of its directory: the path may be longer than an address (control.py)."""
    dirfd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        sock.connect(b"/proc/self/fd/%d/%s" % (dirfd, os.path.basename(path)))
    finally:
        os.close(dirfd)


def _lines(sock: socket.socket, mounted: mounting.Mounted) -> Iterator[dict[str, Any]]:
    rest = b""
    while True:
        line, newline, after = rest.partition(b"\n")
        if newline:
            rest = after
            yield _decoded(line, mounted, sock)
            continue
        try:
            piece = sock.recv(1 << 16)
        except TimeoutError:
            raise MountError(f"{_name(mounted)}: its daemon does not answer") from None
        except ConnectionError:
            piece = b""
        if not piece:
            return
        rest += piece
        if len(rest) > _MAX_LINE_BYTES:
            raise MountError(f"{_name(mounted)}: its daemon said too much")


def _decoded(line: bytes, mounted: mounting.Mounted, sock: socket.socket) -> dict[str, Any]:
    try:
        message = _shown(json.loads(line))
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or not message.keys() & {"ok", "error", "events"}:
        raise MountError(f"{_name(mounted)}: its daemon gave no answer that can be read")
    if "error" in message:
        raise MountError(f"{_name(mounted)}: {message['error']}")
    if "events" in message:
        sock.settimeout(None)  # events come when something happens
    return message


def _shown(value: Any) -> Any:
    """With all text as printable() makes it.  Ours is so already, and stays as it is."""
    match value:
        case str():
            return value if value.isprintable() else printable(value)
        case list():
            return [_shown(one) for one in value]
        case dict():
            return {_shown(key): _shown(one) for key, one in value.items()}
    return value


def _name(mounted: mounting.Mounted) -> str:
    return printable(mounted.entry.mountpoint)
