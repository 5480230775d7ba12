"""Which layers can the live tree in C ask itself, and what must it be told of them?

It reads tar indexes and directories without the interpreter.  Any other layer, and one that overrides what the C side
would do instead, is asked in Python: the tree then calls `merge.names` and `tree.resolve_name` with the Layer objects.

Called by native/py_tree.c only.  `open_tree` (ovlfs.layer) chooses between the two trees.
"""

import os

from ovlfs.ids import Ino
from ovlfs.layer.base import Layer
from ovlfs.layer.directory import TRUSTED, USER, DirLayer
from ovlfs.layer.merge import Layers
from ovlfs.layer.tar import TarLayer
from ovlfs.layer.tree import Inode, root_inode

_PREFIXES = ((), (TRUSTED,), (USER,), (TRUSTED, USER), (USER, TRUSTED))
_ANSWERS = ("lookup", "list", "attr", "ino")
"""The methods that C stands in for."""

Described = tuple[object, Ino, int, int, tuple[int, int, int, int]] | tuple[int, int, int, bool, bool]
"""(index, st_ino of its inode 0, descriptor of the tar, where it begins there, identity of the file), or (descriptor,
first namespace, how many, oci, override)."""


def describe(layers: Layers) -> tuple[Inode, int, list[Described | None]]:
    """The root of the stack, the number of the upperdir's file system, and each layer (None: ask it in Python)."""
    inode = root_inode(layers)
    upper = layers[0]
    number = 0
    if isinstance(upper, DirLayer):
        number = upper.inos.known()[os.fstat(upper.fd).st_dev]
    return inode, number, [_described(layer, layers) for layer in layers]


def reads_all(layers: Layers) -> bool:
    """Whether there is no layer that has to be asked in Python."""
    return all(layer is None or _described(layer, layers) is not None for layer in layers)


def _described(layer: Layer | None, layers: Layers) -> Described | None:
    if isinstance(layer, TarLayer) and _unchanged(layer, TarLayer):
        return layer.index, layer.ino(0), layer.fd, layer.base_offset, layer.identity()
    if not isinstance(layer, DirLayer) or not _unchanged(layer, DirLayer):
        return None
    first = next(other for other in layers if isinstance(other, DirLayer))
    if layer.inos is not first.inos or layer.prefixes not in _PREFIXES:
        return None
    return layer.fd, int(layer.prefixes[:1] == (USER,)), len(layer.prefixes), layer.oci, layer.override


def _unchanged(layer: Layer, known: type) -> bool:
    return all(getattr(type(layer), method) is getattr(known, method) for method in _ANSWERS)


def devices(layers: Layers) -> dict[int, int]:
    """The numbers of file systems that are known so far (directory.InoMap)."""
    return next((layer.inos.known() for layer in layers if isinstance(layer, DirLayer)), {})
