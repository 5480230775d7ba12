"""Images made of bytes, and names that want to run in a browser."""

from collections.abc import Sequence
from pathlib import Path

FIXTURES = Path(__file__).parent.parent / "image" / "fixtures.tar.xz"

Layer = Sequence[tuple[bytes, bytes | None]]
"""Paths and contents; None: a directory."""

EVIL = [
    b"</script><script>window.owned=1</script>",
    b"<img src=x onerror=window.owned=1>",
    b"--><svg onload=window.owned=1>",
    b"\"';window.owned=1;//",
    b"{{facts}}{{script}}",
    b"__proto__",
    b"constructor",
    "\u202etxt.exe".encode(),
    b"caf\xe9 \xff\xfe",
    b"line\nbreak\ttab\x1b[31m",
    "עברית".encode(),
    b"javascript:window.owned=1",
    "\u2028\u2029".encode(),
    b"x" * 255,
]
