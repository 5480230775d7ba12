"""Commits are looked at with the eyes of tests/fuse: its helpers are ours, too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "fuse"))
