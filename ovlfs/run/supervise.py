"""How do signals reach the command, and who cleans up if we are killed?

The command's runner (the runtime, or chroot.py's) is a child in our process group, so it has our terminal.  What the
terminal sends (Ctrl-C) reaches it without us; what somebody sends to us alone is passed on.  SIGTERM, and SIGHUP when
the terminal goes, mean "stop": the image's StopSignal, and SIGKILL ten seconds later, as `docker stop` does.  As
process 1 of its namespace a command may ignore SIGINT; the third one kills it.

Nobody outlives us: the runner is killed when we die (PR_SET_PDEATHSIG), and a janitor, forked before anything was
mounted and out of the terminal's reach, waits for our end and does then what we would have done.

Kernel: sigwaitinfo(2) (si_code tells kill(2) from the terminal), prctl(2), pidfd_open(2), pid_namespaces(7).
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from ovlfs.errors import OvlfsError

GRACE_SECONDS = 10
_INTERRUPTS = 3
_PR_SET_PDEATHSIG = 1
_CHILD_SETUP_FAILED = 125

_NOT_OURS = frozenset((
    signal.SIGKILL, signal.SIGSTOP,  # cannot be taken
    signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT,  # of job control: we stop and go on as everybody
    # our own faults
    signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS, signal.SIGABRT,
    signal.SIGWINCH, signal.SIGURG,  # the terminal tells the runner itself
    signal.SIGPIPE, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF,
))  # fmt: skip


def fork(child: Callable[[], NoReturn], mask: set[int]) -> int:
    """Fork a process that ends with us; `child` runs in it with the signal mask `mask`, and never returns."""
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        die_with_parent(parent)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and exec(3) would leave it so
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        child()
    except OSError as error:
        sys.stderr.write(f"ovlfs: {error.filename or ''}: {error.strerror}\n")
    except Exception as error:  # nobody else could tell of it
        sys.stderr.write(f"ovlfs: {type(error).__name__}: {error}\n")
    finally:
        os._exit(_CHILD_SETUP_FAILED)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill us when our parent ends; if it has ended already, we do, too."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(_CHILD_SETUP_FAILED)


# ---- signals ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def signals_held() -> Iterator[set[int]]:
    """Hold back all signals that are passed on; the block gets the mask from before."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    before = {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, _passed_on())}
    try:
        yield before
    finally:
        while signal.sigtimedwait({signal.SIGCHLD}, 0) is not None:
            pass
        signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _passed_on() -> set[int]:
    """The signals that we wait for.  What is ignored stays so: nohup's SIGHUP, a background job's SIGINT."""
    return {
        int(number)
        for number in signal.valid_signals()
        if number not in _NOT_OURS and signal.getsignal(number) != signal.SIG_IGN
    }


@dataclass(slots=True)
class Command:
    """A running command.

    Attributes:
        runner: our child, which ends with the command's exit code.
        pid_file: where the runner writes the command's own process id.
        stop_signal: what SIGTERM means to it.
        server: the process that serves its root, our child, too; None: not ours to watch.
    """

    runner: int
    pid_file: bytes
    stop_signal: int
    server: int | None = None
    _waiting: list[int] = field(default_factory=list)
    _deadline: float | None = None
    _interrupts: int = 0

    def wait(self) -> int:
        """Pass signals on until the runner has ended; its exit code, negative for a signal.

        Preconditions: signals_held().

        Raises:
            ServerDiedError: the server ended first; the command was killed.
        """
        wanted = _passed_on()
        while True:
            code = _ended(self.runner)
            if code is not None:
                return code
            if self.server is not None and _ended(self.server) is not None:
                self._kill()
                raise ServerDiedError
            for number in self._waiting[:]:
                if self._send(number):
                    self._waiting.remove(number)
            received = signal.sigtimedwait(wanted, self._patience())
            if received is None:
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    self._deadline = None
                    self._kill()
            elif received.si_signo != signal.SIGCHLD:
                self._received(received.si_signo, by_terminal=received.si_code > 0)

    def _patience(self) -> float:
        if self._waiting:
            return 0.02
        return 3600 if self._deadline is None else max(0, self._deadline - time.monotonic())

    def _received(self, number: int, *, by_terminal: bool) -> None:
        if number in (signal.SIGTERM, signal.SIGHUP):
            if self._deadline is not None:
                self._kill()  # asked twice
                return
            self._deadline = time.monotonic() + GRACE_SECONDS
            self._waiting.append(self.stop_signal)
            return
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts >= _INTERRUPTS:
                self._kill()
                return
        if not by_terminal:
            self._waiting.append(number)

    def pid(self) -> int | None:
        """The command's process; None: it is not there yet."""
        try:
            with open(self.pid_file, "rb") as file:
                fields = file.read(64).split()
        except FileNotFoundError:
            return None
        return int(fields[0]) if fields and fields[0].isdigit() else None

    def _send(self, number: int) -> bool:
        """Send the command a signal; False: it is not there yet."""
        pid = self.pid()
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):  # it has ended, and the runner tells us next
            os.kill(pid, number)
        return True

    def _kill(self) -> None:
        if not self._send(signal.SIGKILL):
            os.kill(self.runner, signal.SIGKILL)  # not started yet; we have not waited for it, so the id is its own


class ServerDiedError(OvlfsError):
    """The daemon that serves the root has ended while the command was running."""

    def __init__(self) -> None:
        super().__init__("the daemon that serves the root file system has ended, and with it the command")


def _ended(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


# ---- the janitor -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def janitor(clean_up: Callable[[], None]) -> Iterator[None]:
    """See that `clean_up` is called after this process: by a process of its own, if the block is not left in order."""
    parent = os.pidfd_open(os.getpid())
    pid = os.fork()
    if pid == 0:
        _janitor(parent, clean_up)
    os.close(parent)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _janitor(parent: int, clean_up: Callable[[], None]) -> NoReturn:
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for target in (0, 1, 2):
            os.dup2(null, target)
        poller = select.poll()
        poller.register(parent, select.POLLIN)
        poller.poll()
        clean_up()
    finally:
        os._exit(0)


def settle() -> None:
    """Start from what a program may expect: 0, 1 and 2 are open, and a child that ends can be waited for.

    Otherwise a descriptor that we open would be taken for stdin by the next program.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    # Python has None for those that were closed when it started.
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)


def keep_from_commands() -> None:
    """Let no descriptor but 0, 1 and 2 get into a program that we start, also those that our caller left open."""
    for text in os.listdir("/proc/self/fd"):
        if int(text) > 2:
            with contextlib.suppress(OSError):  # that of the listing itself
                os.set_inheritable(int(text), False)
