"""`ovlfs run`: run a command in an image.

Exit codes are those of `docker run`: the command's own, 128+n when signal n killed it, 127 and 126 when it could not
be found or executed, 125 for everything that is our failure or the command line's.
"""

import argparse
import contextlib
import errno
import os
import sys
from typing import TYPE_CHECKING

from ovlfs.cli.container_options import (
    CommandParser,
    add_options,
    chosen_place,
    failed,
    overrides,
    settings,
    volumes_of,
    with_volumes,
)
from ovlfs.errors import MountError, OvlfsError, UsageError, printable

if TYPE_CHECKING:
    from ovlfs.cli.uppers import Place
    from ovlfs.fuse.mounting import Record
    from ovlfs.image.config import Config
    from ovlfs.run.namespaces import Mapping

_DESCRIPTION = """\
Mounts an image and runs a command in it, as the image's config says (Entrypoint, Cmd, Env, WorkingDir, User, Volumes,
StopSignal), by crun or runc.  The changes are dropped at the end, unless --name or --upper keeps them.

  ovlfs run image.tar                              what the image is made to run
  ovlfs run -t image.tar -- sh                     a shell
  ovlfs run -v .:/src -w /src image.tar -- make
  ovlfs run --name try image.tar -- touch /x       and again: the changes are there

Without root it runs in a user namespace, with the ids that /etc/subuid lends the user.
"""
_EXIT_CODES = """\
Exit code: the command's own; 128+n when signal n killed it; 127 when it was not found, 126 when it could not be
executed, 125 when ovlfs or the runtime failed.  SIGTERM, and the end of the terminal, send the image's StopSignal, and
SIGKILL after ten seconds (or at the second SIGTERM, or the third Ctrl-C).
"""


def parser() -> CommandParser:
    """The command line."""
    found = CommandParser(
        "ovlfs run",
        usage="ovlfs run [OPTIONS] IMAGE [-- COMMAND ...]",
        description=_DESCRIPTION,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("image", metavar="IMAGE", help="PATH, PATH:TAG or PATH:@N")
    add_options(found)
    found.add_argument("--rm", action="store_true", help="remove at the end what --name kept")
    found.add_argument("-i", "--interactive", action="store_true", help="nothing: stdin is always passed on")
    found.add_argument("--chroot", action="store_true", help="by chroot(2) instead of a runtime: no isolation at all")
    return found


def run(args: argparse.Namespace) -> int:
    """Run it; the exit code is the command's."""
    try:
        return _run(args)
    except OvlfsError as error:
        raise failed(error) from error
    except OSError as error:
        where = "" if error.filename is None else f"{printable(error.filename)}: "
        raise failed(OvlfsError(f"{where}{error.strerror or error}")) from error


def _run(args: argparse.Namespace) -> int:
    from ovlfs.cli import uppers  # noqa: PLC0415
    from ovlfs.image.store import Store  # noqa: PLC0415
    from ovlfs.run import namespaces, supervise  # noqa: PLC0415

    supervise.settle()
    if args.tty and not os.isatty(0):
        raise UsageError("--tty: stdin is no terminal")
    if args.rm and args.upper is not None:
        raise UsageError("--rm removes what --name keeps; a directory of your own is yours to remove")
    overrides(args), settings(args)  # what is wrong with the command line is said before anything is done
    config = open_config(args.image, args.platform)
    mapping = namespaces.enter()
    if mapping.note:
        print(f"ovlfs: {mapping.note}", file=sys.stderr)
    store = Store().path
    with contextlib.ExitStack() as stack:
        kept = chosen_place(args, store)
        if kept is not None and args.rm:
            stack.callback(uppers.drop, kept)
        place = stack.enter_context(uppers.temporary(os.path.join(store, b"runs")))
        run_in_place = _Run(args, config, mapping, place, kept)
        stack.enter_context(supervise.janitor(run_in_place.clean_up_for_the_dead))
        return run_in_place.run()


def open_config(image: str, platform: str) -> "Config":
    """The config of an image that this machine can run."""
    from ovlfs.cli.progress import Progress  # noqa: PLC0415
    from ovlfs.image.image import open_image  # noqa: PLC0415
    from ovlfs.image.platform import parse_platform  # noqa: PLC0415
    from ovlfs.run.process import check_platform  # noqa: PLC0415

    with Progress(sys.stderr if sys.stderr.isatty() else None) as progress:
        wanted = parse_platform(platform) if platform else None
        config = open_image(image, platform=wanted, progress=progress).config
    check_platform(config, printable(image))
    return config


class _Run:
    """One run: the mount, the command in it, and the order in which both end."""

    def __init__(
        self, args: argparse.Namespace, config: "Config", mapping: "Mapping", place: bytes, kept: "Place | None"
    ) -> None:
        self.args, self.config, self.mapping, self.place, self.kept = args, config, mapping, place, kept
        self.rootfs, self.state = place + b"/rootfs", place + b"/state"

    def run(self) -> int:
        from ovlfs.run import container, inside, volumes  # noqa: PLC0415

        for directory in (self.rootfs, self.state):
            os.mkdir(directory, 0o700)
        try:
            server = self._mount()
            found = settings(self.args)
            rootfd = inside.open_root(self.rootfs)
            try:
                taken = tuple(bind.destination for bind in found.binds)
                base = volumes_of(self.kept, self.place)
                binds = volumes.image_volumes(self.config, rootfd, base, self.mapping, taken)
            finally:
                os.close(rootfd)
            return container.run_in(
                self.rootfs,
                self.config,
                overrides(self.args),
                with_volumes(found, binds),
                mapping=self.mapping,
                chroot=self.args.chroot,
                state=self.state,
                server=server.pid,
            )
        finally:
            self._unmount()

    def _mount(self) -> "Record":
        """Mount the image as `ovlfs mount` does, for us alone.

        Set-uid programs work, as `su` in a container must: nobody outside our mount namespace sees them.  Device nodes
        of the image do not: they would be the host's devices.
        """
        from ovlfs.cli import start  # noqa: PLC0415
        from ovlfs.overlay.params import MountFlags, Params  # noqa: PLC0415

        # In a user namespace the owners of files are kept in xattrs: so the upperdir is the user's, through and
        # through, and if it is kept, shows the same whichever ids the next mount has.
        mapped, kept = self.mapping.user_namespace, self.kept
        params = Params(xattr_permissions=2 if mapped else None, override_always=mapped and kept is not None)
        flags = MountFlags(suid=True, platform=self.args.platform, ephemeral=kept is None)
        start.mount(
            start.Request(
                mountpoint=self.rootfs,
                image=self.args.image,
                params=params,
                flags=flags,
                upper=None if kept is None else kept.upperdir,
                work=None if kept is None else kept.workdir,
            )
        )
        record = self._record()
        if record is None:
            raise MountError("the daemon that serves the root file system has ended")
        return record

    def _record(self) -> "Record | None":
        from ovlfs.fuse import mounting  # noqa: PLC0415

        return next((one.record for one in mounting.mounts() if one.entry.mountpoint == self.rootfs), None)

    def _unmount(self) -> None:
        """Unmount, and remove the mountpoint: a daemon that is still busy opening the image cannot mount any more."""
        from ovlfs.fuse import mounting  # noqa: PLC0415

        while True:
            if mounting.find_mount(self.rootfs) is not None:
                self._unmount_one()
            try:
                os.rmdir(self.rootfs)
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno != errno.EBUSY:  # EBUSY: it was mounted just now
                    raise
            else:
                return

    def _unmount_one(self) -> None:
        """Unmount, and wait until everything is on disk; after a killed daemon, do what it would have done.

        Raises:
            MountError: not everything is on disk.
            ServerDiedError: the daemon was killed.
        """
        from ovlfs.cli import umount, uppers  # noqa: PLC0415
        from ovlfs.fuse import mounting  # noqa: PLC0415
        from ovlfs.run.supervise import ServerDiedError  # noqa: PLC0415

        record = self._record()
        with mounting.watching(record) as daemon:
            try:
                umount.unmount(self.rootfs, lazy=False)
            except MountError:
                if mounting.find_mount(self.rootfs) is None:
                    raise  # it is unmounted, and something is not on disk
                umount.unmount(self.rootfs, lazy=True)
            if daemon is not None:
                mounting.wait_for_end(daemon)
        if record is not None and mounting.reread(record) is None:  # it has ended in order
            if record.log is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(record.log)  # nobody will look for it: the next run has another mountpoint
            return
        mounting.Registry(mounting.default_registry()).sweep()
        uppers.sweep_ephemeral(os.path.dirname(os.path.dirname(self.place)))
        raise ServerDiedError

    def clean_up_for_the_dead(self) -> None:
        """In the janitor, when the process of the command line was killed."""
        from ovlfs.cli import uppers  # noqa: PLC0415
        from ovlfs.run import chroot, runtime  # noqa: PLC0415

        (chroot if self.args.chroot else runtime).remove_all(self.state)
        with contextlib.suppress(OvlfsError):  # nobody is left to be told
            self._unmount()
        if self.kept is not None and self.args.rm:
            uppers.drop(self.kept)
        uppers.remove(self.place)
