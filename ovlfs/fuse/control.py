"""How is a running mount asked about itself?

Each daemon listens on a unix stream socket beside its record in the registry, whose directory is its user's alone
(mounting.py).  A client sends one line of JSON, {"verb": ..., ...}, and gets lines of JSON: {"ok": ...} or
{"error": "one line"}; `trace` goes on sending {"events": [...]} until either side closes.

    ovlfs stats MOUNT --> client.py --> PID-START.sock --> Control.serve --> a verb, in the trio thread of the mount

Whoever may connect is the mount's user or root, and still gets no say over the daemon: at most _MAX_CLIENTS at once,
_MAX_REQUEST_BYTES and _PATIENCE_S for a request, a bounded queue for each listener (what does not fit is dropped and
counted), and every answer is written by a task of its own, so that one who does not read waits alone.

The socket is there from before the mount is reported to after it is gone; what a killed daemon leaves, the next mount
sweeps (Registry.sweep).

Kernel: unix(7).  The address may be 107 bytes long, so it goes by way of /proc/self/fd.
"""

import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from ovlfs.errors import OvlfsError, printable

log = logging.getLogger("ovlfs.control")

_MAX_CLIENTS = 16
_MAX_REQUEST_BYTES = 1 << 16
_PATIENCE_S = 10.0
"""For a request to come, and for an answer (not a trace) to be taken."""

Message = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]
Verb = Callable[[Message, Send], Awaitable[None]]
"""Answers a request: sends any number of messages.  An OvlfsError or OSError becomes an {"error": ...}."""


class Control:
    """The socket of one mount.

    Args:
        path: where it shall be; its directory is there, and the user's own.
    """

    def __init__(self, path: bytes) -> None:
        self.path = path
        self._socket: socket.socket | None = None
        self._clients = 0

    def listen(self) -> None:
        """Make the socket."""
        try:
            self._socket = self._bound()
        except OSError as error:
            # The mount itself is none the worse for it.
            log.warning("%s: nobody can ask the mount: %s", printable(self.path), error.strerror)

    def _bound(self) -> socket.socket:
        directory, name = os.path.split(self.path)
        dirfd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=dirfd)  # a pid and start time are used once: it is nobody's
            listener.bind(b"/proc/self/fd/%d/%s" % (dirfd, name))
            os.chmod(name, 0o600, dir_fd=dirfd)
            listener.listen(_MAX_CLIENTS)
        except BaseException:
            listener.close()
            raise
        finally:
            os.close(dirfd)
        return listener

    def close(self) -> None:
        """Take the socket away."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)

    async def serve(self, verbs: Mapping[str, Verb]) -> None:
        """Answer until cancelled.  Precondition: listen()."""
        if self._socket is None:
            return
        listener = trio.socket.from_stdlib_socket(self._socket)
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    client, _ = await listener.accept()
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ECONNABORTED):
                        raise
                    await trio.sleep(0.1)  # no descriptor is left: clients of the mount close theirs sooner or later
                    continue
                if self._clients >= _MAX_CLIENTS:
                    client.close()  # it sees an end without an answer
                    continue
                self._clients += 1
                nursery.start_soon(self._answer, trio.SocketStream(client), verbs)

    async def _answer(self, client: trio.SocketStream, verbs: Mapping[str, Verb]) -> None:
        """One client.  Whatever goes wrong with it, the others and the mount do not notice."""

        async def send(message: Message) -> None:
            await client.send_all(json.dumps(message, ensure_ascii=True).encode() + b"\n")

        try:
            async with client:
                with trio.fail_after(_PATIENCE_S):
                    request = await _receive(client)
                try:
                    await _run(request, verbs, client, send)
                except (OvlfsError, OSError) as error:
                    text = str(error) if isinstance(error, OvlfsError) else error.strerror or str(error)
                    with trio.fail_after(_PATIENCE_S):
                        await send({"error": text})
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # the client is gone, or takes too long: nobody is left to tell
        except Exception:
            log.exception("a request on the control socket failed unforeseen")
        finally:
            self._clients -= 1


async def _run(request: Message | None, verbs: Mapping[str, Verb], client: trio.SocketStream, send: Send) -> None:
    if request is None:
        raise OvlfsError(f"a request is one line of JSON, an object, of at most {_MAX_REQUEST_BYTES} bytes")
    verb = verbs.get(str(request.get("verb")))
    if verb is None:
        raise OvlfsError(f"'{printable(str(request.get('verb')))[:100]}' is nothing that this mount answers")
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch_end, client, nursery.cancel_scope)
        try:
            await verb(request, send)
        except Exception as error:  # raised below: out of a nursery it would come as a group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _watch_end(client: trio.SocketStream, scope: trio.CancelScope) -> None:
    """Cancel the answer when the client goes away, or says more than it was asked for."""
    with contextlib.suppress(trio.BrokenResourceError):
        await client.receive_some(1)
    scope.cancel()


async def _receive(client: trio.SocketStream) -> Message | None:
    """The request; None: it is none."""
    line = bytearray()
    while b"\n" not in line:
        if len(line) > _MAX_REQUEST_BYTES:
            return None
        piece = await client.receive_some(4096)
        if not piece:
            return None
        line += piece
    try:
        found = json.loads(line.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def answering(function: Callable[[Message], object]) -> Verb:
    """A verb with one answer, which `function` gives at once."""

    async def verb(request: Message, send: Send) -> None:
        answer = function(request)
        with trio.fail_after(_PATIENCE_S):
            await send({"ok": answer})

    return verb
