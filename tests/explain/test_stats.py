"""`ovlfs stats`: what was asked is counted, by the name of the request and by who answered."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_explain import Run
from processes import wait_until

from ovlfs.fuse.meter import Meter, bucket, bucket_ns, percentile

Mount = Callable[..., Path]


def numbers(ovlfs: Run, mountpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ovlfs("stats", "--json", mountpoint).stdout)
    return found


@pytest.fixture
def words(scratch: Path) -> str:
    for name in ("lower/d", "upper", "work"):
        (scratch / name).mkdir(parents=True)
    for number in range(20):
        (scratch / f"lower/d/file{number}").write_bytes(b"x" * 100)
    return f"lowerdir={scratch}/lower,upperdir={scratch}/upper,workdir={scratch}/work"


@pytest.mark.fuse
@pytest.mark.parametrize("lane", [True, False])
def test_requests_are_counted_by_name_and_by_who_answered(lane: bool, words: str, ovlfs: Run, mounted: Mount) -> None:
    mountpoint = mounted(*([] if lane else ["--no-lane"]), "-o", words)
    before = numbers(ovlfs, mountpoint)
    for number in range(10):
        os.stat(mountpoint / f"d/file{number}")
    (mountpoint / "d/file0").write_bytes(b"new")
    (mountpoint / "d/file1").unlink()
    with pytest.raises(FileExistsError):
        (mountpoint / "d").mkdir()
    with (mountpoint / "d/file2").open("ab") as file:
        file.write(b"more")
        # the kernel does not wait for the RELEASE of file0
        wait_until(lambda: numbers(ovlfs, mountpoint)["caches"]["open_files"] == 1, "one file is open")

    after = numbers(ovlfs, mountpoint)

    def more(name: str, key: str = "requests") -> int:
        none = {"requests": 0, "native": 0, "python_errors": 0}
        return int(after["operations"].get(name, none)[key] - before["operations"].get(name, none)[key])

    assert after["lane"] is lane
    assert more("LOOKUP") >= 11
    assert more("UNLINK") == 1
    assert more("WRITE") == (more("WRITE", "native") if lane else 2)  # with passthrough the kernel writes by itself
    assert more("MKDIR") == 0  # the kernel knew that d exists
    for one in after["operations"].values():
        assert one["requests"] == one["native"] + one["extra"] + one["forwarded"]
    for key in ("requests", "native", "extra", "forwarded"):
        assert after["requests"][key] == sum(one[key] for one in after["operations"].values())
    if lane:
        assert after["operations"]["INIT"]["requests"] == 1
        assert more("LOOKUP", "native") >= 11
        assert after["operations"]["LOOKUP"]["native_us"]["p50"] > 0
    else:
        assert after["requests"]["native"] == after["requests"]["extra"] == 0
    unlink = after["operations"]["UNLINK"]
    assert unlink["native"] or unlink["python_us"]["p99"] >= unlink["python_us"]["p50"] > 0
    assert after["decisions"]["whiteout"] == 1
    assert after["decisions"]["copy-up"] == 3  # d, file0, file2
    assert after["copied_up_bytes"] == 100  # file0 was truncated
    assert after["caches"]["merged_directories"] == 2
    assert after["memory"]["resident_bytes"] > 1 << 20


@pytest.mark.fuse
def test_forgets_are_counted(words: str, ovlfs: Run, mounted: Mount) -> None:
    """What the kernel drops, on its own or when it is told to."""
    mountpoint = mounted("-o", words)
    for number in range(20):
        os.stat(mountpoint / f"d/file{number}")
        (mountpoint / f"d/file{number}").unlink()

    def counted() -> bool:
        return bool({"FORGET", "BATCH_FORGET"} & numbers(ovlfs, mountpoint)["operations"].keys())

    wait_until(counted, "the kernel says that it forgot")


@pytest.mark.fuse
def test_text_has_the_same_numbers(words: str, ovlfs: Run, mounted: Mount) -> None:
    mountpoint = mounted("-o", words)
    os.listdir(mountpoint / "d")
    shown = ovlfs("stats", mountpoint).stdout

    assert f"on {mountpoint}, pid " in shown
    assert "READDIRPLUS" in shown
    assert "merged directories with" in shown


@pytest.mark.fuse
def test_errors_are_one_line(ovlfs: Run, scratch: Path) -> None:
    for verb in ("stats", "trace"):
        assert ovlfs(verb, scratch, code=1).stderr == f"ovlfs: {scratch}: no ovlfs is mounted there\n"
        ovlfs(verb, code=2)


# ---- the histogram ---------------------------------------------------------------------------------------------------


def test_percentiles_are_right_to_an_eighth() -> None:
    meter = Meter()
    for microseconds in range(1, 1001):
        meter.note("lookup", (), microseconds / 1e6, 5 if microseconds == 1 else 0)

    histogram = meter.latencies(["lookup", "never"])
    for share, truth in ((0.5, 500_000), (0.99, 990_000)):
        found = percentile(histogram, share)
        assert found is not None
        assert abs(found - truth) <= truth / 8
    assert percentile([], 0.5) is None
    assert (meter.errors(["lookup"]), meter.errors(["never"])) == (1, 0)


def test_a_bucket_holds_what_it_should() -> None:
    for ns in [*range(5000), 10**6, 10**9, 10**12]:
        assert bucket_ns(bucket(ns)) <= ns < bucket_ns(bucket(ns) + 1)
    assert bucket(-1) == 0
