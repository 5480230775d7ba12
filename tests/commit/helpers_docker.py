"""A docker daemon of our own: its own data, socket and processes, no network, gone at the end."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from processes import wait_until


class Docker:
    """A daemon that runs in `directory`, with its storage driver overlay2."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._host = f"unix://{directory}/sock"

    @classmethod
    @contextmanager
    def at(cls, directory: Path) -> Iterator["Docker"]:
        """Start it, and end it."""
        docker = cls(directory)
        command = ["dockerd", "--data-root", f"{directory}/data", "--exec-root", f"{directory}/exec"]
        command += ["--pidfile", f"{directory}/pid", "-H", docker._host, "--storage-driver", "overlay2"]
        command += ["--iptables=false", "--bridge=none"]
        with open(directory / "log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as daemon:
            try:
                wait_until(lambda: daemon.poll() is not None or docker._answers(), "docker answers", 60)
                if daemon.poll() is not None:
                    pytest.fail(f"dockerd ended: {(directory / 'log').read_text()[-2000:]}")
                yield docker
            finally:
                daemon.terminate()
                with suppress(subprocess.TimeoutExpired):
                    daemon.wait(60)
                daemon.kill()
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            mountpoint = line.split(" ")[4]
            if mountpoint.startswith(f"{directory}/"):
                subprocess.run(["umount", "-l", mountpoint], check=False)

    def _answers(self) -> bool:
        return self._command("version").returncode == 0

    def _command(self, *arguments: object) -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {"DOCKER_CONFIG": str(self.directory / "config")}
        return subprocess.run(
            ["docker", "-H", self._host, *map(str, arguments)], capture_output=True, text=True, env=environment
        )

    def run(self, *arguments: object) -> str:
        """What a docker command prints; it must succeed."""
        result = self._command(*arguments)
        assert result.returncode == 0, f"docker {arguments}: {result.stdout}{result.stderr}"
        return result.stdout

    def config(self, image: str) -> dict[str, Any]:
        """The config of an image, as docker has it."""
        found: dict[str, Any] = json.loads(self.run("image", "inspect", image))[0]
        return found

    @contextmanager
    def tree(self, image: str, mountpoint: Path) -> Iterator[Path]:
        """The merged tree of an image, as the kernel stacks what docker has unpacked."""
        data = self.config(image)["GraphDriver"]["Data"]
        lowers = ":".join([data["UpperDir"], *filter(None, [data.get("LowerDir")])])
        mountpoint.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", f"ro,lowerdir={lowers}", mountpoint], check=True)
        try:
            yield mountpoint
        finally:
            subprocess.run(["umount", mountpoint], check=True)
