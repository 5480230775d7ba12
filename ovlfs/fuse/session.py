"""How long does a mount live, and how does it end?

`serve` mounts, says when the mount answers, serves until somebody unmounts, and puts everything on disk before it
returns.  SIGTERM and SIGINT unmount in order: no new opens get in, what is open keeps working until it is closed or
the second signal detaches the mount.

pyfuse3 keeps one session per process in module globals, so there is one `serve` per process, too.
"""

import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

import pyfuse3
import trio

from ovlfs.fuse.operations import Operations
from ovlfs.overlay.stack import Stack

log = logging.getLogger("ovlfs.fuse")


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What the kernel and fusermount3 are told, beside the file system itself.

    Attributes:
        source: what mount(8) and /proc/mounts show as the device.
        allow_other: users other than the mounting one may enter (without root: needs user_allow_other).
        read_only: the kernel refuses writes before they reach us.
        flags: further mount words: nosuid, nodev, noexec, dev, suid, ....
    """

    source: str = "ovlfs"
    allow_other: bool = False
    read_only: bool = False
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


def serve(stack: Stack, mountpoint: bytes, options: MountOptions, ready: Callable[[], None]) -> None:
    """Mount `stack` on `mountpoint`, call `ready` once it answers, and return after it was unmounted.

    Raises:
        RuntimeError: the mount failed; libfuse or fusermount3 has said why on stderr.
    """
    operations = Operations(stack)
    pyfuse3.init(operations, os.fsdecode(mountpoint), options.words())
    unmount = True
    try:
        trio.run(_run, mountpoint, ready, restrict_keyboard_interrupt_to_checkpoints=True)
        unmount = False  # the kernel said so: nothing is mounted any more
    finally:
        pyfuse3.close(unmount=unmount)
        operations.close()
        stack.close()


async def _run(mountpoint: bytes, ready: Callable[[], None]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_unmount_on_signal, mountpoint)

        async def session() -> None:
            await pyfuse3.main()
            nursery.cancel_scope.cancel()

        nursery.start_soon(session)
        await trio.to_thread.run_sync(os.stat, mountpoint)  # answered by the session beside this task
        ready()


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
