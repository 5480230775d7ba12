"""mount(8), fuse-overlayfs's command line, and the verbs that look into an image without mounting it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ovlfs.fuse import mounting

Run = Callable[..., "subprocess.CompletedProcess[str]"]
SmallImage = Callable[..., Path]
BIN = Path(sys.executable).parent


@pytest.fixture
def stack(scratch: Path) -> Path:
    """Scratch with l1, l2, u, w and m."""
    for name in ("l1", "l2", "u", "w", "m"):
        (scratch / name).mkdir()
    (scratch / "l1/a").write_text("upper a")
    (scratch / "l2/a").write_text("lower a")
    (scratch / "l2/b").write_text("b")
    return scratch


# ---- ovlfs-fuse


@pytest.mark.fuse
def test_fuse_overlayfs_command_line_mounts_as_podman_calls_it(ovlfs: Run, stack: Path) -> None:
    """Relative lower directories, several -o, words of fuse-overlayfs; silent, and unmounted by fusermount3."""
    result = ovlfs(
        "-o", "lowerdir=l1:l2,upperdir=u", "-o", "workdir=w,threaded=1,timeout=10,volatile", stack / "m",
        module="fuse_overlayfs", cwd=stack, env=os.environ | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert (result.stdout, result.stderr) == ("", "")
    assert (stack / "m/a").read_text() == "upper a"
    (stack / "m/b").write_text("changed")
    assert (stack / "u/b").read_text() == "changed"
    entry = mounting.find_mount(os.fsencode(stack / "m"))
    assert entry is not None
    assert entry.source == b"fuse-overlayfs"
    subprocess.run(["fusermount3", "-u", stack / "m"], check=True)


@pytest.mark.fuse
def test_fuse_overlayfs_without_upperdir_is_read_only(ovlfs: Run, stack: Path) -> None:
    ovlfs("-o", f"lowerdir={stack}/l1:{stack}/l2", stack / "m", module="fuse_overlayfs")
    with pytest.raises(OSError, match="Read-only"):
        (stack / "m/x").touch()
    ovlfs("umount", stack / "m")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "lowerdir=l1,foo", "m"], "unknown mount option 'foo'"),
        (["-o", "lowerdir=l1,plugins=x", "m"], "'plugins=x'"),
        (["-o", "lowerdir=l1,upperdir=u", "m"], "workdir"),
        (["-o", "lowerdir=l1"], "mountpoint"),
        (["m"], "lowerdir"),
        (["--nonsense", "m"], "--nonsense"),
        (["-o"], "-o needs a value"),
    ],
)
def test_fuse_overlayfs_refuses_in_one_line(ovlfs: Run, stack: Path, arguments: list[str], said: str) -> None:
    result = ovlfs(*arguments, module="fuse_overlayfs", code=2, cwd=stack, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert result.stderr.startswith("ovlfs-fuse: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


def test_fuse_overlayfs_version_names_what_it_stands_in_for(ovlfs: Run) -> None:
    for argument in ("--version", "-V"):
        assert ovlfs(argument, module="fuse_overlayfs").stdout.startswith("fuse-overlayfs: version ")
    assert "usage" in ovlfs("--help", module="fuse_overlayfs").stdout


# ---- mount(8)


@pytest.fixture
def in_namespace(scratch: Path) -> Callable[[str], "subprocess.CompletedProcess[str]"]:
    """Runs a shell script in a mount namespace where /usr/sbin has the two helpers."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    sbin = scratch / "sbin"
    sbin.mkdir()
    for path in Path("/usr/sbin").iterdir():
        (sbin / path.name).symlink_to(f"/real-sbin/{path.name}")
    for name in ("mount.ovlfs", "mount.fuse.ovlfs"):
        (sbin / name).unlink(missing_ok=True)
        (sbin / name).write_text(
            f'#!/bin/sh\nPYTHONPATH={os.getcwd()} exec {sys.executable} -m ovlfs.cli.mount_helper "$@"\n'
        )
        (sbin / name).chmod(0o755)

    def run(script: str) -> "subprocess.CompletedProcess[str]":
        # mount(8) looks in /sbin, which is /usr/sbin on a merged-/usr system; only our two are needed there.
        prepared = f"set -e; mount --bind {sbin} /usr/sbin; {script}"
        return subprocess.run(
            ["unshare", "-m", "--propagation", "private", "bash", "-c", prepared],
            cwd=scratch, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    return run


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.parametrize("fstype", ["ovlfs", "fuse.ovlfs"])
def test_mount_8_mounts_directories(
    in_namespace: Callable[..., "subprocess.CompletedProcess[str]"], stack: Path, fstype: str
) -> None:
    options = f"lowerdir={stack}/l1:{stack}/l2,upperdir={stack}/u,workdir={stack}/w,noexec"
    result = in_namespace(
        f"mount -t {fstype} -o {options} none {stack}/m;"
        f"findmnt -n -o FSTYPE,SOURCE,OPTIONS {stack}/m; cat {stack}/m/a; echo changed > {stack}/m/b; umount {stack}/m"
    )
    assert result.returncode == 0, result.stderr
    kind, source, options = result.stdout.splitlines()[0].split()
    assert (kind, source) == ("fuse.ovlfs", "none")
    assert {"noexec", "nosuid", "nodev"} <= set(options.split(","))
    assert result.stdout.splitlines()[1] == "upper a"
    assert (stack / "u/b").read_text() == "changed\n"


@pytest.mark.fuse
@pytest.mark.root
def test_mount_8_mounts_an_image_from_fstab(
    in_namespace: Callable[..., "subprocess.CompletedProcess[str]"], stack: Path, small_image: SmallImage
) -> None:
    image = small_image()
    (stack / "fstab").write_text(f"{image} {stack}/m ovlfs ro,nofail,_netdev,x-systemd.automount 0 0\n")
    result = in_namespace(f"mount -T {stack}/fstab {stack}/m; cat {stack}/m/etc/motd; umount {stack}/m")
    assert (result.returncode, result.stdout) == (0, "hello\n"), result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["none", "m", "-o", "rw,lowerdir=l1,foo"], 1, "'foo'"),
        (["none", "m", "-o", "rw,lowerdir=nothing"], 32, "nothing"),
        (["nothing.tar", "m", "-o", "ro"], 32, "nothing.tar: no such file"),
        (["none"], 1, "MOUNTPOINT"),
        (["none", "m", "-N", "x", "-o", "lowerdir=l1"], 1, "-N"),
        (["none", "m", "-f", "-n", "-v", "-t", "ovlfs", "-o", "rw,lowerdir=l1"], 0, ""),
        (["none", "m", "-f", "-s", "-o", "rw,lowerdir=l1,foo,bar=x"], 0, "ignored (-s): unknown mount option 'foo'"),
    ],
)
def test_mount_helper_answers_as_mount_8_expects(
    ovlfs: Run, stack: Path, arguments: list[str], code: int, said: str
) -> None:
    result = ovlfs(
        *arguments, module="mount_helper", code=code, cwd=stack, env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    assert said in result.stderr
    assert all(line.startswith("mount.ovlfs: ") for line in result.stderr.splitlines())


# ---- inspect, ls, cat


@pytest.fixture
def image(small_image: SmallImage) -> Path:
    return small_image(
        {"etc": None, "etc/passwd": b"root:x:0:0\n", "etc/gone": b"x", "dir": None, "dir/old": b"", "bin": "usr/bin"},
        {"usr/bin": None, "usr/bin/sh": b"#!", "etc/.wh.gone": b"", "dir/.wh..wh..opq": b"", "dir/new": b""},
        {"loop": "loop", "abs": "/etc/passwd", "up": "../../../etc", "etc/nl\nname\x1b": b"hostile", "a:b": b"colon"},
    )  # fmt: skip


def test_ls_shows_the_merged_tree(ovlfs: Run, image: Path) -> None:
    assert ovlfs("ls", image).stdout.split() == ["a:b", "abs", "bin", "dir", "etc", "loop", "up", "usr"]
    assert ovlfs("ls", f"{image}:/dir").stdout == "new\n"
    assert ovlfs("ls", f"{image}:small:latest:/dir").stdout == "new\n"


def test_ls_escapes_hostile_names_unless_raw(ovlfs: Run, image: Path) -> None:
    assert ovlfs("ls", f"{image}:/etc").stdout == "nl\\nname\\x1b\npasswd\n"
    assert ovlfs("ls", "-0", f"{image}:/etc").stdout == "nl\nname\x1b\0passwd\0"


def test_ls_follows_symlinks_inside_the_root(ovlfs: Run, image: Path) -> None:
    assert ovlfs("ls", f"{image}:/bin").stdout == "sh\n"
    assert ovlfs("ls", f"{image}:/up/../up").stdout == ovlfs("ls", f"{image}:/etc").stdout
    assert ovlfs("ls", f"{image}:/../../etc/../dir").stdout == "new\n"


def test_ls_long_shows_what_stat_would(ovlfs: Run, image: Path) -> None:
    lines = ovlfs("ls", "-l", f"{image}:/").stdout.splitlines()
    assert any(line.startswith("lrwxrwxrwx") and line.endswith(" abs -> /etc/passwd") for line in lines)
    assert any(line.startswith("drwxr-xr-x") and line.endswith("2023-11-14 22:13:20 etc") for line in lines)
    assert ovlfs("ls", "-l", f"{image}:/abs").stdout.endswith(" /abs -> /etc/passwd\n")
    assert ovlfs("ls", "-d", f"{image}:/etc").stdout == "/etc\n"


def test_cat_prints_bytes(ovlfs: Run, image: Path) -> None:
    assert ovlfs("cat", f"{image}:/etc/passwd", f"{image}:/abs").stdout == "root:x:0:0\n" * 2
    assert ovlfs("cat", f"{image}:/bin/sh").stdout == "#!"
    assert ovlfs("cat", f"{image}:/a:b").stdout == "colon"


@pytest.mark.parametrize(
    ("verb", "path", "code", "said"),
    [
        ("ls", ":/nothing", 1, "/nothing: No such file or directory"),
        ("ls", ":/etc/passwd/x", 1, "Not a directory"),
        ("ls", ":/etc/passwd/", 1, "Not a directory"),
        ("ls", ":/loop", 1, "Too many levels of symbolic links"),
        ("ls", ":/" + "x" * 256, 1, "File name too long"),
        ("ls", ":/etc/gone", 1, "No such file"),
        ("ls", ":v7:/etc", 1, "v7"),
        ("cat", ":/etc", 1, "Is a directory"),
        ("cat", "", 2, "which file"),
        ("cat", ":/dir/old", 1, "No such file"),
    ],
)
def test_ls_and_cat_fail_as_ls_and_cat_do(ovlfs: Run, image: Path, verb: str, path: str, code: int, said: str) -> None:
    result = ovlfs(verb, f"{image}{path}", code=code)
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_ls_of_a_plain_directory(ovlfs: Run, scratch: Path) -> None:
    (scratch / "root/etc").mkdir(parents=True)
    (scratch / "root/etc/.wh.x").touch()
    assert ovlfs("ls", f"{scratch}/root:/etc").stdout == ".wh.x\n"


def test_inspect_describes_layers(ovlfs: Run, image: Path) -> None:
    found = json.loads(ovlfs("inspect", "--json", image).stdout)
    assert found["form"] == "docker-archive"
    assert found["tags"] == ["small:latest"]
    assert found["layers"][1]["counts"] is None
    ovlfs("ls", image)
    layer = json.loads(ovlfs("inspect", "--json", image).stdout)["layers"][1]
    assert (layer["counts"]["whiteouts"], layer["counts"]["opaque"]) == (1, 1)
    text = ovlfs("inspect", f"{image}:small").stdout
    assert "small:latest" in text
    assert layer["diff_id"] in text
    assert "1 whiteouts" in text


# ---- the program


def test_help_is_quick(ovlfs: Run) -> None:
    """Nothing heavy is imported.  (How long it takes: scripts/bench-layers.)"""
    assert "ovlfs mount image.tar /mnt/root" in ovlfs("--help").stdout
    heavy = "import sys, ovlfs.cli.main; print({'pyfuse3', 'trio', 'zstandard', 'hashlib'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


@pytest.mark.parametrize("verb", ["mount", "umount", "mounts", "inspect", "ls", "cat", "version"])
def test_every_verb_has_help(ovlfs: Run, verb: str) -> None:
    assert ovlfs(verb, "--help").stdout.startswith(f"usage: ovlfs {verb}")


def test_no_command_is_a_usage_error(ovlfs: Run) -> None:
    assert "usage" in ovlfs(code=2).stderr
    assert "'mout'" in ovlfs("mout", code=2).stderr


def test_version_names_what_is_used(ovlfs: Run) -> None:
    assert "pyfuse3" in ovlfs("--version").stdout


def test_a_closed_pipe_is_no_error(ovlfs: Run, small_image: SmallImage) -> None:
    path = small_image({f"file{number:06}": b"" for number in range(5000)})
    command = f"{sys.executable} -m ovlfs.cli.main ls {path} | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=True)
    assert (result.stdout, result.stderr) == ("file000000\n", "")


@pytest.mark.skipif(not (BIN / "ovlfs").exists(), reason="ovlfs is not installed beside this python")
def test_the_installed_programs_run() -> None:
    for name in ("ovlfs", "ovlfs-fuse"):
        program = shutil.which(name, path=str(BIN))
        assert program is not None
        assert subprocess.run([program, "--version"], capture_output=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.skipif(shutil.which("buildah") is None, reason="buildah is missing (Debian: apt-get install buildah)")
def test_buildah_builds_with_ovlfs_fuse_as_its_mount_program(
    ovlfs: Run, small_image: SmallImage, scratch: Path
) -> None:
    """A change, a new file and a removal in a container end up in the image that is committed from it."""
    program = scratch / "mount_program"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={os.getcwd()} exec {sys.executable} -m ovlfs.cli.fuse_overlayfs "$@"\n')
    program.chmod(0o755)
    places = ["--root", scratch / "storage", "--runroot", scratch / "run", "--storage-driver", "overlay"]
    storage = [*places, "--storage-opt", f"overlay.mount_program={program}"]

    def buildah(*arguments: object) -> str:
        command = ["buildah", *storage, *arguments]
        return subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()

    image = small_image(
        {"etc": None, "etc/hosts": b"localhost\n", "etc/motd": b"hello\n"}, {"dir": None, "dir/a": b"a"}
    )
    buildah("pull", "-q", f"docker-archive:{image}")
    container = buildah("from", "--pull-never", "localhost/small:latest")
    root = Path(buildah("mount", container))
    entry = mounting.find_mount(os.fsencode(root))
    assert entry is not None
    assert entry.fstype == b"fuse.ovlfs"
    assert "nodev" not in entry.options
    (root / "etc/motd").write_text("changed\n")
    (root / "etc/hosts").unlink()
    (root / "etc/new").write_text("new\n")
    shutil.rmtree(root / "dir")
    (root / "dir").mkdir()
    buildah("umount", container)
    buildah("commit", "-q", container, "built:1")
    buildah("push", "-q", "built:1", f"docker-archive:{scratch}/built.tar")
    buildah("rm", container)

    assert ovlfs("ls", f"{scratch}/built.tar:/etc").stdout == "motd\nnew\n"
    assert ovlfs("ls", f"{scratch}/built.tar:/dir").stdout == ""
    assert ovlfs("cat", f"{scratch}/built.tar:/etc/motd").stdout == "changed\n"
