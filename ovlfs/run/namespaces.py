"""How does a user who is not root mount an image and be root in it?

In a user namespace.  There the kernel lets its root mount FUSE (since 4.18), for itself and all users of the
namespace, and the files of the image's root belong to root.  Which ids exist there is its id map: the user's own id as
0, and as 1, 2, ... those that /etc/subuid and /etc/subgid lend the user, if newuidmap(1) and newgidmap(1) are there to
write them; without them root is the only user, and the ids of all others show as 65534.

Root and others alike get a mount namespace of their own: the mount is seen by nobody else, and when the last process
in the namespace is gone, the kernel unmounts it, whatever has died.

Kernel: user_namespaces(7), mount_namespaces(7); subuid(5), newuidmap(1).
"""

import ctypes
import errno
import os
import pwd
import shutil
from dataclasses import dataclass

from ovlfs.errors import MountError, printable
from ovlfs.run.spec import IdRange

CLONE_NEWNS = 0x20000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19

_CAP_SYS_ADMIN = 21
_MAX_SUBID_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Mapping:
    """Which ids there are.

    Attributes:
        user_namespace: whether we are in one, made here or by somebody else.
        uids, gids: how many of them, from 0; None: all.
        note: for the user, about a namespace made here; "" otherwise.
    """

    user_namespace: bool
    uids: int | None = None
    gids: int | None = None
    note: str = ""

    @property
    def set_groups(self) -> bool:
        """Whether supplementary groups can be set; the kernel forbids it where the user mapped the groups alone."""
        return self.has_group(1)

    def has_group(self, gid: int) -> bool:
        """Whether a group exists."""
        return self.gids is None or gid < self.gids


def unshare(flags: int) -> None:
    """unshare(2), which Python has from 3.12."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def mount(source: bytes, target: bytes, kind: bytes = b"", flags: int = 0, words: bytes = b"") -> None:
    """mount(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
    if libc.mount(source, target, kind or None, flags, words or None) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fsdecode(target))


def enter() -> Mapping:
    """Enter a mount namespace of our own, and without CAP_SYS_ADMIN a user namespace around it.

    Preconditions: this process has one thread.

    Raises:
        MountError: the kernel or its administrator does not allow it.
    """
    if _may_mount():
        unshare(CLONE_NEWNS)
        # The host's unmounts still arrive, so that we hold none of its disks; ours do not leave.
        mount(b"none", b"/", flags=MS_REC | MS_SLAVE)
        return _here()
    uid, gid = os.geteuid(), os.getegid()
    os.environ.setdefault("HOME", _home(uid))  # inside, our uid is root's
    ready_to_map, unshared = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(unshared)
        os._exit(_map_from_outside(ready_to_map, os.getppid(), uid, gid))
    os.close(ready_to_map)
    try:
        unshare(CLONE_NEWUSER | CLONE_NEWNS)
    except OSError as error:
        os.close(unshared)
        os.waitpid(helper, 0)
        hint = "; they are switched off, or used up, in /proc/sys/user" if error.errno == errno.ENOSPC else ""
        raise MountError(f"a user without privileges needs user namespaces: {error.strerror}{hint}") from error
    os.write(unshared, b"x")
    os.close(unshared)
    _, status = os.waitpid(helper, 0)
    mapped = os.waitstatus_to_exitcode(status) == 0
    if not mapped:
        _map_ourselves(uid, gid)
    found = _here()
    if mapped:
        note = f"rootless: uid {uid} is root here, and {(found.uids or 1) - 1} more ids come from /etc/subuid"
    else:
        note = f"rootless: uid {uid} is root here, and there are no other users ({_why_single(uid)})"
    return Mapping(found.user_namespace, found.uids, found.gids, note)


def seen_by_a_runtime() -> tuple[Mapping, tuple[IdRange, ...], tuple[IdRange, ...]]:
    """For a container that a runtime will make from here: which ids there will be, and the maps it shall write, if any.

    A user's runtime can always map the user as root; more only with newuidmap, and a mount that lets the others in.
    """
    if _may_mount():
        return _here(), (), ()
    uid_map, gid_map = (IdRange(0, os.geteuid(), 1),), (IdRange(0, os.getegid(), 1),)
    return Mapping(user_namespace=True, uids=1, gids=1), uid_map, gid_map


def _map_ourselves(uid: int, gid: int) -> None:
    """The only mapping that the kernel lets everybody write.  What newuidmap wrote, if newgidmap failed, stays."""
    _write("/proc/self/setgroups", "deny")
    for name, own in (("uid", uid), ("gid", gid)):
        with open(f"/proc/self/{name}_map", encoding="ascii") as file:
            written = file.read()
        if not written:
            _write(f"/proc/self/{name}_map", f"0 {own} 1")


def _may_mount() -> bool:
    with open("/proc/self/status", encoding="ascii") as file:
        effective = next(line for line in file if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> _CAP_SYS_ADMIN & 1)


def _here() -> Mapping:
    """The mapping of the namespace that we are in."""
    uids, gids = _count("uid"), _count("gid")
    if min(uids, gids) >= 2**32 - 1:
        return Mapping(user_namespace=False)
    return Mapping(user_namespace=True, uids=uids, gids=gids)


def _count(kind: str) -> int:
    """How many ids there are, from 0 without a gap."""
    with open(f"/proc/self/{kind}_map", encoding="ascii") as file:
        ranges = sorted((int(first), int(count)) for first, _, count in map(str.split, file))
    end = 0
    for first, count in ranges:
        if first == end:
            end += count
    return end


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _home(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_dir
    except KeyError:
        return "/"


def _map_from_outside(ready: int, pid: int, uid: int, gid: int) -> int:
    """In a child that stayed outside: let newuidmap and newgidmap map the ids of `pid`; 0 if both did."""
    try:
        if os.read(ready, 1) != b"x":
            return 1
        lines = [(name, lent("uid", uid) if name == "newuidmap" else lent("gid", uid)) for name in _HELPERS]
        if any(found is None or shutil.which(name) is None for name, found in lines):
            return 1
        for (name, found), own in zip(lines, (uid, gid), strict=True):
            assert found is not None
            words = ["0", str(own), "1", "1", str(found.outside), str(found.count)]
            null = os.open(os.devnull, os.O_RDWR)
            child = os.posix_spawnp(
                name, [name, str(pid), *words], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, null, 2)]
            )
            os.close(null)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
                return 1
    except OSError:
        return 1
    return 0


_HELPERS = ("newuidmap", "newgidmap")


def lent(kind: str, uid: int) -> IdRange | None:
    """The first range that /etc/subuid or /etc/subgid (`kind`: "uid", "gid") lends the user, to be mapped from 1."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    try:
        with open(f"/etc/sub{kind}", "rb") as file:
            text = file.read(_MAX_SUBID_BYTES).decode(errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        fields = line.strip().split(":")
        if len(fields) == 3 and fields[0] in (name, str(uid)) and fields[1].isdigit() and fields[2].isdigit():
            first, count = int(fields[1]), int(fields[2])
            if count > 0:
                return IdRange(1, first, count)
    return None


def _why_single(uid: int) -> str:
    missing = [name for name in _HELPERS if shutil.which(name) is None]
    if missing:
        return f"{missing[0]} is missing; Debian: apt-get install uidmap"
    for kind in ("uid", "gid"):
        if lent(kind, uid) is None:
            return f"/etc/sub{kind} lends uid {printable(str(uid))} no ids"
    return "newuidmap or newgidmap refused"
