"""How does one step make one layer?

A fresh upperdir over the layers so far is a stack.  COPY, ADD and WORKDIR change it through overlay/, without a mount;
RUN has it mounted and runs a command in it (running.py).  What the upperdir holds then is written as a layer
(overlay/layer_export.py) into the store, where the next step and the cache find it.  The upperdir is removed, however
the step ends.

A step that changed nothing makes no layer.  The time of the root directory alone is no change: docker's layers do not
hold the root at all.
"""

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ovlfs.build import trees
from ovlfs.build.cache import stored_layer
from ovlfs.ids import ROOT_NODEID, DiffId
from ovlfs.image import layer_tar
from ovlfs.image.blob_writer import BlobWriter
from ovlfs.image.files import FileIdentity
from ovlfs.image.form import WHOLE, is_verified
from ovlfs.image.image import LayerBlob
from ovlfs.image.store import Store
from ovlfs.layer import merge
from ovlfs.layer.base import Attr
from ovlfs.layer.merge import Layers
from ovlfs.overlay import attr, changes, layer_export
from ovlfs.overlay.params import Params
from ovlfs.overlay.stack import Stack, open_stack

_ROOT_OF_NOTHING = Attr(stat.S_IFDIR | 0o755, 1, 0, 0, 0, 0, 0, 0, 0, 0)


@dataclass(slots=True)
class Upper:
    """An upperdir for one step, over `layers` (bottom first).  `base` also has room for what the step needs beside."""

    base: bytes
    layers: Sequence[LayerBlob]
    params: Params


@dataclass(slots=True)
class Workshop:
    """Makes layers.

    Attributes:
        store: where the layers are.
        place: a directory of ours, on a file system that can be an upperdir.
        keep_owners_in_xattrs: in a user namespace, as `ovlfs run` does: the files there are ours through and through.
    """

    store: Store
    place: bytes
    keep_owners_in_xattrs: bool = False
    _steps: int = field(default=0)

    def room(self, closing: contextlib.ExitStack) -> bytes:
        """A new empty directory, that is there until `closing` is closed."""
        self._steps += 1
        base = b"%s/%d" % (self.place, self._steps)
        os.mkdir(base, 0o700)
        assert shutil.rmtree.avoids_symlink_attacks
        closing.callback(shutil.rmtree, base)
        return base

    @contextlib.contextmanager
    def upper(self, layers: Sequence[LayerBlob]) -> Iterator[Upper]:
        """A fresh upperdir that shows what the layers show; it is gone at the end of the block."""
        with contextlib.ExitStack() as closing:
            base = self.room(closing)
            for name in (b"upper", b"work"):
                os.mkdir(base + b"/" + name, 0o755)
            params = Params(
                upperdir=base + b"/upper",
                workdir=base + b"/work",
                volatile=True,  # a crash loses the step, and the next build does it again
                volatile_mark=False,
                xattr_permissions=2 if self.keep_owners_in_xattrs else None,
            )
            yield Upper(base, layers, params)

    @contextlib.contextmanager
    def opened(self, upper: Upper, *, fresh: bool) -> Iterator[Stack]:
        """The stack.  `fresh`: the upperdir is new, and its root gets the looks of the root below."""
        stack = open_stack(upper.params, trees.open_all(upper.layers, self.store))
        try:
            if fresh:
                was = root_attr([None, *stack.layers[1:]])
                look = attr.Change(
                    permissions=stat.S_IMODE(was.mode),
                    uid=was.uid,
                    gid=was.gid,
                    atime_ns=was.mtime_ns,
                    mtime_ns=was.mtime_ns,
                )
                attr.set_(stack, stack.tree.get(ROOT_NODEID), look)
            yield stack
        finally:
            stack.close()

    def layer_of(self, stack: Stack) -> tuple[DiffId | None, tuple[bytes, ...]]:
        """Write what the upperdir of a stack changed; its diff_id (None: nothing), and what no layer can hold.

        Raises LayerError: it has names that no layer can hold.
        """
        before: Layers = [None, *stack.layers[1:]]
        content = layer_export.entries(stack.layers, before)
        entries = content.entries
        if entries and not entries[0].path and not _root_differs(entries[0], root_attr(before)):
            entries = entries[1:]
        skipped = tuple(content.skipped)
        if not entries:
            return None, skipped
        store = self.store
        with store.create(b"layers/new") as temp:
            writer = BlobWriter(temp.fd)
            layer_tar.write(entries, writer.write)
            writer.finish()
            diff_id = writer.diff_id
            temp.target = store.layer_name(diff_id)
            with store.lock(diff_id):
                # Another build may have made the same, and be reading it: what is there stays there.
                if not is_verified(store, temp.target, diff_id):
                    store.commit(temp)
                    store.remember(WHOLE, FileIdentity.of(temp.fd), diff_id)
        return diff_id, skipped

    def on_top(self, layers: Sequence[LayerBlob], diff_id: DiffId | None, created_by: str) -> list[LayerBlob]:
        """The layers with one more, if there is one."""
        if diff_id is None:
            return list(layers)
        return [*layers, stored_layer(self.store, diff_id, layers, created_by)]


def root_attr(layers: Layers) -> Attr:
    """The attributes of the root that layers show."""
    if all(layer is None for layer in layers):
        return _ROOT_OF_NOTHING
    found = changes.attr_of(layers, merge.root(layers))
    return replace(found, mode=stat.S_IFDIR | stat.S_IMODE(found.mode))


def _root_differs(entry: layer_tar.Entry, was: Attr) -> bool:
    return (entry.mode, entry.uid, entry.gid) != (was.mode, was.uid, was.gid) or bool(entry.xattrs)
