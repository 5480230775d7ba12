"""What a mounted tree shows of a path, beside what `explain` says of it."""

import errno
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ovlfs.fuse import client

Run = Callable[..., Any]
Facts = dict[str, Any]

KINDS = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def explained(mountpoint: Path, path: str) -> Facts:
    """What the mount itself says, over its control socket."""
    facts: Facts = client.ask(client.find(bytes(mountpoint)), "explain", path=path)
    return facts


def seen(mountpoint: Path, path: str) -> Facts:
    """The same as `told` gives, from the mounted tree."""
    at = mountpoint / path.lstrip("/")
    try:
        st = os.lstat(at)
    except OSError as error:
        return {"error": errno.errorcode[error.errno or 0]}
    kind = KINDS[stat.S_IFMT(st.st_mode)]
    return {
        "error": None,
        "kind": kind,
        "mode": f"{stat.S_IMODE(st.st_mode):04o}",
        "uid": st.st_uid,
        "gid": st.st_gid,
        "size": st.st_size if kind == "regular file" else None,
        "target": os.readlink(at) if kind == "symlink" else None,
    }


def told(facts: Facts) -> Facts:
    """What an explanation says that can be seen."""
    if facts["object"] is None:
        return {"error": facts["error"]}
    return {"error": facts["error"]} | {
        key: facts["object"][key] for key in ("kind", "mode", "uid", "gid", "size", "target")
    }


def paths_of(*directories: Path) -> list[str]:
    """Every path that one of these directories has, and beside each one that none has."""
    found: set[str] = {"never"}
    for directory in directories:
        for base, names, files in os.walk(directory):
            for name in [*names, *files]:
                path = os.path.relpath(os.path.join(base, name), directory)
                found |= {path, path + "-not", path + "/below"}
                if name.startswith(".wh."):
                    found.add(os.path.join(os.path.dirname(path), name[4:]))
    return sorted(found)


def assert_all_agree(mountpoint: Path, paths: Iterable[str]) -> None:
    """Explained and seen are the same, path by path, and the mount has nothing to object."""
    for path in paths:
        facts = explained(mountpoint, path)
        assert told(facts) == seen(mountpoint, path), path
        assert facts["notes"] == [], path


def layer_of(facts: Facts, number: int | None) -> str:
    """What a layer is called."""
    return str(next(one["name"] for one in facts["layers"] if one["layer"] == number))


def hidden_of(facts: Facts) -> list[tuple[list[str], str, str]]:
    """(layers, path, because of what) of all that is hidden."""
    return [([layer_of(facts, n) for n in one["layers"]], one["path"], one["by"]) for one in facts["hidden"]]
