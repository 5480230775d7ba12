"""`ovlfs trace`: a line a decision, from a mount that runs already, and nothing when nobody looks."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers_explain import Run
from processes import wait_until

from ovlfs.errors import MountError
from ovlfs.fuse import client

pytestmark = pytest.mark.fuse

Mount = Callable[..., Path]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def words(scratch: Path) -> str:
    for name in ("l1/d", "l1/deep/er", "l2/d", "upper", "work"):
        (scratch / name).mkdir(parents=True)
    (scratch / "l1/d/low").write_bytes(b"low" * 100)
    (scratch / "l1/d/gone").touch()
    (scratch / "l1/d/moved").mkdir()
    (scratch / "l1/deep/er/file").touch()
    (scratch / "l2/d/high").touch()
    return f"lowerdir={scratch}/l2:{scratch}/l1,upperdir={scratch}/upper,workdir={scratch}/work"


@contextmanager
def tracing(mountpoint: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """`ovlfs trace`, which listens when the block begins."""
    before = listeners(mountpoint)
    process = subprocess.Popen(
        [sys.executable, "-m", "ovlfs.cli.main", "trace", mountpoint, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        wait_until(lambda: listeners(mountpoint) == before + 1, "trace listens")
        yield process
    finally:
        process.kill()
        process.communicate()


def stats(mountpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = client.ask(client.find(bytes(mountpoint)), "stats")
    return found


def listeners(mountpoint: Path) -> int:
    return int(stats(mountpoint)["listeners"])


def ended(process: "subprocess.Popen[str]", umount: Callable[[], object]) -> list[str]:
    """The lines, after the mount has ended, which ends the trace in order."""
    umount()
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
    return output.splitlines()


@pytest.mark.parametrize("lane", [True, False])
def test_every_decision_is_one_line(lane: bool, words: str, ovlfs: Run, mounted: Mount) -> None:
    mountpoint = mounted(*([] if lane else ["--no-lane"]), "-o", words)
    with tracing(mountpoint, "--json") as process:
        os.stat(mountpoint / "deep/er/file")
        with pytest.raises(FileNotFoundError):
            os.stat(mountpoint / "d/none")
        with (mountpoint / "d/low").open("ab") as file:
            file.write(b"!")
        (mountpoint / "d/gone").unlink()
        (mountpoint / "d/moved").rename(mountpoint / "d/here")
        (mountpoint / "d/new").mkdir()
        events = [json.loads(line) for line in ended(process, lambda: ovlfs("umount", mountpoint))]

    def of(operation: str, path: str) -> dict[str, Any]:
        (found,) = [one for one in events if (one["op"], one["path"]) == (operation, path)]
        return dict(found)

    who = "lane" if lane else "python"
    assert (of("LOOKUP", "/deep")["by"], of("LOOKUP", "/deep")["detail"]) == (who, "layer 1")
    assert of("LOOKUP", "/d/none")["detail"] == "absent"
    assert of("merge", "/deep")["by"] == who
    assert of("merge", "/d")["detail"] == "4 names of layer 2, layer 1"
    copy_up = of("copy-up", "/d/low")
    assert copy_up["detail"] == "300 bytes"
    assert 0 < copy_up["us"] < of("OPEN", "/d/low")["us"]
    assert of("copy-up", "/d")["detail"] == "directory"
    assert of("whiteout", "/d/gone")["us"] > 0
    assert of("rename", "/d/moved")["detail"] == "to /d/here"
    assert of("redirect", "/d/moved")["detail"] == "to moved"
    assert of("opaque", "/d/new")["detail"] == "a new directory"
    assert [one["at"] for one in events] == sorted(one["at"] for one in events)
    assert all(one["us"] is None or one["us"] >= 0 for one in events)


def test_text_shows_time_who_what_and_where(words: str, ovlfs: Run, mounted: Mount) -> None:
    mountpoint = mounted("-o", words)
    with tracing(mountpoint, "--filter", "op=lookup,op=whiteout,path=/d") as process:
        os.stat(mountpoint / "deep/er/file")
        (mountpoint / "d/gone").unlink()
        lines = ended(process, lambda: ovlfs("umount", mountpoint))

    assert [line.split()[1:3] for line in lines[:2]] == [["lane", "LOOKUP"]] * 2
    assert lines[2].split()[1] in {"lane", "python"}
    assert lines[2].split()[2] == "whiteout"
    assert [line.split()[5:] for line in lines] == [["/d", "layer", "2"], ["/d/gone", "layer", "1"], ["/d/gone"]]


def test_what_is_forgotten_keeps_its_name(words: str, ovlfs: Run, mounted: Mount) -> None:
    """An inode that the kernel has forgotten has no path any more; but it was seen before."""
    mountpoint = mounted("-o", words)
    with tracing(mountpoint, "--filter", "op=forget,op=unlink") as process:
        os.stat(mountpoint / "d/gone")
        (mountpoint / "d/gone").unlink()
        wait_until(lambda: "FORGET" in stats(mountpoint)["operations"], "the kernel says that it forgot")
        lines = ended(process, lambda: ovlfs("umount", mountpoint))

    unlink, *forget = [line.split() for line in lines]
    assert (unlink[2], unlink[5]) == ("UNLINK", "/d/gone")
    assert [(line[2].lower(), line[5]) for line in forget][:1] == [("forget", "/d/gone")]


def test_an_interrupt_ends_it(words: str, mounted: Mount) -> None:
    mountpoint = mounted("-o", words)
    with tracing(mountpoint) as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)

    assert (process.returncode, errors) == (130, "ovlfs: interrupted\n")
    wait_until(lambda: listeners(mountpoint) == 0, "nobody listens")


def test_two_may_look_at_once_and_each_sees_what_it_wants(words: str, ovlfs: Run, mounted: Mount) -> None:
    mountpoint = mounted("-o", words)
    with (
        tracing(mountpoint, "--filter", "path=/deep") as one,
        tracing(mountpoint, "--filter", "path=/d") as other,
    ):
        os.stat(mountpoint / "deep/er/file")
        os.stat(mountpoint / "d/low")
        ovlfs("umount", mountpoint)
        first, second = one.communicate(timeout=20)[0], other.communicate(timeout=20)[0]

    assert "/deep/er/file" in first
    assert "/d/low" not in first
    assert "/d/low" in second
    assert "/deep" not in second


def test_one_who_does_not_read_loses_lines_and_is_told(words: str, mounted: Mount) -> None:
    """The mount goes on, and what it keeps for him is bounded."""
    mountpoint = mounted("-o", words)
    with client.connected(client.find(bytes(mountpoint)), "trace", operations=[], paths=[]) as messages:
        assert next(messages) == {"events": [], "dropped": 0}
        before = stats(mountpoint)["memory"]["resident_bytes"]
        for number in range(120_000):  # each one is another missing name: the kernel has to ask
            with pytest.raises(FileNotFoundError):
                os.stat(mountpoint / f"d/none{number}")
        grown = stats(mountpoint)["memory"]["resident_bytes"] - before
        seen, dropped = 0, 0
        while not dropped:
            message = next(messages)
            seen += len(message["events"])
            dropped += message["dropped"]

    assert 0 < seen < 120_000
    assert grown < 64 << 20


def test_a_filter_that_is_none_is_a_usage_error(words: str, ovlfs: Run, mounted: Mount) -> None:
    mountpoint = mounted("-o", words)
    for wrong in ("size=5", "op=", "path=relative", "nothing"):
        assert "should be op=NAME or path=/PATH" in ovlfs("trace", mountpoint, "--filter", wrong, code=2).stderr


def test_a_listener_of_before_leaves_nothing_for_the_next(words: str, ovlfs: Run, mounted: Mount) -> None:
    mountpoint = mounted("-o", words)
    with tracing(mountpoint):
        os.stat(mountpoint / "d/low")
    wait_until(lambda: listeners(mountpoint) == 0, "nobody listens")
    os.stat(mountpoint / "d/high")
    with tracing(mountpoint) as process:
        os.stat(mountpoint / "deep")
        output = "\n".join(ended(process, lambda: ovlfs("umount", mountpoint)))

    assert "/deep" in output
    assert "/d/high" not in output
    assert "/d/low" not in output


def test_a_socket_that_answers_for_another_process_is_not_believed(words: str, mounted: Mount) -> None:
    mountpoint = mounted("-o", words)
    (path,) = Path(os.environ["OVLFS_RUNTIME_DIR"]).glob("*.sock")
    path.unlink()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        with pytest.raises(MountError, match="answers for its daemon"):
            client.ask(client.find(bytes(mountpoint)), "stats")
