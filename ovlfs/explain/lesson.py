"""How is an overlay learned?  By predicting what it does, and then watching it do just that.

A lesson makes a few directories, mounts them as an overlay, asks, does what it asked about, and shows what came of it
in the upperdir.  Every answer is taken from what really happened: a lesson whose text and whose file system disagree
fails, and says so.  The same lessons run on ovlfs and on the kernel's overlayfs; where these differ on purpose,
`differs` marks the paragraph.

Kernel: Documentation/filesystems/overlayfs.rst.
"""

import contextlib
import os
import shutil
import signal
import stat
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn, Protocol, TextIO

from ovlfs.errors import OvlfsError, printable
from ovlfs.fuse import mounting
from ovlfs.layer.directory import TRUSTED, USER

WIDTH = 78
_SHOWN_XATTRS = ("opaque", "redirect", "metacopy", "whiteout", "origin", "nlink", "impure")
_BY_VALUE = frozenset(("opaque", "redirect", "impure"))


class Leave(Exception):  # noqa: N818  # no error
    """The reader has had enough."""


class Mounter(Protocol):
    """Who makes the overlay: ovlfs, or the kernel.

    Attributes:
        is_kernel: the kernel's overlayfs.
    """

    is_kernel: bool

    def command(self, options: str, mountpoint: str) -> str:
        """What one would type."""

    def mount(self, directory: str, options: str, mountpoint: str) -> None:
        """Mount on `directory`/`mountpoint`; the paths in the options are relative to the directory."""

    def unmount(self, path: str) -> None:
        """Unmount, and return when everything is on disk."""


class Answers(Protocol):
    """Where the reader types."""

    def readline(self) -> str:
        """The next line, "" at the end."""


class Talk:
    """What is printed, and what the reader answers.  Without `answers` nobody is asked, and nothing waits."""

    def __init__(self, out: TextIO, answers: Answers | None) -> None:
        self.out = out
        self.answers = answers
        self.asked = 0
        self.right = 0

    def line(self, text: str = "") -> None:
        """One line as it is."""
        self.out.write(f"{text}\n")

    def say(self, text: str, *, mark: str = "") -> None:
        """Paragraphs, filled; an empty line before each."""
        for paragraph in textwrap.dedent(text).strip().split("\n\n"):
            self.line()
            self.line(textwrap.fill(mark + " ".join(paragraph.split()), WIDTH, subsequent_indent=" " * len(mark)))

    def differs(self, text: str) -> None:
        """A paragraph about what is different here, on purpose."""
        self.say(text, mark="| ")

    def title(self, text: str) -> None:
        """The head of a lesson."""
        self.line(text)
        self.line("=" * len(text))

    def ask(self, question: str, choices: dict[str, str]) -> "Question":
        """Ask the reader to predict."""
        self.line()
        self.line(textwrap.fill(f"? {question}", WIDTH, subsequent_indent="  "))
        for letter, choice in choices.items():
            self.line(textwrap.fill(f"  {letter}) {choice}", WIDTH, subsequent_indent="     "))
        return Question(self, choices, self._prediction(tuple(choices)))

    def _prediction(self, letters: tuple[str, ...]) -> str | None:
        if self.answers is None:
            self.line("  (predict, then read on)")
            return None
        while True:
            self.out.write(f"  {'/'.join(letters)}, or q to leave: ")
            self.out.flush()
            typed = self.answers.readline()
            answer = typed.strip().lower()
            if not typed or answer in {"q", "quit"}:
                raise Leave
            if answer in letters:
                return answer

    def pause(self) -> None:
        """Wait for Enter, if somebody is there."""
        if self.answers is not None:
            self.out.write("\nEnter for the next lesson, q to leave: ")
            self.out.flush()
            typed = self.answers.readline()
            if not typed or typed.strip().lower() in {"q", "quit"}:
                raise Leave


@dataclass(slots=True)
class Question:
    """One prediction that waits for what happens."""

    talk: Talk
    choices: dict[str, str]
    predicted: str | None

    def answer(self, happened: str | None, right: str, because: str) -> None:
        """Say what was right, and why.

        Args:
            happened: the choice that fits what was seen; None: none of them.
            right: the choice that `because` explains.
            because: why.

        Raises:
            OvlfsError: the file system did something else than what it should.
        """
        if happened != right:
            seen = "something else" if happened is None else f"'{self.choices[happened]}'"
            raise OvlfsError(f"the lesson expected '{self.choices[right]}', and the file system did {seen}")
        self.talk.asked += 1
        verdict = f"{right}) {self.choices[right]}."
        if self.predicted == right:
            self.talk.right += 1
            verdict = f"Right: {verdict}"
        elif self.predicted is not None:
            verdict = f"Not {self.predicted}: {verdict}"
        self.talk.say(verdict, mark="= ")
        self.talk.say(because)


@dataclass(slots=True)
class World:
    """A directory with lower1 (the bottom), lower2, ..., upper, work and merged.

    Attributes:
        trusted: whether the overlay may keep its marks in trusted.* xattrs, as root may: only then the kernel follows
            redirects and metacopies.
    """

    root: str
    mounter: Mounter
    talk: Talk
    trusted: bool
    lowers: int = 0
    _inodes: dict[int, str] = field(default_factory=dict)

    # ---- making, mounting --------------------------------------------------------------------------------------------

    def path(self, path: str) -> str:
        """The real path of `merged/etc/motd`."""
        return os.path.join(self.root, path)

    def lower(self, content: dict[str, str | None], *, links: dict[str, str] | None = None) -> None:
        """Make the next lower directory, above those that are there.  None: a directory; `links`: hard links."""
        self.lowers += 1
        base = self.path(f"lower{self.lowers}")
        os.mkdir(base)
        for name, text in content.items():
            at = os.path.join(base, name)
            os.makedirs(at if text is None else os.path.dirname(at), exist_ok=True)
            if text is not None:
                with open(at, "w", encoding="utf-8") as file:
                    file.write(text)
        for name, target in (links or {}).items():
            os.link(os.path.join(base, target), os.path.join(base, name))

    def show_lowers(self) -> None:
        """Print what is in the lower directories, top first."""
        self.talk.line()
        for number in range(self.lowers, 0, -1):
            where = " (the bottom)" if number == 1 < self.lowers else " (the top)" if number == self.lowers > 1 else ""
            self.talk.line(f"  lower{number}/{where}")
            for line in self._listing(f"lower{number}"):
                self.talk.line(f"    {line}")

    def mount(self) -> None:
        """Mount all lower directories below upper on merged, and show what upper has."""
        lowers = ":".join(f"lower{number}" for number in range(self.lowers, 0, -1))
        options = f"lowerdir={lowers},upperdir=upper,workdir=work"
        for name in ("upper", "work", "merged"):
            os.makedirs(self.path(name), exist_ok=True)
        self.talk.line()
        self.talk.line(f"$ {self.mounter.command(options, 'merged')}")
        self.mounter.mount(self.root, options, "merged")
        self.show_upper()

    def unmount(self) -> None:
        """Unmount merged."""
        self._command("umount merged" if self.mounter.is_kernel else "ovlfs umount merged")
        self.mounter.unmount(self.path("merged"))

    def clean_up(self) -> None:
        """Leave nothing: no mount, no directory.  A busy mount is taken away all the same, and told by a MountError."""
        merged = self.path("merged")
        try:
            if mounting.find_mount(os.fsencode(merged)) is not None:
                self.mounter.unmount(merged)
        finally:
            if mounting.find_mount(os.fsencode(merged)) is not None:  # busy, or its daemon is gone
                mounting.unmount(os.fsencode(merged), lazy=True)
            for directory, _, _ in os.walk(self.root):
                os.chmod(directory, 0o700)  # before what is in it is listed; work/work has mode 000
            shutil.rmtree(self.root)

    # ---- what one types ----------------------------------------------------------------------------------------------

    def _command(self, text: str) -> None:
        self.talk.line(f"$ {text}")

    def cat(self, path: str) -> str | None:
        """Print a file; None: there is no such file."""
        self._command(f"cat {path}")
        try:
            with open(self.path(path), encoding="utf-8") as file:
                text = file.read()
        except OSError as error:
            self.talk.line(f"cat: {path}: {error.strerror}")
            return None
        self.talk.line(text.removesuffix("\n"))
        return text

    def ls(self, path: str) -> list[str]:
        """Print the names in a directory, sorted."""
        self._command(f"ls {path}")
        names = sorted(os.listdir(self.path(path)))
        self.talk.line("  ".join(names) if names else "(nothing)")
        return names

    def write(self, path: str, text: str, *, append: bool = False) -> None:
        """Write or append a line."""
        self._command(f"echo {text} {'>>' if append else '>'} {path}")
        with open(self.path(path), "a" if append else "w", encoding="utf-8") as file:
            file.write(text + "\n")

    def rm(self, path: str) -> None:
        """Remove a file, or a directory with all that is in it."""
        at = self.path(path)
        directory = os.path.isdir(at)
        self._command(f"rm {'-r ' if directory else ''}{path}")
        if directory:
            shutil.rmtree(at)
        else:
            os.unlink(at)

    def mkdir(self, path: str) -> None:
        """Make a directory."""
        self._command(f"mkdir {path}")
        os.mkdir(self.path(path))

    def chmod(self, mode: int, path: str) -> None:
        """Change permissions."""
        self._command(f"chmod {mode:o} {path}")
        os.chmod(self.path(path), mode)

    def rename(self, path: str, new: str) -> str:
        """rename(2); "" or the error's text."""
        self._command(f'python3 -c \'import os; os.rename("{path}", "{new}")\'')
        try:
            os.rename(self.path(path), self.path(new))
        except OSError as error:
            self.talk.line(f"OSError: [Errno {error.errno}] {error.strerror}: '{path}' -> '{new}'")
            return error.strerror or "an error"
        return ""

    def mv(self, path: str, new: str) -> None:
        """mv(1): rename(2), and if that says EXDEV, copy everything and remove it."""
        self._command(f"mv {path} {new}")
        shutil.move(self.path(path), self.path(new))

    def inode(self, path: str) -> str:
        """Print the inode number, as a letter: the numbers are others each time, which are the same is what counts."""
        self._command(f"stat -c %i {path}")
        number = os.stat(self.path(path)).st_ino
        letter = self._inodes.setdefault(number, chr(ord("A") + len(self._inodes)))
        self.talk.line(f"(the number that we call {letter})")
        return letter

    # ---- what came of it ---------------------------------------------------------------------------------------------

    def show_upper(self) -> dict[str, str]:
        """Print all that is in the upperdir, with its marks.  Returns path to kind."""
        found = self.look_at_upper()
        lines = self._listing("upper")
        self.talk.line("  upper/" if lines else "  upper/ is empty")
        for line in lines:
            self.talk.line(f"    {line}")
        return found

    def look_at_upper(self) -> dict[str, str]:
        """Path to kind ("whiteout", "directory", "file", ...) of all that is in the upperdir."""
        return {os.path.relpath(at, self.path("upper")): self._kind(at) for at in self._walk("upper")}

    def mark(self, path: str, name: str) -> str | None:
        """The overlay's xattr `name` of upper/`path`, as text; None: it has none."""
        value = self._xattr(self.path(f"upper/{path}"), name)
        return None if value is None else value.decode(errors="replace")

    def data_bytes(self, path: str) -> int:
        """How many bytes of upper/`path` are data, and not a hole."""
        return _data_bytes(self.path(f"upper/{path}"))

    def _walk(self, top: str) -> Iterator[str]:
        for directory, subdirectories, files in os.walk(self.path(top)):
            subdirectories.sort()
            yield from (os.path.join(directory, name) for name in sorted(subdirectories + files))

    def _listing(self, top: str) -> list[str]:
        lines = []
        for at in sorted(self._walk(top)):
            name = os.path.relpath(at, self.path(top)) + ("/" if os.path.isdir(at) else "")
            marks = [shown for mark in _SHOWN_XATTRS if (shown := self._shown_mark(at, mark))]
            words = [self._described(at), *marks]
            lines.append(f"{printable(name):<16} {', '.join(words)}".rstrip())
        return lines

    def _kind(self, at: str) -> str:
        status = os.lstat(at)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
            return "whiteout"
        if stat.S_ISREG(status.st_mode) and self._xattr(at, "whiteout") is not None:
            return "whiteout"
        return "directory" if stat.S_ISDIR(status.st_mode) else "file"

    def _described(self, at: str) -> str:
        status = os.lstat(at)
        kind = self._kind(at)
        if kind == "whiteout":
            return "whiteout: a character device 0:0" if stat.S_ISCHR(status.st_mode) else "whiteout: an empty file"
        if kind == "directory":
            return "directory"
        size = f"{status.st_size // 1024} KiB" if status.st_size > 1024 else f"{status.st_size} bytes"
        if status.st_size > 0 and _data_bytes(at) == 0:
            return f"file of {size}, all of it a hole"
        if status.st_size > 64:
            return f"file of {size}"
        with open(at, encoding="utf-8", errors="replace") as file:
            return f'file, "{printable(file.read().removesuffix(chr(10)))}"'

    def _shown_mark(self, at: str, name: str) -> str:
        value = self._xattr(at, name)
        if value is None:
            return ""
        return f"overlay.{name}={printable(value)}" if name in _BY_VALUE else f"overlay.{name}"

    def _xattr(self, at: str, name: str) -> bytes | None:
        prefix = TRUSTED if self.trusted else USER
        try:
            return os.getxattr(os.fsencode(at), prefix + name.encode(), follow_symlinks=False)
        except OSError:  # ENODATA: it has none; EPERM: a device can have no user.* xattr
            return None


def _data_bytes(at: str) -> int:
    found, end = 0, 0
    with open(at, "rb") as file:
        with contextlib.suppress(OSError):  # ENXIO: no data from here on
            while True:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                found += end - start
    return found


@dataclass(frozen=True, slots=True)
class Lesson:
    """One lesson."""

    title: str
    run: Callable[[World, Talk], None]


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, a signal that would end us raises KeyboardInterrupt, so that everything is cleaned up."""

    def interrupted(_number: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = [(number, signal.signal(number, interrupted)) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@contextlib.contextmanager
def world(mounter: Mounter, talk: Talk) -> Iterator[World]:
    """A new World.  At the end, however it comes but by SIGKILL, nothing is mounted and the directory is gone.

    Signals wait while the directory is made and while everything is cleaned up.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        root, trusted = _place(mounter)
        made = World(root, mounter, talk, trusted)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield made
        finally:
            try:
                signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            finally:  # also when a signal that came just before is told here
                made.clean_up()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _place(mounter: Mounter) -> tuple[str, bool]:
    """A new directory on a file system that can be an upperdir; and whether it takes trusted.* xattrs."""
    chosen = os.environ.get("TMPDIR")
    bases = [chosen] if chosen else ["/tmp", "/var/tmp", "/dev/shm"]  # noqa: S108  # mkdtemp makes the name
    for base in bases:
        if not os.path.isdir(base) or not os.access(base, os.W_OK) or set(base) & set(",:\\"):
            continue
        root = os.path.realpath(tempfile.mkdtemp(prefix="ovlfs-lesson-", dir=base))
        if not (mounter.is_kernel and _is_overlay(root)):
            for prefix in (TRUSTED, USER):
                with contextlib.suppress(OSError):  # EPERM, EOPNOTSUPP: then the other, or another place
                    os.setxattr(root, prefix + b"probe", b"y")
                    os.removexattr(root, prefix + b"probe")
                    return root, prefix == TRUSTED
        os.rmdir(root)
    raise OvlfsError(f"none of {', '.join(bases)} has xattrs, as an upperdir must; TMPDIR can name another place")


def _is_overlay(path: str) -> bool:
    """Whether a path lies on an overlay, which cannot be an upperdir of the kernel's."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(entry.device == number and entry.fstype == b"overlay" for entry in mounting.mount_table())
