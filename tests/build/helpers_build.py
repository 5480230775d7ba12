"""A context, a build in it, and what came out."""

import contextlib
import io
import json
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers_images import images
from helpers_tree import Tree, look

from ovlfs.cli.main import main
from ovlfs.image.config import Config, parse_config
from ovlfs.image.image import Image, open_image


def rootfs() -> Path:
    """A small root file system with a shell: rootfs.tar.xz of the fixtures."""
    return images() / "rootfs.tar.xz"


def fill(directory: Path, files: Mapping[str, bytes | str | None]) -> Path:
    """Write files: bytes are content, a str is a symlink's target, None a directory."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(exist_ok=True)
        elif isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)
    return directory


Ovlfs = Callable[..., "subprocess.CompletedProcess[str]"]
"""The fixture `ovlfs`."""


@dataclass
class Builds:
    """Builds in one context.  `ovlfs` is the fixture."""

    scratch: Path
    ovlfs: Ovlfs
    count: int = 0

    @property
    def context(self) -> Path:
        """The context."""
        found = self.scratch / "context"
        found.mkdir(exist_ok=True)
        return found

    def run(
        self, dockerfile: str, *arguments: object, code: int = 0, **keywords: Any
    ) -> "subprocess.CompletedProcess[str]":
        """`ovlfs build` of this Dockerfile."""
        (self.context / "Dockerfile").write_text(dockerfile)
        return self.ovlfs("build", *arguments, self.context, code=code, **keywords)

    def fails(self, dockerfile: str, *arguments: object, code: int = 1) -> str:
        """The line that tells why a build fails.  In this process: not for RUN."""
        (self.context / "Dockerfile").write_text(dockerfile)
        ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in ending}
        try:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                assert main(["build", *map(str, arguments), str(self.context)]) == code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return said.getvalue().splitlines()[-1].removeprefix("ovlfs: ")

    def image(self, dockerfile: str, *arguments: object) -> Image:
        """The image of a build that works."""
        self.count += 1
        out = self.scratch / f"out{self.count}.tar"
        self.run(dockerfile, "-t", f"{out}:built:{self.count}", *arguments)
        return open_image(str(out))

    def config(self, dockerfile: str, *arguments: object) -> Config:
        """The config of a build that works, also of one without layers."""
        out = self.scratch / "config.tar"
        self.run(dockerfile, "-t", out, *arguments)
        with tarfile.open(out) as archive:
            named = json.load(archive.extractfile("manifest.json") or io.BytesIO())[0]["Config"]
            raw = (archive.extractfile(named) or io.BytesIO()).read()
        return parse_config(raw, "config")

    @contextlib.contextmanager
    def mounted(self, image: Image) -> Iterator[Path]:
        """The tree of an image."""
        mountpoint = self.scratch / f"mnt{self.count}"
        mountpoint.mkdir()
        self.ovlfs("mount", "--ro", image.path.decode(), mountpoint)
        try:
            yield mountpoint
        finally:
            self.ovlfs("umount", mountpoint)

    def tree(self, dockerfile: str, *arguments: object) -> Tree:
        """What the image of a build shows."""
        with self.mounted(self.image(dockerfile, *arguments)) as mountpoint:
            return look(bytes(mountpoint))


def run_config(config: Config) -> dict[str, Any]:
    """The "config" object as it is written."""
    found = json.loads(config.raw)["config"]
    assert isinstance(found, dict)
    return found


def history(config: Config) -> list[tuple[str, bool]]:
    """(created_by, whether there is no layer) of each step."""
    return [(step.created_by, step.empty_layer) for step in config.history]
