"""What does an image's config say?

Only what mounting and running need is typed; everything may be absent or null, and the raw bytes stay available,
since their sha256 is the image's id.  `diff_ids` are the only trusted names of the layers' content; history is
for people: entries with `empty_layer` have no layer, and its length proves nothing.

Spec: image-spec config.md.
"""

from dataclasses import dataclass, field
from typing import Any

from ovlfs.errors import ImageError, printable
from ovlfs.ids import DiffId
from ovlfs.image.digest import parse_digest
from ovlfs.image.documents import parse_object
from ovlfs.image.manifest import MAX_DOCUMENT, MAX_LAYERS
from ovlfs.image.platform import Platform, normalise

MAX_HISTORY = 65536


@dataclass(frozen=True, slots=True)
class History:
    """One step of the build, for people."""

    created_by: str = ""
    created: str = ""
    author: str = ""
    comment: str = ""
    empty_layer: bool = False


@dataclass(frozen=True, slots=True)
class Config:
    """A config.  Fields are named as in the spec; an absent one has its empty value."""

    platform: Platform = field(default_factory=lambda: Platform("linux", ""))
    created: str = ""
    author: str = ""
    diff_ids: tuple[DiffId, ...] = ()
    history: tuple[History, ...] = ()
    user: str = ""
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    hostname: str = ""
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    stop_signal: str = ""
    healthcheck: dict[str, Any] | None = None
    shell: tuple[str, ...] = ()
    on_build: tuple[str, ...] = ()
    raw: bytes = b""
    """The document, byte for byte; empty for a rootfs, which has none."""

    def created_by(self, layers: int) -> list[str]:
        """The command that made each of `layers` layers; "" where history does not fit."""
        steps = [step.created_by for step in self.history if not step.empty_layer]
        return steps if len(steps) == layers else [""] * layers


def parse_config(raw: bytes, where: str) -> Config:
    """The config of an image that can be mounted here; ImageError for any other."""
    found = parse_object(raw, where, MAX_DOCUMENT)
    system = found.text("os")
    if system and system.lower() != "linux":
        raise ImageError(f"{where}: is for {printable(system[:40])}, and only linux images can be mounted")
    rootfs = found.object("rootfs")
    kind = rootfs.text("type")
    if kind and kind != "layers":
        raise ImageError(f"{where}: rootfs.type should be 'layers', not '{printable(kind[:40])}'")
    diff_ids = tuple(
        DiffId(parse_digest(item, f"{where}: rootfs.diff_ids[{number}]"))
        for number, item in enumerate(rootfs.items("diff_ids", MAX_LAYERS))
    )
    run = found.object("config")
    healthcheck = run.get("Healthcheck")
    return Config(
        platform=normalise(system or "linux", found.text("architecture"), found.text("variant")),
        created=found.text("created"),
        author=found.text("author"),
        diff_ids=diff_ids,
        history=tuple(
            History(
                created_by=step.text("created_by"),
                created=step.text("created"),
                author=step.text("author"),
                comment=step.text("comment"),
                empty_layer=step.boolean("empty_layer"),
            )
            for step in found.objects("history", MAX_HISTORY)
        ),
        user=run.text("User"),
        env=run.texts("Env"),
        entrypoint=run.words("Entrypoint"),
        cmd=run.words("Cmd"),
        working_dir=run.text("WorkingDir"),
        hostname=run.text("Hostname"),
        volumes=run.keys("Volumes"),
        exposed_ports=run.keys("ExposedPorts"),
        labels=run.mapping("Labels"),
        stop_signal=run.text("StopSignal"),
        healthcheck=healthcheck if isinstance(healthcheck, dict) else None,
        shell=run.words("Shell"),
        on_build=run.texts("OnBuild"),
        raw=raw,
    )
