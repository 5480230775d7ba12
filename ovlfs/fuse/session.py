"""How long does a mount live, and how does it end?

`serve` mounts, says when the mount answers, serves until somebody unmounts, and puts everything on disk before it
returns.  SIGTERM and SIGINT unmount in order: no new opens get in, what is open keeps working until it is closed or
the second signal detaches the mount.

With the lane (the default, see lane.py and native/lane.h), we mount, the lane owns /dev/fuse, and pyfuse3 gets one end
of a socket pair; without it pyfuse3 mounts and reads the device itself.  Either way pyfuse3 keeps one session per
process in module globals, so there is one `serve` per process, too.
"""

import contextlib
import errno
import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pyfuse3
import trio

from ovlfs._native import Lane, Trace, Tree
from ovlfs.errors import MountError
from ovlfs.fuse import mounting
from ovlfs.fuse.control import Control, Verb
from ovlfs.fuse.lane import MAX_WRITE_BYTES, ExtraServer, MountRequest, UnboundOperations, open_and_mount
from ovlfs.fuse.operations import Operations, requests
from ovlfs.fuse.watch import Watch
from ovlfs.layer.native import reads_all
from ovlfs.overlay.owner import DirectOwner, OverrideOwner
from ovlfs.overlay.stack import Stack

log = logging.getLogger("ovlfs.fuse")


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What the kernel and fusermount3 are told, beside the file system itself.

    Attributes:
        source: what mount(8) and /proc/mounts show as the device.
        allow_other: users other than the mounting one may enter (without root: needs user_allow_other).
        read_only: the kernel refuses writes before they reach us.
        io_uring: requests come by io_uring, if the kernel offers it.
        flags: further mount words: nosuid, nodev, noexec, dev, suid, ....
    """

    source: str = "ovlfs"
    allow_other: bool = False
    read_only: bool = False
    io_uring: bool = False
    flags: tuple[str, ...] = ()

    def words(self) -> set[str]:
        """The words for libfuse's -o."""
        # libfuse splits its options at commas; a backslash keeps one (lib/fuse_opt.c)
        source = self.source.replace("\\", "\\\\").replace(",", "\\,")
        # source.encode: pyfuse3 takes ASCII only
        source = source.encode("ascii", "backslashreplace").decode("ascii")
        words = {f"fsname={source}", "subtype=ovlfs", "default_permissions", "noatime", *self.flags}
        if self.allow_other:
            words.add("allow_other")
        if self.read_only:
            words.add("ro")
        return words


def serve(
    stack: Stack,
    mountpoint: bytes,
    options: MountOptions,
    ready: Callable[[], None],
    *,
    lane: bool = True,
    control: Control | None = None,
    verbs: Mapping[str, Verb] | None = None,
) -> None:
    """Mount `stack` on `mountpoint`, call `ready` once it answers, and return after it was unmounted.

    The stack is closed when this returns, however it does.  Without `lane` there is no fallocate, lseek,
    copy_file_range and O_TMPFILE, and default ACLs lose what the umask takes away.  `control`, on which `ready` has
    made the mount listen, answers `stats`, `trace` and `verbs`.

    Raises:
        MountError: the mount failed.
        RuntimeError: the same, without the lane; libfuse or fusermount3 has said why on stderr.
    """
    if stack.upper is None:
        options = replace(options, read_only=True)  # as kernel: super.c: ovl_fill_super()
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(stack.close)
        trace = Trace()
        watch = Watch(stack, control, verbs or {}, trace)
        if control is not None:
            cleanup.callback(control.close)
        if lane:
            _serve_by_lane(stack, mountpoint, options, ready, watch, trace, cleanup)
        else:
            _serve_by_session(stack, mountpoint, options, ready, watch, cleanup)


def _serve_by_session(
    stack: Stack,
    mountpoint: bytes,
    options: MountOptions,
    ready: Callable[[], None],
    watch: Watch,
    cleanup: contextlib.ExitStack,
) -> None:
    if options.io_uring:
        log.warning("io_uring is not used: it needs the lane")
    operations = Operations(stack)
    watch.operations = operations
    cleanup.callback(operations.close)
    pyfuse3.init(operations, os.fsdecode(mountpoint), options.words())
    unmount = True
    try:
        trio.run(_run, mountpoint, ready, None, watch, restrict_keyboard_interrupt_to_checkpoints=True)
        unmount = False  # the kernel said so: nothing is mounted any more
    finally:
        pyfuse3.close(unmount=unmount)


def _serve_by_lane(
    stack: Stack,
    mountpoint: bytes,
    options: MountOptions,
    ready: Callable[[], None],
    watch: Watch,
    trace: Trace,
    cleanup: contextlib.ExitStack,
) -> None:
    """What is given back at the end, in order: pyfuse3's session, the lane (which aborts what is left), the mount."""
    mountpoint = mounting.resolve_mountpoint(mountpoint)  # while nobody needs us for that
    operations = UnboundOperations(stack)
    watch.operations = operations
    cleanup.callback(operations.close)
    device = open_and_mount(
        MountRequest(mountpoint, options.source, options.allow_other, options.read_only, options.flags)
    )
    cleanup.callback(_unmount_rest, mountpoint, mounting.find_mount(mountpoint))
    try:
        for_lane, for_session = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except BaseException:
        os.close(device)
        raise
    with for_session:
        tree = _tree_for_lane(stack, operations)
        operations.opens_itself = tree is None
        native = Lane(
            device,
            for_lane.detach(),
            max_write=MAX_WRITE_BYTES,
            tree=tree,
            upper=_upper_for_lane(stack),
            no_open=options.read_only and stack.upper is None,
            passthrough=stack.upper is not None and os.geteuid() == 0,
            trace=trace,
            io_uring=options.io_uring,
        )
        cleanup.callback(native.close)
        watch.lane = native
        for_session.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)  # replies; the lane sizes its own end
        # libfuse takes an open descriptor by this name, and closes it.
        pyfuse3.init(operations, f"/dev/fd/{for_session.fileno()}", {"default_permissions"})
        for_session.detach()
    cleanup.callback(pyfuse3.close, unmount=False)
    native.start()

    def answers() -> None:
        if options.io_uring:
            _tell_io_uring(native.io_uring)
        ready()

    extra = ExtraServer(native, operations)
    trio.run(_run, mountpoint, answers, extra, watch, restrict_keyboard_interrupt_to_checkpoints=True)
    if native.end_reason:
        raise MountError(f"/dev/fuse: {os.strerror(native.end_reason)}")


_URING_SWITCH = "/sys/module/fuse/parameters/enable_uring"


def _tell_io_uring(code: int) -> None:
    """One line: is it used, and if not, why, and what to do about it."""
    if code == 0:
        log.info("requests come by io_uring")
        return
    why = os.strerror(code)
    if code == errno.EOPNOTSUPP:
        try:
            with open(_URING_SWITCH) as switch:
                on = switch.read().strip() == "Y"
        except FileNotFoundError:
            why = "this kernel has no FUSE over io_uring (Linux 6.14, CONFIG_FUSE_IO_URING)"
        else:
            why = "the kernel did not offer it"
            if not on:
                why += f"; before the mount, as root: echo Y > {_URING_SWITCH}"
    elif code in (errno.EPERM, errno.ENOSYS):
        why += "; see kernel.io_uring_disabled, and the container's seccomp profile"
    log.warning("io_uring is not used, but /dev/fuse: %s", why)


def _tree_for_lane(stack: Stack, operations: Operations) -> Tree | None:
    """The live tree, if it is the one in C and shows what is to be shown; None: every request passes Python.

    With --debug each is logged there; with mapped ids the tree's owners are not those to show.
    """
    tree: object = stack.tree
    if requests.isEnabledFor(logging.DEBUG) or not operations.shows_ids_as_stored:
        return None
    return tree if isinstance(tree, Tree) and reads_all(stack.layers) else None


def _upper_for_lane(stack: Stack) -> tuple[int, str, bool, bool, bool, bool, bool] | None:
    """What the lane has to know to change the upperdir itself (native/lane_fs.h: struct ovl_lane_upper)."""
    upper = stack.upper
    if upper is None:
        return None
    direct = isinstance(upper.owner, DirectOwner)
    if isinstance(upper.owner, OverrideOwner) and upper.owner.always:
        return None  # the lane makes objects without the xattr, where they show the right owner by themselves
    return upper.work_fd, upper.prefix.decode("ascii"), direct, direct, upper.devices, stack.volatile, stack.metacopy


def _unmount_rest(mountpoint: bytes, ours: mounting.MountEntry | None) -> None:
    """Take our mount away if it is still there: after an exception, or when its connection was aborted."""
    now = mounting.find_mount(mountpoint)
    if ours is not None and now is not None and now.device == ours.device:
        with contextlib.suppress(MountError):  # there is nobody left to tell; the kernel says ENOTCONN from now on
            mounting.unmount(mountpoint, lazy=True)


async def _run(mountpoint: bytes, ready: Callable[[], None], extra: ExtraServer | None, watch: Watch) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_unmount_on_signal, mountpoint)
        if extra is not None:
            nursery.start_soon(extra.run)
            nursery.start_soon(_terminate_at_end, extra)

        async def session() -> None:
            await pyfuse3.main()
            nursery.cancel_scope.cancel()

        nursery.start_soon(session)
        # Answered by the session beside this task.  Abandoned if that ends first: its end is what ends the stat.
        await trio.to_thread.run_sync(os.stat, mountpoint, abandon_on_cancel=True)
        if extra is not None:
            _read_far_ahead(mountpoint)
        ready()
        nursery.start_soon(watch.run)


def _read_far_ahead(mountpoint: bytes) -> None:
    """Have the kernel read ahead in messages of the largest size, not of 128 KiB.  Only root may say so.

    Measured: 256 MiB of a lower file, read from end to end for the first time, take half the time.
    """
    mount = mounting.find_mount(mountpoint)
    if mount is None:
        return
    with contextlib.suppress(OSError):  # no sysfs here, or not ours to write: slower, and nothing else
        with open(f"/sys/class/bdi/{mount.device}/read_ahead_kb", "w", encoding="ascii") as file:
            file.write(str(MAX_WRITE_BYTES >> 10))


async def _terminate_at_end(extra: ExtraServer) -> None:
    """The device's end is the lane's to notice; pyfuse3 would wait at its socket for ever."""
    await extra.ended()
    pyfuse3.terminate()


async def _unmount_on_signal(mountpoint: bytes) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        lazy = False
        async for number in signals:
            log.info("%s: unmounting", signal.Signals(number).name)
            await _unmount(mountpoint, lazy=lazy)
            lazy = True


async def _unmount(mountpoint: bytes, *, lazy: bool) -> None:
    """umount(8) or fusermount3(1), which know what this user may do.  A busy mount stays, unless `lazy`."""
    program = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    flags = (["-l"] if os.geteuid() == 0 else ["-z"]) if lazy else []
    result = await trio.run_process(
        [*program, *flags, os.fsdecode(mountpoint)], check=False, capture_stdout=True, capture_stderr=True
    )
    if result.returncode != 0:
        log.warning("not unmounted: %s", result.stderr.decode(errors="replace").strip())
