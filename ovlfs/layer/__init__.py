"""What a layer is, and how several are seen as one tree.  Start at `base`, then `merge`, then `tree`."""

import os
from typing import cast

from ovlfs.layer.merge import Layers
from ovlfs.layer.tree import Tree


def open_tree(layers: Layers) -> Tree:
    """The live tree over a stack of layers (layers[0]: the upperdir, or None).

    It is the one in C, unless OVLFS_PURE_PYTHON=1 asks for the readable one, which behaves the same.
    """
    if os.environ.get("OVLFS_PURE_PYTHON") == "1":
        return Tree(layers)
    from ovlfs import _native  # noqa: PLC0415 - the extension imports this package

    return cast("Tree", _native.Tree(layers))
