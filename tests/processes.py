"""Waiting for what other processes do, and finding them.  For tests of all rooms (`import processes`)."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ovlfs.fuse import mounting

_REALTIME_COARSE = 5  # linux/time.h: CLOCK_REALTIME_COARSE


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
    """Whether any thread of it is left: a main thread can have ended while others still hold descriptors and locks."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        return not mounting.wait_for_end(pidfd, 0)
    finally:
        os.close(pidfd)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal, and wait until the process has ended."""
    os.kill(pid, number)
    wait_until(lambda: not is_running(pid), "the process ended")


def wait_for_a_tick() -> None:
    """Until a change would get another time than one before: the kernel stamps by a clock of some milliseconds."""
    began = time.clock_gettime_ns(_REALTIME_COARSE)
    wait_until(lambda: time.clock_gettime_ns(_REALTIME_COARSE) > began, "the clock goes on")


def described(listing: str, mountpoint: Path) -> dict[str, Any]:
    """What `ovlfs mounts --json` printed about one mount."""
    found: list[dict[str, Any]] = [one for one in json.loads(listing) if one["mountpoint"] == str(mountpoint)]
    assert len(found) == 1, listing
    return found[0]
