"""How does a mount go on after the command has returned?

`launch` forks before there is any thread.  The child does all the work and says over a pipe how it went: one message,
either what to print now that the mount answers, or a one-line error with an exit code.  Only then does the parent
return, so `ovlfs mount ... && ls /mnt/root` works, and a failed mount is a failed command.

    parent                            child
    fork ---------------------------> stdin: /dev/null, stdout and stderr: the log
    read the pipe                     open the image, the upperdir, mount   (errors, Ctrl-C: cleaned up, told, exit)
      |                               the mount answers: ready()
    print, exit 0 <------------------ a session of its own (setsid), cwd /
                                      serve until unmounted, everything on disk, exit

Until ready() the child belongs to the terminal, so Ctrl-C reaches both and nothing is left behind; after it, only
SIGTERM and SIGINT end the child, in order, by way of serve().
"""

import contextlib
import faulthandler
import json
import logging
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn, TextIO

from ovlfs.errors import MountError, OvlfsError, printable

log = logging.getLogger("ovlfs.daemon")

Ready = Callable[[str], None]
"""To be called once the mount answers, with what shall be printed then."""

_MAX_LOG_BYTES = 1 << 20
_SAID_BY_FUSE = re.compile(r"^(?:fusermount3|fuse|mount): +(.+)$")
INTERRUPTED = 130


@dataclass(slots=True)
class Job:
    """What the work of a daemon is given.

    Attributes:
        ready: see Ready.
        terminal: where progress can be shown, or None; gone after ready().
        log: the path of the log, None: stderr.
    """

    ready: Ready
    terminal: TextIO | None
    log: bytes | None


def describe(error: BaseException) -> tuple[str, int]:
    """An error as one line for the user, and the exit code."""
    match error:
        case OvlfsError():
            return str(error), error.exit_code
        case KeyboardInterrupt():
            return "interrupted", INTERRUPTED
        case OSError():
            where = "" if error.filename is None else f"{printable(error.filename)}: "
            return f"{where}{error.strerror or error}", 1
        case _:
            return f"unforeseen {type(error).__name__}: {printable(str(error))}", 1


# ---- in the background -----------------------------------------------------------------------------------------------


def launch(work: Callable[[Job], None], *, log_path: bytes, debug: bool = False) -> str:
    """Run `work` in a process of its own; return what it gave to ready(), once it did.

    Precondition: this process has one thread.

    Raises:
        MountError: with the line that tells why it failed.  Its exit_code is that of the error in the child.
    """
    log_fd = open_log(log_path)
    receiver, sender = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with _patient() as interrupts:
        pid = os.fork()
        if pid == 0:
            os.close(receiver)
            _child(work, sender, log_fd, log_path, debug=debug, interrupts=interrupts)
        os.close(sender)
        os.close(log_fd)
        with open(receiver, "rb") as pipe:
            said = pipe.read()
    if not said:
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise MountError(f"the daemon ended before the mount answered ({ended}); its log is {printable(log_path)}")
    message = json.loads(said)
    if message["error"] is None:
        return str(message["text"])
    os.waitpid(pid, 0)  # what it cleans up is cleaned up when we return
    error = MountError(message["error"])
    error.exit_code = message["exit_code"]
    raise error


@contextlib.contextmanager
def _patient() -> Iterator[list[int]]:
    """Ctrl-C reaches the child, too: its answer is waited for.  The second one is not.

    The list has the signals that came, for a child that was just forked and had no handler of its own yet.
    """
    came: list[int] = []

    def note(number: int, _frame: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def _child(
    work: Callable[[Job], None], sender: int, log_fd: int, log_path: bytes, *, debug: bool, interrupts: list[int]
) -> NoReturn:
    """The daemon's whole life.  Never returns into the caller's stack: its buffers and exit handlers are not ours."""
    code = 1
    try:
        terminal = _keep_terminal()
        _close_others(keep={0, 1, 2, sender, log_fd, *([terminal.fileno()] if terminal else [])})
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, target in ((null, 0), (log_fd, 1), (log_fd, 2)):
            os.dup2(fd, target)
        os.close(null)
        os.close(log_fd)
        start_bytes = os.fstat(2).st_size
        set_up_logging(debug=debug)
        code = _work(work, sender, log_path, terminal, start_bytes, interrupts)
    except BaseException:
        log.exception("the daemon failed")
    finally:
        logging.shutdown()
        sys.stderr.flush()
        os._exit(code)


def _work(
    work: Callable[[Job], None],
    sender: int,
    log_path: bytes,
    terminal: TextIO | None,
    start_bytes: int,
    interrupts: list[int],
) -> int:
    state = _Signals()
    told = False

    def tell(text: str | None, error: str | None, code: int) -> None:
        nonlocal told
        told = True
        with open(sender, "w", encoding="utf-8", errors="backslashreplace") as pipe:
            json.dump({"text": text, "error": error, "exit_code": code}, pipe)

    def ready(text: str) -> None:
        state.serving = True
        os.setsid()
        os.chdir("/")
        if terminal is not None:
            terminal.close()
        tell(text, None, 0)  # BrokenPipeError: the command is gone, so the mount goes, too

    try:
        state.install()
        if interrupts:
            raise KeyboardInterrupt  # noqa: TRY301
        work(Job(ready, terminal, log_path))
    except BaseException as error:
        text, code = describe(error)
        if not isinstance(error, OvlfsError | KeyboardInterrupt):
            log.exception("%s", text)
        if isinstance(error, RuntimeError):
            text = _said_by_fuse(start_bytes) or f"{text}; the log is {printable(log_path)}"
        if not told:
            tell(None, text, code)
        elif isinstance(error, OvlfsError):
            log.critical("%s", text)
        return code
    return 0


def _keep_terminal() -> TextIO | None:
    """Stderr for progress, if somebody is looking at it."""
    if not os.isatty(2):
        return None
    return open(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")


def _close_others(keep: set[int]) -> None:
    """Close what we inherited: a caller that waits for the end of a pipe would wait as long as we live."""
    for text in os.listdir("/proc/self/fd"):
        if int(text) not in keep:
            with contextlib.suppress(OSError):  # the descriptor of the listing itself
                os.close(int(text))


def _said_by_fuse(start_bytes: int) -> str | None:
    """What libfuse or fusermount3 wrote to stderr (the log), which is the reason why a mount failed."""
    with open("/proc/self/fd/2", "rb") as file:
        file.seek(start_bytes)
        lines = file.read(65536).decode(errors="replace").splitlines()
    found = [match[1] for line in lines if (match := _SAID_BY_FUSE.match(line))]
    return printable(found[0]) if found else None


# ---- in the foreground -----------------------------------------------------------------------------------------------


def run_here(work: Callable[[Job], None], *, debug: bool = False) -> None:
    """Run `work` in this process, with the log on stderr.  Raises what it raises."""
    set_up_logging(debug=debug)
    state = _Signals()

    def ready(text: str) -> None:
        state.serving = True
        # The terminal that we run in is closed: unmount in order, as for SIGTERM.
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        if text:
            print(text, flush=True)

    state.install()
    work(Job(ready, sys.stderr if sys.stderr.isatty() else None, None))


# ---- signals ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Signals:
    """SIGTERM and SIGINT outside serve(), which has its own receiver while it runs.

    Before the mount answers they end the work in order (as an exception).  After it they mean nothing: either serve()
    takes them, or it is putting things on disk already and must not be disturbed.
    """

    serving: bool = False

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._received)

    def _received(self, number: int, _frame: object) -> None:
        if not self.serving:
            raise KeyboardInterrupt
        log.info("%s: unmounting already", signal.Signals(number).name)


# ---- logs and limits -------------------------------------------------------------------------------------------------


def log_directory() -> bytes:
    """Where this user's logs are: /var/log/ovlfs, or $XDG_STATE_HOME/ovlfs/log ($OVLFS_LOG_DIR overrides)."""
    if os.environb.get(b"OVLFS_LOG_DIR", b"").startswith(b"/"):
        return os.environb[b"OVLFS_LOG_DIR"]
    if os.geteuid() == 0 and os.access(b"/var/log", os.W_OK):
        return b"/var/log/ovlfs"
    state = os.environb.get(b"XDG_STATE_HOME", b"")
    if not state.startswith(b"/"):
        state = os.path.expanduser(b"~") + b"/.local/state"
    return state + b"/ovlfs/log"


def open_log(path: bytes) -> int:
    """A descriptor to append to the log `path`.  One that has grown is kept once as `.old`."""
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(path).st_size > _MAX_LOG_BYTES:
                os.rename(path, path + b".old")
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise MountError(f"log {printable(path)}: {error.strerror}") from error


class _Formatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z WARNING ovlfs.fuse: text`."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"


def set_up_logging(*, debug: bool) -> None:
    """Send the log to stderr, wherever that goes."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.DEBUG if debug else logging.INFO, force=True)
    logging.captureWarnings(capture=True)
    faulthandler.enable()


def raise_limits() -> None:
    """As many open files as we may have: every file that is open in the mount is open here, too."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
