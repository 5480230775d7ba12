"""The unprivileged user of tests/fuse is needed here, too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "fuse"))
