"""How does a layer of an image become something that answers questions?

A layer that lies uncompressed in an uncompressed file is used where it lies: nothing is copied.  A compressed one is
decompressed once into the store.  Either way no byte is served before the sha256 of the whole tar equals its diff_id
(and, where a manifest names it, that of the stored bytes its digest), and before the index exists; hashing,
decompressing, writing and scanning are one pass.  What was verified is remembered with the file's identity, so a
second mount reads only the index; any change of the file means verifying again.

Several processes, and several threads of one, may open the same layer: the first does the work under the blob's lock,
the others wait and use it.

While mounted: `ImageLayer.check` tells whether the file still has the content that was verified.  It is called for
every `extents`, that is when a file is opened; a reader that gets fewer bytes than an extent has must answer EIO.

Spec: image-spec layer.md, config.md "Layer DiffID".
"""

import contextlib
import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from mmap import mmap
from typing import TYPE_CHECKING, Self

from ovlfs import _native
from ovlfs.errors import ImageError, LayerError, printable
from ovlfs.image.blob import decompress, output_limit, read_range, sniff
from ovlfs.image.digest import hasher, split_digest
from ovlfs.image.files import FileIdentity, Where, read_exactly
from ovlfs.image.form import WHOLE, Progress, is_verified, range_fact
from ovlfs.image.image import Image, LayerBlob
from ovlfs.image.store import Store, write_all
from ovlfs.layer.base import Extent, Ref
from ovlfs.layer.tar import TarLayer, layer_error, scan

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

Index = bytes | mmap
"""The image of an index, in memory or mapped."""

INDEX_VERSION = "1"
"""Part of an index's name in the store: another version of the scanner or of the format makes another index."""

_PARALLEL_FROM = 4 << 20
"""Bytes from which hashing in a second thread pays."""
_QUEUED = 4
"""Chunks that may wait for that thread."""


class ImageLayer(TarLayer):
    """A layer of an image, and the file that it was verified in.  `blob` is what the image says of it."""

    def __init__(self, index: "Index", source: "_Range", *, layer: LayerBlob, number: int) -> None:
        """Takes ownership of the descriptor of `source`, whose bytes are verified."""
        super().__init__(index, source.fd, base_offset=source.offset, layer_number=number)
        self._source = source
        self.blob = layer
        self.where = layer.blob.where

    def close(self) -> None:
        """Close the file, and let go of the index, which may be mapped.  Nothing may be asked afterwards."""
        os.close(self._source.fd)
        del self.index

    def check(self) -> None:
        """Raise OSError (EIO) if the file was changed or truncated since it was verified.

        Costs one fstat.  A file that was renamed, linked or unlinked meanwhile is unchanged; one that has a new mtime
        and its old size is hashed again, so `touch` does not break a mount.
        """
        now = FileIdentity.of(self._source.fd)
        if self._source.identity.same_content(now):
            return
        if now.size == self._source.identity.size and self._still_verified(now):
            self._source.identity = now
            return
        raise OSError(errno.EIO, f"{self.where}: the file was changed while it was mounted")

    def identity(self) -> tuple[int, int, int, int]:
        """See TarLayer: of the file as it was verified."""
        verified = self._source.identity
        return verified.dev, verified.ino, verified.size, verified.mtime_ns

    def _still_verified(self, now: FileIdentity) -> bool:
        source = self._source
        try:
            with _Hashing(self.blob.diff_id, source.length) as hashing:
                for chunk in read_range(source.fd, source.offset, source.length, self.where):
                    hashing.update(chunk)
                hashing.check(self.where, "the layer")
        except ImageError:
            return False
        return FileIdentity.of(source.fd) == now

    def extents(self, ref: Ref) -> tuple[int, list[Extent]]:
        """See Layer; EIO if the file is no longer the one that was verified."""
        self.check()
        return super().extents(ref)


def open_layer(layer: LayerBlob, store: Store, *, number: int, progress: Progress | None = None) -> ImageLayer:
    """The layer, verified and indexed.

    Raises ImageError (LayerError for a broken tar), with nothing left in the store.
    """
    blob = layer.blob
    if blob.inline is None:
        fd = blob.open()
        with _closing(fd) as keep:
            if not sniff(read_exactly(fd, blob.offset, min(6, blob.size), blob.where)):
                _check_plain_digest(layer)
                identity = blob.identity or FileIdentity.of(fd)
                source = _Range(fd, identity, blob.offset, blob.size, range_fact(blob.offset, blob.size))
                opened = _open_range(layer, source, store, number, progress)
                keep()
                return opened
    name = store.layer_name(layer.diff_id)
    if not is_verified(store, name, layer.diff_id):
        with store.lock(layer.diff_id, _waiting(layer, progress)):
            if not is_verified(store, name, layer.diff_id):
                _unpack(layer, name, store, progress)
    found = store.open(name)
    if found is None:
        raise ImageError(f"store: {printable(name)} was removed while it was being opened")
    with _closing(found) as keep:
        identity = FileIdentity.of(found)
        source = _Range(found, identity, 0, identity.size, WHOLE)
        opened = _open_range(layer, source, store, number, progress)
        keep()
        return opened


def open_layers(image: Image, store: Store, *, progress: Progress | None = None) -> list[ImageLayer]:
    """All layers of an image, bottom first, opened on all processors.  Raises what open_layer raises."""
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="open-layer") as pool:
        futures = [
            pool.submit(open_layer, layer, store, number=number, progress=progress)
            for number, layer in enumerate(image.layers)
        ]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            future.cancel()  # without effect unless one failed
    finished = [future for future in futures if not future.cancelled()]
    failures = [error for error in (future.exception() for future in finished) if error is not None]
    if not failures:
        return [future.result() for future in finished]
    for future in finished:
        if future.exception() is None:
            future.result().close()
    try:
        raise failures[0]
    finally:
        # Else the error's traceback and this frame hold each other, and with them what the failed thread had mapped.
        del failures, finished, futures, future


class _Range:
    """The bytes of an uncompressed layer in an open file.  `fact` is what the store remembers of them."""

    def __init__(self, fd: int, identity: FileIdentity, offset: int, length: int, fact: str) -> None:
        self.fd = fd
        self.identity = identity
        self.offset = offset
        self.length = length
        self.fact = fact


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[Callable[[], None]]:
    """Close `fd` at the end of the block, unless the function it gives was called."""
    kept = False

    def keep() -> None:
        nonlocal kept
        kept = True

    try:
        yield keep
    finally:
        if not kept:
            os.close(fd)


def _waiting(layer: LayerBlob, progress: Progress | None) -> Callable[[], None]:
    def tell() -> None:
        if progress is not None:
            progress(f"waiting for another process to prepare {layer.blob.where}", 0, layer.size)

    return tell


def _check_plain_digest(layer: LayerBlob) -> None:
    """Digest and diff_id of a layer that is stored uncompressed are of the same bytes."""
    digest = layer.digest
    if digest is None:
        return
    (algorithm, encoded), (plain_algorithm, plain_encoded) = split_digest(digest), split_digest(layer.diff_id)
    if algorithm == plain_algorithm and encoded != plain_encoded:
        raise ImageError(
            f"{layer.blob.where}: is stored uncompressed, so its digest {digest} should be its diff_id {layer.diff_id}"
        )


def _open_range(layer: LayerBlob, source: _Range, store: Store, number: int, progress: Progress | None) -> ImageLayer:
    name = store.index_name(layer.diff_id, INDEX_VERSION, "layer" if layer.whiteouts else "rootfs")
    where = layer.blob.where
    known = store.recall(source.fact, source.identity) == layer.diff_id
    index: Index | None = store.load_index(name) if known else None
    if index is None:
        with store.lock(layer.diff_id, _waiting(layer, progress)):
            known = store.recall(source.fact, source.identity) == layer.diff_id
            index = store.load_index(name)
            if not known:
                index = _verify(layer, source, index, progress)
                store.save_index(name, index)
                if source.identity.settled():
                    store.remember(source.fact, source.identity, layer.diff_id)
            elif index is None:
                index = scan(source.fd, source.offset, source.length, whiteouts=layer.whiteouts, where=where)
                store.save_index(name, index)
    try:
        return ImageLayer(index, source, layer=layer, number=number)
    except OSError as error:
        if error.errno != errno.EUCLEAN:
            raise
    # An index that its own checksum confirms, of a format that this scanner no longer reads.
    index = scan(source.fd, source.offset, source.length, whiteouts=layer.whiteouts, where=where)
    store.save_index(name, index)
    return ImageLayer(index, source, layer=layer, number=number)


def _verify(layer: LayerBlob, source: _Range, index: "Index | None", progress: Progress | None) -> "Index":
    """Hash the layer where it lies and scan it in the same pass, unless it has an `index` already."""
    where = layer.blob.where
    scanning = _Scanning(layer.whiteouts, where) if index is None else None
    expected = list(dict.fromkeys((layer.diff_id, layer.digest or layer.diff_id)))
    done = 0
    with contextlib.ExitStack() as stack:
        hashing = [stack.enter_context(_Hashing(digest, source.length)) for digest in expected]
        for chunk in read_range(source.fd, source.offset, source.length, where):
            for one in hashing:
                one.update(chunk)
            if scanning is not None:
                scanning.feed(chunk)
            done += len(chunk)
            if progress is not None:
                progress(f"verifying {where}", done, source.length)
        for one in hashing:
            one.check(where, "the layer")
    if FileIdentity.of(source.fd) != source.identity:
        raise ImageError(f"{where}: the file changed while it was being read")
    if index is not None:
        return index
    assert scanning is not None
    return scanning.finish()


def _unpack(layer: LayerBlob, name: bytes, store: Store, progress: Progress | None) -> None:
    """Decompress a layer into the store: hash what is stored and what comes out, and scan, in one pass.

    Preconditions: the blob's lock is held.
    """
    blob = layer.blob
    where = blob.where
    index_name = store.index_name(layer.diff_id, INDEX_VERSION, "layer" if layer.whiteouts else "rootfs")
    scanning = _Scanning(layer.whiteouts, where) if store.load_index(index_name) is None else None
    done = 0
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(_Hashing(layer.digest, blob.size)) if layer.digest else None
        plain = stack.enter_context(_Hashing(layer.diff_id, blob.size))

        def chunks() -> Iterator[bytes]:
            nonlocal done
            for chunk in blob.chunks():
                if raw is not None:
                    raw.update(chunk)
                yield chunk
                done += len(chunk)
                if progress is not None:
                    progress(f"decompressing {where}", done, blob.size)

        stored = chunks()
        first = next(stored, b"")
        temp = stack.enter_context(store.create(name))
        for piece in decompress(_joined(first, stored), sniff(first), where, output_limit(blob.size)):
            plain.update(piece)
            if scanning is not None:
                scanning.feed(piece)
            write_all(temp.fd, piece)
        if raw is not None:
            raw.check(where, "the stored layer")
        plain.check(where, "the uncompressed layer")
        index = scanning.finish() if scanning is not None else None
        store.commit(temp)
        store.remember(WHOLE, FileIdentity.of(temp.fd), layer.diff_id)
    if index is not None:
        store.save_index(index_name, index)


def _joined(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest


class _Scanning:
    """A tar scanner that keeps its error until the digests are checked: of a wrong layer, that is what to say."""

    def __init__(self, whiteouts: bool, where: Where) -> None:
        self._scanner = _native.TarScanner(whiteouts=whiteouts)
        self._where = where
        self._error: LayerError | None = None

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the tar."""
        if self._error is None:
            try:
                self._scanner.feed(chunk)
            except _native.TarError as error:
                self._error = layer_error(self._where, error)

    def finish(self) -> bytes:
        """The index image, or the LayerError."""
        if self._error is not None:
            raise self._error
        try:
            return self._scanner.finish()
        except _native.TarError as error:
            raise layer_error(self._where, error) from error


class _Hashing:
    """A hash that is computed in a thread of its own, where that pays: hashlib works without the GIL."""

    def __init__(self, expected: str, size: int) -> None:
        self._expected = expected
        self._hash: Hash = hasher(expected)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hash") if size >= _PARALLEL_FROM else None
        self._queue: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def update(self, chunk: bytes) -> None:
        """The next bytes, in order: the pool has one thread."""
        if self._pool is None:
            self._hash.update(chunk)
            return
        if len(self._queue) >= _QUEUED:
            self._queue.popleft().result()
        self._queue.append(self._pool.submit(self._hash.update, chunk))

    def check(self, where: Where, what: str) -> None:
        """Raise ImageError unless the bytes had the expected digest."""
        while self._queue:
            self._queue.popleft().result()
        algorithm, encoded = split_digest(self._expected)
        computed = self._hash.hexdigest()
        if computed != encoded:
            raise ImageError(f"{where}: {what} has {algorithm} digest {computed}, but {encoded} is named")
