"""What a tree looks like, in the keys of EXPECTED.jsonl, and in what two such looks differ.

Also a program, for a look with another user's eyes: `python helpers_tree.py DIRECTORY` prints one JSON line a path.
It needs nothing but the standard library.
"""

import errno
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from typing import Any

Line = dict[str, Any]
Tree = dict[str, Line]

_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
}


def look(root: bytes) -> Tree:
    """Every path below `root` (`.` itself first) with all that can be seen of it.

    `denied` lists what EACCES kept from us: `sha256`, `xattrs`, `names` (of a directory), `stat` (a directory without
    search permission: nothing but the names in it is known).  `ino` is st_ino; `d_ino` what readdir says.
    """
    tree: Tree = {}
    todo: list[tuple[bytes, bytes, int | None]] = [(b".", root, None)]
    while todo:
        path, at, d_ino = todo.pop()
        line = _line(at)
        line["d_ino"] = d_ino
        tree[os.fsdecode(path)] = line
        if line["type"] == "dir":
            try:
                with os.scandir(at) as entries:
                    below = [(entry.name, entry.inode()) for entry in entries]
            except PermissionError:
                line["denied"].append("names")
                continue
            for name, number in below:
                todo.append((name if path == b"." else path + b"/" + name, at + b"/" + name, number))
    _group_links(tree)
    return tree


def _line(at: bytes) -> Line:
    try:
        st = os.lstat(at)
    except PermissionError:
        return {"type": None, "denied": ["stat"]}
    kind = _TYPES[stat.S_IFMT(st.st_mode)]
    line: Line = {
        "type": kind,
        "mode": f"{stat.S_IMODE(st.st_mode):04o}",
        "uid": st.st_uid,
        "gid": st.st_gid,
        "size": None if kind == "dir" else st.st_size,
        "sha256": None,
        "target": os.fsdecode(os.readlink(at)) if kind == "symlink" else None,
        "rdev": [os.major(st.st_rdev), os.minor(st.st_rdev)] if kind in ("char", "block") else None,
        "nlink": None if kind == "dir" else st.st_nlink,
        "mtime_ns": st.st_mtime_ns,
        "xattrs": {},
        "ino": st.st_ino,
        "denied": [],
    }
    try:
        if kind == "file":
            line["sha256"] = _digest(at)
    except PermissionError:
        line["denied"].append("sha256")
    for name in os.listxattr(at, follow_symlinks=False):
        try:
            line["xattrs"][name] = os.getxattr(at, name, follow_symlinks=False).hex()
        except PermissionError:
            line["denied"].append("xattrs")
    return line


def _digest(at: bytes) -> str:
    with open(at, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _group_links(tree: Tree) -> None:
    groups: dict[int, list[str]] = {}
    for path, line in tree.items():
        if line["type"] not in ("dir", None):
            groups.setdefault(line["ino"], []).append(path)
    for path, line in tree.items():
        group = sorted(groups.get(line.get("ino", -1), [path]), key=os.fsencode)
        line["links"] = len(group)
        line["hardlink"] = group[0] if len(group) > 1 else None


def differences(found: Mapping[str, Line], expected: Mapping[str, Line], keys: tuple[str, ...]) -> list[str]:
    """In words, one a line, what of `expected` is not so in `found`."""
    out = [f"{path!r}: is missing" for path in expected if path not in found]
    out += [f"{path!r}: should not be there" for path in found if path not in expected]
    for path, line in expected.items():
        here = found.get(path)
        if here is None:
            continue
        out += [
            f"{path!r}: {key} is {here[key]!r}, should be {line[key]!r}"
            for key in keys
            if key in line and key in here and here[key] != line[key] and key not in here["denied"]
        ]
    return out


SHOWN = (
    *("type", "mode", "uid", "gid", "size", "sha256", "target", "rdev", "links", "hardlink", "mtime_ns", "xattrs"),
)
"""All that a mount and another mount of the same must agree in; link counts and inode numbers are compared apart."""


def inode_numbers_that_differ(tree: Tree) -> list[str]:
    """Where readdir and stat disagree about the inode number."""
    return [
        f"{path!r}: d_ino {line['d_ino']}, st_ino {line['ino']}"
        for path, line in tree.items()
        if line["d_ino"] is not None and line["type"] is not None and line["d_ino"] != line["ino"]
    ]


def read_lines(text: str) -> Tree:
    """The Tree that the program printed."""
    return {line.pop("path"): line for line in map(json.loads, text.splitlines())}


def _print(tree: Tree) -> Iterator[str]:
    for path, line in tree.items():
        yield json.dumps({"path": path} | line)


if __name__ == "__main__":
    try:
        print("\n".join(_print(look(os.fsencode(sys.argv[1])))))
    except OSError as error:
        sys.exit(f"{error} ({errno.errorcode.get(error.errno or 0)})")
