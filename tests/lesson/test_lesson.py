"""The lessons are true: on ovlfs, on the kernel's overlayfs and without privileges; and nothing is left of them."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers_users import User, interpreter
from processes import wait_until

from ovlfs.errors import OvlfsError
from ovlfs.explain.lesson import Talk
from ovlfs.explain.lessons import LESSONS
from ovlfs.fuse import mounting

Run = Callable[..., "subprocess.CompletedProcess[str]"]
ROOT = Path(__file__).parent.parent.parent
NUMBERS = range(1, len(LESSONS) + 1)

pytestmark = pytest.mark.fuse

# What upper shows differently, and the text explains: (ovlfs, kernel), by lesson.
DIFFERENT = {
    5: (
        {"papers/c file of 4 bytes, all of it a hole, overlay.redirect=/docs/a, overlay.metacopy, overlay.origin"},
        {"papers/c file of 4 bytes, all of it a hole, overlay.redirect=a, overlay.metacopy, overlay.origin"},
    ),
    6: (
        {r'one file, "text\nmore", overlay.origin', r'two file, "text\nmore", overlay.origin'},
        {r'one file, "text\nmore", overlay.origin, overlay.nlink'},
    ),
}


@pytest.fixture
def place(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the lessons make their directories; nothing may be there, or mounted there, afterwards."""
    directory = scratch / "lessons"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    yield directory
    assert list(directory.iterdir()) == []
    assert [entry.mountpoint for entry in mounting.mount_table() if os.fsencode(directory) in entry.mountpoint] == []


def told(text: str) -> list[str]:
    """The lines of a lesson, without what may differ: the commands that mount, and paragraphs marked as different."""
    text = re.sub(r"^\| .*\n(  .*\n)*", "", text, flags=re.MULTILINE)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return [line for line in lines if not re.match(r"\$ (ovlfs mount|mount -t overlay|ovlfs umount|umount) ", line)]


@pytest.mark.root
@pytest.mark.parametrize("number", NUMBERS)
def test_lesson_is_the_same_on_the_kernel(ovlfs: Run, place: Path, number: int) -> None:
    """Every line that is shown is the same on both, what is in upper included, but for what the text explains."""
    here = told(ovlfs("lesson", number).stdout)
    kernel = told(ovlfs("lesson", number, "--kernel").stdout)
    only_here, only_kernel = DIFFERENT.get(number, (set(), set()))
    assert set(here) - set(kernel) == only_here
    assert set(kernel) - set(here) == only_kernel
    assert [line for line in here if line not in only_here] == [line for line in kernel if line not in only_kernel]
    if number in DIFFERENT:
        assert "\n| " in ovlfs("lesson", number).stdout


@pytest.mark.root
def test_all_lessons_without_privileges(scratch: Path) -> None:
    """As uid 1000, with fusermount3: all seven, and the text says what is different without root's rights."""
    with User.at(scratch) as user:
        place = user.directory("lessons")
        result = user.run("env", f"TMPDIR={place}", interpreter(), "-m", "ovlfs.cli.main", "lesson")
        assert list(place.iterdir()) == []
        refused = user.ovlfs("lesson", "--kernel", code=1)
    assert [line for line in result.stdout.splitlines() if line.startswith("Lesson ")] == [
        f"Lesson {number}: {lesson.title}" for number, lesson in enumerate(LESSONS, 1)
    ]
    assert "= c) fails with EXDEV, as between two file systems." in result.stdout
    assert "= b) all of it." in result.stdout
    assert "trusted" not in result.stdout
    assert refused.stderr.count("\n") == 1
    assert "only root" in refused.stderr


def test_without_a_terminal_nobody_is_asked(ovlfs: Run, place: Path) -> None:
    """In a pipe a lesson does not wait, shows question and answer, and does not keep a score."""
    out = ovlfs("lesson", 2, stdin=subprocess.DEVNULL).stdout
    assert out.count("\n? ") == out.count("\n= ") == 3
    assert "predicted" not in out
    assert "motd             whiteout: a character device 0:0" in out


def test_list_and_usage(ovlfs: Run) -> None:
    """--list names seven lessons; there is no eighth."""
    assert ovlfs("lesson", "--list").stdout.splitlines() == [
        f"{number}  {lesson.title}" for number, lesson in enumerate(LESSONS, 1)
    ]
    assert len(LESSONS) == 7
    for number in (0, 8):
        assert "lessons 1 to 7" in ovlfs("lesson", number, code=2).stderr
    ovlfs("lesson", "opaque", code=2)


def test_a_file_system_that_does_something_else_is_found_out() -> None:
    """What happened decides; a lesson never claims what was not seen."""
    talk = Talk(io.StringIO(), None)
    question = talk.ask("What?", {"a": "this", "b": "that"})
    with pytest.raises(OvlfsError, match="expected 'this', and the file system did 'that'"):
        question.answer("b", "a", "because")
    with pytest.raises(OvlfsError, match="something else"):
        question.answer(None, "a", "because")


# ---- at a terminal ---------------------------------------------------------------------------------------------------


class Terminal:
    """A lesson in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.shown = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ["PYTHONPATH"] = str(ROOT)
            os.execv(sys.executable, [sys.executable, "-m", "ovlfs.cli.main", "lesson", *arguments])

    def until(self, text: str) -> None:
        """Read until the text is shown, once more than before."""
        start = len(self.shown)
        deadline = time.monotonic() + 60
        while text not in self.shown[start:]:
            assert self._more(deadline), f"'{text}' was not shown: {self.shown}"

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def end(self) -> int:
        """Read to the end, and return the exit code."""
        deadline = time.monotonic() + 60
        while self._more(deadline):
            pass
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _more(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
        try:
            piece = os.read(self._fd, 65536) if ready else b""
        except OSError:  # EIO: the other end is closed
            return False
        self.shown += piece.decode()
        return bool(piece)


PROMPT = "or q to leave: "


def test_predictions_are_checked_and_counted(place: Path) -> None:
    """A right answer, a wrong one, and something that is none of the choices."""
    terminal = Terminal("1")
    for answer in ("b\n", "a\n", "z\n", "A\n"):
        terminal.until(PROMPT)
        terminal.type(answer)
    assert terminal.end() == 0
    assert "= Right: b) from lower2." in terminal.shown
    assert "= Not a: c) fstab and hosts." in terminal.shown
    assert "= Right: a) a file." in terminal.shown
    assert "You predicted 2 of 3." in terminal.shown


def test_leaving_and_going_on(place: Path) -> None:
    """Enter leads to the next lesson, q and the end of input leave; both are no failure."""
    terminal = Terminal()
    for answer in "bca":
        terminal.until(PROMPT)
        terminal.type(f"{answer}\n")
    terminal.until("Enter for the next lesson")
    terminal.type("\n")
    terminal.until("Lesson 2: whiteout")
    terminal.until(PROMPT)
    terminal.type("q\n")
    assert terminal.end() == 0
    assert "You predicted 3 of 3." in terminal.shown
    terminal = Terminal("3")
    terminal.until(PROMPT)
    terminal.type("\x04")
    assert terminal.end() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=pytest.mark.root)])
def test_a_signal_leaves_nothing(place: Path, number: signal.Signals, kernel: bool) -> None:
    """Ctrl-C and the signals that would end us: unmounted, removed, exit code 130."""
    terminal = Terminal("4", *(["--kernel"] if kernel else []))
    terminal.until(PROMPT)
    assert len(list(place.iterdir())) == 1
    if number == signal.SIGINT:
        terminal.type("\x03")
    else:
        os.kill(terminal.pid, number)
    assert terminal.end() == 130
    assert "interrupted" in terminal.shown


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=pytest.mark.root)])
def test_a_kill_leaves_nothing(place: Path, kernel: bool) -> None:
    """SIGKILL cannot be caught: a janitor cleans up."""
    terminal = Terminal("4", *(["--kernel"] if kernel else []))
    terminal.until(PROMPT)
    os.kill(terminal.pid, signal.SIGKILL)
    assert terminal.end() == -signal.SIGKILL
    wait_until(lambda: list(place.iterdir()) == [], "it was cleaned up")


@pytest.mark.slow
def test_a_signal_at_any_time_leaves_nothing(place: Path) -> None:
    """Also while a mount is being made or taken away: whenever it comes."""
    for number in range(12):
        process = subprocess.Popen(
            [sys.executable, "-m", "ovlfs.cli.main", "lesson", "7"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        deadline = time.monotonic() + 30
        while process.poll() is None and not any(place.iterdir()):
            assert time.monotonic() < deadline
        time.sleep(number * 0.05)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode in {0, 130, -signal.SIGINT}, errors  # the last: after everything was over
        assert list(place.iterdir()) == []


def test_a_busy_mount_and_a_dead_daemon_leave_nothing(place: Path) -> None:
    """Somebody stands in the mount, or kills its daemon: it is taken away all the same, and the directory goes."""
    for kill in (False, True):
        terminal = Terminal("2")
        terminal.until(PROMPT)
        (directory,) = place.iterdir()
        if kill:
            record = next(
                found.record
                for found in mounting.mounts()
                if found.entry.mountpoint == os.fsencode(directory / "merged")
            )
            assert record is not None
            os.kill(record.pid, signal.SIGKILL)
            terminal.type("b\n")
            assert terminal.end() == 1
        else:
            fd = os.open(directory / "merged", os.O_RDONLY)
            try:
                terminal.type("q\n")
                assert terminal.end() in {0, 1}
            finally:
                os.close(fd)
        assert list(place.iterdir()) == []


def test_a_reader_that_goes_away_leaves_nothing(place: Path) -> None:
    """`ovlfs lesson | head -1`."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "ovlfs.cli.main", "lesson", "2"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"Lesson 2: whiteout\n"
    process.stdout.close()
    assert process.wait(60) == 1
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


def test_no_place_to_be_an_upperdir(ovlfs: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc takes neither files nor xattrs: one line that names it."""
    monkeypatch.setenv("TMPDIR", "/proc")
    failed = ovlfs("lesson", 1, code=1)
    assert "/proc" in failed.stderr
    assert failed.stderr.count("\n") == 1
