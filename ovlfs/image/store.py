"""What is kept between mounts, where, and who may touch it?

A content-addressed store, by default `$XDG_DATA_HOME/ovlfs` (root: /var/lib/ovlfs; `OVLFS_STORE` overrides):

    layers/sha256/<diff_id>.tar              a decompressed layer
    archives/sha256/<digest>.tar             a decompressed image archive, by the digest of the compressed file
    index/<version>/<dialect>/sha256/<diff_id>.idx   the index of a layer, and its sha256 behind it
    verified/<dev>-<ino>-<what>              which content a file had when it had which identity
    locks/<what>                             empty files to flock
    tmp/                                     what is being written

The rules: the store belongs to the user who runs ovlfs and nobody else can write to it, and neither can a file in
it belong to somebody else (a poisoned index would serve the poisoner's files).  A file appears under its name only
when it is complete and on disk (temp, fsync, rename; no fsync where a reader can tell that it is torn).  A temp's
writer holds its flock, so a temp without a holder is what a crash left, and goes at the next start.  Losing the store
loses time only.

Lock order: `build` (build/cache.py) before a blob's lock (`lock`) before a temp's; nobody holds two blob locks.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import mmap
import os
import pwd
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ovlfs.errors import ImageError
from ovlfs.image.digest import split_digest
from ovlfs.image.files import FileIdentity, shown

ENVIRONMENT = "OVLFS_STORE"

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_INDEX_AT = 1 << 16
"""Where the index begins in its file, whatever the size of a page is; before it stands its digest."""


def default_path() -> bytes:
    """Where this user's store is."""
    chosen = os.environb.get(ENVIRONMENT.encode())
    if chosen:
        return chosen
    if os.geteuid() == 0 and os.access(b"/var/lib", os.W_OK):  # not so for the root of somebody's user namespace
        return b"/var/lib/ovlfs"
    data = os.environb.get(b"XDG_DATA_HOME", b"")
    if not data.startswith(b"/"):  # relative: to be ignored (XDG base directory specification)
        home = os.environb.get(b"HOME") or os.fsencode(pwd.getpwuid(os.geteuid()).pw_dir)
        data = home + b"/.local/share"
    return data + b"/ovlfs"


@dataclass(slots=True)
class Temp:
    """A file being written.  `commit` gives it its name; without that it is removed with its `with` block."""

    fd: int
    name: bytes
    target: bytes
    committed: bool = False


class Store:
    """A store that exists, is ours and is ours alone.  Safe to use from several threads."""

    def __init__(self, path: bytes | None = None) -> None:
        """Open the store at `path` (default: `default_path()`), make it if need be, and sweep what crashes left."""
        self.path = os.path.abspath(path if path is not None else default_path())
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            self._check_root()
            for name in (b"tmp", b"locks", b"verified"):
                self._make_directory(name)
            self._sweep()
        except OSError as error:
            raise self._error("cannot be used", error) from error

    def _error(self, what: str, error: OSError) -> ImageError:
        return ImageError(f"store {shown(self.path)}: {what}: {os.strerror(error.errno or 0)}")

    def _check_root(self) -> None:
        found = os.stat(self.path)
        if found.st_uid != os.geteuid():
            raise ImageError(
                f"store {shown(self.path)}: belongs to uid {found.st_uid}, not to uid {os.geteuid()} who runs ovlfs"
            )
        if found.st_mode & 0o022:
            raise ImageError(
                f"store {shown(self.path)}: others can write to it (mode {stat.S_IMODE(found.st_mode):04o}); "
                "should be 0700"
            )
        if found.st_mode & 0o077:
            os.chmod(self.path, 0o700)

    def _full(self, name: bytes) -> bytes:
        return self.path + b"/" + name

    def _make_directory(self, name: bytes) -> None:
        os.makedirs(self._full(name), mode=0o700, exist_ok=True)

    # -- names

    @staticmethod
    def _blob_name(kind: bytes, digest: str, suffix: bytes) -> bytes:
        algorithm, encoded = split_digest(digest)
        return b"/".join((kind, algorithm.encode(), encoded.encode() + suffix))

    def layer_name(self, diff_id: str) -> bytes:
        """The decompressed layer's name in the store."""
        return self._blob_name(b"layers", diff_id, b".tar")

    def archive_name(self, digest: str) -> bytes:
        """The decompressed archive's name in the store; `digest` is that of the compressed file."""
        return self._blob_name(b"archives", digest, b".tar")

    def index_name(self, diff_id: str, version: str, dialect: str) -> bytes:
        """The layer index's name in the store."""
        return self._blob_name(f"index/{version}/{dialect}".encode(), diff_id, b".idx")

    def full_path(self, name: bytes) -> bytes:
        """The path of a name in the store."""
        return self._full(name)

    # -- files

    def open(self, name: bytes) -> int | None:
        """A descriptor of a file in the store, None if there is none; ImageError if it is not ours."""
        try:
            fd = os.open(self._full(name), _READ)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error(f"{shown(name)} cannot be opened", error) from error
        found = os.fstat(fd)
        problem = None
        if not stat.S_ISREG(found.st_mode):
            problem = "should be a regular file"
        elif found.st_uid != os.geteuid():
            problem = f"belongs to uid {found.st_uid}, not to uid {os.geteuid()} who runs ovlfs"
        elif found.st_mode & 0o022:
            problem = f"can be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
        if problem is not None:
            os.close(fd)
            raise ImageError(f"store {shown(self.path)}: {shown(name)} {problem}; remove it")
        return fd

    @contextlib.contextmanager
    def create(self, name: bytes) -> Iterator[Temp]:
        """A new file that will be called `name` once `commit`ted, and is gone if the block ends without that."""
        try:
            temp = self._new_temp(name)
        except OSError as error:
            raise self._error("cannot be written to", error) from error
        try:
            yield temp
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}:
                raise self._error(f"{shown(name)} cannot be written", error) from error
            raise
        finally:
            if not temp.committed:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._full(temp.name))
            os.close(temp.fd)

    def _new_temp(self, target: bytes) -> Temp:
        while True:
            name = b"tmp/" + os.urandom(8).hex().encode()
            fd = os.open(self._full(name), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return Temp(fd, name, target)
            os.close(fd)  # a sweep took it between open and flock

    def commit(self, temp: Temp, *, durable: bool = True) -> None:
        """Put a finished temp in its place, whatever was there.

        Not `durable`: the reader can tell a torn file from a whole one, so a crash may tear it.
        """
        try:
            if durable:
                os.fsync(temp.fd)
            directory = os.path.dirname(temp.target)
            self._make_directory(directory)
            os.rename(self._full(temp.name), self._full(temp.target))
            temp.committed = True
            if durable:
                _sync_directory(self._full(directory))
        except OSError as error:
            raise self._error(f"{shown(temp.target)} cannot be written", error) from error

    def remove(self, name: bytes) -> None:
        """Forget a file of the store that turned out to be damaged."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._full(name))

    def remove_layer(self, diff_id: str) -> int:
        """Forget a decompressed layer and its indexes; how many bytes they had.  Who has them open keeps them."""
        indexes = glob.glob(self._blob_name(b"index/*/*", diff_id, b".idx"), root_dir=self.path)
        removed = 0
        for name in (*indexes, self.layer_name(diff_id)):
            with contextlib.suppress(FileNotFoundError):
                size = os.stat(self._full(name)).st_size
                os.unlink(self._full(name))
                removed += size
        return removed

    def _sweep(self) -> None:
        """Remove the temps whose writers are gone."""
        for name in os.listdir(self._full(b"tmp")):
            path = self._full(b"tmp/" + name)
            try:
                fd = os.open(path, _READ)
            except OSError:  # its writer finished just now
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            except (BlockingIOError, FileNotFoundError):  # being written, or finished just now
                pass
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def lock(self, what: str, waiting: Callable[[], None] | None = None, *, shared: bool = False) -> Iterator[None]:
        """Hold the lock of one blob or file, so that of several mounts one does the work and the others use it.

        `what` is a checked digest, made of numbers, or a word of ours.  `waiting` is called once if somebody else holds
        the lock.  `shared`: others who want it so may hold it, too.
        """
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        name = b"locks/" + what.replace(":", "-").encode()
        try:
            fd = os.open(self._full(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise self._error(f"{shown(name)} cannot be opened", error) from error
        try:
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is not None:
                    waiting()
                fcntl.flock(fd, kind)
            yield
        finally:
            os.close(fd)

    # -- indexes

    def load_index(self, name: bytes) -> mmap.mmap | None:
        """An index, or None if there is none or it is damaged.

        It is mapped, not read: the pages are the kernel's to keep or to drop, and all mounts share them.  A file of the
        store is never changed nor cut short, only replaced.
        """
        fd = self.open(name)
        if fd is None:
            return None
        with os.fdopen(fd, "rb") as file:
            size = os.fstat(file.fileno()).st_size - _INDEX_AT
            if size <= 0:
                self.remove(name)
                return None
            digest = file.read(hashlib.sha256().digest_size)
            mapped = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ, offset=_INDEX_AT)
        if hashlib.sha256(mapped).digest() != digest:
            mapped.close()
            self.remove(name)
            return None
        mapped.madvise(mmap.MADV_DONTNEED)  # from our memory, not from the page cache
        return mapped

    def save_index(self, name: bytes, image: "bytes | mmap.mmap") -> None:
        """Keep an index."""
        with self.create(name) as temp:
            write_all(temp.fd, hashlib.sha256(image).digest())
            os.lseek(temp.fd, _INDEX_AT, os.SEEK_SET)
            write_all(temp.fd, image)
            self.commit(temp, durable=False)

    # -- what files had which content

    def recall(self, what: str, identity: FileIdentity) -> str | None:
        """What `remember` was told about `what` of the file that still has `identity`, else None."""
        fd = self.open(self._verified_name(what, identity))
        if fd is None:
            return None
        with os.fdopen(fd, "rb") as file:
            words = file.read(4096).decode("ascii", "replace").split()
        if words[:-1] != self._fact(identity):
            return None
        return words[-1]

    def remember(self, what: str, identity: FileIdentity, value: str) -> None:
        """Keep `value` (one word) for `what` of the file with `identity`."""
        with self.create(self._verified_name(what, identity)) as temp:
            write_all(temp.fd, " ".join([*self._fact(identity), value]).encode())
            self.commit(temp, durable=False)

    @staticmethod
    def _verified_name(what: str, identity: FileIdentity) -> bytes:
        return f"verified/{identity.dev:x}-{identity.ino:x}-{what}".encode()

    @staticmethod
    def _fact(identity: FileIdentity) -> list[str]:
        return ["ovlfs-verified-1", str(identity.size), str(identity.mtime_ns), str(identity.ctime_ns)]


def write_all(fd: int, raw: bytes | memoryview | mmap.mmap) -> None:
    """Write all of `raw` at the descriptor's position."""
    view = memoryview(raw)
    while view:
        view = view[os.write(fd, view) :]


def _sync_directory(path: bytes) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
