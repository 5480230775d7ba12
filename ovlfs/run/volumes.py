"""What is mounted at the paths that an image calls volumes?

A fresh directory, which starts with what the image has there (files, owners, modes, links: `cp -a`), so that what is
written to a volume is no change of the image, and a read-only root can still write there.  It lives as long as the
changes do: next to a kept upperdir, or with an ephemeral run.  What the user mounts at the same path (-v) takes its
place.

Paths come from the image, so `/../../etc` and links are followed inside the root only (CVE-2022-23648).

Source: image-spec config.md (Volumes); docker's anonymous volumes.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess

from ovlfs.errors import ImageError, printable
from ovlfs.image.config import Config
from ovlfs.layer import sys
from ovlfs.run import inside
from ovlfs.run.namespaces import Mapping
from ovlfs.run.spec import Bind

_NAME_DIGITS = 32


def image_volumes(
    config: Config, rootfd: int, base: bytes, mapping: Mapping, taken: tuple[bytes, ...] = ()
) -> tuple[Bind, ...]:
    """The volumes of an image as directories below `base`, filled when they are made.

    Args:
        config: the image's.
        rootfd: the mounted root, from inside.open_root().
        base: a directory of ours; made if it is wanted and not there.
        mapping: which owners a file can have here.
        taken: where the user mounts something else.

    Raises:
        ImageError: a volume's path makes no sense, or its content cannot be copied.
    """
    found: dict[bytes, Bind] = {}
    names = {inside.lexical(path) for path in taken}
    for text in config.volumes:
        path = text.encode("utf-8", "surrogateescape")
        if inside.lexical(path) in names:
            continue
        place = inside.find(rootfd, path, make="directory")
        try:
            if not place.path:
                raise ImageError(f"volume {printable(text[:200])}: is the root itself")
            if place.path not in found:
                found[place.path] = Bind(_filled(rootfd, place.path, base, mapping), place.absolute)
        finally:
            inside.remove_stubs(rootfd, place.stubs)
    return tuple(found.values())


def _filled(rootfd: int, path: bytes, base: bytes, mapping: Mapping) -> bytes:
    """The directory of the volume at `path`.  It has its name only once it is complete."""
    directory = base + b"/" + hashlib.sha256(path).hexdigest()[:_NAME_DIGITS].encode()
    if os.path.isdir(directory):
        return directory
    with contextlib.suppress(FileExistsError):
        os.mkdir(base, 0o700)
    temp = directory + b".tmp"
    if os.path.lexists(temp):
        shutil.rmtree(temp)
    os.mkdir(temp, 0o755)
    try:
        _copy(rootfd, path, temp, mapping)
        os.rename(temp, directory)
    except BaseException:
        shutil.rmtree(temp)
        raise
    return directory


def _copy(rootfd: int, path: bytes, target: bytes, mapping: Mapping) -> None:
    # With the user as the only one, everything can only be the user's.
    words = ["cp", "-a", *([] if mapping.set_groups else ["--no-preserve=ownership"]), "-T", "--"]
    fd = sys.open_beneath(rootfd, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        result = subprocess.run(
            [*words, f"/proc/self/fd/{fd}/.", target],
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    finally:
        os.close(fd)
    if result.returncode != 0:
        said = result.stderr.decode(errors="replace").strip().splitlines() or [f"cp ended with {result.returncode}"]
        raise ImageError(f"volume /{printable(path)}: {printable(said[0][:300])}")
