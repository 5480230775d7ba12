"""What does an OCI runtime have to be told (config.json of a bundle)?

The process, as process.py resolved it to numbers, so that no runtime looks anything up in the image; namespaces of its
own for processes, mounts, host name and IPC, and for the network unless it is the host's; /proc, /dev and /sys as
docker makes them; what of /proc and /sys is masked or read-only is docker's list, too.

Device nodes, of the image or made by the command, must not open the host's disks, and there is no device cgroup that
would see to it.  So CAP_MKNOD is not given, and the root stays `nodev`: crun and runc both lose that flag when they
remount the root (seen with crun 1.8.1; runc 1.1.5 for a read-only root), so a hook, which runs after all their mounts,
sets it again, and makes the root read-only in the same call.  In a user namespace the kernel does it by itself.

Other deliberate differences from docker: there is no seccomp profile; the image's labels are no annotations, since
runtimes act on those (CVE-2026-53488, run.oci.*).

Spec: runtime-spec config.md, config-linux.md; image-spec conversion.md.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ovlfs.errors import MountError
from ovlfs.run.process import Process

_CAPABILITIES = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
TTY_GROUP = 5
"""Debian's and everybody's gid of tty, which owns the terminals."""

_MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


@dataclass(frozen=True, slots=True)
class Bind:
    """A file or directory of the host (an absolute path) and where the container sees it."""

    source: bytes
    destination: bytes
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Container:
    """Everything about a container but its root.

    Attributes:
        hostname: of its UTS namespace.
        host_network: the host's network; otherwise there is a loopback device only.
        read_only: the root cannot be written; what is mounted in it can.
        binds: in order; destinations are resolved below the root.
    """

    process: Process
    hostname: str
    host_network: bool = True
    read_only: bool = False
    binds: tuple[Bind, ...] = ()


@dataclass(frozen=True, slots=True)
class IdRange:
    """One line of uid_map."""

    inside: int
    outside: int
    count: int


def runtime_spec(
    container: Container,
    rootfs: bytes,
    *,
    tty_group: bool = True,
    in_user_namespace: bool = False,
    set_groups: bool = True,
    uid_map: Sequence[IdRange] = (),
    gid_map: Sequence[IdRange] = (),
    console: tuple[int, int] | None = None,
) -> bytes:
    """config.json.

    Args:
        container: what to run.
        rootfs: the root's absolute path.
        tty_group: whether gid 5 (tty) exists, for the terminals' group.
        in_user_namespace: the runtime runs, or will run the container, in one.
        set_groups: whether supplementary groups may be set.
        uid_map: of a user namespace that the runtime shall make; empty: it makes none.
        gid_map: the same for groups.
        console: columns and lines of the terminal that the command gets.

    Raises:
        MountError: mount(8) is missing.
    """
    process, user = container.process, container.process.user
    kinds = [
        "pid",
        "ipc",
        "uts",
        "mount",
        *([] if container.host_network else ["network"]),
        *(["user"] if uid_map else []),
    ]
    linux: dict[str, Any] = {
        "namespaces": [{"type": kind} for kind in kinds],
        "maskedPaths": list(_MASKED),
        "readonlyPaths": list(_READ_ONLY),
    }
    if uid_map:
        for name, ranges in (("uidMappings", uid_map), ("gidMappings", gid_map)):
            linux[name] = [{"containerID": one.inside, "hostID": one.outside, "size": one.count} for one in ranges]
    if not in_user_namespace:
        linux["resources"] = {"devices": [{"allow": False, "access": "rwm"}]}
    capabilities = {"bounding": list(_CAPABILITIES)}
    if user.uid == 0:
        capabilities |= {"effective": list(_CAPABILITIES), "permitted": list(_CAPABILITIES)}
    document: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": process.tty,
            "user": {"uid": user.uid, "gid": user.gid}
            | ({"additionalGids": list(user.groups)} if user.groups and set_groups else {}),
            "args": list(process.argv),
            "env": list(process.env),
            "cwd": _text(process.cwd),
            "capabilities": capabilities,
            "noNewPrivileges": False,
        },
        "root": {"path": _text(rootfs), "readonly": container.read_only and in_user_namespace},
        "hostname": container.hostname,
        "mounts": [
            *_system_mounts(tty_group=tty_group, bind_sys=in_user_namespace and container.host_network),
            *map(_bind, container.binds),
        ],
        "annotations": {"org.opencontainers.image.stopSignal": str(int(process.stop_signal))},
        "linux": linux,
    }
    if console is not None:
        document["process"]["consoleSize"] = {"width": console[0], "height": console[1]}
    if not in_user_namespace:
        document["hooks"] = {"createContainer": [_remount(rootfs, read_only=container.read_only)]}
    # Words of the image that are not UTF-8 pass as the bytes they are.
    return json.dumps(document, indent=1, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n"


def _remount(rootfs: bytes, *, read_only: bool) -> dict[str, Any]:
    program = shutil.which("mount", path=os.environ.get("PATH", os.defpath) + ":/usr/bin:/bin")
    if program is None:
        raise MountError("mount(8) is missing (Debian: apt-get install mount)")
    words = "remount,bind,nodev" + (",ro" if read_only else "")
    # A hook must read what the runtime writes to it: crun takes a closed pipe for its failure.
    script = 'cat >/dev/null && exec "$0" "$@"'
    return {"path": "/bin/sh", "args": ["sh", "-c", script, program, "-o", words, _text(rootfs)]}


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


def _system_mounts(*, tty_group: bool, bind_sys: bool) -> list[dict[str, Any]]:
    terminals = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]
    # A sysfs shows the network namespace that mounts it, and only its owner may: with the host's network, bind.
    sys_options = ["nosuid", "noexec", "nodev", "ro"]
    sys_mount = (
        {"destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind", *sys_options]}
        if bind_sys
        else {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": sys_options}
    )
    return [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
        },
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": [*terminals, *([f"gid={TTY_GROUP}"] if tty_group else [])],
        },
        {
            "destination": "/dev/shm",  # noqa: S108
            "type": "tmpfs",
            "source": "shm",
            "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        },
        {
            "destination": "/dev/mqueue",
            "type": "mqueue",
            "source": "mqueue",
            "options": ["nosuid", "noexec", "nodev"],
        },
        sys_mount,
    ]


def _bind(bind: Bind) -> dict[str, Any]:
    return {
        "destination": _text(bind.destination),
        "type": "bind",
        "source": _text(bind.source),
        "options": ["rbind", "rprivate", "ro" if bind.read_only else "rw"],
    }
