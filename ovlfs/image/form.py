"""What is this file or directory: which of the forms an image can have?

Told by content, never by name: `docker save -o x.tar.gz` writes a plain tar.  A directory is known by the files its
form requires; a file by its magic (gzip, zstd, xz, bzip2, tar) and then by the members at the root of the tar.
manifest.json alone makes a docker-archive, `oci-layout` an OCI archive, `repositories` with `<id>/json` an archive of
docker before 1.10; any other tar is the root file system itself.  A tar that has usr/, etc/ or bin is a root file
system even if it has a manifest.json: programs do keep such files in `/`, and image archives have no such
directories.

Stores of other tools that cannot be read yet are recognised too, so that nobody mounts /var/lib/docker by mistake
as if it were a root file system.

Spec: image-spec image-layout.md; moby image/tarexport; containers/image docker/archive, directory.
"""

import contextlib
import enum
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ovlfs.errors import ImageError
from ovlfs.ids import DiffId, Digest
from ovlfs.image.archive import Member, MemberTable, looks_like_tar, read_members
from ovlfs.image.blob import Blob, decompress, output_limit, read_range, sniff
from ovlfs.image.files import FileIdentity, Where, clean_name, open_file, read_exactly, shown
from ovlfs.image.store import Store, write_all

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes done and the bytes in all.  From several threads, if layers are opened
in parallel."""


class Form(enum.Enum):
    """The forms that can be mounted."""

    DOCKER_ARCHIVE = "docker-archive"
    DOCKER_LEGACY = "docker-archive of docker before 1.10"
    OCI_ARCHIVE = "oci-archive"
    OCI_LAYOUT = "oci-layout"
    SKOPEO_DIR = "skopeo dir"
    ROOTFS_TAR = "rootfs tar"
    DIRECTORY = "directory"


class Files(Protocol):
    """The files of an image by name, wherever they are."""

    @property
    def where(self) -> Where:
        """What messages call the image."""

    def has(self, name: bytes) -> bool:
        """Whether there is anything called `name`."""

    def blob(self, name: bytes, digest: Digest | None = None) -> Blob:
        """The regular file `name`; ImageError if there is none."""


@dataclass(frozen=True, slots=True)
class DirectoryFiles:
    """Files below a directory."""

    where: Where
    root: bytes

    def has(self, name: bytes) -> bool:
        """See Files."""
        return os.path.lexists(self.root + b"/" + name)

    def blob(self, name: bytes, digest: Digest | None = None) -> Blob:
        """See Files."""
        where = f"{self.where}: {shown(name)}"
        parts = tuple(clean_name(name).split(b"/"))
        fd = open_file(self.root, parts, where)
        try:
            identity = FileIdentity.of(fd)
        finally:
            os.close(fd)
        return Blob(where, self.root, parts, 0, identity.size, digest, identity)


@dataclass(frozen=True, slots=True)
class ArchiveFiles:
    """Members of a tar.  `path` is the tar, decompressed; `where` calls it what the user called it."""

    where: Where
    path: bytes
    identity: FileIdentity
    table: MemberTable

    def has(self, name: bytes) -> bool:
        """See Files."""
        return name in self.table.members

    def member(self, name: bytes) -> Member:
        """The member behind `name`, one link followed."""
        return self.table.find(name, self.where)

    def blob(self, name: bytes, digest: Digest | None = None) -> Blob:
        """See Files."""
        member = self.member(name)
        where = f"{self.where}: {shown(clean_name(name))}"
        return Blob(where, self.path, (), member.offset, member.length, digest, self.identity)

    def whole(self) -> Blob:
        """The tar itself."""
        return Blob(self.where, self.path, (), 0, self.identity.size, None, self.identity)


@dataclass(frozen=True, slots=True)
class Recognised:
    """A form, and the means to read it.  `diff_id` is the digest of a rootfs tar, where it is known already."""

    form: Form
    compression: str = ""
    archive: ArchiveFiles | None = None
    directory: DirectoryFiles | None = None
    diff_id: DiffId | None = None
    has_oci: bool = False

    @property
    def files(self) -> Files:
        """Whichever there is."""
        found = self.archive or self.directory
        assert found is not None
        return found


def recognise(path: bytes, store: Callable[[], Store], progress: Progress | None = None) -> Recognised:
    """The form of what is at `path`; `store` is asked for only if the file is compressed.

    Raises ImageError: unreadable, not an image, damaged, or a form that is not supported yet.
    """
    where = shown(path)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ImageError(f"{where}: {os.strerror(error.errno or 0)}") from error
    full = os.path.abspath(path)
    if stat.S_ISDIR(mode):
        return _recognise_directory(full, where)
    fd = open_file(full, (), where)
    try:
        identity = FileIdentity.of(fd)
        compression = sniff(read_exactly(fd, 0, min(6, identity.size), where))
        diff_id = None
        if compression:
            full, diff_id = unpack_archive(fd, identity, compression, store(), where, progress)
            unpacked = open_file(full, (), where)
            os.close(fd)
            fd = unpacked
            identity = FileIdentity.of(fd)
        first = read_exactly(fd, 0, min(512, identity.size), where)
        if not looks_like_tar(first):
            within = f" {compression} of" if compression else ""
            raise ImageError(f"{where}: is no image:{within} neither a tar nor a compressed tar")
        table = read_members(fd, identity.size, where)
    finally:
        os.close(fd)
    files = ArchiveFiles(where, full, identity, table)
    form, has_oci = _archive_form(table)
    return Recognised(form, compression, archive=files, diff_id=diff_id, has_oci=has_oci)


def _archive_form(table: MemberTable) -> tuple[Form, bool]:
    names = table.members
    if not table.complete:
        return Form.ROOTFS_TAR, False
    has_oci = b"index.json" in names and (
        b"oci-layout" in names or any(name.startswith(b"blobs/sha256/") for name in names)
    )
    if b"manifest.json" in names:
        return Form.DOCKER_ARCHIVE, has_oci
    if has_oci or b"oci-layout" in names:
        return Form.OCI_ARCHIVE, True
    if b"repositories" in names and any(name.endswith(b"/json") for name in names):
        return Form.DOCKER_LEGACY, False
    return Form.ROOTFS_TAR, False


def _recognise_directory(path: bytes, where: Where) -> Recognised:
    files = DirectoryFiles(where, path)
    if files.has(b"index.json") and (files.has(b"oci-layout") or files.has(b"blobs/sha256")):
        return Recognised(Form.OCI_LAYOUT, directory=files, has_oci=True)
    if files.has(b"manifest.json") and files.has(b"version"):
        with contextlib.suppress(ImageError):
            if files.blob(b"version").read(4096).startswith(b"Directory Transport Version:"):
                return Recognised(Form.SKOPEO_DIR, directory=files, has_oci=True)
    store = _store_of_others(files)
    if store:
        raise ImageError(
            f"{where}: is {store}, which is not supported yet; save the image to a file first "
            "(docker save, skopeo copy, ctr images export, podman save)"
        )
    return Recognised(Form.DIRECTORY, directory=files)


def _store_of_others(files: DirectoryFiles) -> str:
    if files.has(b"docker/registry/v2") or (files.has(b"blobs") and files.has(b"repositories")):
        return "the storage of a registry"
    for driver in (b"overlay2", b"vfs", b"fuse-overlayfs", b"btrfs", b"zfs", b"aufs", b"devicemapper"):
        if files.has(b"image/" + driver + b"/imagedb") or files.has(b"image/" + driver + b"/layerdb"):
            return "the data root of docker"
    if files.has(b"io.containerd.content.v1.content"):
        return "the root of containerd"
    for driver in (b"overlay", b"vfs", b"btrfs"):
        if files.has(driver + b"-layers") and files.has(driver + b"-images"):
            return "a containers-storage (podman, buildah, CRI-O)"
    return ""


def unpack_archive(
    fd: int, identity: FileIdentity, compression: str, store: Store, where: Where, progress: Progress | None
) -> tuple[bytes, DiffId]:
    """The path in the store of the decompressed file, and the digest of its content.

    Done once: as long as the file's identity stays, neither is it read again.
    """
    what = "unpacked"

    def known() -> tuple[bytes, DiffId] | None:
        fact = store.recall(what, identity)
        if fact is None:
            return None
        digest, _, plain = fact.partition(",")
        name = store.archive_name(digest)
        return (store.full_path(name), DiffId(Digest(plain))) if is_verified(store, name, plain) else None

    found = known()
    if found is not None:
        return found
    with store.lock(f"file-{identity.dev:x}-{identity.ino:x}"):
        found = known()
        if found is not None:
            return found
        raw_hash, plain_hash = hashlib.sha256(), hashlib.sha256()
        done = 0

        def chunks() -> Iterator[bytes]:
            nonlocal done
            for chunk in read_range(fd, 0, identity.size, where):
                raw_hash.update(chunk)
                yield chunk
                done += len(chunk)
                if progress is not None:
                    progress(f"decompressing {where}", done, identity.size)

        with store.create(b"archives/unnamed") as temp:
            for plain in decompress(chunks(), compression, where, output_limit(identity.size)):
                plain_hash.update(plain)
                write_all(temp.fd, plain)
            if FileIdentity.of(fd) != identity:
                raise ImageError(f"{where}: the file changed while it was being read")
            digest, diff_id = "sha256:" + raw_hash.hexdigest(), "sha256:" + plain_hash.hexdigest()
            name = store.archive_name(digest)
            if not is_verified(store, name, diff_id):  # another copy of the same file was here before
                temp.target = name
                store.commit(temp)
                kept = FileIdentity.of(temp.fd)
                store.remember(WHOLE, kept, diff_id)
                store.remember(range_fact(0, kept.size), kept, diff_id)
        if identity.settled():
            store.remember(what, identity, f"{digest},{diff_id}")
        return store.full_path(name), DiffId(Digest(diff_id))


WHOLE = "whole"
"""What the store remembers of its own files: the digest of the whole."""


def range_fact(offset: int, size: int) -> str:
    """What the store remembers of a range of any file: its digest."""
    return f"{offset}-{size}"


def is_verified(store: Store, name: bytes, digest: str) -> bool:
    """Whether the store has `name`, and it is still the file whose content had `digest`."""
    fd = store.open(name)
    if fd is None:
        return False
    try:
        return store.recall(WHOLE, FileIdentity.of(fd)) == digest
    finally:
        os.close(fd)
