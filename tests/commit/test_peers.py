"""What other tools make of a commit: skopeo copies it, umoci and docker unpack it, and the tree is the same."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_commit import Run, change_everything, check_mounts_as, check_same
from helpers_docker import Docker
from helpers_images import images
from helpers_tree import Tree, look

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.slow]

Mount = Callable[..., Path]
IMAGE = "small-docker20.tar"


@pytest.fixture
def changed(mounted: Mount, scratch: Path) -> Path:
    mountpoint = mounted("--upper", scratch / "upper", images() / IMAGE)
    change_everything(mountpoint)
    return mountpoint


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    with Docker.at(tmp_path_factory.mktemp("docker")) as docker:
        yield docker


def tool(*command: object) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return result.stdout


# ---- skopeo and umoci


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_skopeo_copies_each_form_into_the_others(ovlfs: Run, changed: Path, scratch: Path, compression: str) -> None:
    expected = look(bytes(changed))
    made = {
        "docker-archive": f"{scratch}/docker.tar:app:v2",
        "oci-archive": f"{scratch}/oci.tar:app:v2",
        "oci": f"{scratch}/layout:v2",
    }
    for form, out in made.items():
        name = "oci-layout" if form == "oci" else form
        ovlfs("commit", changed, out, "--format", name, "--compress", compression)
        # skopeo itself: "zstd compression is not supported for docker images"
        for other in ("oci",) if compression == "zstd" and form != "docker-archive" else ("docker-archive", "oci"):
            copy = scratch / f"{form}-to-{other}"
            tool("skopeo", "copy", "--insecure-policy", f"{form}:{out}", f"{other}:{copy}:app:copy")
            check_mounts_as(ovlfs, f"{copy}:app:copy", expected, scratch)


@pytest.mark.parametrize("options", [(), ("--sparse",)])
def test_umoci_unpacks_the_same_tree(ovlfs: Run, changed: Path, scratch: Path, options: tuple[str, ...]) -> None:
    ovlfs("commit", changed, f"{scratch}/layout/:v2", *options)
    tool("umoci", "unpack", "--image", f"{scratch}/layout:v2", scratch / "bundle")
    check_same(look(bytes(scratch / "bundle/rootfs")), without_empty_xattrs(look(bytes(changed))))


def without_empty_xattrs(tree: Tree) -> Tree:
    """Go's archive/tar takes an empty PAX value for the absence of one."""
    for line in tree.values():
        line["xattrs"] = {name: value for name, value in line["xattrs"].items() if value}
    return tree


# ---- docker


def as_docker_keeps(tree: Tree) -> Tree:
    """Docker sets times before 1970 to 1970, and touches the root while it unpacks."""
    for line in without_empty_xattrs(tree).values():
        line["mtime_ns"] = max(0, line["mtime_ns"])
    del tree["."]["mtime_ns"]
    return tree


@pytest.mark.parametrize("compression", ["none", "gzip"])  # docker 20 loads no zstd
def test_docker_loads_saves_and_shows_the_same_tree(
    ovlfs: Run, docker: Docker, changed: Path, scratch: Path, compression: str
) -> None:
    """What docker saves again is the same layer: it was not damaged by going through docker's store."""
    ovlfs("commit", changed, f"{scratch}/new.tar:app:{compression}", "--compress", compression)
    docker.run("load", "-i", scratch / "new.tar")
    with docker.tree(f"app:{compression}", scratch / "docker") as tree:
        check_same(look(bytes(tree)), as_docker_keeps(look(bytes(changed))))
    docker.run("save", f"app:{compression}", "-o", scratch / "saved.tar")
    ours, theirs = (json.loads(ovlfs("inspect", "--json", scratch / name).stdout) for name in ("new.tar", "saved.tar"))
    assert ours["image_id"] == theirs["image_id"]
    assert [layer["diff_id"] for layer in ours["layers"]] == [layer["diff_id"] for layer in theirs["layers"]]


def test_docker_loads_holes(ovlfs: Run, docker: Docker, changed: Path, scratch: Path) -> None:
    """With --sparse docker still shows the same tree (it cannot save it again, which is why that is no default)."""
    ovlfs("commit", changed, f"{scratch}/new.tar:app:sparse", "--sparse")
    docker.run("load", "-i", scratch / "new.tar")
    with docker.tree("app:sparse", scratch / "docker") as tree:
        check_same(look(bytes(tree)), as_docker_keeps(look(bytes(changed))))


_SHELL = """
echo more >> /etc/issue; rm /etc/hosts.allow /etc/group; touch /etc/new; chmod 600 /etc/passwd; mkdir -p /a/b/c;
echo x > /a/b/c/d; rm -r /opt/shape; rm -r /opt/links; mkdir /opt/links; echo y > /opt/links/new; rm /opt/zoo/README;
mkdir /opt/zoo/README; rm -r /var/spool; echo z > /var/spool; touch /var/lib; ln /etc/issue /etc/issue2;
ln -s x /etc/sym; rm /opt/zoo/dangling; ln -s elsewhere /opt/zoo/dangling; mkdir /tmp/gone; rmdir /tmp/gone;
chown 5:6 /home;
"""


def test_diff_lists_what_docker_diff_lists(ovlfs: Run, docker: Docker, mounted: Mount, scratch: Path) -> None:
    """The same commands in a container and in a mount."""
    docker.run("load", "-i", images() / IMAGE)
    tags = json.loads(ovlfs("inspect", "--json", images() / IMAGE).stdout)["tags"]
    docker.run("run", "--name", "diffed", "--network=none", "--user=0", "--entrypoint=/bin/sh", tags[0], "-c", _SHELL)
    volume = {"C /var/cache", "A /var/cache/app"}  # docker makes the mountpoint of a volume
    theirs = set(docker.run("diff", "diffed").splitlines()) - volume
    mountpoint = mounted("--ephemeral", images() / IMAGE)
    tool("chroot", mountpoint, "/bin/sh", "-c", _SHELL)
    ours = ovlfs("diff", mountpoint).stdout.splitlines()
    assert set(ours) == theirs
    assert len(ours) > 20


@pytest.mark.parametrize(
    "instructions",
    [
        'CMD ["a", "b c"]',
        "CMD a 'b c'",
        'ENTRYPOINT ["x"]',
        "ENTRYPOINT x y",
        'ENV A=1 B="2 3"',
        "ENV A b c",
        "EXPOSE 80 53/UDP 8000-8002",
        "CMD a\nENTRYPOINT b",
        "ENV A=1\nENV B=$A:$PATH",
        "WORKDIR $PATH",
        "LABEL a=b 'c d'=e",
        "ONBUILD RUN x",
        "USER a:b",
        'VOLUME ["/a b", "/c"]',
        "VOLUME /a /b",
        "WORKDIR rel/ative/",
        "WORKDIR /a/../b",
    ],
)
def test_change_does_what_docker_commit_does(
    ovlfs: Run, docker: Docker, mounted: Mount, scratch: Path, instructions: str
) -> None:
    """Field by field of the config."""
    options = [word for line in instructions.split("\n") for word in ("-c", line)]
    docker.run("load", "-i", images() / IMAGE)
    tag = json.loads(ovlfs("inspect", "--json", images() / IMAGE).stdout)["tags"][0]
    container = docker.run("create", "--network=none", tag).strip()
    theirs = docker.config(docker.run("commit", *options, container).strip())["Config"]
    mountpoint = mounted("--ephemeral", images() / IMAGE)
    ovlfs("commit", mountpoint, f"{scratch}/new.tar:app:changed", *options)
    docker.run("load", "-i", scratch / "new.tar")
    ours = docker.config("app:changed")["Config"]
    container_only = ("Hostname", "Image", "AttachStdin", "AttachStdout", "AttachStderr", "Domainname")
    assert _relevant(ours, container_only) == _relevant(theirs, container_only)


def _relevant(config: dict[str, Any], ignored: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ignored and value}
