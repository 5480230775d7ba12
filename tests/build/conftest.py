"""The rooms whose helpers these tests share."""

import sys
from pathlib import Path

for room in ("fuse", "run", "commit"):
    sys.path.insert(0, str(Path(__file__).parent.parent / room))
