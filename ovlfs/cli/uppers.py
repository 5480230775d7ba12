"""Where are the changes of a mount kept?

Four ways:

* kept for the image: in the store, `uppers/NAME/{upper,work,image.json}`, NAME made of the image's path and tag, so
  that mounting the same image again finds the changes again;
* `--upper DIR`: where the user says, with a workdir `DIR.work` and a note `DIR.image.json` beside it;
* `ovlfs run --name NAME`: in the store, `uppers/NAME`, with the volumes of the image beside the upperdir;
* `--ephemeral`: in the store, `ephemeral/RANDOM/{upper,work}`, removed at unmount; what a killed daemon left is
  removed by the next mount.

The note says over which image (the chain_id of its layers) the changes were made.  Changes shown over another image
would be nonsense (whiteouts of files that never were, half of a file from here and half from there), so that is
refused.  Nothing of ours is put into an upperdir.

An upperdir is claimed with flock(2) as long as it is mounted, whichever workdir comes with it; overlay/stack.py does
the same with the workdir.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ovlfs.errors import MountError, UsageError, printable
from ovlfs.fuse import mounting

if TYPE_CHECKING:
    from ovlfs.image.image import Image

log = logging.getLogger("ovlfs.uppers")

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_NOTE_BYTES = 1 << 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True)
class Place:
    """An upperdir, its workdir, and where the note about its image is (None: there is none to keep)."""

    upperdir: bytes
    workdir: bytes
    note: bytes | None = None
    ephemeral: bool = False


def chosen(upperdir: bytes, workdir: bytes | None) -> Place:
    """What the user chose with --upper and --work; the directories are made if they are not there."""
    upperdir = os.path.abspath(upperdir)
    workdir = upperdir + b".work" if workdir is None else os.path.abspath(workdir)
    for path in (upperdir, workdir):
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o755 if path == upperdir else 0o700)
        except OSError as error:
            raise MountError(f"{printable(path)}: {error.strerror}") from error
    return noted(Place(upperdir, workdir))


def noted(place: Place) -> Place:
    """`place` with its note beside the upperdir."""
    return replace(place, note=os.path.realpath(place.upperdir) + b".image.json")


def kept_for(store: bytes, image: bytes, choice: str) -> Place:
    """Where the changes to an image are kept: the same place each time.

    Args:
        store: the store's path.
        image: the image's path.
        choice: what tells the image from others in the same file: its tag, its platform.
    """
    path = os.path.realpath(image)
    digest = hashlib.sha256(path + b"\0" + os.fsencode(choice)).hexdigest()[:12]
    name = b"%s-%s" % (os.path.basename(path)[:200] or b"image", digest.encode())
    place = os.path.join(store, b"uppers", name)
    _make_private(os.path.join(store, b"uppers"), place)
    return Place(*_make_pair(place), note=place + b"/image.json")


def workdir_of(upperdir: bytes) -> bytes:
    """The workdir that `chosen` or `kept_for` gives an upperdir."""
    directory, name = os.path.split(os.path.realpath(upperdir))
    beside = os.path.join(directory, b"work")
    return beside if name == b"upper" and os.path.isdir(beside) else os.path.join(directory, name + b".work")


def named(store: bytes, name: str) -> Place:
    """Where the changes called `name` are kept."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"name '{printable(name[:200])}' should be letters, digits and any of _.- (at most 128)")
    place = os.path.join(store, b"uppers", name.encode())
    _make_private(os.path.join(store, b"uppers"), place)
    return noted(Place(*_make_pair(place)))


def drop(place: Place) -> None:
    """Remove a place that named() made, with everything beside the upperdir.

    Raises:
        MountError: it is mounted.
    """
    with claimed(place):
        remove(os.path.dirname(place.upperdir))


def _make_private(*paths: bytes) -> None:
    for path in paths:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)


def _make_pair(place: bytes) -> tuple[bytes, bytes]:
    upperdir, workdir = place + b"/upper", place + b"/work"
    with contextlib.suppress(FileExistsError):
        os.mkdir(upperdir, 0o755)
    with contextlib.suppress(FileExistsError):
        os.mkdir(workdir, 0o700)
    return upperdir, workdir


@contextlib.contextmanager
def ephemeral(store: bytes) -> Iterator[Place]:
    """A new place that is removed at the end of the block."""
    with temporary(os.path.join(store, b"ephemeral")) as place:
        yield Place(*_make_pair(place), ephemeral=True)


@contextlib.contextmanager
def temporary(base: bytes) -> Iterator[bytes]:
    """A new directory in `base` that is removed at the end of the block, or by the next who makes one there.

    It is claimed by a lock that processes forked in the block share: it is theirs until the last of them ends.
    """
    _make_private(base)
    with _locked(base):  # nobody sweeps the new one before it is claimed
        _sweep(base)
        place = os.path.join(base, secrets.token_hex(8).encode())
        os.mkdir(place, 0o700)
        fd = os.open(place, _OPEN_DIRECTORY)
        fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield place
    finally:
        remove(place)
        os.close(fd)


def sweep_ephemeral(store: bytes) -> None:
    """Remove what killed daemons left."""
    base = os.path.join(store, b"ephemeral")
    if os.path.isdir(base):
        with _locked(base):
            _sweep(base)


def _sweep(base: bytes) -> None:
    for name in os.listdir(base):
        path = os.path.join(base, name)
        fd = os.open(path, _OPEN_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)
        except BlockingIOError:
            pass  # it is mounted
        except (OSError, MountError) as error:
            # Files of other users of a user namespace: the next run in such a one removes them.
            log.warning("%s: not removed: %s", printable(path), error)
        finally:
            os.close(fd)


def remove(path: bytes) -> None:
    """Remove a directory of ours, if nothing is mounted in it: that would be emptied, too."""
    below = os.path.realpath(path) + b"/"
    if any(entry.mountpoint.startswith(below) for entry in mounting.mount_table()):
        raise MountError(f"{printable(path)}: cannot be removed, something is mounted in it")
    assert shutil.rmtree.avoids_symlink_attacks
    shutil.rmtree(path)


@contextlib.contextmanager
def _locked(directory: bytes) -> Iterator[None]:
    fd = os.open(directory, _OPEN_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def claimed(place: Place) -> Iterator[None]:
    """Hold the upperdir for this mount alone.  Raises MountError: another mount has it."""
    try:
        fd = os.open(place.upperdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(f"upperdir {printable(place.upperdir)}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MountError(f"upperdir {printable(place.upperdir)} is in use by another mount") from None
        yield
    finally:
        os.close(fd)


def check_note(place: Place, identity: str) -> bool:
    """Refuse an upperdir whose changes were made over another image.

    Precondition: the place is claimed.

    Returns:
        Whether the upperdir is new: nothing was ever changed in it.

    Raises:
        MountError: it was another image.
    """
    note = None if place.note is None else _read_note(place.note)
    if note is None:
        return not os.listdir(place.upperdir)
    if note.get("identity") != identity:
        raise MountError(
            f"the changes in {printable(place.upperdir)} were made over another image "
            f"({printable(str(note.get('identity'))[:200])}, this is {identity}); "
            "choose another --upper, or remove them"
        )
    return False


@dataclass(frozen=True, slots=True)
class Note:
    """Over which image the changes in an upperdir were made: its file, and the identity of what was in it then."""

    image: str
    identity: str


def identity_of(image: "Image") -> str:
    """What a note remembers of an image: not its place or name, but what is in it."""
    if image.layers:
        return image.layers[-1].chain_id
    return f"directory {printable(os.path.realpath(image.path))}"


def note_of(upperdir: bytes) -> Note | None:
    """The note about an upperdir, where one was written (see `noted`, `kept_for`)."""
    path = os.path.realpath(upperdir)
    places = [path + b".image.json"]
    if os.path.basename(path) == b"upper":
        places.append(os.path.join(os.path.dirname(path), b"image.json"))
    for place in places:
        found = _read_note(place)
        if found is not None:
            image, identity = found.get("image"), found.get("identity")
            if not isinstance(image, str) or not isinstance(identity, str):
                raise MountError(f"{printable(place)}: should name an image and its identity")
            return Note(image, identity)
    return None


def _read_note(path: bytes) -> dict[str, object] | None:
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW)) as file:
            found = json.loads(file.read(_MAX_NOTE_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise MountError(f"{printable(path)}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise MountError(f"{printable(path)}: should be a JSON object")
    return found


def write_note(place: Place, image: str, identity: str) -> None:
    """Remember over which image the changes are made."""
    if place.note is None:
        return
    temp = place.note + b".tmp"
    try:
        with open(temp, "w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump({"image": image, "identity": identity}, file, indent=1)
            file.write("\n")
        os.rename(temp, place.note)
    except OSError as error:
        # The note is a guard against mistakes; an upperdir in a directory where we may not write works without it.
        log.warning("%s: %s", printable(place.note), error.strerror)
