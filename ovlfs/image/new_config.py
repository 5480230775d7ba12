"""What does the config of an image say after one more step?

All that it said before, with the new layer in rootfs.diff_ids, one more entry in history, a new `created`, and what
`--change` asks for.  Fields that are not known here are kept as they are; only what docker notes about the container
that it committed before (`container`, `container_config`) is dropped, as it would be wrong.

Spec: image-spec config.md; docker commit --change: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, ONBUILD, STOPSIGNAL, USER,
VOLUME, WORKDIR.
"""

import json
import posixpath
import re
import shlex
import time
from collections.abc import Callable, Sequence
from typing import Any

from ovlfs.errors import UsageError, printable
from ovlfs.ids import DiffId
from ovlfs.image.config import Config
from ovlfs.image.platform import host_platform

Document = dict[str, Any]

_STALE = ("container", "container_config")
_DEFAULT_SHELL = ["/bin/sh", "-c"]


def timestamp(epoch: int | None = None) -> str:
    """Now, or `epoch` seconds since 1970, as configs have it (RFC 3339)."""
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch))
    except (OverflowError, OSError, ValueError):
        raise UsageError(f"{epoch} is no time that a calendar has") from None


def document_of(config: Config) -> Document:
    """The document of a base image's config, to be changed; a new one where the base has none (a rootfs)."""
    if config.raw:
        found = json.loads(config.raw.decode("utf-8", "surrogateescape"))
        assert isinstance(found, dict)  # parse_config has accepted it
        return found
    platform = host_platform()
    found = {"architecture": platform.architecture, "os": platform.os}
    if platform.variant:
        found["variant"] = platform.variant
    return found


def dump(document: Document) -> bytes:
    """The bytes of a config: compact, and with the bytes of names that are not UTF-8 as they were."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogateescape")


def extended(
    document: Document,
    diff_ids: Sequence[DiffId],
    *,
    created: str,
    created_by: str,
    author: str = "",
    comment: str = "",
    empty_layer: bool = False,
) -> Document:
    """`document` after one more step.

    Args:
        document: a config's document; it is not changed.
        diff_ids: of all layers of the new image, bottom first.
        created: RFC 3339 (`timestamp`).
        created_by: the step's line in history.
        author: of the image; "": as before.
        comment: of the step.
        empty_layer: the step made no layer, `diff_ids` are those of before.
    """
    found = {key: value for key, value in document.items() if key.casefold() not in _STALE}
    found["created"] = created
    if author:
        found["author"] = author
    found["rootfs"] = {"type": "layers", "diff_ids": list(diff_ids)}
    history = found.get("history")
    history = list(history) if isinstance(history, list) else []
    below = len(diff_ids) - (0 if empty_layer else 1)
    told = sum(1 for step in history if not (isinstance(step, dict) and step.get("empty_layer")))
    # Every layer has its entry, so that the new line stands beside the new layer.
    history = [{"created_by": ""} for _ in range(below - told)] + history
    step: Document = {"created": created, "created_by": created_by}
    step |= {key: value for key, value in (("author", author), ("comment", comment)) if value}
    if empty_layer:
        step["empty_layer"] = True
    found["history"] = [*history, step]
    return found


# ---- --change --------------------------------------------------------------------------------------------------------


def changed(document: Document, instructions: Sequence[str]) -> Document:
    """`document` with what Dockerfile instructions say about its config.  Raises UsageError naming the instruction."""
    run = document.get("config")
    run = dict(run) if isinstance(run, dict) else {}
    for instruction in instructions:
        word, _, rest = instruction.strip().partition(" ")
        apply = _INSTRUCTIONS.get(word.upper())
        if apply is None:
            known = ", ".join(_INSTRUCTIONS)
            raise UsageError(f"--change '{printable(instruction[:100])}': should begin with one of {known}")
        try:
            if not rest.strip():
                raise ValueError("a value should follow")  # noqa: TRY301
            apply(run, rest.strip())
        except ValueError as error:
            raise UsageError(f"--change '{printable(instruction[:100])}': {error}") from error
    return document | {"config": run}


def _command(key: str) -> Callable[[Document, str], None]:
    """A command line: a JSON list of words, or a line for the shell."""

    def apply(run: Document, rest: str) -> None:
        words = _json_words(rest)
        shell = run.get("Shell")
        run[key] = [*(shell if isinstance(shell, list) and shell else _DEFAULT_SHELL), rest] if words is None else words
        if key == "Entrypoint":
            run["Cmd"] = None  # as docker build: a command is the old entrypoint's

    return apply


def _json_words(rest: str) -> list[str] | None:
    if not rest.startswith("["):
        return None
    try:
        found = json.loads(rest)
    except ValueError:
        return None  # docker, too, takes it for a line of shell then
    return found if isinstance(found, list) and all(isinstance(word, str) for word in found) else None


def _pairs(rest: str) -> list[tuple[str, str]]:
    """`KEY=VALUE ...` with quotes, or `KEY VALUE`."""
    if "=" not in rest.split(maxsplit=1)[0]:
        key, _, value = rest.partition(" ")
        return [(key, value.strip())]
    pairs = []
    for word in shlex.split(rest):
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise ValueError(f"'{printable(word[:100])}' should be KEY=VALUE")
        pairs.append((key, value))
    return pairs


def _env(run: Document, rest: str) -> None:
    found = {entry.partition("=")[0]: entry for entry in run.get("Env") or []}
    run["Env"] = list((found | {key: f"{key}={value}" for key, value in _pairs(rest)}).values())


def _label(run: Document, rest: str) -> None:
    run["Labels"] = (run.get("Labels") or {}) | dict(_pairs(rest))


def _expose(run: Document, rest: str) -> None:
    ports: Document = {}
    for word in rest.split():
        port = word if "/" in word else word + "/tcp"
        if not re.fullmatch(r"[0-9]{1,5}(-[0-9]{1,5})?/(tcp|udp|sctp)", port):
            raise ValueError(f"'{printable(word[:40])}' should be PORT or PORT/tcp, PORT/udp, PORT/sctp")
        ports[port] = {}
    run["ExposedPorts"] = (run.get("ExposedPorts") or {}) | ports


def _volume(run: Document, rest: str) -> None:
    words = _json_words(rest)
    run["Volumes"] = (run.get("Volumes") or {}) | {word: {} for word in (rest.split() if words is None else words)}


def _workdir(run: Document, rest: str) -> None:
    """An absolute path is taken as it is; a relative one begins where the one before led."""
    relative = posixpath.normpath(posixpath.join("/", run.get("WorkingDir") or "/", rest))
    run["WorkingDir"] = rest if rest.startswith("/") else relative


def _onbuild(run: Document, rest: str) -> None:
    run["OnBuild"] = [*(run.get("OnBuild") or []), rest]


def _text(key: str) -> Callable[[Document, str], None]:
    def apply(run: Document, rest: str) -> None:
        run[key] = rest

    return apply


_INSTRUCTIONS: dict[str, Callable[[Document, str], None]] = {
    "CMD": _command("Cmd"),
    "ENTRYPOINT": _command("Entrypoint"),
    "ENV": _env,
    "EXPOSE": _expose,
    "LABEL": _label,
    "ONBUILD": _onbuild,
    "STOPSIGNAL": _text("StopSignal"),
    "USER": _text("User"),
    "VOLUME": _volume,
    "WORKDIR": _workdir,
}
