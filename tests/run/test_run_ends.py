"""Whatever dies first: signals, kills, closed terminals; no mount, process or file is left behind."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import processes
import pytest
from helpers_run import ENGINES, command_line, engine_environment, holders, make_image, nothing_is_left

from ovlfs.cli import uppers
from ovlfs.errors import MountError
from ovlfs.fuse import mounting

pytestmark = [pytest.mark.fuse, pytest.mark.root]

Ovlfs = Callable[..., "subprocess.CompletedProcess[str]"]
FOREVER = "echo ready; while true; do sleep 0.05; done"
PATIENT = """
import sys
from ovlfs.cli.main import main
from ovlfs.run import supervise
supervise.GRACE_SECONDS = 3600
sys.exit(main())
"""
"""The program `ovlfs`, which after the first SIGTERM waits for longer than any test."""


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def image(scratch: Path) -> Path:
    return make_image(scratch / "it.tar", {"Cmd": ["sh"], "StopSignal": "SIGUSR1"})


@contextlib.contextmanager
def running(
    engine: str,
    scratch: Path,
    image: Path,
    script: str,
    *words: str,
    program: tuple[str, str] = ("-m", "ovlfs.cli.main"),
) -> "Iterator[subprocess.Popen[str]]":
    """`ovlfs run` of a shell script, which has said "ready"; at the end nothing is left."""
    python, _, _, *arguments = command_line(engine, *words, image, "--", "sh", "-c", script)
    with subprocess.Popen(
        [python, *program, *arguments],
        env=engine_environment(engine, scratch),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=scratch,
    ) as run:
        try:
            assert run.stdout is not None
            assert run.stderr is not None
            first = run.stdout.readline()
            assert first == "ready\n", run.stderr.read()
            yield run
        finally:
            if run.poll() is None:
                run.kill()
    nothing_is_left(scratch, store())


def store() -> Path:
    return Path(os.environ["OVLFS_STORE"])


def daemon() -> mounting.Record:
    """The daemon of the one run there is."""
    records = [record for record in mounting.all_records() if record.alive]
    assert len(records) == 1
    return records[0]


def children(pid: int) -> list[tuple[int, str]]:
    """The child processes of one, with their command lines."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
        with contextlib.suppress(FileNotFoundError):
            found.append((int(child), Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()))
    return found


# ---- signals


def test_sigterm_sends_the_stop_signal(engine: str, scratch: Path, image: Path) -> None:
    script = "trap 'echo stopped by USR1; exit 5' USR1; trap 'echo TERM' TERM; " + FOREVER
    with running(engine, scratch, image, script) as run:
        run.send_signal(signal.SIGTERM)
        assert run.communicate(timeout=30)[0] == "stopped by USR1\n"
        assert run.returncode == 5


def test_second_sigterm_kills(engine: str, scratch: Path, image: Path) -> None:
    """Process 1 of a namespace is not stopped by a signal that it does not handle."""
    with running(engine, scratch, image, FOREVER, program=("-c", PATIENT)) as run:
        run.send_signal(signal.SIGTERM)
        time.sleep(0.3)  # two of the same signal at once are one
        assert run.poll() is None
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=30)
        assert run.returncode == 128 + signal.SIGKILL


@pytest.mark.slow
def test_sigterm_kills_after_ten_seconds(engine: str, scratch: Path, image: Path) -> None:
    with running(engine, scratch, image, "trap '' USR1; " + FOREVER) as run:
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=60)
        assert run.returncode == 128 + signal.SIGKILL


def test_other_signals_are_passed_on(engine: str, scratch: Path, image: Path) -> None:
    script = "trap 'echo INT' INT; trap 'echo USR2; exit 0' USR2; trap 'echo WINCH' WINCH; " + FOREVER
    with running(engine, scratch, image, script) as run:
        assert run.stdout is not None
        run.send_signal(signal.SIGINT)
        assert run.stdout.readline() == "INT\n"
        run.send_signal(signal.SIGUSR2)
        assert run.communicate(timeout=30)[0] == "USR2\n"
        assert run.returncode == 0


def test_third_interrupt_kills(engine: str, scratch: Path, image: Path) -> None:
    with running(engine, scratch, image, "trap 'echo INT' INT; " + FOREVER) as run:
        assert run.stdout is not None
        for _ in range(2):
            run.send_signal(signal.SIGINT)
            assert run.stdout.readline() == "INT\n"
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=30)
        assert run.returncode == 128 + signal.SIGKILL


def test_sigterm_while_it_starts(engine: str, scratch: Path, image: Path) -> None:
    """At any moment: nothing is left, and it ends."""
    for delay in (0.05, 0.2, 0.3, 0.4, 0.5, 0.6):
        with subprocess.Popen(
            command_line(engine, image, "--", "sleep", "1000"),
            env=engine_environment(engine, scratch),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as run:
            time.sleep(delay)
            run.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            run.send_signal(signal.SIGTERM)
            run.wait(30)
            assert run.returncode in (-signal.SIGTERM, 128 + signal.SIGKILL, 125)
        nothing_is_left(scratch, store())


# ---- kills


def test_killed_run(engine: str, scratch: Path, image: Path) -> None:
    """With kill -9 of the command line: container, mount, daemon and temporary files are gone."""
    with running(engine, scratch, image, FOREVER) as run:
        run.kill()
        run.communicate(timeout=30)
    nothing_is_left(scratch, store())


def test_killed_run_keeps_what_shall_be_kept(engine: str, scratch: Path, image: Path) -> None:
    script = "echo kept > /x; sync; " + FOREVER
    with running(engine, scratch, image, script, "--upper", "up") as run:
        run.kill()
        run.communicate(timeout=30)
    assert (scratch / "up/x").read_text() == "kept\n"
    again = subprocess.run(
        command_line(engine, "--upper", "up", image, "--", "cat", "/x"),
        env=engine_environment(engine, scratch),
        capture_output=True,
        text=True,
        cwd=scratch,
    )
    assert again.stdout == "kept\n", again.stderr


def test_killed_run_drops_what_shall_be_dropped(engine: str, scratch: Path, image: Path) -> None:
    with running(engine, scratch, image, FOREVER, "--name", "dropped", "--rm") as run:
        run.kill()
        run.communicate(timeout=30)
    processes.wait_until(lambda: not (store() / "uppers/dropped").exists(), "the upperdir is dropped")


def test_killed_daemon(engine: str, scratch: Path, image: Path) -> None:
    """With kill -9 of the daemon: the command is killed, one line says why, and what the daemon left is removed."""
    with running(engine, scratch, image, FOREVER) as run:
        os.kill(daemon().pid, signal.SIGKILL)
        _, said = run.communicate(timeout=30)
        assert run.returncode == 125
        assert "the daemon that serves the root file system has ended" in said.splitlines()[-1]


def test_killed_runtime(engine: str, scratch: Path, image: Path) -> None:
    """With kill -9 of crun or runc, or of chroot's waiting process: the command does not live on."""
    with running(engine, scratch, image, FOREVER) as run:
        served = daemon().pid
        # The janitor and the daemon are copies of the command line's process in name, and older.
        runner = [pid for pid, _ in children(run.pid) if pid != served][-1]
        os.kill(runner, signal.SIGKILL)
        run.communicate(timeout=30)
        assert run.returncode == 128 + signal.SIGKILL


def test_killed_janitor(engine: str, scratch: Path, image: Path) -> None:
    """Then the command line's process does all itself, as it does anyway."""
    script = "trap 'exit 6' USR1; " + FOREVER
    with running(engine, scratch, image, script) as run:
        janitor = next(pid for pid, _ in children(run.pid) if pid != daemon().pid)
        os.kill(janitor, signal.SIGKILL)
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=30)
        assert run.returncode == 6


def test_processes_that_a_command_leaves_end_with_it(engine: str, scratch: Path, image: Path) -> None:
    script = "(setsid sleep 1000 >/dev/null 2>&1 </dev/null &) ; cd /; echo ready; exit 9"
    with running(engine, scratch, image, script) as run:
        run.communicate(timeout=30)
        assert run.returncode == 9


def test_two_runs_of_one_name(engine: str, scratch: Path, image: Path) -> None:
    with running(engine, scratch, image, FOREVER, "--name", "one") as run:
        second = subprocess.run(
            command_line(engine, "--name", "one", "--rm", image, "--", "true"),
            env=engine_environment(engine, scratch), capture_output=True, text=True,
        )  # fmt: skip
        assert second.returncode == 125
        assert "is in use by another mount" in second.stderr
        assert len(second.stderr.splitlines()) == 1
        assert holders(scratch)
        run.kill()
    assert (store() / "uppers/one").exists()


# ---- terminals


class Terminal:
    """A terminal with `ovlfs run` as its session's leader."""

    def __init__(self, words: list[str], environment: dict[str, str]) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.execve(words[0], words, environment)
        self.seen = b""

    def until(self, text: bytes) -> None:
        """Read until the text has come."""
        end = time.monotonic() + 30
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 4096)
                except OSError:  # EIO: the other end is closed
                    assert text in self.seen, self.seen

    def send(self, text: bytes) -> None:
        self.seen = b""
        os.write(self.master, text)

    def ended(self) -> int:
        """The exit code; what is written meanwhile is read."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if select.select([self.master], [], [], 0.02)[0]:
                with contextlib.suppress(OSError):
                    os.read(self.master, 4096)
        pytest.fail("it does not end")


def test_terminal(engine: str, scratch: Path, image: Path) -> None:
    """--tty: a terminal inside, of the size outside, with Ctrl-C for the command in front."""
    terminal = Terminal(command_line(engine, "-it", image), engine_environment(engine, scratch))
    try:
        fcntl.ioctl(terminal.master, termios.TIOCSWINSZ, struct.pack("HHHH", 31, 97, 0, 0))
        terminal.until(b"# ")
        terminal.send(b"tty && stty size; echo $TERM\n")
        terminal.until(b"xterm")
        assert b"31 97" in terminal.seen
        assert b"/dev/" in terminal.seen
        terminal.send(b"sleep 1000\n")
        time.sleep(0.3)
        terminal.send(b"\x03")
        terminal.until(b"# ")
        terminal.send(b"exit 7\n")
        assert terminal.ended() == 7
    finally:
        os.close(terminal.master)
    nothing_is_left(scratch, store())


@pytest.mark.parametrize("tty", [True, False])
def test_closed_terminal(engine: str, scratch: Path, image: Path, tty: bool) -> None:
    words = ["-t"] if tty else []
    script = "trap 'exit 3' USR1; " + FOREVER
    terminal = Terminal(
        command_line(engine, *words, image, "--", "sh", "-c", script), engine_environment(engine, scratch)
    )
    terminal.until(b"ready")
    os.close(terminal.master)
    os.waitpid(terminal.pid, 0)
    nothing_is_left(scratch, store())


def test_interrupt_at_the_terminal_reaches_the_command_once(engine: str, scratch: Path, image: Path) -> None:
    """Without --tty the terminal sends SIGINT to all in front: to the runtime, which passes it on, and to us."""
    script = "n=0; trap 'n=$((n+1)); echo INT $n' INT; trap 'echo end $n; exit 0' USR2; " + FOREVER
    terminal = Terminal(command_line(engine, image, "--", "sh", "-c", script), engine_environment(engine, scratch))
    try:
        terminal.until(b"ready")
        terminal.send(b"\x03")
        terminal.until(b"INT 1")
        time.sleep(0.3)
        os.kill(terminal.pid, signal.SIGUSR2)
        terminal.until(b"end 1")
        assert terminal.ended() == 0
    finally:
        os.close(terminal.master)
    nothing_is_left(scratch, store())


def test_what_is_mounted_is_not_emptied(scratch: Path, image: Path, ovlfs: Ovlfs) -> None:
    """A temporary directory in which something is (still) mounted stays: rmtree would go on into the mount."""
    (scratch / "run/rootfs").mkdir(parents=True)
    ovlfs("mount", "--upper", scratch / "up", image, scratch / "run/rootfs")
    try:
        with pytest.raises(MountError, match="something is mounted in it"):
            uppers.remove(bytes(scratch / "run"))
        assert (scratch / "run/rootfs/etc").is_dir()
        assert list((scratch / "up").iterdir()) == []
    finally:
        ovlfs("umount", scratch / "run/rootfs")
    uppers.remove(bytes(scratch / "run"))
    assert not (scratch / "run").exists()
