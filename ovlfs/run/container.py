"""How is one command run in a mounted root, from an image's config to an exit code?

`prepare` turns the config and the command line into a Container: the process, the files that the host lends
(/etc/resolv.conf, /etc/hosts, /etc/hostname), what is mounted where; and makes what is missing in the root for that.
`run_in` does it, runs the command by a runtime or by chroot, and takes away again what was made.

A name to mount on is looked up once, without leaving the root (inside.py), and passed on as what it resolved to: no
runtime is left to follow a link that an image planted.
"""

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ovlfs.errors import ImageError, MountError, UsageError, printable
from ovlfs.image.config import Config
from ovlfs.run import inside, process, runtime, spec, supervise
from ovlfs.run.chroot import Chroot
from ovlfs.run.namespaces import Mapping
from ovlfs.run.process import Overrides
from ovlfs.run.spec import Bind, Container

_HOSTNAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,62}[A-Za-z0-9])?")
_SYSTEM = (b"/proc", b"/dev", b"/sys")
_MAX_HOST_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """How a command is run, beside what it is.

    Attributes:
        hostname: "" for the host's own with the host's network, a random one otherwise.
        binds: what the user wants mounted; sources are absolute and exist.
    """

    hostname: str = ""
    host_network: bool = True
    read_only: bool = False
    binds: tuple[Bind, ...] = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A container, and what was made in the root for it."""

    container: Container
    stubs: tuple[inside.Stub, ...]


def prepare(
    config: Config, overrides: Overrides, settings: Settings, rootfd: int, state: bytes, mapping: Mapping
) -> Prepared:
    """Everything that is decided before the command runs.

    Args:
        config: the image's.
        overrides: what the command line says of the process.
        settings: what it says of the container.
        rootfd: the root, from inside.open_root().
        state: a directory for the files that the host lends.
        mapping: which ids there are.

    Raises:
        ImageError, UsageError: naming what cannot be done; nothing is left in the root.
    """
    hostname = _hostname(settings)
    wanted = [*_lent_files(hostname, settings.host_network, state), *settings.binds]
    resolved = process.resolve(
        config, overrides, rootfd, hostname=hostname, mounted=tuple(one.destination for one in wanted)
    )
    stubs: list[inside.Stub] = []
    try:
        _check_mapped(resolved, mapping)
        for path in _SYSTEM:
            place = inside.find(rootfd, path, make="directory")
            stubs += place.stubs
            _check_place(path, place.absolute == path, "is a symlink in the image, and should be a directory")
        binds = []
        for bind in wanted:
            kind = "directory" if os.path.isdir(bind.source) else "file"
            place = inside.find(rootfd, bind.destination, make=kind)
            stubs += place.stubs
            in_system = any(inside.is_below(place.path, path[1:]) for path in _SYSTEM)
            _check_place(bind.destination, bool(place.path) and not in_system, "nothing can be mounted there")
            binds.append(replace(bind, destination=place.absolute))
    except BaseException:
        inside.remove_stubs(rootfd, (*resolved.made, *stubs))
        raise
    container = Container(resolved, hostname, settings.host_network, settings.read_only, tuple(binds))
    return Prepared(container, tuple(stubs))


def _check_place(path: bytes, fits: bool, rule: str) -> None:
    if not fits:
        raise ImageError(f"{printable(path)}: {rule}")


def _hostname(settings: Settings) -> str:
    if settings.hostname:
        if not _HOSTNAME.fullmatch(settings.hostname):
            raise UsageError(f"'{printable(settings.hostname[:100])}' is no host name")
        return settings.hostname
    return os.uname().nodename if settings.host_network else secrets.token_hex(6)


def _lent_files(hostname: str, host_network: bool, state: bytes) -> Iterator[Bind]:
    """Copies, so that a command that writes them does not write the host's."""
    hosts = _host_file(b"/etc/hosts") if host_network else b"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost\n"
    if hostname.encode() not in hosts.split():
        hosts += b"127.0.1.1\t%s\n" % hostname.encode()
    files = {b"hosts": hosts, b"hostname": hostname.encode() + b"\n"}
    if host_network:
        files[b"resolv.conf"] = _host_file(b"/etc/resolv.conf")
    for name, content in files.items():
        path = state + b"/" + name
        with open(
            path, "wb", opener=lambda file, flags: os.open(file, flags | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        ) as file:
            file.write(content)
        os.chmod(path, 0o644)
        yield Bind(path, b"/etc/" + name)


def _host_file(path: bytes) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_HOST_FILE_BYTES)
    except FileNotFoundError:
        return b""


def _check_mapped(resolved: process.Process, mapping: Mapping) -> None:
    user = resolved.user
    gids = (user.gid, *user.groups) if mapping.set_groups else (user.gid,)
    for what, number, count in (("uid", user.uid, mapping.uids), ("gid", max(gids), mapping.gids)):
        if count is not None and number >= count:
            raise MountError(
                f"the command's {what} {number} does not exist here, where {count} "
                f"{'is' if count == 1 else 'are'} mapped; /etc/sub{what} can lend more, or choose another with --user"
            )


def run_in(
    rootfs: bytes,
    config: Config,
    overrides: Overrides,
    settings: Settings | None = None,
    *,
    mapping: Mapping,
    chroot: bool = False,
    state: bytes | None = None,
    server: int | None = None,
) -> int:
    """Run one command in a mounted root, in the foreground, and return its exit code.

    The command has our stdin, stdout, stderr and terminal, and gets our signals (supervise.py).  What had to be made in
    the root to mount /proc, /dev, /sys and the host's files on is taken away afterwards.

    Args:
        rootfs: the root, absolute.  It should be mounted `nodev`.
        config: the image's; `Config()` for none.
        overrides: the command, and what else differs from the config.
        settings: network, host name, binds, read-only root.
        mapping: from namespaces.enter(), which must have been called.
        chroot: by chroot(2) and a few mounts instead of an OCI runtime.
        state: an empty directory of ours; None: a temporary one.
        server: the process, our child, that serves the root; if it ends, the command is killed.

    Returns:
        The command's own, or 128 + n: it was killed by signal n.  If it could not be started, one line on stderr has
        said why, and the code is docker's: 127 not found, 126 not executable, 125 for every other reason.

    Raises:
        ServerDiedError: the server has ended.
        ImageError, MountError, UsageError: config, root and command line do not fit.
    """
    with contextlib.ExitStack() as stack:
        if state is None:
            state = os.fsencode(tempfile.mkdtemp(prefix="ovlfs-run-"))
            stack.callback(shutil.rmtree, state)
        rootfd = inside.open_root(rootfs)
        stack.callback(os.close, rootfd)
        prepared = prepare(config, overrides, settings or Settings(), rootfd, state, mapping)
        unused = stack.enter_context(contextlib.ExitStack())
        unused.callback(inside.remove_stubs, rootfd, prepared.container.process.made)
        stack.callback(inside.remove_stubs, rootfd, prepared.stubs)
        runner = make_runner(rootfs, prepared.container, state, mapping, chroot=chroot)
        stack.callback(runner.remove)
        unused.pop_all()  # from here on the command may have been in its directory
        return supervised(runner, prepared.container.process, server)


def make_runner(
    rootfs: bytes, container: Container, state: bytes, mapping: Mapping, *, chroot: bool
) -> runtime.Runtime | Chroot:
    """What will run the container: its bundle is written, nothing is started."""
    if chroot:
        return Chroot(rootfs, container, state, mapping.set_groups)
    document = spec.runtime_spec(
        container,
        rootfs,
        tty_group=mapping.has_group(spec.TTY_GROUP),
        in_user_namespace=mapping.user_namespace,
        set_groups=mapping.set_groups,
        console=os.get_terminal_size(0) if container.process.tty else None,
    )
    with open(state + b"/config.json", "xb") as file:
        file.write(document)
    return runtime.Runtime(runtime.find_runtime(), state, f"ovlfs-{secrets.token_hex(6)}", state)


def supervised(runner: runtime.Runtime | Chroot, resolved: process.Process, server: int | None) -> int:
    """Run it, pass signals on, and understand its exit code."""
    supervise.keep_from_commands()
    with supervise.signals_held() as mask:
        child = runner.start(mask)
        code = supervise.Command(child, runner.pid_file, resolved.stop_signal, server).wait()
    if code < 0:
        return 128 - code  # the runner itself was killed; the command is killed with it, by remove()
    return runner.understood(code, resolved.argv[0])
