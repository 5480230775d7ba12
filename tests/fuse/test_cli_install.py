"""Setting up: what is missing is named; an installation into a clean venv works; the demo runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(*command: object, code: int = 0, **environment: str) -> "subprocess.CompletedProcess[str]":
    result = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT, env=os.environ | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
    assert result.returncode == code, result.stdout + result.stderr
    return result


@pytest.fixture
def sources(scratch: Path) -> Path:
    """A copy of what is under version control, and of what is not yet committed."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (scratch / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, scratch / "src" / name)
    return scratch / "src"


def test_setup_py_names_the_missing_headers() -> None:
    result = run(sys.executable, "setup.py", "--name", code=1, PKG_CONFIG_LIBDIR="/nonexistent", PKG_CONFIG_PATH="")
    assert result.stderr == "ovlfs: the headers of libfuse 3 are missing (Debian: apt-get install libfuse3-dev)\n"


def test_setup_py_names_the_missing_pkg_config(scratch: Path) -> None:
    result = run(sys.executable, "setup.py", "--name", code=1, PATH=str(scratch))
    assert result.stderr == "ovlfs: pkg-config is missing (Debian: apt-get install pkg-config)\n"


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is missing (Debian: apt-get install util-linux)")
@pytest.mark.root
def test_setup_without_root_and_sudo_names_the_missing_packages(sources: Path, scratch: Path) -> None:
    for name in ("dpkg-query", "sudo"):  # no package is there, and sudo wants a password
        (scratch / name).write_text("#!/bin/sh\nexit 1\n")
        (scratch / name).chmod(0o755)
    for path in (scratch, scratch.parent):
        path.chmod(0o755)
    result = run(
        "setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", sources / "scripts/setup",
        code=1, PATH=f"{scratch}:{os.environ['PATH']}",
    )  # fmt: skip
    assert "neither root nor sudo is here: apt-get install python3-venv python3-dev gcc" in result.stderr
    assert "libfuse3-dev fuse3" in result.stderr


@pytest.mark.slow
def test_pip_install_into_a_clean_venv_gives_the_programs(sources: Path, scratch: Path) -> None:
    run(sys.executable, "-m", "venv", scratch / "venv")
    run(scratch / "venv/bin/python", "-m", "pip", "install", "--quiet", sources)
    programs = scratch / "venv/bin"
    assert "ovlfs 0" in run(programs / "ovlfs", "version").stdout
    assert "fuse-overlayfs" in run(programs / "ovlfs-fuse", "--version").stdout
    assert "SOURCE" in run(programs / "mount.ovlfs", "--help").stdout
    assert "SOURCE" in run(programs / "mount.fuse.ovlfs", "--help").stdout


@pytest.mark.slow
@pytest.mark.fuse
def test_the_demo_shows_what_it_says(scratch: Path) -> None:
    result = run(ROOT / "scripts/demo", TMPDIR=str(scratch))
    assert "mounted demo.tar (3 layers, 6 files)" in result.stdout
    assert "\nup/etc/motd\n" in result.stdout  # the copy-up
    assert any(line.startswith("c--------- ") and line.endswith(" hosts") for line in result.stdout.splitlines())
    assert result.stdout.endswith("a change\n$ ovlfs umount root\n")
    assert not list(scratch.iterdir())
