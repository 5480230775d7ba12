"""Which kinds of names and numbers there are, so that mypy can tell them apart.

A name inside a layer is bytes, end to end: Linux file names are bytes, and images hold names in Latin-1, UTF-8
and neither.  `str` appears only where people read or type (cli, error texts).

Three different numbers are called "inode" in a file system like this one:

* `NodeId`  names an inode in FUSE messages.  It lives as long as this mount, and is ours to choose.
* `Ino`     is what stat(2) shows as st_ino.  It is constant over copy-up and over remounts, and equals d_ino.
* a layer's own number: st_ino of the file in a lower directory, or the ordinal of an entry in a tar index.
"""

from typing import NewType

Name = NewType("Name", bytes)
"""One path component: 1 to 255 bytes, neither b"/" nor NUL in it, not b"." and not b".."."""

NodeId = NewType("NodeId", int)
Ino = NewType("Ino", int)

Digest = NewType("Digest", str)
"""`sha256:` and 64 lowercase hex digits: the hash of a blob as it is stored (maybe compressed)."""

DiffId = NewType("DiffId", str)
"""The digest of an *uncompressed* layer tar (image-spec config.md, rootfs.diff_ids)."""

ChainId = NewType("ChainId", str)
"""The digest of a layer and all below it (image-spec config.md, "Layer ChainID")."""

ROOT_NODEID = NodeId(1)
"""FUSE_ROOT_ID: the kernel's name for the root, which is never looked up and never forgotten."""
