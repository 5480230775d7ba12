"""COPY and ADD: what arrives, where, with which owner, mode, time; and what does not get out of context and image."""

import bz2
import gzip
import lzma
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from archives import MTIME, Members, tar
from helpers_build import Builds, Ovlfs, fill, history
from helpers_tree import Tree

pytestmark = [pytest.mark.fuse]

SECOND = 10**9


@pytest.fixture
def builds(scratch: Path, ovlfs: Ovlfs) -> Builds:
    return Builds(scratch, ovlfs)


@pytest.fixture
def base(builds: Builds) -> str:
    """A stage with users and symlinks to copy to."""
    passwd = "root:x:0:0::/:/bin/sh\nu:x:12:13::/:\n"
    group = "root:x:0:\nu:x:14:\ng:x:15:\n"
    members: Members = {
        "etc/passwd": passwd.encode(),
        "etc/group": group.encode(),
        "real/old": b"old",
        "link": "real",
        "out": "../../../../etc",
        "dangling": "new/place",
        "file": b"file",
        "loop": "loop",
    }
    (builds.context / "base.tar").write_bytes(tar(members))
    return "FROM scratch\nADD base.tar /\n"


def owners(tree: Tree, *paths: str) -> list[tuple[int, int]]:
    return [(tree[path]["uid"], tree[path]["gid"]) for path in paths]


def test_the_contents_of_a_directory_are_copied(builds: Builds) -> None:
    """Not the directory itself: its mode and time stay behind, those of what is in it are kept, in whole seconds."""
    fill(builds.context, {"d/a": b"1", "d/sub/b": b"2", "d/sub/empty": None, "d/link": "sub/b"})
    os.chmod(builds.context / "d", 0o700)
    os.chmod(builds.context / "d/sub", 0o750)
    os.chmod(builds.context / "d/sub/b", 0o4711)
    for name in ("d", "d/sub", "d/sub/b"):
        os.utime(builds.context / name, ns=(0, 1_234_567_890_123_456_789))
    os.link(builds.context / "d/a", builds.context / "d/hard")
    tree = builds.tree("FROM scratch\nCOPY d /x/y\n")
    assert set(tree) == {
        ".",
        "x",
        *(f"x/y{one}" for one in ("", "/a", "/hard", "/link", "/sub", "/sub/b", "/sub/empty")),
    }
    assert [tree[path]["mode"] for path in ("x", "x/y", "x/y/sub", "x/y/sub/b")] == ["0755", "0755", "0750", "4711"]
    assert [tree[path]["mtime_ns"] for path in ("x/y/sub", "x/y/sub/b")] == [1_234_567_890 * SECOND] * 2
    assert tree["x/y"]["mtime_ns"] != 1_234_567_890 * SECOND
    assert tree["x/y/link"]["target"] == "sub/b"
    assert tree["x/y/a"]["nlink"] == 2
    assert {(line["uid"], line["gid"]) for line in tree.values()} == {(0, 0)}


def test_files_go_to_a_name_or_into_a_directory(builds: Builds, base: str) -> None:
    fill(builds.context, {"one": b"1", "two": b"2", "t/x y": b"3"})
    tree = builds.tree(
        base
        + "COPY one /file\nCOPY one two /into/\nCOPY one /real\nCOPY one new/name\nWORKDIR /w\nCOPY one two ./sub/\n"
        'COPY one .\nCOPY ["t/x y", "/z z/"]\nCOPY /one ./two /abs/\n'
    )
    expected = ["file", "into/one", "into/two", "real/one", "new/name", "w/sub/two", "w/one", "z z/x y", "abs/two"]
    assert [path for path in expected if path not in tree] == []
    assert tree["file"]["size"] == 1


def test_symlinks_in_the_destination_stay_in_the_image(builds: Builds, base: str) -> None:
    """They are followed as in a chroot; the last component, too, unless the file goes into a directory."""
    fill(builds.context, {"one": b"one", "d/old": b"new", "d/link": b"no link"})
    tree = builds.tree(
        base
        + "COPY one /link/through\nCOPY one /out/\nCOPY one /dangling\nCOPY d /link\nCOPY d /\nCOPY one /real/../up\n"
    )
    assert tree["real/through"]["size"] == 3
    assert tree["etc/one"]["size"] == 3
    assert tree["new/place"]["size"] == 3
    assert tree["dangling"]["type"] == "symlink"
    assert (tree["real/old"]["size"], tree["link"]["type"]) == (3, "file")
    assert tree["up"]["size"] == 3


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("COPY one /file/x", "Not a directory"),
        ("COPY one /loop/x", "Too many levels of symbolic links"),
        ("COPY d /file", "cannot copy a directory over the file /file"),
        ("WORKDIR /file", "is there already, and is no directory"),
        ("COPY one two /x", "When using COPY with more than one source file, the destination must be a directory"),
        (
            "COPY nope /x",
            "file not found in build context or excluded by .dockerignore: stat nope: file does not exist",
        ),
        ("COPY secret /x", "file not found in build context or excluded by .dockerignore: stat secret: file does not"),
        ("COPY tosecret /x", "file not found in build context or excluded by .dockerignore: stat tosecret: file does"),
        ("COPY *.none /x/", "no source files were specified"),
        ("COPY [a /x", "syntax error in pattern"),
        ("COPY one", "requires at least two arguments"),
        ("COPY --chown=nobody one /x", "user 'nobody' is not in /etc/passwd of the image"),
        ("COPY --chown=u:nope one /x", "group 'nope' is not in /etc/group of the image"),
        ("COPY --chown=9999999999 one /x", "is no id"),
        ("COPY --chown=: one /x", "should be USER or USER:GROUP"),
        ("COPY --chmod=u+x one /x", "--chmod=u+x should be an octal mode, such as 755"),
        ("COPY --from=nope one /x", "nope: no such file or directory"),
        ("COPY --from=3 one /x", "there is no such earlier stage"),
        ("COPY --from=0000000005 one /x", "there is no such earlier stage"),
        ("COPY --from=0 one /x", "there is no such earlier stage"),
        ("ADD https://example.org/x /x", "remote sources are not fetched"),
        ("ADD git@example.org:x.git /x", "remote sources are not fetched"),
        ("COPY .wh.one /x/", "a name that begins with .wh. cannot be in a layer"),
        ("COPY one /.wh.x/y", "a name that begins with .wh. cannot be in a layer"),
        ("COPY <<a/b /x/\na/b", "a here-document cannot be called 'a/b'"),
    ],
)
def test_what_cannot_be_copied_names_the_line(builds: Builds, base: str, line: str, rule: str) -> None:
    fill(builds.context, {"one": b"", "two": b"", "d/x": b"", "secret": b"", "tosecret": "secret", ".wh.one": b""})
    (builds.context / ".dockerignore").write_text("secret\n")
    said = builds.fails(base + line + "\n")
    assert said.startswith("Dockerfile:3: ")
    assert rule in said
    assert os.listdir(Path(os.environ["OVLFS_STORE"]) / "builds") == []
    assert os.listdir(Path(os.environ["OVLFS_STORE"]) / "tmp") == []


def test_symlinks_in_the_context_stay_in_it(builds: Builds) -> None:
    fill(
        builds.context,
        {"d/f": b"inside", "rel": "d/f", "abs": "/d", "up": "../../../../../../d/f", "etc/passwd": b"the context's"},
    )
    (builds.context / "host").symlink_to("/etc/passwd")
    (builds.context / "gone").symlink_to("/etc/hostname")
    tree = builds.tree("FROM scratch\nCOPY rel up host /x/\nCOPY abs /y\nCOPY ../../d/f /z\nCOPY d/../rel /n\n")
    assert {tree[path]["size"] for path in ("x/rel", "x/up", "y/f", "z", "n")} == {6}
    assert tree["x/host"]["size"] == len("the context's")
    assert "file does not exist" in builds.fails("FROM scratch\nCOPY gone /x\n")


def test_names_of_all_kinds(builds: Builds) -> None:
    names = [b"\xff\xfe", b"new\nline", "\u00e9".encode(), b" sp ", b"-dash", b"$A", b"n" * 250, b"a\\b"]
    (builds.context / "d").mkdir()
    for name in names:
        with open(bytes(builds.context / "d") + b"/" + name, "w", encoding="ascii") as file:
            file.write("x")
    tree = builds.tree("FROM scratch\nCOPY d /d\nCOPY d/\\$A d/[$]A /e/\n")
    assert set(tree) == {".", "d", "e", "e/$A", *(os.fsdecode(b"d/" + name) for name in names)}


def test_a_path_too_long_for_a_layer_is_refused(builds: Builds) -> None:
    """The context is deeper than PATH_MAX: nothing is kept of a layer that nobody could read."""
    fd = os.open(builds.context, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(30):
            os.mkdir("d" * 200, dir_fd=fd)
            deeper = os.open("d" * 200, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = deeper
    finally:
        os.close(fd)
    assert "is too long for a layer (4096)" in builds.fails("FROM scratch\nCOPY . /\n")
    assert not (Path(os.environ["OVLFS_STORE"]) / "layers").exists()


def test_patterns(builds: Builds) -> None:
    fill(builds.context, {"a1.c": b"", "a2.c": b"", "b.c": b"", "s/a3.c": b"", "s/t/a4.c": b"", "[x]": b"", "to": "s"})
    tree = builds.tree("FROM scratch\nCOPY a?.c /one/\nCOPY */a*.c /two/\nCOPY [^ab]* /three/\nCOPY [[]x] /four/\n")
    assert [path for path in sorted(tree) if path.startswith("one/")] == ["one/a1.c", "one/a2.c"]
    assert [path for path in tree if path.startswith("two/")] == ["two/a3.c"]
    assert "four/[x]" in tree
    assert {"three/a3.c", "three/t", "three/t/a4.c", "three/Dockerfile", "three/[x]"} <= set(tree)


def test_dockerignore_leaves_out(builds: Builds) -> None:
    fill(builds.context, {"d/keep": b"", "d/drop": b"", "e/keep": b"", "e/f/g/keep": b"", "x.md": b"", "d/y.md": b""})
    (builds.context / ".dockerignore").write_text("d\n!d/keep\ne/f\n**/*.md\nDockerfile\n.dockerignore\n")
    tree = builds.tree("FROM scratch\nCOPY . /\n")
    assert set(tree) == {".", "d", "d/keep", "e", "e/keep"}


def test_a_dockerignore_beside_a_named_dockerfile(builds: Builds, ovlfs: Ovlfs) -> None:
    fill(builds.context, {"a": b"", "b": b"", ".dockerignore": b"a\n"})
    other = builds.scratch / "other"
    other.write_text("FROM scratch\nCOPY * /\n")
    Path(f"{other}.dockerignore").write_text("b\n.dockerignore\n")
    ovlfs("build", "-f", other, "-t", builds.scratch / "o.tar", builds.context)
    assert ovlfs("ls", f"{builds.scratch / 'o.tar'}:/").stdout.split() == ["a"]


def test_chown_and_chmod(builds: Builds, base: str) -> None:
    fill(builds.context, {"f": b"1", "d/x": b"", "d/s/y": b""})
    tree = builds.tree(
        base + "ENV who=u:g\nCOPY --chown=$who f /p/q/f\nCOPY --chown=u f /one\nCOPY --chown=7 d /new/d\n"
        "COPY --chown=8:9 --chmod=0640 d /real\nCOPY --chmod=4755 f /suid\n"
    )
    assert owners(tree, "p", "p/q", "p/q/f") == [(12, 15)] * 3
    assert owners(tree, "one", "new", "new/d", "new/d/s/y") == [(12, 14), (0, 0), (7, 7), (7, 7)]
    assert owners(tree, "real", "real/old", "real/x", "real/s/y") == [(0, 0), (0, 0), (8, 9), (8, 9)]
    assert [tree[path]["mode"] for path in ("real/x", "real/s", "suid")] == ["0640", "0640", "4755"]


@pytest.mark.parametrize("kind", ["tar", "gzip", "xz", "bzip2", "zstd"])
def test_add_unpacks_a_tar(builds: Builds, base: str, kind: str) -> None:
    """Owners are the tar's, links stay links, a directory that it only implies goes through a symlink of the image."""
    raw = tar({"d": None, "d/f": b"12345", "s": "d/f", "link/g": b"through"}, uid=5, gid=6)
    packers: dict[str, Callable[[bytes], bytes]] = {
        "tar": bytes,
        "gzip": gzip.compress,
        "xz": lzma.compress,
        "bzip2": bz2.compress,
        "zstd": zstandard.ZstdCompressor().compress,
    }
    packed = packers[kind](raw)
    (builds.context / "some.thing").write_bytes(packed)
    tree = builds.tree(base + "ADD --chown=9:9 some.thing /\nADD some.thing /new/x\nCOPY some.thing /copied\n")
    assert owners(tree, "d", "d/f", "s", "real/g") == [(5, 6)] * 4
    assert tree["link"]["type"] == "symlink"
    assert owners(tree, "new/x", "new/x/d", "new/x/link", "new/x/link/g") == [(0, 0), (5, 6), (0, 0), (5, 6)]
    assert tree["d/f"]["mtime_ns"] == MTIME * SECOND
    assert tree["copied"]["size"] == len(packed)


def test_add_copies_what_is_no_tar(builds: Builds) -> None:
    fill(builds.context, {"plain": b"x" * 2000, "packed": gzip.compress(b"no tar"), "cut": gzip.compress(b"x")[:9]})
    tree = builds.tree("FROM scratch\nADD plain packed cut /d/\n")
    assert {path for path in tree if "/" in path} == {"d/plain", "d/packed", "d/cut"}


def test_add_of_a_broken_tar_fails(builds: Builds) -> None:
    raw = tar({"a": b"x" * 5000})
    fill(builds.context, {"t.tar": raw[:2000], "t.tar.gz": gzip.compress(raw)[:-20]})
    assert "t.tar" in builds.fails("FROM scratch\nADD t.tar /\n")
    assert "t.tar.gz" in builds.fails("FROM scratch\nADD t.tar.gz /\n")
    assert os.listdir(Path(os.environ["OVLFS_STORE"]) / "tmp") == []


def test_names_of_a_tar_stay_in_the_destination(builds: Builds) -> None:
    (builds.context / "up.tar").write_bytes(tar({"../../x": b"1", "/y": b"2"}))
    assert {"d/x", "d/y"} <= set(builds.tree("FROM scratch\nADD up.tar /d/\n"))


def test_a_directory_takes_the_place_of_a_file_and_the_other_way_round(builds: Builds, base: str) -> None:
    fill(builds.context, {"t1/real": b"now a file", "t2/file/x": b"now a directory"})
    tree = builds.tree(base + "COPY t1 /\nCOPY t2 /\n")
    assert tree["real"]["type"] == "file"
    assert tree["file/x"]["size"] == 15


@pytest.mark.root
def test_devices_fifos_capabilities_and_sparse_files(builds: Builds) -> None:
    context = fill(builds.context, {"d/cap": b"\x7fELF"})
    os.mknod(context / "d/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mkfifo(context / "d/fifo")
    subprocess.run(["setfattr", "-n", "security.capability", "-v", "0x0100000200200000000000000000000000000000",
                    context / "d/cap"], check=True)  # fmt: skip
    os.setxattr(context / "d/cap", "user.x", b"y")
    with (context / "d/sparse").open("wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(b"middle")
    tree = builds.tree("FROM scratch\nCOPY d /d\n")
    assert (tree["d/null"]["type"], tree["d/null"]["rdev"], tree["d/fifo"]["type"]) == ("char", [1, 3], "fifo")
    assert list(tree["d/cap"]["xattrs"]) == ["security.capability"]
    assert tree["d/sparse"]["size"] == 64 << 20
    assert (tree["d/sparse"]["type"], tree["d/fifo"]["mode"]) == ("file", "0644")


def test_copy_from_a_stage_and_from_an_image(builds: Builds, base: str) -> None:
    """Owners are those of the stage, unless --chown says otherwise."""
    fill(builds.context, {"f": b"1"})
    first = builds.image(base + "COPY --chown=3:4 f /own/f\n")
    text = (
        f"{base}COPY --chown=3:4 f /own/f\nFROM scratch AS Second\nCOPY --from=0 /own /a\nFROM scratch\n"
        f"COPY --from=second /a/f /b/\nCOPY --from=0 --chown=5 link/old /c\n"
        f"COPY --from={first.path.decode()} own/f /d\n"
    )
    image = builds.image(text)
    with builds.mounted(image) as mountpoint:
        found = {name: (mountpoint / name).stat() for name in ("b/f", "c", "d")}
    assert [(one.st_uid, one.st_gid) for one in found.values()] == [(3, 4), (5, 5), (3, 4)]
    assert [line.partition("file:")[0] for line, _ in history(image.config)] == [
        "/bin/sh -c #(nop) COPY ",
        "/bin/sh -c #(nop) COPY --chown=5",
        "/bin/sh -c #(nop) COPY ",
    ]


def test_heredocs_become_files(builds: Builds) -> None:
    image = builds.image(
        "FROM scratch\nENV who=me\nCOPY <<one <<'two' /d/\nhi $who \\$x \"q\"\none\n$who\ntwo\n"
        "ADD --chmod=755 <<-E /run.sh\n\t#!/bin/sh\nE\n"
    )
    with builds.mounted(image) as mountpoint:
        assert (mountpoint / "d/one").read_text() == 'hi me $x "q"\n'
        assert (mountpoint / "d/two").read_text() == "$who\n"
        assert (mountpoint / "run.sh").read_text() == "#!/bin/sh\n"
        assert [stat.S_IMODE((mountpoint / name).stat().st_mode) for name in ("d/one", "run.sh")] == [0o644, 0o755]
