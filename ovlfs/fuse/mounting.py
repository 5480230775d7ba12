"""What is mounted where, by which process, and how is it unmounted?

The kernel's list (/proc/self/mountinfo) says what is mounted; the registry says which process serves it, where its
changes and its log are.  Neither is enough alone: a killed daemon leaves a mount without a process ("Transport
endpoint is not connected"), and a mount of another namespace has a process without a mount.

The registry is a directory with one JSON file for each daemon, $XDG_RUNTIME_DIR/ovlfs or /run/ovlfs, of mode 0700 and
ours.  A process is known by its pid and its start time, since pids are used again.

The daemon writes its own file and removes it when everything is on disk.  Files of dead processes are swept by the
next mount.  Nothing here blocks on a mount: a path is never stat'ed below its parent unless it is known to be alive.

Kernel: Documentation/filesystems/proc.rst section 3.5 (mountinfo), umount(2), pidfd_open(2).
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import select
import stat
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

from ovlfs.errors import MountError, printable
from ovlfs.overlay.params import split_words, unescape

FSTYPE = b"fuse.ovlfs"

_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_MAX_RECORD_BYTES = 1 << 20
_OWN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


# ---- the kernel's list -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of mountinfo.

    Attributes:
        device: `major:minor`, st_dev of everything in the mount; unique among the mounts that are there.
        options: of the mount and of its super block (`rw,nosuid`, `user_id=0,...`).
    """

    mountpoint: bytes
    device: str
    fstype: bytes
    source: bytes
    options: str


def mount_table(raw: bytes | None = None) -> list[MountEntry]:
    """The mounts of this namespace, in the order in which they were made; a later one covers an earlier."""
    if raw is None:
        with open("/proc/self/mountinfo", "rb") as file:
            raw = file.read()
    return [_parse_line(line) for line in raw.splitlines()]


def _parse_line(line: bytes) -> MountEntry:
    """`36 35 98:0 /root /mountpoint rw,noatime master:1 - ext4 /dev/sda1 rw,errors=continue`."""
    before, _, after = line.partition(b" - ")
    fields, types = before.split(b" "), after.split(b" ")
    return MountEntry(
        mountpoint=_unescape(fields[4]),
        device=fields[2].decode(),
        fstype=types[0],
        source=_unescape(types[1]) if len(types) > 1 else b"",
        options=",".join(os.fsdecode(part) for part in (fields[5], *types[2:3])),
    )


def _unescape(raw: bytes) -> bytes:
    """Space, tab, newline and backslash are written as three octal digits."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes((int(match[1], 8),)), raw)


def find_mount(path: bytes) -> MountEntry | None:
    """The topmost mount at `path`, whatever its type."""
    path = resolve_mountpoint(path)
    return next((entry for entry in reversed(mount_table()) if entry.mountpoint == path), None)


def resolve_mountpoint(path: bytes) -> bytes:
    """The absolute name of a mountpoint, without symlinks.  Does not touch the mount itself, dead or alive."""
    path = os.path.abspath(path)
    parent, name = os.path.split(path)
    direct = os.path.join(os.path.realpath(parent), name)
    if any(entry.mountpoint == direct for entry in mount_table()):
        return direct
    return os.path.realpath(path)


_PATIENCE_SECONDS = 2.0


def is_dead(path: bytes) -> bool:
    """Whether `path` is a FUSE mount whose daemon is gone.  One that does not answer in time is not.

    A daemon that hangs, anybody's, must not hang us: the question is asked in a thread that nobody waits for.
    """
    code = 0

    def ask() -> None:
        nonlocal code
        try:
            os.statvfs(path)  # stat() would be answered from the kernel's cache
        except OSError as error:
            code = error.errno or 0

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE_SECONDS)
    return code in (errno.ENOTCONN, errno.ECONNABORTED)


# ---- processes -------------------------------------------------------------------------------------------------------


def start_time(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; None: there is no such process, or it is a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name before it may have spaces and parentheses
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in {b"Z", b"X"} else int(fields[19])


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _mount_namespace() -> int:
    return os.stat("/proc/self/ns/mnt").st_ino


# ---- the registry ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """What one daemon says about its mount.  Paths are text as os.fsdecode gives it.

    Attributes:
        started: start_time of the process.
        device: the mount's `major:minor`, "" until it is mounted.
        since: when it was mounted, in seconds since the epoch.
        failed: why what was changed could not be put on disk at the end, "" otherwise.
        directory: where the command was given: relative paths in `options` start there.
    """

    pid: int
    started: int
    mountpoint: str
    source: str
    options: str = ""
    upper: str | None = None
    work: str | None = None
    ephemeral: bool = False
    log: str | None = None
    device: str = ""
    since: float = 0.0
    pid_namespace: int = field(default_factory=_pid_namespace)
    mount_namespace: int = field(default_factory=_mount_namespace)
    failed: str = ""
    directory: str = "/"

    @property
    def visible(self) -> bool:
        """Whether the process is in our pid namespace."""
        return self.pid_namespace == _pid_namespace()

    @property
    def alive(self) -> bool:
        """Whether the process is still there.  True for one that we cannot see, in another pid namespace."""
        return not self.visible or start_time(self.pid) == self.started


class Registry:
    """The directory of records of one user."""

    def __init__(self, path: bytes) -> None:
        """Open the registry at `path`, and make it if need be.  Raises MountError: it is not ours alone."""
        self.path = path
        try:
            with contextlib.suppress(FileExistsError):
                os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
                os.mkdir(path, 0o700)
            fd = os.open(path, _OWN_DIRECTORY)
        except OSError as error:
            raise MountError(f"{printable(path)}: {error.strerror}") from error
        try:
            found = os.fstat(fd)
            if found.st_uid != os.geteuid():
                raise MountError(f"{printable(path)}: belongs to uid {found.st_uid}, not to uid {os.geteuid()}")
            if found.st_mode & 0o077:
                os.fchmod(fd, 0o700)
        finally:
            os.close(fd)

    def _file(self, record: Record) -> bytes:
        return b"%s/%d-%d.json" % (self.path, record.pid, record.started)

    def socket(self, record: Record) -> bytes:
        """Where the daemon of a record answers (control.py).  Made after the record, removed before it."""
        return b"%s/%s" % (self.path, _socket_name(record))

    def save(self, record: Record) -> None:
        """Write a record; a reader sees the old one or the new one."""
        name = self._file(record)
        temp = name + b".tmp"
        with open(temp, "w", encoding="utf-8", opener=_private) as file:
            json.dump(asdict(record), file, indent=1)
            file.write("\n")
        os.rename(temp, name)

    def remove(self, record: Record) -> None:
        """Forget a record and its socket, if they are there."""
        for path in (self.socket(record), self._file(record)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def records(self) -> list[Record]:
        """All records, oldest first, those of dead processes too."""
        return _read_records(self.path, os.geteuid())

    def sweep(self) -> list[Record]:
        """Forget the records of dead processes whose mount is gone, too; they are returned."""
        mounted = {(entry.device, os.fsdecode(entry.mountpoint)) for entry in mount_table() if entry.fstype == FSTYPE}
        here = _mount_namespace()
        swept = [
            record
            for record in self.records()
            if not record.alive
            and not (record.mount_namespace == here and (record.device, record.mountpoint) in mounted)
        ]
        for record in swept:
            self.remove(record)
        names = set(os.listdir(self.path))
        for name in names:
            if name.endswith(b".sock") and name.removesuffix(b".sock") + b".json" not in names:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self.path, name))
        return swept


def _socket_name(record: Record) -> bytes:
    return b"%d-%d.sock" % (record.pid, record.started)


def control_socket(record: Record) -> bytes:
    """The path of the socket on which a record's daemon answers, whether it is there or not."""
    places = [default_registry()]
    owner = _owner(record.pid) if os.geteuid() == 0 and record.visible else None
    if owner:
        places.append(b"/run/user/%d/ovlfs" % owner)
    paths = [os.path.join(place, _socket_name(record)) for place in places]
    return next((path for path in paths if os.path.lexists(path)), paths[0])


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _read_records(path: bytes, uid: int) -> list[Record]:
    found = []
    for entry in os.listdir(path):
        if not entry.endswith(b".json"):
            continue
        with contextlib.suppress(FileNotFoundError):
            record = _read_record(os.path.join(path, entry), uid)
            if record is not None:
                found.append(record)
    return sorted(found, key=lambda record: (record.since, record.pid))


def _read_record(path: bytes, uid: int) -> Record | None:
    """The record in a file; None if it is damaged or somebody else's, then there is nothing to learn from it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if status.st_uid != uid or not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_RECORD_BYTES:
            return None
        try:
            fields = json.loads(file.read(_MAX_RECORD_BYTES))
            record = Record(**fields)
        except (ValueError, TypeError):
            return None
    numbers = (record.pid, record.started, record.pid_namespace, record.mount_namespace)
    texts = (record.mountpoint, record.source, record.device, record.failed, record.directory)
    if not all(type(number) is int for number in numbers) or not all(type(text) is str for text in texts):
        return None
    return record


def default_registry() -> bytes:
    """Where this user's registry is: a directory that a reboot empties ($OVLFS_RUNTIME_DIR overrides)."""
    if os.environb.get(b"OVLFS_RUNTIME_DIR", b"").startswith(b"/"):
        return os.environb[b"OVLFS_RUNTIME_DIR"]
    chosen = os.environb.get(b"XDG_RUNTIME_DIR", b"")
    if os.geteuid() == 0 and os.access(b"/run", os.W_OK):
        return b"/run/ovlfs"
    if chosen.startswith(b"/") and os.access(chosen, os.W_OK):
        return chosen + b"/ovlfs"
    return b"/tmp/ovlfs-%d" % os.geteuid()  # Registry refuses it if somebody else made it


def all_records() -> list[Record]:
    """The records of the user who asks; for root, those of all users."""
    records = _records_if_any(default_registry(), os.geteuid())
    if os.geteuid() == 0:
        with contextlib.suppress(FileNotFoundError):
            for user in os.listdir(b"/run/user"):
                if user.isdigit() and int(user):
                    # What a user says is believed about the user's own processes only.
                    records += [
                        record
                        for record in _records_if_any(b"/run/user/%s/ovlfs" % user, int(user))
                        if _owner(record.pid) == int(user)
                    ]
    return records


def _records_if_any(path: bytes, uid: int) -> list[Record]:
    try:
        status = os.lstat(path)
        if status.st_uid != uid or not stat.S_ISDIR(status.st_mode):
            return []
        return _read_records(path, uid)
    except (FileNotFoundError, PermissionError):
        return []


def _owner(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except FileNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount of ours: what the kernel says of it, and its daemon's record, if it has one."""

    entry: MountEntry
    record: Record | None

    @property
    def alive(self) -> bool:
        """Whether somebody serves it."""
        if self.record is not None:
            return self.record.alive
        return not is_dead(self.entry.mountpoint)


def mounts() -> list[Mounted]:
    """All mounts of ours in this namespace."""
    here = _mount_namespace()
    # The kernel uses device numbers again, so a dead daemon's may be another's by now: the mountpoint must fit, too.
    records = {(record.device, record.mountpoint): record for record in all_records() if record.mount_namespace == here}
    return [
        Mounted(entry, records.get((entry.device, os.fsdecode(entry.mountpoint))))
        for entry in mount_table()
        if entry.fstype == FSTYPE
    ]


def refuse_inside(path: bytes, name: bytes | None = None) -> None:
    """Raise MountError where `path` is not a mountpoint, but lies in a mount whose daemon is known here.

    Args:
        path: given for a mount.
        name: given beside it, from the root of the mount; None: nothing is.
    """
    at = resolve_mountpoint(path)
    around = [one for one in mount_table() if (at + b"/").startswith(one.mountpoint.rstrip(b"/") + b"/")]
    nearest = max(reversed(around), key=lambda one: len(one.mountpoint), default=None)
    known = {mounted.entry for mounted in mounts() if mounted.record is not None}
    if nearest is None or nearest not in known or nearest.mountpoint == at:
        return
    say = nearest.mountpoint
    if name is not None:
        say += b" " + os.path.join(b"/", os.path.relpath(at, nearest.mountpoint), name.lstrip(b"/"))
    raise MountError(
        f"{printable(path)}: lies in the mount of ovlfs on {printable(nearest.mountpoint)}; say `{printable(say)}`"
    )


def kernel_overlay_of(upperdir: bytes) -> bytes | None:
    """Where the kernel's overlayfs has `upperdir` mounted in this namespace; None: nowhere."""
    for entry in mount_table():
        if entry.fstype != b"overlay":
            continue
        for word in split_words(os.fsdecode(_unescape(os.fsencode(entry.options)))):
            name, _, value = word.partition("=")
            with contextlib.suppress(OSError):  # a path of another namespace
                if name == "upperdir" and os.path.samefile(os.fsencode(unescape(value)), upperdir):
                    return entry.mountpoint
    return None


# ---- mountpoints -----------------------------------------------------------------------------------------------------


def check_mountpoint(path: bytes) -> bytes:
    """The mountpoint `path`, resolved.  A dead mount of ours that covers it is taken away.

    Raises:
        MountError: there is no such directory.
    """
    resolved = resolve_mountpoint(path)
    while is_dead(resolved):
        entry = find_mount(resolved)
        if entry is None or entry.fstype != FSTYPE:
            kind = "" if entry is None else f" ({printable(entry.fstype)})"
            raise MountError(f"{printable(path)}: is a dead mount of another file system{kind}; unmount it first")
        unmount(resolved, lazy=True)
    try:
        status = os.stat(resolved)
    except OSError as error:
        raise MountError(f"{printable(path)}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise MountError(f"{printable(path)}: is not a directory, and a mountpoint must be one")
    return resolved


def is_within(path: bytes, directory: bytes) -> bool:
    """Whether `path` is `directory` or something below it; both must exist.

    Compared by inode on the way up, so that bind mounts and symlinks do not hide it.
    """
    wanted = os.stat(directory)
    at = os.path.realpath(path)
    while True:
        status = os.stat(at)
        if (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
        if at == b"/":
            return False
        at = os.path.dirname(at)


def check_places(mountpoint: bytes, lowerdirs: tuple[bytes, ...], upperdir: bytes, workdir: bytes) -> None:
    """Raise MountError where one directory lies in another in a way that would make writes come back as reads.

    Precondition: all exist.  Kernel: super.c: ovl_workdir_ok(), ovl_check_overlapping_layers().
    """
    if is_within(workdir, upperdir) or is_within(upperdir, workdir):
        raise MountError(
            f"workdir {printable(workdir)} and upperdir {printable(upperdir)} must be apart, not one inside the other"
        )
    if os.stat(upperdir).st_dev != os.stat(workdir).st_dev:
        raise MountError(
            f"workdir {printable(workdir)} must be on the same file system as upperdir {printable(upperdir)}"
        )
    for what, path in (("upperdir", upperdir), ("workdir", workdir)):
        for lower in lowerdirs:
            if is_within(path, lower) or is_within(lower, path):
                raise MountError(
                    f"{what} {printable(path)} and lowerdir {printable(lower)} must be apart, not one inside the other"
                )
        if is_within(mountpoint, path):
            raise MountError(f"the mountpoint {printable(mountpoint)} must not be in {what} {printable(path)}")
        if is_within(path, mountpoint):
            raise MountError(f"{what} {printable(path)} would be hidden by the mount on {printable(mountpoint)}")


def check_lowerdirs(mountpoint: bytes, lowerdirs: tuple[bytes, ...]) -> None:
    """Raise MountError where the mountpoint is inside a lower directory: we would wait for our own answers there.

    A lower directory that is the mountpoint, or in it, is fine: it is opened before it is covered.
    """
    for lower in lowerdirs:
        if is_within(mountpoint, lower) and not is_within(lower, mountpoint):
            raise MountError(f"the mountpoint {printable(mountpoint)} must not be inside lowerdir {printable(lower)}")


# ---- unmounting ------------------------------------------------------------------------------------------------------


def unmount(mountpoint: bytes, *, lazy: bool = False) -> None:
    """Take the topmost mount away: umount(2), or fusermount3(1) for those who may not call it.

    Raises:
        MountError: it is busy, or not ours to unmount.
    """
    code = _umount2(mountpoint, _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)) if os.geteuid() == 0 else errno.EPERM
    if code == errno.EPERM:
        code = _fusermount(mountpoint, lazy=lazy)
    if code == errno.EBUSY:
        raise MountError(f"{printable(mountpoint)}: is busy; close what is open in it, or unmount it with --lazy")
    if code:
        raise MountError(f"{printable(mountpoint)}: cannot be unmounted: {os.strerror(code)}")


def _umount2(mountpoint: bytes, flags: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if libc.umount2(mountpoint, flags) != 0 else 0


def _fusermount(mountpoint: bytes, *, lazy: bool) -> int:
    try:
        result = subprocess.run(
            ["fusermount3", "-uz" if lazy else "-u", "--", mountpoint], capture_output=True, check=False
        )
    except FileNotFoundError:
        raise MountError("fusermount3 is missing (Debian: apt-get install fuse3)") from None
    if result.returncode == 0:
        return 0
    said = result.stderr.decode(errors="replace").strip()
    if "busy" in said:
        return errno.EBUSY
    raise MountError(printable(said.removeprefix("fusermount3: ")) or f"fusermount3 ended with {result.returncode}")


@contextlib.contextmanager
def watching(record: Record | None) -> Iterator[int | None]:
    """A pidfd of the record's process, opened before it is asked to go; None: it is not there, or not visible."""
    fd = None
    if record is not None and record.pid_namespace == _pid_namespace():
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(record.pid)
    try:
        if fd is not None and record is not None and start_time(record.pid) != record.started:
            yield None  # the pid is another process's by now
        else:
            yield fd
    finally:
        if fd is not None:
            os.close(fd)


def wait_for_end(pidfd: int, timeout_seconds: float | None = None) -> bool:
    """Wait until a process has ended; False: the time was up first."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(None if timeout_seconds is None else timeout_seconds * 1000))


def holders(device: str) -> list[str]:
    """Where else a mount of ours is mounted, in words: its copies in this mount namespace and in those of others.

    A mount that is unmounted here lives on in every copy: bind mounts, and what unshare(2) made of the whole table.
    One process speaks for its namespace.  What we may not look at is left out.
    """
    here = _mount_namespace()
    namespaces: set[int] = set()
    found = []
    for pid in (b"self", *sorted(filter(bytes.isdigit, os.listdir(b"/proc")), key=int)):
        with contextlib.suppress(OSError):  # the process has ended, or is not ours
            namespace = os.stat(b"/proc/%s/ns/mnt" % pid).st_ino
            if namespace in namespaces:
                continue
            namespaces.add(namespace)
            with open(b"/proc/%s/comm" % pid, "rb") as file:
                name = printable(file.read().removesuffix(b"\n"))
            with open(b"/proc/%s/mountinfo" % pid, "rb") as file:
                table = mount_table(file.read())
            who = "" if namespace == here else f"process {int(pid)} ({name}) in its mount namespace, "
            found += [
                f"{who}on {printable(entry.mountpoint)}"
                for entry in table
                if entry.device == device and entry.fstype == FSTYPE
            ]
    return found


def reread(record: Record) -> Record | None:
    """The record as it is now; None: the daemon has removed it, so all is well."""
    key = (record.pid, record.started)
    return next((now for now in all_records() if (now.pid, now.started) == key), None)


def mounted_record(record: Record, mountpoint: bytes, since: float) -> Record:
    """`record` with what is known once the mount answers."""
    entry = find_mount(mountpoint)
    return replace(record, device=entry.device if entry is not None else "", since=since)
