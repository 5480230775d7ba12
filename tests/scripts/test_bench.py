"""Do the benchmarks still measure?  They run for real, in tiny sizes; rows and counts are looked at, never times."""

import json
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.slow]


def mountinfo() -> str:
    """What is mounted now."""
    return Path("/proc/self/mountinfo").read_text(encoding="utf-8")


def run_script(scratch: Path, name: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run it, with its tmpfs below scratch; nothing may stay mounted there, and no file."""
    place = scratch / "place"
    place.mkdir()
    result = subprocess.run(
        [ROOT / "scripts" / name, "--tmpfs", place, *map(str, arguments)], capture_output=True, text=True, timeout=250
    )
    assert str(place) not in mountinfo()
    assert list(place.iterdir()) == []
    place.rmdir()
    return result


def rows(output: str) -> dict[str, list[str]]:
    """The cells of a Markdown table by the first of each row; a measured cell is not empty."""
    lines = [line.strip("|").split("|") for line in output.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


@pytest.fixture
def image(small_image: Callable[..., Path]) -> Path:
    """Two layers, with enough files to change, and a whiteout."""
    files: dict[str, bytes | str | None] = {f"srv/f{number}": b"%300d" % number for number in range(20)}
    return small_image({"usr": None, "usr/lib": None, "srv": None} | files, {"srv": None, "srv/.wh.f7": b""})


def test_bench_measures_every_workload(scratch: Path, image: Path) -> None:
    """Every row of the table is there; what needs no program in the image is measured for every peer."""
    from_json, plot = scratch / "out.json", scratch / "out.svg"
    found = run_script(
        scratch, "bench", "--image", image, "--scale", "0.002", "--rounds", 2, "--peers", "kernel,ovlfs,ovlfs archive",
        "--archive", "--pin", 0, "--json", from_json, "--plot", plot,
    )  # fmt: skip

    assert found.returncode == 0, found.stderr
    table = rows(found.stdout)
    assert table.pop("workload") == ["kernel", "ovlfs", "ovlfs archive", "reach"]
    in_image = {"40 x chroot ls -lR + cat", "git clone", "gcc of 100 files", "apt-get install"}
    assert {row for row, cells in table.items() if cells[:3] == ["-", "-", "-"]} == in_image
    measured = {row: cells for row, cells in table.items() if row not in in_image}
    without_reach = {row for row in measured if row.startswith("first touch")}
    assert (len(measured), len(without_reach)) == (27, 3)
    for row, cells in measured.items():
        assert "-" not in cells
        if row in without_reach:
            assert cells[3] == ""
            continue
        assert cells[3].endswith("x kernel")
        assert cells[1].endswith((" ok", " **miss**"))
    document = json.loads(from_json.read_text(encoding="utf-8"))
    assert document["pinned"]
    assert {len(document["rows"][row]["ovlfs"]["seconds"]) for row in document["rows"] if row not in in_image} == {2}
    assert ET.parse(plot).getroot().tag.endswith("svg")


def test_bench_peer_that_cannot_mount_is_a_dash_and_says_why(scratch: Path, image: Path) -> None:
    """The others are measured all the same, and nothing stays mounted."""
    found = run_script(
        scratch, "bench", "--image", image, "--scale", "0.002", "--rounds", 1, "--only", "walk warm",
        "--peers", "kernel,ovlfs wrong", "--variant", "wrong=no_such_option",
    )  # fmt: skip

    assert found.returncode == 0
    table = rows(found.stdout)
    assert table["workload"][:2] == ["kernel", "ovlfs wrong"]
    assert table["walk warm"][0] != "-"
    assert table["walk warm"][1] == "-"
    assert "walk cold" not in table
    assert "no_such_option" in found.stderr


def test_bench_that_is_terminated_leaves_no_mount(scratch: Path, image: Path) -> None:
    """SIGTERM in the middle of a workload: programs, mounts and the tmpfs go."""
    place = scratch / "place"
    place.mkdir()
    command: list[str | Path] = [
        "scripts/bench",
        "--tmpfs",
        place,
        "--image",
        image,
        "--only",
        "missing",
        "--peers",
        "ovlfs",
    ]
    script = subprocess.Popen([*command, "--rounds", "9999"], cwd=ROOT, stderr=subprocess.PIPE)
    while not any(str(place) in line and "fuse.ovlfs" in line for line in mountinfo().splitlines()):
        assert script.poll() is None
        time.sleep(0.01)
    script.terminate()
    _, said = script.communicate(timeout=60)

    assert script.returncode == 130
    assert said.splitlines()[-1] == b"bench: interrupted"
    assert str(place) not in mountinfo()
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("wrong", [["--only", "sleep"], ["--peers", "aufs"], ["--variant", "uring"]])
def test_bench_wrong_choice_is_one_line(scratch: Path, image: Path, wrong: list[str]) -> None:
    """A workload or peer that does not exist fails by name, before anything is measured."""
    found = run_script(scratch, "bench", "--image", image, "--scale", "0.002", *wrong)

    assert found.returncode == 1
    assert found.stdout == ""
    assert len(found.stderr.splitlines()) == 1
    assert wrong[1] in found.stderr


def test_bench_messages_are_counted_exactly(scratch: Path) -> None:
    """What the kernel has cached takes no message, a chmod takes one SETATTR."""
    found = run_script(scratch, "bench", "--messages", "--only", "stat of a known name,chmod (upper")

    assert found.returncode == 0, found.stderr
    table = rows(found.stdout)
    assert table.pop("operation") == ["messages", "allowed", "", "by opcode", "20 times", "by opcode"]
    assert table["stat of a known name"] == ["0", "0", "ok", "", "0", ""]
    assert table["stat of a known name (read-only mount)"] == ["0", "0", "ok", "", "0", ""]
    assert table["chmod (upper file)"] == ["1", "1", "ok", "SETATTR 1", "1", "SETATTR 1"]
    assert len(table) == 3


def test_bench_layers_measures_every_section(scratch: Path, image: Path) -> None:
    """Every section has its rows."""
    found = run_script(
        scratch, "bench-layers", "--scale", "0.001", "--rounds", 1, "--big", 8, "--image", image, "--layers", "2,8,20"
    )

    assert found.returncode == 0, found.stderr
    table = rows(found.stdout)
    assert table.pop("what") == ["measured", "reach", ""]
    for start, number in {
        "cold lookup, 2 / 8 layers": 3, "20 layers": 2, "list 25 / 50 / 100 entries": 4, "scan of 1,000 files": 1,
        "mount of it": 2, "resident memory": 3, "mount of ": 4, "ovlfs --help": 1, "lookups during the copy-up": 2,
    }.items():  # fmt: skip
        assert len([row for row in table if row.startswith(start)]) == number, start
