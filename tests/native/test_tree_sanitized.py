"""The live tree, merging and directory layers in pure C, under sanitizers, with random operations."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from ovlfs import _native

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parents[1] / "native"
SOURCES = [NATIVE / name for name in ("tree.c", "tree_data.c", "merge.c", "dirlayer.c", "index.c")]
FLAGS = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-pthread", f"-I{NATIVE}"]


def compiled(out: Path, sanitizers: str, driver: str = "tree_stress.c") -> Path:
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    done = subprocess.run(
        ["gcc", *FLAGS, *flags, "-o", out, HERE / driver, *SOURCES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


def index_image(path: Path, names: list[str]) -> str:
    """An index of a tar with these names; a slash at the end makes a directory."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in names:
            info = tarfile.TarInfo(name.rstrip("/"))
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            tar.addfile(info)
        link = tarfile.TarInfo("dd/hard")
        link.type, link.linkname = tarfile.LNKTYPE, names[-1]
        tar.addfile(link)
    scanner = _native.TarScanner()
    scanner.feed(stream.getvalue())
    path.write_bytes(scanner.finish())
    return f"tar:{path}"


def layers(base: Path) -> list[str]:
    """An upperdir and four layers whose names are those that the driver asks for."""
    upper, lower, unpacked = base / "upper", base / "lower", base / "unpacked"
    for path in (upper / "a/b", upper / "etc", lower / "a/c/dd/etc", lower / "b", lower / "dd", unpacked / "etc/x1"):
        path.mkdir(parents=True)
    for path in (upper / "a/x1", lower / "a/x1", lower / "b/b", unpacked / "c", unpacked / "etc/.wh.b"):
        path.touch()
    os.link(lower / "b/b", lower / "a/b")
    (upper / "c").touch()
    os.setxattr(upper / "c", "user.overlay.metacopy", b"")
    os.setxattr(upper / "etc", "user.overlay.redirect", b"/a")
    (unpacked / "dd").symlink_to("a")
    first = ["a/", "a/a", "b/a", "b/.wh.b", "c", "dd/.wh..wh..opq", "dd/c", "etc/x1/a/b/c/dd"]
    many = [f"etc/n{number}" for number in range(300)]
    return [
        f"upper:{upper}",
        index_image(base / "1", first),
        f"dir:{lower}",
        f"oci:{unpacked}",
        index_image(base / "2", [*many, "etc/b", "a/etc/b", "x1/x1/x1", "a/long-name-of-a-file.so.6"]),
    ]


@pytest.mark.parametrize(("sanitizers", "threads", "steps"), [("address,undefined", 1, 60000), ("thread", 4, 100000)])
def test_random_operations_are_clean(sanitizers: str, threads: int, steps: int, scratch: Path) -> None:
    """No access out of bounds, no leak, no undefined arithmetic, no race; and the invariants hold."""
    program = compiled(scratch / "stress", sanitizers)
    places = layers(scratch)
    for seed in range(1, 4):
        done = subprocess.run(
            [program, str(seed), str(steps), str(threads), *places],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=os.environ | {"LD_PRELOAD": ""},
        )
        assert done.returncode == 0, done.stderr
        assert "inodes at the end" in done.stdout


def test_removed_files_are_closed_without_the_lock(scratch: Path) -> None:
    """What is the last descriptor of a removed file takes its data along: seconds, in which others go on."""
    program = compiled(scratch / "orphans", "address,undefined", "tree_orphans.c")
    (scratch / "upper").mkdir()
    done = subprocess.run(
        [program, scratch / "upper"],
        capture_output=True, text=True, timeout=60, check=False, env=os.environ | {"LD_PRELOAD": ""},
    )  # fmt: skip

    assert (done.returncode, done.stdout, done.stderr) == (0, "all closed\n", "")
