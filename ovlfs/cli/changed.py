"""From what was typed to two trees that can be compared: what `diff`, `commit` and `fsck` share.

MOUNT is a mountpoint of ovlfs: the registry knows its image (or lower directories), its upperdir and its options.
UPPER is an upperdir, mounted or not: the note that the mount left beside it (cli/uppers.py) says over which image it
was written, and the image is taken only if it still is that one.

The upperdir of a mount is read directly, after everything that the kernel holds back for it was written (syncfs(2)).
What somebody writes at the same time may be seen or not, file by file.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ovlfs.cli import uppers
from ovlfs.cli.progress import Progress
from ovlfs.errors import ImageError, MountError, OvlfsError, printable
from ovlfs.fuse import mounting
from ovlfs.image.image import Image, list_images, open_image
from ovlfs.image.platform import parse_platform
from ovlfs.image.reference import Reference, parse_reference
from ovlfs.image.store import Store
from ovlfs.layer import sys as syscalls
from ovlfs.layer.base import Layer
from ovlfs.layer.directory import USER, DirLayer, InoMap
from ovlfs.layer.open import open_layers
from ovlfs.overlay import upperdir
from ovlfs.overlay.params import MountFlags, Params, parse_mount_options
from ovlfs.overlay.stack import open_stack


@dataclass(frozen=True, slots=True)
class Place:
    """An upperdir, and how it is (or was) mounted.

    Attributes:
        mounted: the mount that has it now.
        image: the image as it can be opened; None: the layers below are `params.lowerdirs`.
    """

    upperdir: bytes
    params: Params
    flags: MountFlags
    image: str | None
    mounted: mounting.Mounted | None


@dataclass(frozen=True, slots=True)
class Changed:
    """An upperdir over its layers, opened.

    Attributes:
        upper: the upperdir.
        lowers: the layers below it, top first.
        image: whose layers `lowers` are; None: directories.
    """

    place: Place
    upper: DirLayer
    lowers: Sequence[Layer]
    image: Image | None

    @property
    def now(self) -> list[Layer | None]:
        """The tree with the changes."""
        return [self.upper, *self.lowers]

    @property
    def before(self) -> list[Layer | None]:
        """The tree without them."""
        return [None, *self.lowers]


def find(typed: bytes, image: str | None = None) -> Place:
    """What MOUNT|UPPER is.

    Args:
        typed: as the user typed it.
        image: --image: the image, where the user says it.

    Raises:
        MountError: it is neither, or nothing is known of its image.
    """
    mounts = mounting.mounts()
    mountpoint = mounting.resolve_mountpoint(typed)
    here = next((mounted for mounted in reversed(mounts) if mounted.entry.mountpoint == mountpoint), None)
    where = printable(typed)
    if here is not None:
        if here.record is None:
            raise MountError(f"{where}: nothing is known of this mount; name its upperdir instead, with --image IMAGE")
        if here.record.upper is None:
            raise MountError(f"{where}: is mounted read-only, without an upperdir, so nothing was changed")
        return _place(os.fsencode(here.record.upper), here, image)
    if not os.path.isdir(typed):
        mounting.refuse_inside(typed)
        raise MountError(f"{where}: is neither a mount of ovlfs nor an upperdir")
    for mounted in mounts:
        if mounted.record is not None and mounted.record.upper is not None and _is_same(mounted.record.upper, typed):
            return _place(os.path.abspath(typed), mounted, image)
    if image is None and uppers.note_of(typed) is None:
        mounting.refuse_inside(typed)
    return _place(os.path.abspath(typed), None, image)


def _is_same(path: str, other: bytes) -> bool:
    try:
        return os.path.samefile(os.fsencode(path), other)
    except OSError:  # the upperdir of a dead mount may be gone
        return False


def _place(upper: bytes, mounted: mounting.Mounted | None, image: str | None) -> Place:
    params, flags = Params(), MountFlags()
    if mounted is not None and mounted.record is not None:
        record = mounted.record
        params, flags = parse_mount_options(record.options)
        here = os.fsencode(record.directory)
        params = replace(
            params,
            lowerdirs=tuple(os.path.join(here, path) for path in params.lowerdirs),
            datadirs=tuple(os.path.join(here, path) for path in params.datadirs),
        )
        if image is None and not params.lowerdirs:
            image = record.source
    return Place(upper, params, flags, image, mounted)


@contextlib.contextmanager
def opened(place: Place, platform: str = "") -> Iterator[Changed]:
    """The upperdir and the layers below it.

    Raises:
        OvlfsError: the image is not there, or not the one over which the changes were made.
    """
    _sync(place)
    inos = InoMap()
    with contextlib.ExitStack() as stack:
        upper = upperdir.open_layer(place.upperdir, place.params, inos)
        stack.callback(upper.close)
        image = None
        lowerdirs = place.params.lowerdirs
        if not lowerdirs:
            image = _image(place, platform or place.flags.platform)
            lowerdirs = () if image.directory is None else (os.path.abspath(image.directory),)
        lowers: Sequence[Layer]
        if image is not None and image.directory is None:
            lowers = stack.enter_context(layers_of(image))
        else:
            params = replace(
                place.params,
                lowerdirs=lowerdirs,
                upperdir=None,
                workdir=None,
                read_only=True,
                userxattr=upper.prefixes == (USER,),
                oci_whiteouts=place.params.oci_whiteouts and image is None,
            )
            served = open_stack(params, inos=inos)
            stack.callback(served.close)
            lowers = [layer for layer in served.layers if layer is not None]
        yield Changed(place, upper, lowers, image)


@contextlib.contextmanager
def layers_of(image: Image) -> Iterator[Sequence[Layer]]:
    """The layers of an image, top first."""
    with contextlib.ExitStack() as stack:
        if image.directory is not None:
            params = Params(lowerdirs=(os.path.abspath(image.directory),), oci_whiteouts=False, read_only=True)
            served = open_stack(params)
            stack.callback(served.close)
            yield [layer for layer in served.layers if layer is not None]
            return
        with progress() as shown:
            layers = open_layers(image, Store(), progress=shown)[::-1]
        for layer in layers:
            stack.callback(layer.close)
        yield layers


def progress() -> Progress:
    """On a terminal only."""
    return Progress(sys.stderr if sys.stderr.isatty() else None)


def _sync(place: Place) -> None:
    """Have the kernel write what it still holds back for the mount."""
    if place.mounted is None or not place.mounted.alive:
        return
    fd = os.open(place.mounted.entry.mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.syncfs(fd)
    finally:
        os.close(fd)


def _image(place: Place, platform: str) -> Image:
    """The image below an upperdir: as the mount, the user or the note says, and as the note confirms."""
    note = uppers.note_of(place.upperdir)
    named = place.image if place.image is not None or note is None else note.image
    where = printable(place.upperdir)
    if named is None:
        raise MountError(f"{where}: nothing says over which image its changes were made; name it with --image IMAGE")
    wanted = None if note is None else note.identity
    try:
        with progress() as shown:
            reference = Reference(os.fsencode(named)) if place.image is None else parse_reference(named)
            image = _open_identical(reference, platform, wanted, shown)
    except ImageError as error:
        raise ImageError(
            f"{error} (the changes in {where} were made over it; --image IMAGE names another place)"
        ) from None
    if wanted is not None and uppers.identity_of(image) != wanted:
        raise MountError(
            f"the changes in {where} were made over another image ({printable(wanted[:200])}) "
            f"than {printable(named)} is ({uppers.identity_of(image)}); name the right one with --image IMAGE"
        )
    return image


def _open_identical(reference: Reference, platform: str, wanted: str | None, shown: Progress) -> Image:
    """The image that is named; where the name leaves a choice, the one that has the identity `wanted`."""
    store = Store()
    choice = parse_platform(platform) if platform else None
    found: Image | None = None
    failure: OvlfsError | None = None
    try:
        found = open_image(reference, platform=choice, progress=shown, store=store)
    except ImageError as error:  # several images, and the note does not say which
        failure = error
    chosen = (reference.tag, reference.index, reference.digest) != (None, None, None)
    if chosen or wanted is None or (found is not None and uppers.identity_of(found) == wanted):
        if found is None:
            assert failure is not None
            raise failure
        return found
    for listed in list_images(reference, progress=shown, store=store):
        for each in listed.platforms or (None,):
            with contextlib.suppress(ImageError):  # for another operating system, or no image at all
                one = Reference(reference.path, index=listed.number)
                candidate = open_image(one, platform=each, progress=shown, store=store)
                if uppers.identity_of(candidate) == wanted:
                    return candidate
    if found is None:
        assert failure is not None
        raise failure
    return found
