"""From a command line to a mount that answers: what `ovlfs mount`, `mount.ovlfs` and `ovlfs-fuse` share.

The command's own process checks what can be checked without opening anything; the daemon (fuse/daemon.py) opens the
image, the upperdir and the stack, mounts and serves.  What was opened is given back in reverse order at the end, also
when a step in between fails.
"""

import contextlib
import hashlib
import os
import stat
import sys
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ovlfs.cli import uppers
from ovlfs.cli.progress import Progress
from ovlfs.errors import MountError, UsageError, printable
from ovlfs.fuse import daemon, mounting
from ovlfs.overlay.params import MountFlags, Params, verify

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ovlfs.fuse.session import MountOptions
    from ovlfs.image.image import Image
    from ovlfs.image.store import Store
    from ovlfs.layer.base import Layer
    from ovlfs.overlay.stack import Stack


@dataclass(frozen=True, slots=True)
class Request:
    """What shall be mounted, and how.

    Attributes:
        mountpoint: as typed.
        image: a reference as typed; None: `params.lowerdirs`.
        source: what mount(8) shows as the source; None: the image, or "overlay".
        upper, work: from --upper and --work: made if they are not there.
        keep: without an upperdir, the changes to an image are kept in the store.
        options: the option string, for the registry.
        directory: where the command was given.
    """

    mountpoint: bytes
    image: str | None = None
    source: str | None = None
    params: Params = field(default_factory=Params)
    flags: MountFlags = field(default_factory=MountFlags)
    upper: bytes | None = None
    work: bytes | None = None
    keep: bool = True
    foreground: bool = False
    options: str = ""
    directory: str = field(default_factory=os.getcwd)


def mount(request: Request) -> str:
    """Mount, and return what there is to say about it once it answers (in the foreground: when it was unmounted)."""
    request = _checked(request)
    registry = mounting.Registry(mounting.default_registry())
    registry.sweep()
    work = _Work(request, registry)
    if request.foreground:
        daemon.run_here(work.run, debug=request.flags.debug)
        return ""
    return daemon.launch(work.run, log_path=_log_path(request.mountpoint), debug=request.flags.debug)


def _log_path(mountpoint: bytes) -> bytes:
    digest = hashlib.sha256(mountpoint).hexdigest()[:8].encode()
    return b"%s/%s-%s.log" % (daemon.log_directory(), os.path.basename(mountpoint)[:200] or b"root", digest)


def _checked(request: Request) -> Request:
    """The request with absolute paths.  Raises what can be known before anything is opened."""
    params, flags = request.params, request.flags
    if request.upper is not None and params.upperdir is not None:
        raise UsageError("--upper and option 'upperdir' say the same thing twice")
    if request.work is not None and request.upper is None:
        raise UsageError("--work needs --upper")
    if request.image is not None and params.lowerdirs:
        raise UsageError("an image and option 'lowerdir' cannot be combined")
    if request.image is None and not params.lowerdirs:
        raise UsageError("what shall be mounted? name an image, or directories with option 'lowerdir'")
    if flags.ephemeral and (request.upper is not None or params.upperdir is not None):
        raise UsageError("an upperdir and 'ephemeral' contradict each other")
    if flags.ephemeral and params.read_only:
        raise UsageError("'ro' and 'ephemeral' contradict each other")
    if request.upper is not None and params.read_only:
        raise UsageError("'ro' and --upper contradict each other; option 'upperdir' with 'ro' shows an upperdir")
    verify(params)
    here = os.fsencode(request.directory)
    params = replace(
        params,
        lowerdirs=tuple(os.path.join(here, path) for path in params.lowerdirs),
        datadirs=tuple(os.path.join(here, path) for path in params.datadirs),
        upperdir=None if params.upperdir is None else os.path.join(here, params.upperdir),
        workdir=None if params.workdir is None else os.path.join(here, params.workdir),
    )
    return replace(request, params=params, mountpoint=mounting.check_mountpoint(request.mountpoint))


@dataclass(slots=True)
class _Opened:
    """What has been opened so far, for the summary and the registry."""

    image: "Image | None" = None
    lowers: "Sequence[Layer] | None" = None
    place: uppers.Place | None = None


class _Work:
    """The work of the daemon's process."""

    def __init__(self, request: Request, registry: mounting.Registry) -> None:
        self.request = request
        self.registry = registry

    def run(self, job: daemon.Job) -> None:
        """Open, mount, serve, close."""
        from ovlfs.fuse.control import Control, answering  # noqa: PLC0415
        from ovlfs.fuse.session import serve  # noqa: PLC0415  # heavy: pyfuse3, trio
        from ovlfs.overlay.stack import open_stack  # noqa: PLC0415

        os.umask(0o077)
        daemon.raise_limits()
        request = self.request
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(Progress(job.terminal))
            opened, params = self._open(stack, progress)
            progress.close()
            served = open_stack(params, opened.lowers)
            if opened.image is not None and opened.place is not None and not params.read_only:
                _take_over(served, opened.image, opened.place)
            record = self._record(opened, job)
            control = Control(self.registry.socket(record))

            def ready() -> None:
                nonlocal record
                record = mounting.mounted_record(record, request.mountpoint, time.time())
                self.registry.save(record)
                control.listen()
                job.ready(_summary(request, opened))

            try:
                serve(
                    served,
                    request.mountpoint,
                    self._mount_options(),
                    ready,
                    lane=request.flags.lane,
                    control=control,
                    verbs={"explain": answering(lambda request: _explain(served, request))},
                )
            except Exception as error:
                if record.device:  # it was mounted, and what was changed may not be on disk: `ovlfs umount` tells
                    self.registry.save(replace(record, failed=daemon.describe(error)[0]))
                raise
            self.registry.remove(record)

    def _open(self, stack: contextlib.ExitStack, progress: Progress) -> tuple[_Opened, Params]:
        """Open the image and claim the upperdir; and the Params for open_stack()."""
        from ovlfs.image.store import Store  # noqa: PLC0415

        request, params = self.request, self.request.params
        opened = _Opened()
        store: Store | None = None
        if request.image is not None or request.flags.ephemeral:
            store = Store()
        if request.image is not None:
            assert store is not None
            params = self._open_image(opened, store, progress)
        directories = params.lowerdirs + params.datadirs
        for path in directories:
            _check_directory("lowerdir", path)
        mounting.check_lowerdirs(request.mountpoint, directories)
        opened.place = self._place(opened, store, stack)
        if opened.place is None:
            return opened, params
        place = opened.place
        params = replace(params, upperdir=place.upperdir, workdir=place.workdir)
        _check_directory("upperdir", place.upperdir)
        _check_directory("workdir", place.workdir)
        mounting.check_places(request.mountpoint, directories, place.upperdir, place.workdir)
        if not params.read_only:
            stack.enter_context(uppers.claimed(place))
        return opened, params

    def _open_image(self, opened: _Opened, store: "Store", progress: Progress) -> Params:
        from ovlfs.image.image import open_image  # noqa: PLC0415
        from ovlfs.image.platform import parse_platform  # noqa: PLC0415
        from ovlfs.layer.open import open_layers  # noqa: PLC0415

        request = self.request
        assert request.image is not None
        platform = parse_platform(request.flags.platform) if request.flags.platform else None
        image = open_image(request.image, platform=platform, progress=progress, store=store)
        opened.image = image
        if image.directory is not None:
            # A root file system in a directory speaks the kernel's dialect: `.wh.` names are ordinary there.
            return replace(request.params, lowerdirs=(os.path.abspath(image.directory),), oci_whiteouts=False)
        path = os.path.abspath(image.path)
        if mounting.is_within(path, request.mountpoint):
            raise MountError(f"{printable(path)} would be hidden by the mount on {printable(request.mountpoint)}")
        opened.lowers = open_layers(image, store, progress=progress)[::-1]
        return request.params

    def _place(self, opened: _Opened, store: "Store | None", stack: contextlib.ExitStack) -> uppers.Place | None:
        request, params = self.request, self.request.params
        if params.upperdir is not None:
            place = uppers.Place(params.upperdir, params.workdir or params.upperdir)
            if params.workdir is None:
                return None  # read-only: open_stack looks at the upperdir itself
            return place if opened.image is None else uppers.noted(place)
        if params.read_only:
            return None
        if request.upper is not None:
            return uppers.chosen(request.upper, request.work)
        if request.flags.ephemeral:
            assert store is not None
            return stack.enter_context(uppers.ephemeral(store.path))
        if opened.image is None or not request.keep:
            return None
        assert store is not None
        uppers.sweep_ephemeral(store.path)
        return uppers.kept_for(store.path, opened.image.path, _choice(opened.image))

    def _mount_options(self) -> "MountOptions":
        from ovlfs.fuse.session import MountOptions  # noqa: PLC0415

        request, flags = self.request, self.request.flags
        words = ["suid" if flags.suid else "nosuid", "dev" if flags.dev else "nodev"]
        words += [] if flags.exec else ["noexec"]
        words += [word for word, wanted in (("sync", flags.sync), ("dirsync", flags.dirsync)) if wanted]
        if os.path.isdir("/sys/fs/selinux"):
            words += [word.replace('"', "").replace(",", "\\,") for word in flags.security]
        return MountOptions(
            source=flags.fsname or request.source or request.image or "overlay",
            allow_other=os.geteuid() == 0 if flags.allow_other is None else flags.allow_other,
            read_only=flags.read_only,
            io_uring=flags.io_uring,
            flags=tuple(words),
        )

    def _record(self, opened: _Opened, job: daemon.Job) -> mounting.Record:
        request, place = self.request, opened.place
        started = mounting.start_time(os.getpid())
        assert started is not None
        return mounting.Record(
            pid=os.getpid(),
            started=started,
            mountpoint=os.fsdecode(request.mountpoint),
            source=_absolute(request) or request.source or "overlay",
            options=request.options,
            upper=None if place is None else os.fsdecode(place.upperdir),
            work=None if place is None else os.fsdecode(place.workdir),
            ephemeral=request.flags.ephemeral,
            log=None if job.log is None else os.fsdecode(job.log),
            directory=request.directory,
        )


def _explain(served: "Stack", request: dict[str, Any]) -> dict[str, Any]:
    from ovlfs.explain.explain import answer  # noqa: PLC0415

    return answer(served, request)


def _take_over(served: "Stack", image: "Image", place: uppers.Place) -> None:
    """Check that the changes are this image's; an upperdir without any gets the looks of the image's root.

    What the root looks like is the upperdir's business, so a new one (mode 0700, or what mkdir made) would hide the
    image's own.
    """
    from ovlfs.ids import ROOT_NODEID  # noqa: PLC0415
    from ovlfs.overlay import attr  # noqa: PLC0415

    identity = uppers.identity_of(image)
    lowers = [layer for layer in served.layers[1:] if layer is not None]
    if uppers.check_note(place, identity) and lowers:
        looks = next((layer for layer in lowers if not _root_is_implied(layer)), lowers[0])
        found = looks.attr(looks.root)
        change = attr.Change(
            permissions=stat.S_IMODE(found.mode),
            uid=found.uid,
            gid=found.gid,
            atime_ns=found.atime_ns,
            mtime_ns=found.mtime_ns,
        )
        attr.set_(served, served.tree.get(ROOT_NODEID), change)
    uppers.write_note(place, os.fsdecode(os.path.abspath(image.path)), identity)


def _root_is_implied(layer: "Layer") -> bool:
    """Whether a tar never describes its root."""
    root_entry = getattr(layer, "root_entry", None)
    return root_entry is not None and root_entry().implied


def _check_directory(what: str, path: bytes) -> None:
    """Raise MountError where `path` is none."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        raise MountError(f"{what} {printable(path)}: {os.strerror(error.errno or 0)}") from error


def _absolute(request: Request) -> str | None:
    """The image as it can be named from anywhere."""
    if request.image is None:
        return None
    return request.image if request.image.startswith("/") else os.path.join(request.directory, request.image)


def _choice(image: "Image") -> str:
    """What tells this image from the others in the same file."""
    platform = str(image.config.platform) if image.config.raw else ""
    return "\0".join((image.chosen_tag or image.image_id or image.manifest_digest or "", platform))


def _summary(request: Request, opened: _Opened) -> str:
    """`mounted image.tar (9 layers, 7692 files) on /mnt/root`, and where the changes are."""
    if opened.image is not None and opened.lowers is not None:
        files = sum(layer.index.counts()[0] for layer in opened.lowers)  # type: ignore[attr-defined]
        what = f"{printable(request.image or '')} ({_counted(len(opened.lowers), 'layer')}, {_counted(files, 'file')})"
    elif opened.image is not None:
        what = printable(request.image or "")
    else:
        count = len(request.params.lowerdirs)
        what = printable(request.params.lowerdirs[0]) if count == 1 else f"{count} directories"
    lines = [f"mounted {what} on {printable(request.mountpoint)}"]
    if opened.place is None or request.params.read_only:
        lines[0] += ", read-only"
    elif opened.place.ephemeral:
        lines.append("changes are dropped at unmount")
    else:
        lines.append(f"changes are kept in {printable(opened.place.upperdir)}")
    return "\n".join(lines)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def say(text: str) -> None:
    """Print the summary."""
    if text:
        print(text)
        sys.stdout.flush()
