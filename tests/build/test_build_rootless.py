"""Builds of a user without privileges: with lent ids, with one id, and without a RUN, which needs no namespace."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
from archives import tar
from helpers_build import Ovlfs, fill, rootfs
from helpers_run import holders
from helpers_tree import look
from helpers_users import GID, UID, User

from ovlfs.image.image import open_image

pytestmark = [pytest.mark.fuse, pytest.mark.root]

DOCKERFILE = """\
FROM scratch AS one
ADD rootfs.tar.xz owned.tar /
COPY --chown=5:6 f /f
RUN echo "$(id -u):$(id -g)" > /ran; mkdir -p /d/e; rm -rf /etc/skel; chmod 4755 /d
FROM scratch
COPY --from=one / /
WORKDIR /w
"""


@pytest.fixture
def user(user: User, scratch: Path) -> Iterator[User]:
    """With a context to build in; at the end nothing is left."""
    context = user.directory("context")
    fill(context, {"f": b"1", "rootfs.tar.xz": rootfs().read_bytes(), "Dockerfile": DOCKERFILE.encode()})
    (context / "owned.tar").write_bytes(tar({"own/f": b"1", "own/l": "f"}, uid=7, gid=8))
    yield user
    store = user.home / ".local/share/ovlfs"
    processes.wait_until(lambda: not holders(scratch) - {os.getpid()}, "all mounts and their processes are gone")
    processes.wait_until(lambda: not os.listdir(store / "builds"), "nothing temporary is left in the store")
    assert os.listdir(store / "tmp") == []


def seen(user: User, ovlfs: Ovlfs, scratch: Path, name: str) -> dict[str, tuple[str, int, int]]:
    """(mode, uid, gid) of every path, as root's mount of the image shows them."""
    mountpoint = scratch / "root-mount"
    mountpoint.mkdir(exist_ok=True)
    ovlfs("mount", "--ro", user.home / name, mountpoint)
    try:
        return {path: (line["mode"], line["uid"], line["gid"]) for path, line in look(bytes(mountpoint)).items()}
    finally:
        ovlfs("umount", mountpoint)


@pytest.mark.parametrize("lent", [True, False])
@pytest.mark.parametrize("engine", [(), ("--chroot",)])
def test_a_user_builds_what_root_builds(
    user: User, ovlfs: Ovlfs, scratch: Path, lent: bool, engine: tuple[str, ...]
) -> None:
    """Owners, modes and layers are the same, although no file on disk has these owners."""
    if lent:
        user.lend_ids()
    result = user.ovlfs("build", *engine, "-t", "out.tar", "context")
    note = f"ovlfs: rootless: uid {UID} is root here, and "
    assert [line for line in result.stderr.splitlines() if line.startswith(note)]
    ovlfs("build", *engine, "-t", scratch / "root.tar", user.home / "context")
    mine = seen(user, ovlfs, scratch, "out.tar")
    assert mine == seen(user, ovlfs, scratch, str(scratch / "root.tar"))
    assert [mine[path][1:] for path in ("f", "own/f", "own/l", "etc/passwd", "w")] == [
        (5, 6), (7, 8), (7, 8), (0, 0), (0, 0)
    ]  # fmt: skip
    assert mine["d"][0] == "4755"
    assert "etc/skel" not in mine
    assert (user.home / "out.tar").stat().st_uid == UID
    cached = user.ovlfs("build", "context").stderr
    assert cached.count(" ---> Using cache") == 5


def test_without_run_no_namespace_is_needed(user: User) -> None:
    """COPY, ADD and WORKDIR make layers with any owner; only RUN would have to enter a user namespace."""
    (user.home / "context/Dockerfile").write_text(re.sub("^RUN.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    result = user.ovlfs("build", "-q", "-t", "out.tar", "context")
    assert result.stderr == ""
    with_owners = open_image(str(user.home / "out.tar"))
    assert result.stdout == f"{with_owners.image_id}\n"
    assert os.stat(user.home / "out.tar").st_gid == GID
