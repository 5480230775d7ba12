"""A real Debian in a mount: chroot into it, install, compile, remove; and find it all again after a remount."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers_overlay import Overlay, Run, overlay
from helpers_tree import SHOWN, differences, look

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

DEFAULT_MIRROR = "http://deb.debian.org/debian"


def mirror() -> tuple[str, str]:
    """(address, suite) of the first Debian archive that apt uses here."""
    sources = Path("/etc/apt")
    for path in (*sources.glob("*.list.d/*.sources"), *sources.glob("sources.list"), *sources.glob("*.list.d/*.list")):
        text = path.read_text()
        found = re.search(r"^URIs:\s*(\S+)", text, re.MULTILINE)
        suite = re.search(r"^Suites:\s*(\S+)", text, re.MULTILINE)
        if found and suite:
            return found[1], suite[1]
        line = re.search(r"^deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+(\S+)", text, re.MULTILINE)
        if line:
            return line[1], line[2]
    return DEFAULT_MIRROR, "stable"


def run(*words: object, **keywords: Any) -> str:
    """Run a program; when it fails, its last lines are the message."""
    try:
        result: subprocess.CompletedProcess[str] = subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            timeout=400,
            **keywords,
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"{words[0]}: not within 400 s")
    if result.returncode != 0:
        last = "\n".join((result.stdout + result.stderr).splitlines()[-15:])
        pytest.fail(f"{' '.join(map(str, words))} ended with {result.returncode}:\n{last}")
    return result.stdout


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minimal Debian as an image of two layers: what debootstrap made, and a second one with a change."""
    if shutil.which("debootstrap") is None:
        pytest.fail("debootstrap is missing (Debian: apt-get install debootstrap)")
    address, suite = mirror()
    directory = tmp_path_factory.mktemp("debian")
    root = directory / "root"
    try:
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", suite, root, address], capture_output=True, text=True, timeout=500
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"debootstrap did not end within 500 s (mirror {address})")
    if made.returncode != 0:
        last = (made.stdout + made.stderr).strip().splitlines()[-1:]
        pytest.fail(f"no Debian can be made: debootstrap from {address}: {' '.join(last)}")
    (root / "etc/apt/sources.list").write_text(f"deb {address} {suite} main\n")
    # as in containers: no sandbox user for downloads, no services
    (root / "etc/apt/apt.conf.d/90test").write_text('APT::Sandbox::User "root";\nAPT::Install-Recommends "false";\n')
    run("tar", "--numeric-owner", "--xattrs", "--one-file-system", "-C", root, "-cf", directory / "layer0.tar", ".")
    shutil.rmtree(root)
    return image(directory)


def image(directory: Path) -> Path:
    """`docker save` of the layers."""
    with tarfile.open(directory / "layer1.tar", "w") as tar:
        for name, content in (("etc/motd", b"second layer\n"), ("usr/share/doc/.wh.tzdata", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    names = ["layer0.tar", "layer1.tar"]
    diff_ids = []
    for name in names:
        with open(directory / name, "rb") as file:
            diff_ids.append("sha256:" + hashlib.file_digest(file, "sha256").hexdigest())
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    (directory / "config.json").write_text(json.dumps(config))
    manifest = [{"Config": "config.json", "RepoTags": ["debian:test"], "Layers": names}]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    run("tar", "-C", directory, "-cf", directory / "image.tar", "manifest.json", "config.json", *names)
    for name in names:
        os.unlink(directory / name)
    return directory / "image.tar"


@pytest.fixture
def made(ovlfs: Run, scratch: Path, debian: Path) -> Iterator[Overlay]:
    with overlay(ovlfs, scratch, image=debian) as found:
        yield found


@contextmanager
def chrooted(mnt: Path) -> Iterator[Path]:
    """With /proc, a null device and this machine's resolver in the root."""
    mounts = [("-t", "proc", "proc", mnt / "proc"), ("--bind", "/dev/null", mnt / "dev/null")]
    done: list[Path] = []
    try:
        for words in mounts:
            run("mount", *words)
            done.append(Path(words[-1]))
        if os.path.exists("/etc/resolv.conf"):
            shutil.copyfile("/etc/resolv.conf", mnt / "etc/resolv.conf")
        yield mnt
    finally:
        for path in reversed(done):
            run("umount", "-l", path)


def inside(root: Path, script: str) -> str:
    """Run a script in the root."""
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "DEBIAN_FRONTEND": "noninteractive",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
    } | {name: os.environ[name] for name in ("http_proxy", "https_proxy", "no_proxy") if name in os.environ}
    return run("chroot", root, "/bin/sh", "-euc", script, env=environment)


_PROGRAM = r"""
cat > /root/hello.c <<'END'
#include <stdio.h>
int main(void) { printf("compiled in the mount: %d\n", 6 * 7); return 0; }
END
tcc -o /root/hello /root/hello.c
/root/hello
"""


def test_debian_installs_compiles_removes_and_is_found_again(made: Overlay) -> None:
    """What a stranger does first with a writable root."""
    mnt = made.mount()
    assert (mnt / "etc/motd").read_text() == "second layer\n"
    with chrooted(mnt) as root:
        inside(root, "apt-get update && apt-get install -y tcc libc6-dev file")
        assert inside(root, _PROGRAM) == "compiled in the mount: 42\n"
        assert "ELF" in inside(root, "file /root/hello")
        inside(root, "useradd -m tester && su tester -c 'echo mine > ~/note'")
        inside(root, "apt-get remove -y --purge file && dpkg --audit")
        packages = inside(root, "dpkg -l | sort")
    seen = look(bytes(mnt))
    mnt = made.remount()
    assert differences(look(bytes(mnt)), seen, SHOWN) == []
    with chrooted(mnt) as root:
        assert inside(root, "dpkg -l | sort") == packages
        assert inside(root, "/root/hello; cat /home/tester/note") == "compiled in the mount: 42\nmine\n"
        assert inside(root, "command -v file || echo gone") == "gone\n"
        inside(root, "apt-get install -y file && file /bin/sh && dpkg --audit && apt-get check")
