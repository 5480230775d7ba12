"""What a layer is, and how several are seen as one tree.  Start at `base`, then `merge`, then `tree`."""
