"""How does RUN run?

The stack of the step is mounted by a daemon of its own, in a mount namespace that only this build sees (without root:
in a user namespace, see run/namespaces.py, which is entered at the first RUN), and the command runs in it as `ovlfs
run` runs it: by crun, else runc, or by chroot.  USER, WORKDIR and ENV are the config's; stdin is empty; what the
command prints goes to stderr, or into a file that is shown if it fails.  Set-uid programs work, device nodes do not.

Whatever dies first, no mount is left: the step unmounts, and if this process is killed a janitor does.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ovlfs.build import trees
from ovlfs.build.workshop import Upper, Workshop
from ovlfs.errors import MountError, OvlfsError
from ovlfs.fuse import daemon, mounting
from ovlfs.image.config import Config
from ovlfs.image.store import write_all
from ovlfs.overlay.stack import open_stack
from ovlfs.run import container, namespaces, runtime, supervise
from ovlfs.run.container import Settings
from ovlfs.run.namespaces import Mapping
from ovlfs.run.process import Overrides
from ovlfs.run.spec import Bind

_FAILED = 125
_PATIENCE = 100
"""Tenths of a second that the janitor tries to remove what is left; the next build would do it."""
_SCRIPT = b"/.ovlfs-heredoc"
_HOSTNAME = "ovlfs-build"
"""The same on every machine, since what a command writes becomes a layer."""


@dataclass(frozen=True, slots=True)
class Command:
    """What a RUN runs.

    Attributes:
        argv: the words, the shell's included.
        env: what it has beside the config's, NAME=VALUE.
        script: a here-document that begins with #!: run as a program, in the place of `argv`.
    """

    argv: tuple[str, ...]
    env: tuple[str, ...] = ()
    script: str | None = None
    host_network: bool = True


class Runner:
    """Runs the commands of one build.  Closed with `stack`, which the caller closes."""

    def __init__(self, workshop: Workshop, stack: contextlib.ExitStack, *, chroot: bool, quiet: bool) -> None:
        self._workshop = workshop
        self._stack = stack
        self._chroot = chroot
        self._quiet = quiet
        self._mapping: Mapping | None = None

    def enter(self) -> Mapping:
        """Enter the namespaces, once, before the upperdir of a RUN is made.  Precondition: we have one thread."""
        if self._mapping is None:
            self._mapping = namespaces.enter()
            self._workshop.keep_owners_in_xattrs = self._mapping.user_namespace
            if self._mapping.note:
                print(f"ovlfs: {self._mapping.note}", file=sys.stderr)
            self._stack.enter_context(supervise.janitor(self._clean_up_for_the_dead))
        return self._mapping

    def run(self, upper: Upper, config: Config, command: Command) -> int:
        """Run a command over the layers of `upper`, whose directory then has its changes; the exit code.

        Raises:
            MountError, ImageError: it could not be run, or not everything that it wrote is on disk.
        """
        mapping = self.enter()
        rootfs, state = upper.base + b"/rootfs", upper.base + b"/state"
        for directory in (rootfs, state):
            os.mkdir(directory, 0o700)
        argv = command.argv
        binds: tuple[Bind, ...] = ()
        if command.script is not None:
            binds = (Bind(_written(upper.base + b"/script", command.script), _SCRIPT, read_only=True),)
            argv = (os.fsdecode(_SCRIPT),)
        settings = Settings(_HOSTNAME, host_network=command.host_network, binds=binds)

        def run() -> int:
            overrides = Overrides(argv, (), command.env)
            return container.run_in(
                rootfs, config, overrides, settings, mapping=mapping, chroot=self._chroot, state=state
            )

        with self._mounted(upper, rootfs) as server, _output(upper.base + b"/output" if self._quiet else None) as shown:
            try:
                code = _in_a_child(run, server)
            finally:
                runtime.remove_all(state)  # there is something only if we were interrupted
            if code:
                shown()
        return code

    @contextlib.contextmanager
    def _mounted(self, upper: Upper, rootfs: bytes) -> Iterator[int]:
        """The stack, mounted; the process that serves it."""
        from ovlfs.fuse.session import MountOptions, serve  # noqa: PLC0415  # heavy: pyfuse3, trio

        def work(job: daemon.Job) -> None:
            os.umask(0o077)
            daemon.raise_limits()
            stack = open_stack(upper.params, trees.open_all(upper.layers, self._workshop.store))
            options = MountOptions(allow_other=os.geteuid() == 0, flags=("suid", "nodev"))
            serve(stack, rootfs, options, lambda: job.ready(str(os.getpid())))

        server = int(daemon.launch(work, log_path=upper.base + b"/log"))
        try:
            yield server
        finally:
            self._unmount(rootfs)
            _, status = os.waitpid(server, 0)
        if os.waitstatus_to_exitcode(status):
            raise MountError("the daemon that serves the root file system has failed: not all changes are on disk")

    @staticmethod
    def _unmount(rootfs: bytes) -> None:
        if mounting.find_mount(rootfs) is None:
            return
        try:
            mounting.unmount(rootfs)
        except MountError:  # something outlived the command and is still looking at it
            mounting.unmount(rootfs, lazy=True)

    def _clean_up_for_the_dead(self) -> None:
        """In the janitor, when this process was killed."""
        place = self._workshop.place
        for name in os.listdir(place):
            base = place + b"/" + name
            if os.path.isdir(base + b"/rootfs"):
                with contextlib.suppress(MountError):  # the others are to be cleaned up all the same
                    runtime.remove_all(base + b"/state")
                    self._unmount(base + b"/rootfs")
        for _ in range(_PATIENCE):
            with contextlib.suppress(OSError):  # the daemon and the runtime are ending, and were still writing there
                shutil.rmtree(place)
                return
            time.sleep(0.1)


def _in_a_child(run: Callable[[], int], server: int) -> int:
    """Run a command and return its exit code.  Any exception here (Ctrl-C, SIGTERM) kills it at once.

    So `run`, which passes signals on to the command and waits for what it makes of them, is a child's work.

    Raises:
        MountError: `run` could not be done, or the server has ended; the command was killed.
    """
    receiver, sender = os.pipe()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        code = _FAILED
        try:
            supervise.die_with_parent(parent)
            os.close(receiver)
            code = run()
        except (OvlfsError, OSError) as error:
            write_all(sender, daemon.describe(error)[0].encode("utf-8", "backslashreplace")[:4096])
        finally:
            os._exit(code)
    os.close(sender)
    ended = False
    try:
        with contextlib.ExitStack() as stack:
            said = stack.enter_context(open(receiver, "rb"))
            poller = select.poll()
            for pid in (child, server):
                pidfd = os.pidfd_open(pid)
                stack.callback(os.close, pidfd)
                poller.register(pidfd, select.POLLIN)
            poller.poll()
            found, status = os.waitpid(child, os.WNOHANG)
            if not found:
                raise MountError("the daemon that serves the root file system has ended; the command was killed")
            ended = True
            failure = said.read().decode("utf-8", "replace")
    finally:
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if failure:
        raise MountError(failure)
    return os.waitstatus_to_exitcode(status)


def _written(path: bytes, script: str) -> bytes:
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(script)
    os.chmod(path, 0o755)  # noqa: S103  # whoever USER is must be able to execute it
    return path


@contextlib.contextmanager
def _output(path: bytes | None) -> Iterator[Callable[[], None]]:
    """What the command reads and writes: nothing, and to stderr, or into the file `path` that the function shows."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(number) for number in range(3)]
    empty = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    out = os.dup(2) if path is None else os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def show() -> None:
        if path is not None:
            with open(path, "rb") as file:
                while piece := file.read(1 << 16):
                    write_all(saved[2], piece)

    try:
        os.dup2(empty, 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        yield show
    finally:
        sys.stderr.flush()
        for number, fd in enumerate(saved):
            os.dup2(fd, number)
        for fd in (*saved, empty, out):
            os.close(fd)
