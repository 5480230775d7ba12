"""`ovlfs commit`: what was changed comes out of the new image again, exactly, whoever wrote it and however."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_commit import Run, change_everything, check_mounts_as, check_same
from helpers_images import images
from helpers_random import populate, random_run, write
from helpers_tree import look
from processes import wait_until

pytestmark = [pytest.mark.fuse, pytest.mark.root]

Mount = Callable[..., Path]
IMAGE = "small-docker20.tar"


@pytest.fixture
def changed(mounted: Mount, scratch: Path) -> Path:
    """The `small` image, mounted with the upperdir `scratch/upper`, and changed in every way."""
    mountpoint = mounted("--upper", scratch / "upper", images() / IMAGE)
    change_everything(mountpoint)
    return mountpoint


def document(archive: Path, name: str) -> object:
    with tarfile.open(archive) as tar:
        file = tar.extractfile(name)
        assert file is not None
        return json.load(file)


def config_of(archive: Path) -> dict[str, object]:
    manifest = document(archive, "manifest.json")
    assert isinstance(manifest, list)
    config = document(archive, manifest[0]["Config"])
    assert isinstance(config, dict)
    return config


def layers_of(archive: Path) -> list[str]:
    manifest = document(archive, "manifest.json")
    assert isinstance(manifest, list)
    names: list[str] = manifest[0]["Layers"]
    return names


# ---- the tree --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "options"),
    [
        ("new.tar:app:v2", ()),
        ("new.tar:app:v2", ("--compress", "zstd")),
        ("new.tar", ("--sparse",)),
        ("new.tar", ("--format", "oci-archive")),
        ("layout/:v2", ()),
        ("layout/", ("--compress", "none")),
    ],
)
def test_commit_makes_an_image_with_the_same_tree(
    ovlfs: Run, changed: Path, scratch: Path, out: str, options: tuple[str, ...]
) -> None:
    """Whatever the form and the compression: types, owners, modes, times, xattrs, links, devices, content."""
    before = look(bytes(changed))
    ovlfs("commit", changed, f"{scratch}/{out}", *options)
    check_same(look(bytes(changed)), before)  # and the mount goes on as it was
    check_mounts_as(ovlfs, f"{scratch}/{out}", before, scratch)


def test_commit_of_an_upperdir_is_that_of_its_mount(ovlfs: Run, changed: Path, scratch: Path) -> None:
    """Mounted or not, named by its mountpoint or by itself, an upperdir makes the same bytes."""
    when = ("--source-date-epoch", 1_900_000_000)
    ovlfs("commit", changed, scratch / "mount.tar", *when)
    ovlfs("commit", scratch / "upper", scratch / "upper.tar", *when)
    ovlfs("umount", changed)
    ovlfs("commit", scratch / "upper", scratch / "unmounted.tar", *when)
    subprocess.run(["cp", "-a", scratch / "upper", scratch / "copy"], check=True)
    ovlfs("commit", scratch / "copy", scratch / "copy.tar", *when, "--image", images() / IMAGE)
    archives = [(scratch / name).read_bytes() for name in ("mount.tar", "upper.tar", "unmounted.tar", "copy.tar")]
    assert all(archive == archives[0] for archive in archives)


def test_commit_without_an_epoch_makes_the_same_layer(ovlfs: Run, changed: Path, scratch: Path) -> None:
    ovlfs("commit", changed, scratch / "one.tar")
    ovlfs("commit", changed, scratch / "two.tar")
    assert layers_of(scratch / "one.tar") == layers_of(scratch / "two.tar")


@pytest.mark.parametrize("out", ["new.tar", "layout/"])
def test_commit_keeps_the_layers_below_byte_for_byte(ovlfs: Run, scratch: Path, out: str) -> None:
    """Compressed layers keep their digests, in each form."""
    base = images() / "small-zstd.oci.tar"
    (scratch / "upper").mkdir()
    (scratch / "upper/file").touch()
    ovlfs("commit", scratch / "upper", f"{scratch}/{out}", "--image", base)
    was, made = (json.loads(ovlfs("inspect", "--json", image).stdout)["layers"] for image in (base, f"{scratch}/{out}"))
    assert [layer["digest"] for layer in made[:-1]] == [layer["digest"] for layer in was]
    assert [layer["size"] for layer in made[:-1]] == [layer["size"] for layer in was]


def test_commit_of_a_commit_stacks_layers(ovlfs: Run, mounted: Mount, changed: Path, scratch: Path) -> None:
    ovlfs("commit", changed, scratch / "one.tar")
    again = mounted("--ephemeral", scratch / "one.tar")
    (again / "zones").rename(again / "zones2")
    (again / "old").unlink()
    ovlfs("commit", again, scratch / "two.tar")
    check_mounts_as(ovlfs, scratch / "two.tar", look(bytes(again)), scratch)
    assert len(layers_of(scratch / "two.tar")) == len(layers_of(scratch / "one.tar")) + 1


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20))])
def test_commit_of_random_changes(ovlfs: Run, mounted: Mount, scratch: Path, seed: int) -> None:
    """Random operations on a stack of two directories and a redirect-happy upper come out of the commit again."""
    for number in (0, 1):
        populate(scratch / f"lower{number}", seed * 2 + number)
    lowers = f"{scratch}/lower0:{scratch}/lower1"
    for place in ("upper", "work"):
        (scratch / place).mkdir()
    mountpoint = mounted("-o", f"lowerdir={lowers},upperdir={scratch}/upper,workdir={scratch}/work")
    random_run(mountpoint, seed, 150)
    ovlfs("commit", mountpoint, scratch / "new.tar")
    check_mounts_as(ovlfs, scratch / "new.tar", look(bytes(mountpoint)), scratch)
    random_run(mountpoint, seed + 1000, 150)  # changes of changes
    ovlfs("commit", mountpoint, scratch / "new.tar", "--sparse", "--compress", "gzip")
    check_mounts_as(ovlfs, scratch / "new.tar", look(bytes(mountpoint)), scratch)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20))])
def test_commit_of_random_changes_to_an_image(ovlfs: Run, mounted: Mount, scratch: Path, seed: int) -> None:
    mountpoint = mounted("--ephemeral", images() / IMAGE)
    random_run(mountpoint, seed, 300)
    ovlfs("commit", mountpoint, scratch / "new.tar")
    check_mounts_as(ovlfs, scratch / "new.tar", look(bytes(mountpoint)), scratch)


def test_commit_of_an_upperdir_that_the_kernel_wrote(ovlfs: Run, scratch: Path) -> None:
    """Redirects, metacopies and opaque directories of kernel overlayfs are translated, too."""
    lower, upper, mnt = scratch / "lower", scratch / "upper", scratch / "mnt"
    populate(lower, 7)
    write(lower / "big", b"x" * 100_000)
    for place in (upper, scratch / "work", mnt):
        place.mkdir()
    options = f"lowerdir={lower},upperdir={upper},workdir={scratch}/work,redirect_dir=on,metacopy=on,index=on"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, mnt], check=True)
    try:
        (mnt / "a").rename(mnt / "renamed")
        (mnt / "big").chmod(0o600)
        (mnt / "big").rename(mnt / "renamed/big")
        shutil.rmtree(mnt / "d")
        (mnt / "d").mkdir()
        expected = look(bytes(mnt))
    finally:
        subprocess.run(["umount", mnt], check=True)
    assert b"trusted.overlay.redirect" in map(os.fsencode, os.listxattr(upper / "renamed"))
    ovlfs("commit", upper, scratch / "new.tar", "--image", lower)
    check_mounts_as(ovlfs, scratch / "new.tar", expected, scratch)


def test_commit_follows_a_renamed_file_into_directories_below(ovlfs: Run, mounted: Mount, scratch: Path) -> None:
    """A renamed lower directory is a whiteout and a full copy; hard links out of it stay hard links."""
    write(scratch / "lower/dir/sub/file", b"data" * 5000)
    os.link(scratch / "lower/dir/sub/file", scratch / "lower/outside")
    for place in ("upper", "work"):
        (scratch / place).mkdir()
    mountpoint = mounted("-o", f"lowerdir={scratch}/lower,upperdir={scratch}/upper,workdir={scratch}/work")
    (mountpoint / "dir").rename(mountpoint / "new")
    ovlfs("commit", mountpoint, scratch / "new.tar")
    with tarfile.open(scratch / "new.tar") as tar:
        raw = tar.extractfile(layers_of(scratch / "new.tar")[-1])
        assert raw is not None
        with tarfile.open(fileobj=raw) as layer:
            members = {member.name: member for member in layer}
    assert set(members) == {".", ".wh.dir", "new", "new/sub", "new/sub/file", "outside"}
    assert members["outside"].linkname == "new/sub/file"
    assert members["new/sub/file"].size == 20_000
    check_mounts_as(ovlfs, scratch / "new.tar", look(bytes(mountpoint)), scratch)


# ---- the config ------------------------------------------------------------------------------------------------------


def test_commit_extends_config_and_history(ovlfs: Run, changed: Path, scratch: Path) -> None:
    base = config_of(images() / IMAGE)
    options = ("-m", "why", "-a", "Ann <ann@example.org>", "-c", 'CMD ["sh", "-l"]', "-c", "ENV A=1 B='2 3'")
    more = (
        "-c",
        "ENTRYPOINT run it",
        "-c",
        "LABEL x=y",
        "-c",
        "EXPOSE 80 53/udp",
        "-c",
        "WORKDIR sub",
        "-c",
        "USER nobody",
    )
    ovlfs("commit", changed, scratch / "new.tar:app:v2", *options, *more, "--source-date-epoch", 0)
    made = config_of(scratch / "new.tar")
    assert made["created"] == "1970-01-01T00:00:00Z"
    assert made["author"] == "Ann <ann@example.org>"
    history = made["history"]
    assert isinstance(history, list)
    assert history[:-1] == base["history"]
    assert history[-1] == {
        "created": "1970-01-01T00:00:00Z",
        "created_by": "ovlfs commit",
        "author": "Ann <ann@example.org>",
        "comment": "why",
    }
    run, before = made["config"], base["config"]
    assert isinstance(run, dict)
    assert isinstance(before, dict)
    assert run["Entrypoint"] == ["/bin/sh", "-c", "run it"]
    assert run["Cmd"] == ["sh", "-l"]  # it came before the ENTRYPOINT
    assert run["Env"] == [*before["Env"], "A=1", "B=2 3"]
    assert run["Labels"] == before["Labels"] | {"x": "y"}
    assert run["ExposedPorts"] == (before.get("ExposedPorts") or {}) | {"80/tcp": {}, "53/udp": {}}
    assert (run["WorkingDir"], run["User"]) == (before["WorkingDir"] + "/sub", "nobody")
    manifest = document(scratch / "new.tar", "manifest.json")
    assert isinstance(manifest, list)
    assert manifest[0]["RepoTags"] == ["app:v2"]


def test_commit_without_changes_adds_no_layer(ovlfs: Run, mounted: Mount, scratch: Path) -> None:
    mountpoint = mounted("--ephemeral", images() / IMAGE)
    result = ovlfs("commit", mountpoint, scratch / "new.tar", "-c", "CMD ls")
    assert "nothing was changed" in result.stdout
    assert config_of(scratch / "new.tar")["rootfs"] == config_of(images() / IMAGE)["rootfs"]
    history = config_of(scratch / "new.tar")["history"]
    assert isinstance(history, list)
    assert history[-1]["empty_layer"] is True


def test_commit_clamps_times_to_the_epoch(ovlfs: Run, mounted: Mount, scratch: Path) -> None:
    """No file of the new layer is newer than SOURCE_DATE_EPOCH; older ones keep their time."""
    mountpoint = mounted("--ephemeral", images() / IMAGE)
    (mountpoint / "new").touch()
    (mountpoint / "old").touch()
    os.utime(mountpoint / "old", (5, 5))
    ovlfs("commit", mountpoint, scratch / "new.tar", env=os.environ | {"SOURCE_DATE_EPOCH": "1000000000"})
    again = mounted("--ro", scratch / "new.tar")
    assert (again / "new").stat().st_mtime_ns == 10**18
    assert (again / "old").stat().st_mtime_ns == 5 * 10**9


# ---- where to --------------------------------------------------------------------------------------------------------


def test_commit_into_a_layout_keeps_its_other_images(ovlfs: Run, changed: Path, scratch: Path) -> None:
    layout = f"{scratch}/layout/"
    ovlfs("commit", changed, f"{layout}:v1")
    (changed / "more").touch()
    ovlfs("commit", changed, f"{layout}:v2")
    blobs = len(os.listdir(scratch / "layout/blobs/sha256"))
    ovlfs("commit", changed, f"{layout}:v2")  # the tag goes to the new image (another `created`), the layers are there
    index = json.loads((scratch / "layout/index.json").read_text())
    names = [entry["annotations"]["org.opencontainers.image.ref.name"] for entry in index["manifests"]]
    assert names == ["v1", "v2"]
    assert len(os.listdir(scratch / "layout/blobs/sha256")) <= blobs + 2  # a config and a manifest
    assert "more" not in ovlfs("ls", f"{layout}:v1").stdout
    assert "more" in ovlfs("ls", f"{layout}:v2").stdout


def test_commit_replaces_the_image_that_is_mounted(ovlfs: Run, mounted: Mount, scratch: Path) -> None:
    """The archive is renamed into place; the mount goes on with the old one."""
    shutil.copy(images() / IMAGE, scratch / "image.tar")
    mountpoint = mounted("--ephemeral", scratch / "image.tar")
    (mountpoint / "new").write_text("new")
    ovlfs("commit", mountpoint, scratch / "image.tar")
    assert (mountpoint / "etc/group").read_text()
    check_mounts_as(ovlfs, scratch / "image.tar", look(bytes(mountpoint)), scratch)


def test_commit_leaves_nothing_behind_when_it_fails(ovlfs: Run, changed: Path, scratch: Path) -> None:
    """Disk full: one line, what was there is still there, and no temporary file."""
    full = scratch / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", full], check=True)
    try:
        (full / "new.tar").write_text("precious")
        (full / "layout").mkdir()
        for out in ("new.tar", "layout/"):
            result = ovlfs("commit", changed, f"{full}/{out}", "--compress", "none", code=1)
            assert result.stderr.count("\n") == 1
            assert "No space left on device" in result.stderr
        assert sorted(path.name for path in full.rglob("*")) == ["layout", "new.tar"]
        assert (full / "new.tar").read_text() == "precious"
    finally:
        subprocess.run(["umount", full], check=True)


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (".wh.x", "an OCI layer cannot hold the name '.wh.x'"),
        ("new/.wh..wh..opq", "an OCI layer cannot hold the name '.wh..wh..opq'"),
        (".wh.dir/below", "an OCI layer cannot hold the name '.wh.dir'"),
    ],
)
def test_commit_refuses_names_that_mean_deletions(
    ovlfs: Run, mounted: Mount, scratch: Path, name: str, says: str
) -> None:
    mountpoint = mounted("--ephemeral", images() / IMAGE)
    write(mountpoint / name)
    result = ovlfs("commit", mountpoint, scratch / "new.tar", code=1)
    assert says in result.stderr
    assert f"/{name.partition('/below')[0]}" in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(os.listdir(scratch)) == ["mnt0"]


def test_commit_leaves_sockets_out_and_says_so(ovlfs: Run, mounted: Mount, scratch: Path) -> None:
    """As docker does; a file whose place a socket took is gone."""
    mountpoint = mounted("--ephemeral", images() / IMAGE)
    (mountpoint / "etc/hosts").unlink()
    for name in ("run/s", "etc/hosts"):
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(mountpoint / name))
    result = ovlfs("commit", mountpoint, scratch / "new.tar")
    assert result.stderr.splitlines() == [
        f"left out /{name}: a socket, which no layer can hold" for name in ("etc/hosts", "run/s")
    ]
    expected = look(bytes(mountpoint))
    del expected["run/s"], expected["etc/hosts"]
    check_mounts_as(ovlfs, scratch / "new.tar", expected, scratch)


def test_commit_refuses_an_xattr_that_no_tar_can_hold(ovlfs: Run, mounted: Mount, scratch: Path) -> None:
    mountpoint = mounted("--ephemeral", images() / IMAGE)
    os.setxattr(mountpoint / "etc", "user.a=b", b"")
    assert (
        "/etc: a tar cannot hold the xattr 'user.a=b'" in ovlfs("commit", mountpoint, scratch / "x.tar", code=1).stderr
    )


def test_commit_refuses_the_deletion_of_a_name_that_is_too_long(ovlfs: Run, mounted: Mount, scratch: Path) -> None:
    name = "n" * 252
    write(scratch / "lower" / name)
    for place in ("upper", "work"):
        (scratch / place).mkdir()
    mountpoint = mounted("-o", f"lowerdir={scratch}/lower,upperdir={scratch}/upper,workdir={scratch}/work")
    (mountpoint / name).unlink()
    result = ovlfs("commit", mountpoint, scratch / "new.tar", code=1)
    assert "an OCI layer cannot delete a name of more than 251 bytes" in result.stderr


def test_commit_refuses_a_rootfs_with_names_that_mean_deletions(ovlfs: Run, mounted: Mount, scratch: Path) -> None:
    """As the tar of a root file system `.wh.x` is a file; as a layer it would be a deletion."""
    with tarfile.open(scratch / "rootfs.tar", "w") as tar:
        for name in ("etc/", "etc/.wh.hosts"):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            tar.addfile(info)
    mountpoint = mounted("--ephemeral", scratch / "rootfs.tar")
    (mountpoint / "new").touch()
    result = ovlfs("commit", mountpoint, scratch / "new.tar", code=1)
    assert "/etc/.wh.hosts: an OCI layer cannot hold the name" in result.stderr


def test_commit_of_a_rootfs_makes_an_image(ovlfs: Run, mounted: Mount, scratch: Path) -> None:
    mountpoint = mounted("--ephemeral", images() / "rootfs.tar.xz")
    (mountpoint / "new").touch()
    ovlfs("commit", mountpoint, scratch / "new.tar:base", "-c", 'CMD ["bash"]')
    check_mounts_as(ovlfs, f"{scratch}/new.tar:base", look(bytes(mountpoint)), scratch)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("new.tar:",), 2, "a tag should follow the colon"),
        (("new.tar:App:v1",), 2, "no capitals"),
        (("new.tar:a b",), 2, "cannot be an image's name"),
        (("new.tar", "-c", "RUN x"), 2, "should begin with one of CMD"),
        (("new.tar", "-c", "EXPOSE http"), 2, "invalid containerPort"),
        (("new.tar", "-c", "EXPOSE 8000-99999"), 2, "invalid range"),
        (("new.tar", "-c", "STOPSIGNAL none"), 2, "Invalid signal"),
        (("new.tar", "-c", ""), 2, "should begin with one of CMD"),
        (("new.tar", "--source-date-epoch", "x"), 2, "should be seconds since 1970"),
        (("missing/new.tar",), 1, "No such file or directory"),
        (("mnt0:tag",), 1, "is there already, and is neither empty nor an OCI layout"),
        (("fifo",), 1, "is no regular file"),
    ],
)
def test_commit_says_in_one_line_what_is_wrong(
    ovlfs: Run, mounted: Mount, scratch: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    mountpoint = mounted("--ephemeral", images() / IMAGE)
    os.mkfifo(scratch / "fifo")
    result = ovlfs("commit", mountpoint, *arguments, code=code, cwd=scratch)
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(os.listdir(scratch)) == ["fifo", "mnt0"]


def test_commit_refuses_to_write_into_what_it_reads(ovlfs: Run, changed: Path, scratch: Path) -> None:
    for out in (changed / "etc/new.tar", scratch / "upper/new.tar", f"{changed}/layout/"):
        for place in (changed, scratch / "upper"):
            assert "of which the image is made" in ovlfs("commit", place, out, code=1).stderr
    assert not list(scratch.rglob("new.tar"))


def test_commit_refuses_an_upperdir_of_another_image(ovlfs: Run, changed: Path, scratch: Path) -> None:
    result = ovlfs(
        "commit", changed, scratch / "new.tar", "--image", f"{images()}/small-two-docker20.tar.gz:small:v2", code=1
    )
    assert "were made over another image" in result.stderr
    (scratch / "bare").mkdir()
    result = ovlfs("commit", scratch / "bare", scratch / "new.tar", code=1)
    assert "nothing says over which image its changes were made; name it with --image IMAGE" in result.stderr


def test_commit_finds_its_image_among_several(ovlfs: Run, mounted: Mount, scratch: Path) -> None:
    """The note beside the upperdir says which of the archive's images it was."""
    archive = images() / "small-two-docker20.tar.gz"
    tag = json.loads(ovlfs("inspect", "--json", archive).stdout)["images"][1]["tags"][0]
    mountpoint = mounted("--upper", scratch / "upper", f"{archive}:{tag}")
    (mountpoint / "new").touch()
    expected = look(bytes(mountpoint))
    ovlfs("umount", mountpoint)
    ovlfs("commit", scratch / "upper", scratch / "new.tar")
    check_mounts_as(ovlfs, scratch / "new.tar", expected, scratch)


def test_commit_follows_no_symlink_in_a_strangers_layout(ovlfs: Run, changed: Path, scratch: Path) -> None:
    """Neither for its directories nor for its blobs; what a symlink led to stays as it was."""
    ovlfs("commit", changed, f"{scratch}/layout/:v1", "--source-date-epoch", 4_000_000_000)
    (scratch / "layout/blobs/sha256").rename(scratch / "outside")
    (scratch / "layout/blobs/sha256").symlink_to(scratch / "outside")
    before = sorted(os.listdir(scratch / "outside"))
    result = ovlfs("commit", changed, f"{scratch}/layout/:v2", code=1)
    assert result.stderr.count("\n") == 1
    assert sorted(os.listdir(scratch / "outside")) == before
    (scratch / "layout/blobs/sha256").unlink()
    (scratch / "outside").rename(scratch / "layout/blobs/sha256")
    name = layer_name(scratch / "layout")
    (scratch / "layout/blobs/sha256" / name).unlink()
    (scratch / "layout/blobs/sha256" / name).symlink_to(write(scratch / "precious"))
    ovlfs("commit", changed, f"{scratch}/layout/:v1", "--source-date-epoch", 4_000_000_000)
    assert (scratch / "precious").read_bytes() == b"lower\n"
    assert not (scratch / "layout/blobs/sha256" / name).is_symlink()
    check_mounts_as(ovlfs, f"{scratch}/layout/:v1", look(bytes(changed)), scratch)


def layer_name(layout: Path) -> str:
    """The blob of the topmost layer of the only image in a layout."""
    blobs = layout / "blobs/sha256"
    (entry,) = json.loads((layout / "index.json").read_text())["manifests"]
    manifest = json.loads((blobs / entry["digest"].removeprefix("sha256:")).read_text())
    digest: str = manifest["layers"][-1]["digest"]
    return digest.removeprefix("sha256:")


def test_commit_repairs_a_damaged_blob_of_a_layout(ovlfs: Run, changed: Path, scratch: Path) -> None:
    """A blob that is there already is believed by its digest, not by its name."""
    for _ in range(2):
        ovlfs("commit", changed, f"{scratch}/layout/:v1", "--source-date-epoch", 4_000_000_000)
        check_mounts_as(ovlfs, f"{scratch}/layout/:v1", look(bytes(changed)), scratch)
        (scratch / "layout/blobs/sha256" / layer_name(scratch / "layout")).write_bytes(b"damage")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_commit_that_is_ended_leaves_nothing_behind(mounted: Mount, scratch: Path, number: signal.Signals) -> None:
    mountpoint = mounted("--ephemeral", images() / IMAGE)
    with open(mountpoint / "large", "wb") as file:
        file.truncate(8 << 30)
    write(scratch / "out/new.tar", b"precious")
    command = [sys.executable, "-m", "ovlfs.cli.main", "commit", f"{mountpoint}", f"{scratch}/out/new.tar"]
    command += ["--compress", "gzip"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: len(list((scratch / "out").glob(".ovlfs-commit-*/new"))) == 1, "the layer is being written")
        process.send_signal(number)
        _, said = process.communicate()
    assert process.returncode == 130
    assert said == "ovlfs: interrupted\n"
    assert os.listdir(scratch / "out") == ["new.tar"]
    assert (scratch / "out/new.tar").read_bytes() == b"precious"
