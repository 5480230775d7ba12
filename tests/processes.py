"""Waiting for what other processes do, and finding them.  For tests of all rooms (`import processes`)."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ovlfs.fuse import mounting


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"not within {seconds} s: {what}")
        time.sleep(0.02)


def is_mounted(mountpoint: Path) -> bool:
    return mounting.find_mount(os.fsencode(mountpoint)) is not None


def is_running(pid: int) -> bool:
    return mounting.start_time(pid) is not None


def described(listing: str, mountpoint: Path) -> dict[str, Any]:
    """What `ovlfs mounts --json` printed about one mount."""
    found: list[dict[str, Any]] = [one for one in json.loads(listing) if one["mountpoint"] == str(mountpoint)]
    assert len(found) == 1, listing
    return found[0]
