"""Which process do an image's config and a command line make together?

Entrypoint and Cmd are one command; a command on the command line replaces Cmd, an entrypoint there replaces both.  Env
is the config's, then the command line's; PATH, HOME, HOSTNAME and TERM are added only where nobody says them.  USER is
looked up in the root (user.py), WorkingDir is made there if it is missing.

WorkingDir may not lead into /proc: what /proc/self/fd has are the runtime's own descriptors (CVE-2024-21626).

Source: image-spec config.md and conversion.md; where they are silent, `docker run`.
"""

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass

from ovlfs.errors import ImageError, UsageError, printable
from ovlfs.image.config import Config
from ovlfs.image.platform import fallbacks, host_platform
from ovlfs.run import inside
from ovlfs.run.user import User, resolve_user

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_SIGNAL = re.compile(r"(?:SIG)?(RTMIN|RTMAX)([+-][0-9]{1,2})?")


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the command line says instead of the config; None: nothing.

    Attributes:
        argv: in place of Cmd.
        entrypoint: in place of Entrypoint (and Cmd is dropped); () for none at all.
        env: NAME=VALUE, or NAME to take it away; later ones win.
    """

    argv: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    env: tuple[str, ...] = ()
    cwd: str | None = None
    user: str | None = None
    tty: bool = False


@dataclass(frozen=True, slots=True)
class Process:
    """What shall be executed, ready for execve(2) inside the root.

    Attributes:
        made: the directories that had to be made for `cwd`; they stay once the command has run.
    """

    argv: tuple[str, ...]
    env: tuple[str, ...]
    cwd: bytes
    user: User
    tty: bool = False
    stop_signal: int = signal.SIGTERM
    made: tuple[inside.Stub, ...] = ()


def check_platform(config: Config, where: str) -> None:
    """Raise ImageError for an image whose programs this machine cannot run."""
    wanted, host = config.platform, host_platform()
    if not wanted.architecture:
        return  # a root file system says nothing
    runs = wanted in fallbacks(host) or (wanted.architecture == host.architecture and host.architecture != "arm")
    if not runs:
        raise ImageError(
            f"{where}: is for {printable(str(wanted)[:60])}, and this machine is {host}: "
            "it can be mounted, its programs cannot be run"
        )


def resolve(
    config: Config, overrides: Overrides, rootfd: int, *, hostname: str = "", mounted: tuple[bytes, ...] = ()
) -> Process:
    """The process.

    Args:
        config: the image's.
        overrides: the command line's.
        rootfd: the mounted root, from inside.open_root(); WorkingDir is made in it.
        hostname: for $HOSTNAME; "" for none.
        mounted: paths where something will be mounted: a WorkingDir below them is not made.

    Raises:
        ImageError: naming what in the config, or in the root, makes no sense; nothing is left in the root.
        UsageError: there is nothing to run.
    """
    argv = _argv(config, overrides)
    user = resolve_user(config.user if overrides.user is None else overrides.user, rootfd)
    env = _env(config, overrides, user, hostname)
    for what, words in (("command", argv), ("environment", env)):
        for word in words:
            if "\0" in word:
                raise ImageError(f"{what} '{printable(word[:100])}': holds a NUL byte")
    stop_signal = parse_signal(config.stop_signal or "SIGTERM")
    cwd = _cwd((overrides.cwd or config.working_dir) or "/", rootfd, mounted)
    return Process(argv, env, cwd.absolute, user, overrides.tty, stop_signal, cwd.stubs)


def _argv(config: Config, overrides: Overrides) -> tuple[str, ...]:
    if overrides.entrypoint is not None:
        argv = (*overrides.entrypoint, *overrides.argv)
    else:
        argv = (*config.entrypoint, *(overrides.argv or config.cmd))
    if not argv:
        raise UsageError("the image does not say what to run; name a command after `--`")
    return argv


def _env(config: Config, overrides: Overrides, user: User, hostname: str) -> tuple[str, ...]:
    found: dict[str, str] = {"PATH": DEFAULT_PATH}
    if hostname:
        found["HOSTNAME"] = hostname
    if overrides.tty:
        found["TERM"] = "xterm"
    for one in (*config.env, *overrides.env):
        name, equals, value = one.partition("=")
        if not equals or not name:
            found.pop(name, None)  # docker: a name alone takes the variable away
        else:
            found[name] = value
    found.setdefault("HOME", user.home)
    return tuple(f"{name}={value}" for name, value in found.items())


def environment(process: Process) -> Mapping[str, str]:
    """The environment as a mapping."""
    return dict(one.split("=", 1) for one in process.env)


def _cwd(text: str, rootfd: int, mounted: tuple[bytes, ...]) -> inside.Place:
    path = b"/" + text.encode("utf-8", "surrogateescape")
    lexical = inside.lexical(path)
    if any(inside.is_below(lexical, inside.lexical(one)) for one in mounted):
        place = inside.Place(lexical)  # what is there shows when it is mounted
    else:
        place = inside.find(rootfd, path, make="directory")
    if place.path.split(b"/")[0] == b"proc":
        inside.remove_stubs(rootfd, place.stubs)
        raise ImageError(f"the working directory {printable(text)} leads into /proc, which is not allowed")
    return place


def parse_signal(text: str) -> int:
    """The number of a signal: `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`."""
    name = text.strip().upper()
    if name.isascii() and name.isdigit() and len(name) < 4 and 1 <= int(name) <= signal.SIGRTMAX:
        return int(name)
    if match := _SIGNAL.fullmatch(name):
        number = {"RTMIN": signal.SIGRTMIN, "RTMAX": signal.SIGRTMAX}[match[1]] + int(match[2] or 0)
        if signal.SIGRTMIN <= number <= signal.SIGRTMAX:
            return int(number)
    found = signal.Signals.__members__.get("SIG" + name.removeprefix("SIG"))
    if found is None or name.startswith("_"):
        raise ImageError(f"StopSignal '{printable(text[:40])}' is no signal")
    return int(found)
