"""`ovlfs lesson`: seven lessons about overlays, on a real mount, with predictions."""

import argparse
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ovlfs.cli.main import Parser
from ovlfs.errors import MountError, OvlfsError, UsageError, printable

if TYPE_CHECKING:
    from ovlfs.explain.lesson import Mounter, Talk, World

_DESCRIPTION = """\
Seven lessons about overlay file systems.  Each makes directories, mounts them as an overlay, asks you to predict what
happens, does it, and shows what came of it.  Nothing is left behind.

  ovlfs lesson                 all of them
  ovlfs lesson 4               one
  ovlfs lesson --kernel 4      the same on the kernel's overlayfs (as root)
  ovlfs lesson | less          to read: nobody is asked
"""
_KERNEL_OPTIONS = "redirect_dir=on,metacopy=on,index=on"
_PATIENCE = 50
"""Tenths of a second that a daemon may take to end after the command line was killed."""


def parser() -> Parser:
    """The command line."""
    found = Parser("ovlfs lesson", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("number", nargs="?", type=int, metavar="N", help="which lesson (default: all)")
    found.add_argument("--list", action="store_true", help="list the lessons")
    found.add_argument("--kernel", action="store_true", help="on mount -t overlay instead of ovlfs (needs root)")
    return found


def run(args: argparse.Namespace) -> int:
    """Teach."""
    from ovlfs.explain.lesson import Leave, Talk  # noqa: PLC0415
    from ovlfs.explain.lessons import LESSONS  # noqa: PLC0415

    if args.list:
        for number, lesson in enumerate(LESSONS, 1):
            print(f"{number}  {lesson.title}")
        return 0
    if args.number is not None and not 1 <= args.number <= len(LESSONS):
        raise UsageError(f"lesson: there are lessons 1 to {len(LESSONS)}, not {args.number}")
    if args.kernel and os.geteuid() != 0:
        raise OvlfsError("only root can mount the kernel's overlayfs; without --kernel the lesson runs on ovlfs")
    numbers = [args.number] if args.number is not None else list(range(1, len(LESSONS) + 1))
    talk = Talk(sys.stdout, _Keyboard() if sys.stdin.isatty() and sys.stdout.isatty() else None)
    mounter: Mounter = _Kernel() if args.kernel else _Ovlfs()
    try:
        for number in numbers:
            if number != numbers[0]:
                talk.pause()
                talk.line()
            _teach(number, mounter, talk)
    except Leave:
        talk.line()
    if talk.answers is not None and talk.asked:
        print(f"\nYou predicted {talk.right} of {talk.asked}.")
    return 0


def _teach(number: int, mounter: "Mounter", talk: "Talk") -> None:
    from ovlfs.explain.lesson import interruptible, world  # noqa: PLC0415
    from ovlfs.explain.lessons import LESSONS  # noqa: PLC0415
    from ovlfs.run.supervise import janitor  # noqa: PLC0415

    lesson = LESSONS[number - 1]
    talk.title(f"Lesson {number}: {lesson.title}")
    with interruptible(), world(mounter, talk) as made, janitor(lambda: _clean_up_for_the_dead(made)):
        with _logs_below(made.root):
            lesson.run(made, talk)


def _clean_up_for_the_dead(made: "World") -> None:
    """In the janitor, when the process of the command line was killed."""
    for _ in range(_PATIENCE):
        with contextlib.suppress(OSError, OvlfsError):  # a daemon that was just being started is not done yet
            made.clean_up()
        if not os.path.exists(made.root):
            return
        time.sleep(0.1)


class _Keyboard:
    """The terminal (explain.lesson.Answers)."""

    def readline(self) -> str:
        """The next line.  A signal that comes just before the waiting begins ends it, too: it writes to a pipe."""
        waking, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        before = signal.set_wakeup_fd(wake)
        try:
            while True:
                ready, _, _ = select.select([sys.stdin, waking], [], [])
                if sys.stdin in ready:
                    return sys.stdin.readline()
                os.read(waking, 64)  # the handler has run, or is about to: whoever raises does it here
        finally:
            signal.set_wakeup_fd(before)
            os.close(waking)
            os.close(wake)


@contextlib.contextmanager
def _logs_below(root: str) -> Iterator[None]:
    """The daemon's log goes with the lesson's directory."""
    before = os.environ.get("OVLFS_LOG_DIR")
    os.environ["OVLFS_LOG_DIR"] = os.path.join(root, "log")
    try:
        yield
    finally:
        if before is None:
            del os.environ["OVLFS_LOG_DIR"]
        else:
            os.environ["OVLFS_LOG_DIR"] = before


class _Ovlfs:
    """Mounts by ovlfs (explain.lesson.Mounter)."""

    is_kernel = False

    def command(self, options: str, mountpoint: str) -> str:
        return f"ovlfs mount -o {options} {mountpoint}"

    def mount(self, directory: str, options: str, mountpoint: str) -> None:
        from ovlfs.cli import start  # noqa: PLC0415  # heavy
        from ovlfs.overlay.params import parse_mount_options  # noqa: PLC0415

        params, flags = parse_mount_options(options)
        at = os.fsencode(os.path.join(directory, mountpoint))
        start.mount(start.Request(mountpoint=at, params=params, flags=flags, options=options, directory=directory))

    def unmount(self, path: str) -> None:
        from ovlfs.cli.umount import unmount  # noqa: PLC0415

        unmount(os.fsencode(path), lazy=False)


class _Kernel:
    """Mounts by the kernel (explain.lesson.Mounter)."""

    is_kernel = True

    def command(self, options: str, mountpoint: str) -> str:
        return f"mount -t overlay -o {options},{_KERNEL_OPTIONS} overlay {mountpoint}"

    def mount(self, directory: str, options: str, mountpoint: str) -> None:
        words = ["mount", "-t", "overlay", "-o", f"{options},{_KERNEL_OPTIONS}", "overlay", mountpoint]
        _run_program(words, directory)

    def unmount(self, path: str) -> None:
        _run_program(["umount", "--", path], "/")


def _run_program(words: list[str], directory: str) -> None:
    """Run mount(8) or umount(8).  Raises MountError with what it said."""
    try:
        done = subprocess.run(words, cwd=directory, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError as error:
        raise MountError(f"{words[0]} is missing (Debian: apt-get install mount)") from error
    if done.returncode != 0:
        raise MountError(printable(" ".join(done.stderr.split())) or f"{words[0]}: exit code {done.returncode}")
