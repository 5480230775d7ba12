"""What a layer is, and how several are seen as one tree.  Start at `base`, then `merge`, then `tree`."""

from ovlfs.layer.merge import Layers
from ovlfs.layer.tree import Tree


def open_tree(layers: Layers) -> Tree:
    """The live tree over a stack of layers (layers[0]: the upperdir, or None)."""
    return Tree(layers)
