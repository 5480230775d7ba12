"""Which layer did a step make the last time?

The key of a step is the sha256 of all that its result depends on: the layers below (their ChainID, so their content,
not how they came about), the config so far, the platform, the instruction with its variables replaced, and for COPY and
ADD the digest of what is copied.  The record says when the step was made and which layer it made (its diff_id, None for
none); the layer itself is in the store, where decompressed layers are (`layers/`).  A record whose layer is gone, or
is no longer the file that was verified, counts for nothing.

Records are in the store: `build/sha256/HEX.json`.  A file's mtime says when a build has last used it.  A record that
gives way to one with another layer (--no-cache) is called `HEX-DIFF_ID.json` from then on: no build finds it, but
prune() does, and so its layer is not there for ever.  Losing records loses time only.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ovlfs.errors import ImageError
from ovlfs.ids import ChainId, DiffId
from ovlfs.image.blob import Blob
from ovlfs.image.digest import next_chain_id, parse_digest, split_digest
from ovlfs.image.files import FileIdentity, shown
from ovlfs.image.form import is_verified
from ovlfs.image.image import DOCKER_LAYER, LayerBlob
from ovlfs.image.store import Store, write_all

_VERSION = 1
"""Another version of the builder that makes other layers from the same words must say so here."""
_MAX_RECORD = 1 << 20
_DIRECTORY = b"build/sha256"
_LOCK = "build"
"""Held by builds together, and by prune() alone."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a step made.  `created` as configs have it (RFC 3339); `diff_id` None: no layer."""

    created: str
    diff_id: DiffId | None


@dataclass(frozen=True, slots=True)
class Pruned:
    """How much prune() has removed."""

    steps: int
    layers: int
    size: int


def step_key(*words: Any) -> str:
    """The key of a step that depends on `words` (values for JSON)."""
    return hashlib.sha256(json.dumps([_VERSION, *words], sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _name(key: str) -> bytes:
    return b"%s/%s.json" % (_DIRECTORY, key.encode())


class Cache:
    """The records of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Nothing is pruned during the block: a build needs what it has found and made, also to write the image."""
        with self._store.lock(_LOCK, shared=True):
            yield

    def find(self, key: str) -> Record | None:
        """The record of a step; None: it has to be done."""
        record = self._read(_name(key))
        if record is None:
            return None
        if record.diff_id is not None and not is_verified(
            self._store, self._store.layer_name(record.diff_id), record.diff_id
        ):
            return None
        with contextlib.suppress(FileNotFoundError):  # another build has just given it another layer
            os.utime(self._store.full_path(_name(key)))
        return record

    def _read(self, name: bytes) -> Record | None:
        fd = self._store.open(name)
        if fd is None:
            return None
        with os.fdopen(fd, "rb") as file:
            raw = file.read(_MAX_RECORD)
        try:
            found = json.loads(raw)
            diff_id = found["diff_id"]
            return Record(str(found["created"]), None if diff_id is None else DiffId(parse_digest(diff_id, "cache")))
        except (ValueError, KeyError, TypeError, ImageError):  # torn by a crash: as if it was not there
            return None

    def keep(self, key: str, record: Record) -> None:
        """Remember what a step made."""
        name = _name(key)
        before = self._read(name)
        if before is not None and before.diff_id not in {None, record.diff_id}:
            old = _name(f"{key}-{split_digest(before.diff_id)[1]}")
            with contextlib.suppress(FileNotFoundError):  # another build does the same step
                os.rename(self._store.full_path(name), self._store.full_path(old))
        words = {"created": record.created, "diff_id": record.diff_id}
        with self._store.create(name) as temp:
            write_all(temp.fd, json.dumps(words).encode("utf-8", "surrogatepass"))
            self._store.commit(temp, durable=False)

    def prune(self, unused_since: float, waiting: Callable[[], None]) -> Pruned:
        """Forget the steps that no build has used since then, and the layers that only they have made.

        Args:
            unused_since: in seconds since the epoch.
            waiting: called once if a build is running, whose end is waited for.
        """
        with self._store.lock(_LOCK, waiting):
            old: list[bytes] = []
            unused: set[DiffId] = set()
            used: set[DiffId] = set()
            for name in self._names():
                record = self._read(name)
                is_old = os.stat(self._store.full_path(name)).st_mtime <= unused_since
                if is_old:
                    old.append(name)
                if record is not None and record.diff_id is not None:
                    (unused if is_old else used).add(record.diff_id)
            # Layers first: a record without its layer counts for nothing, a layer without a record stays for ever.
            freed = sum(self._store.remove_layer(diff_id) for diff_id in unused - used)
            for name in old:
                self._store.remove(name)
        return Pruned(len(old), len(unused - used), freed)

    def _names(self) -> list[bytes]:
        try:
            found = os.listdir(self._store.full_path(_DIRECTORY))
        except FileNotFoundError:
            return []
        return [_DIRECTORY + b"/" + name for name in found]


def stored_layer(store: Store, diff_id: DiffId, below: Sequence[LayerBlob], created_by: str) -> LayerBlob:
    """The layer with this diff_id in the store, on top of others.  Raises ImageError: it is not there."""
    name = store.layer_name(diff_id)
    fd = store.open(name)
    if fd is None:
        raise ImageError(f"store: {shown(name)} was removed while it was being used")
    with contextlib.closing(os.fdopen(fd, "rb")) as file:
        identity = FileIdentity.of(file.fileno())
    return LayerBlob(
        blob=Blob(shown(name), store.full_path(name), (), 0, identity.size, None, identity),
        diff_id=diff_id,
        chain_id=chain_id_on(below, diff_id),
        digest=None,
        size=identity.size,
        media_type=DOCKER_LAYER,
        created_by=created_by,
    )


def chain_id_on(below: Sequence[LayerBlob], diff_id: DiffId) -> ChainId:
    """The ChainID of a layer on top of others."""
    return next_chain_id(below[-1].chain_id if below else None, diff_id)
