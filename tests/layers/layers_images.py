"""Images made of bytes, and names that want to run in a browser."""

import io
import tarfile
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


def make_tar(layer: Layer) -> bytes:
    """The layer as a tar."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
        for name, content in layer:
            member = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
            member.mode = 0o755 if content is None else 0o644
            member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            member.size = len(content or b"")
            tar.addfile(member, io.BytesIO(content or b""))
    return stream.getvalue()
