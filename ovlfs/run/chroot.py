"""What is a container without a container runtime?

chroot(2), and the few mounts without which programs are lost: /proc, /dev, /sys, and /etc/resolv.conf.  This is for
looking at how little it takes, and for root where no runtime is installed.  It isolates nothing: root in here has all
capabilities, the host's devices and (unless --network none) its network, and can walk out.

Three processes: we; a runner in new mount and process namespaces, which waits; and process 1 of these, which mounts,
changes root and becomes the command.  When it ends, the kernel kills what it has left running and unmounts, so nothing
stays behind, whoever is killed.  Mountpoints are opened without following links (inside.py made them), so no mount
lands outside the root, and every descriptor is closed before the working directory is entered (CVE-2024-21626).

Kernel: chroot(2), mount(2), pid_namespaces(7), mount_namespaces(7).
"""

import contextlib
import errno
import os
import signal
import socket
import sys as python
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from ovlfs.errors import printable
from ovlfs.fuse import mounting
from ovlfs.layer import sys
from ovlfs.run import namespaces, supervise
from ovlfs.run.namespaces import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
)
from ovlfs.run.runtime import FAILED, NOT_EXECUTABLE, NOT_FOUND
from ovlfs.run.spec import Bind, Container

_PID_FILE = b"/pid"
_NOT_FOUND = frozenset((errno.ENOENT, errno.ENOTDIR))
_NOT_EXECUTABLE = frozenset((errno.EACCES, errno.ENOEXEC, errno.EISDIR, errno.EPERM))


@dataclass(frozen=True, slots=True)
class Chroot:
    """One command in a root; the interface is runtime.Runtime's.

    Attributes:
        rootfs: the root.
        container: what to run in it; destinations of its binds are Place.absolute of places that were made.
        state: a directory for the command's process id.
        set_groups: whether supplementary groups may be set (namespaces.Mapping).
    """

    rootfs: bytes
    container: Container
    state: bytes
    set_groups: bool = True

    @property
    def pid_file(self) -> bytes:
        """Where the runner writes the command's process id."""
        return self.state + _PID_FILE

    def start(self, mask: set[int]) -> int:
        """Start it in a child; the child's process id."""
        return supervise.fork(self._runner, mask)

    def remove(self) -> None:
        """Kill process 1, if it is still there: a set-uid command does not end with its runner (prctl(2))."""
        remove_all(self.state)

    def understood(self, code: int, command: str) -> int:  # noqa: ARG002
        """The exit code as it is: ours are docker's."""
        return code

    def _runner(self) -> NoReturn:
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the command gets them, and we get its end
        network = 0 if self.container.host_network else CLONE_NEWNET
        namespaces.unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS | CLONE_NEWIPC | network)
        socket.sethostname(self.container.hostname)
        if network:
            _loopback_up()
        pid = os.fork()
        if pid == 0:
            self._first()
        temp = self.pid_file + b".tmp"
        with open(temp, "w", encoding="ascii") as file:
            file.write(f"{pid} {mounting.start_time(pid)}")
        os.rename(temp, self.pid_file)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code < 0:
            os._exit(128 - code)
        os._exit(code)

    def _first(self) -> NoReturn:
        """Process 1: mounts, changes root, becomes the command."""
        code = FAILED
        try:
            supervise.die_with_parent(0)  # of another process namespace: seen as 0
            for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            self._mount()
            self._become()
        except OSError as error:
            program = self.container.process.argv[0]
            what = program if error.filename is None else os.fsdecode(error.filename)
            python.stderr.write(f"ovlfs: {printable(what)}: {error.strerror}\n")
        except _CannotExecuteError as error:
            python.stderr.write(f"ovlfs: {error}\n")
            code = error.exit_code
        finally:
            python.stderr.flush()
            os._exit(code)

    def _mount(self) -> None:
        namespaces.mount(b"none", b"/", flags=MS_REC | MS_PRIVATE)
        root = self.rootfs
        namespaces.mount(root, root, flags=MS_BIND | MS_REC)
        rootfd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        os.fchdir(rootfd)
        # New where our namespaces are not the host's: /proc shows our processes, /sys our network.
        _mount_system(rootfd, b"proc", new=True)
        _mount_system(rootfd, b"sys", new=not self.container.host_network)
        _mount_system(rootfd, b"dev", new=False)
        for bind in self.container.binds:
            self._bind(rootfd, bind)
        if self.container.read_only:
            namespaces.mount(b"none", root, flags=MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NODEV)

    @staticmethod
    def _bind(rootfd: int, bind: Bind) -> None:
        path = bind.destination.lstrip(b"/")
        with _at(rootfd, path) as target:
            namespaces.mount(bind.source, target, flags=MS_BIND | MS_REC)
        if bind.read_only:
            with _at(rootfd, path) as target:  # opened anew: what is mounted there now
                locked = _locked_flags(target)
                namespaces.mount(b"none", target, flags=MS_REMOUNT | MS_BIND | MS_RDONLY | locked)

    def _become(self) -> NoReturn:
        process = self.container.process
        os.chroot(b".")
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.chdir(process.cwd)
        user = process.user
        if self.set_groups:
            os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
        supervise.die_with_parent(0)  # a change of ids has cleared it
        argv = [_bytes(word) for word in process.argv]
        env = dict(_bytes(one).split(b"=", 1) for one in process.env)
        os.umask(0o022)
        try:
            os.execvpe(argv[0], argv, env)  # noqa: S606
        except OSError as error:
            code = NOT_FOUND if error.errno in _NOT_FOUND else NOT_EXECUTABLE
            if error.errno not in _NOT_FOUND | _NOT_EXECUTABLE:
                code = FAILED
            raise _CannotExecuteError(f"{printable(argv[0][:200])}: {error.strerror}", code) from error


def _mount_system(rootfd: int, name: bytes, *, new: bool) -> None:
    with _at(rootfd, name) as target:
        if new:
            kind = {b"sys": b"sysfs"}.get(name, name)
            # EPERM: the host's is partly covered, so the kernel gives a user namespace no other view of it.
            with contextlib.suppress(PermissionError):
                namespaces.mount(kind, target, kind, MS_NOSUID | MS_NODEV | MS_NOEXEC)
                return
        namespaces.mount(b"/" + name, target, flags=MS_BIND | MS_REC)


def remove_all(state: bytes) -> None:
    """Kill the command whose process is written in `state`: for who has not started it."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # there is none, or none any more
        with open(state + _PID_FILE, encoding="ascii") as file:
            fields = file.read(64).split()
        if len(fields) == 2 and str(mounting.start_time(int(fields[0]))) == fields[1]:
            os.kill(int(fields[0]), signal.SIGKILL)


class _CannotExecuteError(Exception):
    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def _bytes(word: str) -> bytes:
    return word.encode("utf-8", "surrogateescape")


@contextlib.contextmanager
def _at(rootfd: int, path: bytes) -> Iterator[bytes]:
    """A name for mount(2) of the place `path` below the root, which has no symlinks in it."""
    fd = sys.open_beneath(rootfd, path, os.O_PATH | os.O_NOFOLLOW)
    try:
        yield sys.fd_path(fd)
    finally:
        os.close(fd)


def _locked_flags(path: bytes) -> int:
    """The flags that a remount must repeat: in a user namespace, those of an outer mount are locked."""
    found = os.statvfs(path).f_flag
    return found & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME | os.ST_RELATIME)


def _loopback_up() -> None:
    """`ip link set lo up`; netdevice(7)."""
    import fcntl  # noqa: PLC0415
    import struct  # noqa: PLC0415

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", b"lo", 1 | 64))  # SIOCSIFFLAGS, IFF_UP | IFF_RUNNING
