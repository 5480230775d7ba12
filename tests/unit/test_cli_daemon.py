"""A daemon says how it went, and only then does the command return.  With work that mounts nothing.

Each test runs a program of its own: what forks must have one thread, and pytest has more.
"""

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import processes
import pytest

from ovlfs.errors import MountError
from ovlfs.fuse import daemon, mounting

Launch = Callable[[str], "subprocess.CompletedProcess[str]"]

PROGRAM = """
import os, signal, sys, time
from ovlfs.errors import OvlfsError, UsageError
from ovlfs.fuse import daemon

def work(job):
{body}

def main():
    print(daemon.launch(work, log_path=b"log/daemon.log"))
    return 0

from ovlfs.cli.main import guarded
sys.exit(guarded("program", main))
"""


@pytest.fixture
def launch(scratch: Path) -> Launch:
    """Runs a program in scratch that launches a daemon with this body of work(job)."""

    def run(body: str) -> "subprocess.CompletedProcess[str]":
        program = PROGRAM.format(body=textwrap.indent(textwrap.dedent(body), "    "))
        # Returns at the end of both pipes: a daemon that kept them open would be waited for.
        return subprocess.run(
            [sys.executable, "-c", program],
            cwd=scratch,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    return run


def log_of(scratch: Path) -> str:
    return (scratch / "log" / "daemon.log").read_text()


def test_launch_returns_when_ready_and_not_before(launch: Launch, scratch: Path) -> None:
    result = launch("""
        time.sleep(0.2)
        open("done", "w").close()
        job.ready("it is ready")
    """)
    assert (result.returncode, result.stdout, result.stderr) == (0, "it is ready\n", "")
    assert (scratch / "done").exists()


def test_the_daemon_lives_on_detached(launch: Launch, scratch: Path) -> None:
    """It has a session of its own, cwd /, and no descriptors of the caller: not even its pipes."""
    result = launch(f"""
        job.ready(str(os.getpid()))
        while not os.path.exists("{scratch}/end"):
            time.sleep(0.01)
    """)
    pid = int(result.stdout)
    log = str((scratch / "log" / "daemon.log").resolve())
    processes.wait_until(lambda: os.readlink(f"/proc/{pid}/cwd") == "/", "the daemon left")
    links = {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}

    assert os.getsid(pid) == pid
    assert links == {"0": "/dev/null", "1": log, "2": log}
    (scratch / "end").touch()
    processes.wait_until(lambda: not processes.is_running(pid), "the daemon ended")


def test_an_error_before_ready_is_the_commands_error(launch: Launch) -> None:
    result = launch("raise UsageError('this makes no sense')")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "program: this makes no sense\n")


def test_an_oserror_names_the_file(launch: Launch, scratch: Path) -> None:
    result = launch("os.open('/nonexistent/file', os.O_RDONLY)")
    assert (result.returncode, result.stderr) == (1, "program: /nonexistent/file: No such file or directory\n")
    assert "Traceback" in log_of(scratch)


def test_an_unforeseen_error_is_one_line_and_a_traceback_in_the_log(launch: Launch, scratch: Path) -> None:
    result = launch(r"raise ValueError('a\nb')")
    assert (result.returncode, result.stderr) == (1, "program: unforeseen ValueError: a\\nb\n")
    assert "Traceback" in log_of(scratch)


def test_what_fusermount_said_is_the_reason(launch: Launch) -> None:
    result = launch("""
        os.write(2, b"fusermount3: user has no write access to mountpoint /mnt\\n")
        raise RuntimeError("fuse_session_mount failed")
    """)
    assert result.stderr == "program: user has no write access to mountpoint /mnt\n"


def test_a_mount_that_fails_for_no_stated_reason_names_the_log(launch: Launch) -> None:
    result = launch("raise RuntimeError('fuse_session_mount failed')")
    assert re.search(r"fuse_session_mount failed; the log is log/daemon\.log", result.stderr)


def test_a_daemon_that_dies_silently_is_reported(launch: Launch) -> None:
    result = launch("os.kill(os.getpid(), signal.SIGKILL)")
    assert result.returncode == 1
    assert re.search(r"SIGKILL.*daemon\.log", result.stderr)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_before_ready_ends_the_work_in_order(launch: Launch, scratch: Path, name: str) -> None:
    result = launch(f"""
        try:
            os.kill(os.getpid(), signal.{name})
            time.sleep(10)
        finally:
            open("cleaned", "w").close()
    """)
    assert (result.returncode, result.stderr) == (130, "program: interrupted\n")
    assert (scratch / "cleaned").exists()


def test_ctrl_c_reaches_command_and_daemon(launch: Launch, scratch: Path) -> None:
    """Both are in the terminal's foreground group until the mount answers."""
    result = launch("""
        try:
            os.kill(os.getppid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        finally:
            time.sleep(0.2)
            open("cleaned", "w").close()
    """)
    assert (result.returncode, result.stderr) == (130, "program: interrupted\n")
    assert (scratch / "cleaned").exists()


def test_a_signal_after_the_session_does_not_disturb_the_end(launch: Launch, scratch: Path) -> None:
    launch(f"""
        job.ready("")
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        open("{scratch}/flushed", "w").close()
    """)
    processes.wait_until((scratch / "flushed").exists, "the work went on")


def test_an_error_after_ready_goes_to_the_log(launch: Launch, scratch: Path) -> None:
    result = launch("""
        job.ready("ready")
        raise OSError(5, "Input/output error", "/upper")
    """)
    assert (result.returncode, result.stdout) == (0, "ready\n")
    processes.wait_until(lambda: "/upper: Input/output error" in log_of(scratch), "it is in the log")


def test_when_the_command_is_gone_nothing_is_left_running(launch: Launch, scratch: Path) -> None:
    result = launch(f"""
        open("pid", "w").write(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(0.2)
        try:
            job.ready("nobody reads this")
        except BrokenPipeError:
            open("{scratch}/refused", "w").close()
            raise
    """)
    assert result.returncode == -9
    pid = int((scratch / "pid").read_text())
    processes.wait_until(lambda: mounting.start_time(pid) is None, "the daemon ended")
    assert (scratch / "refused").exists()


def test_a_log_that_has_grown_is_kept_once(scratch: Path) -> None:
    path = scratch / "log" / "x.log"
    path.parent.mkdir()
    path.write_bytes(b"x" * ((1 << 20) + 1))
    os.close(daemon.open_log(os.fsencode(path)))

    assert path.stat().st_size == 0
    assert path.with_name("x.log.old").stat().st_size > 1 << 20
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_log_is_no_symlink_to_elsewhere(scratch: Path) -> None:
    (scratch / "x.log").symlink_to(scratch / "victim")
    with pytest.raises(MountError, match="log "):
        daemon.open_log(os.fsencode(scratch / "x.log"))
    assert not (scratch / "victim").exists()
