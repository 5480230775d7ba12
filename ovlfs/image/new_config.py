"""What does the config of an image say after one more step?

All that it said before, with the new layer in rootfs.diff_ids, one more entry in history and a new `created`.  Fields
that are not known here are kept as they are; only what docker notes about the container that it committed before
(`container`, `container_config`) is dropped, as it would be wrong.

Spec: image-spec config.md.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

from ovlfs.errors import UsageError
from ovlfs.ids import DiffId
from ovlfs.image.config import Config
from ovlfs.image.platform import host_platform

Document = dict[str, Any]

_STALE = ("container", "container_config")


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
