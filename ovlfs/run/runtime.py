"""How does an OCI runtime run a bundle, and what did it say when it could not?

crun if it is there, else runc; both are asked to stay in the foreground (`run`), where they pass the terminal, stdin
and signals through and end with the command's exit code.  What goes wrong in themselves they say on stderr, and once
more in a log that we read, so that their exit code 1 is not taken for the command's.

No cgroup is asked for: ovlfs sets no limits, and a user, a container or a machine without systemd has none to give.
crun can do without; it refuses to start where cgroups v1 and v2 are mixed, so it is not shown the v2 part there.

Sources: crun(1), runc(8), runc-run(8); the exit codes are docker's (moby daemon/errors.go:
translateContainerdStartErr()).
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import NoReturn

from ovlfs.errors import MountError, printable
from ovlfs.fuse import mounting
from ovlfs.run import namespaces, supervise

FAILED, NOT_EXECUTABLE, NOT_FOUND = 125, 126, 127

_NOT_FOUND = re.compile(r"executable file.*not found|no such file or directory", re.IGNORECASE)
_NOT_EXECUTABLE = re.compile(r"open executable|permission denied|exec format error|is a directory", re.IGNORECASE)
_MAX_LOG_BYTES = 1 << 20
_CONTAINERS = b"/runtime"
_HYBRID = "/sys/fs/cgroup/unified"


def find_runtime() -> str:
    """The path of crun, or of runc.  Raises MountError where there is neither."""
    for name in ("crun", "runc"):
        found = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin")
        if found is not None:
            return found
    raise MountError("there is no OCI runtime (Debian: apt-get install crun); --chroot does without")


@dataclass(frozen=True, slots=True)
class Runtime:
    """One container of a runtime.

    Attributes:
        program: the runtime.
        bundle: the directory with config.json.
        identity: the container's name.
        state: the runtime's own directory, its log and the command's process id are in here.
    """

    program: str
    bundle: bytes
    identity: str
    state: bytes

    @property
    def pid_file(self) -> bytes:
        """Where the runtime writes the command's process id."""
        return self.state + b"/pid"

    @property
    def _log(self) -> bytes:
        return self.state + b"/log"

    @property
    def _is_crun(self) -> bool:
        return os.path.basename(self.program) == "crun"

    def _words(self) -> list[bytes]:
        log = (b"file:" if self._is_crun else b"") + self._log
        words = [os.fsencode(self.program), b"--root", self.state + _CONTAINERS, b"--log", log]
        # Not JSON: crun would say it on stderr, too, when execve(2) fails.
        return [*words, b"--cgroup-manager=disabled"] if self._is_crun else [*words, b"--log-format", b"json"]

    def start(self, mask: set[int]) -> int:
        """Start it in a child, in the foreground; the child's process id."""
        words = [*self._words(), b"run", b"--bundle", self.bundle, b"--pid-file", self.pid_file]
        if self._is_crun:
            _hide_mixed_cgroups()
        words.append(self.identity.encode())

        def child() -> NoReturn:
            os.execv(words[0], words)  # noqa: S606

        return supervise.fork(child, mask)

    def remove(self) -> None:
        """Kill what is left of the container, if anything is.  Can be called at any time, and twice."""
        if os.path.isdir(self.state + _CONTAINERS + b"/" + self.identity.encode()):
            null = subprocess.DEVNULL
            words = [*self._words(), b"delete", b"--force", self.identity.encode()]
            subprocess.run(words, stdin=null, stdout=null, stderr=null, check=False)

    def understood(self, code: int, command: str) -> int:
        """What the exit code of the runtime says: the command's own, or that it was never started, and why.

        Deliberate: what execve(2) itself refuses (no interpreter, no format) is 1, as with docker; there the runtime
        has become the command already, and has said so on stderr only.
        """
        said = self._said() if code == 1 else ""
        if not said:
            return code
        if command not in said:  # "open executable: Permission denied", says crun
            sys.stderr.write(f"ovlfs: {printable(command[:200])}: the runtime could not execute it\n")
        if _NOT_FOUND.search(said):
            return NOT_FOUND
        return NOT_EXECUTABLE if _NOT_EXECUTABLE.search(said) else FAILED

    def _said(self) -> str:
        """The last error in the runtime's log."""
        try:
            with open(self._log, "rb") as file:
                lines = file.read(_MAX_LOG_BYTES).splitlines()
        except FileNotFoundError:
            return ""
        if self._is_crun:
            return lines[-1].decode(errors="replace") if lines else ""  # it logs nothing but errors
        errors = []
        for line in lines:
            with contextlib.suppress(ValueError, AttributeError):
                found = json.loads(line)
                if found.get("level") in ("error", "fatal"):
                    errors.append(str(found.get("msg")))
        return errors[-1] if errors else ""


def remove_all(state: bytes) -> None:
    """Kill what is left of containers whose state is in `state`: for who has not started them."""
    with contextlib.suppress(FileNotFoundError):  # none was ever started
        for name in os.listdir(state + _CONTAINERS):
            Runtime(find_runtime(), state, os.fsdecode(name), state).remove()


def _hide_mixed_cgroups() -> None:
    """In our own mount namespace: crun 1 says "cgroups in hybrid mode not supported", also if it shall not use any."""
    found = mounting.find_mount(os.fsencode(_HYBRID))
    if found is not None and found.fstype == b"cgroup2":
        namespaces.mount(b"none", os.fsencode(_HYBRID), b"tmpfs", namespaces.MS_RDONLY)
