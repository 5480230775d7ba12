"""native/uring.c against the kernel and against broken input, under the sanitizers; whole mounts: tests/fuse."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parents[1] / "native"
FLAGS = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}", "-pthread"]


def build(source: Path, out: Path, *flags: str, compiler: str = "gcc") -> Path:
    done = subprocess.run(
        [compiler, *FLAGS, *flags, "-o", out, source], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return out


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=120)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run here")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_requests_with_any_sizes_stay_within_their_memory(tmp_path: Path) -> None:
    """What the kernel says of sizes is checked; and CPUs are counted as it counts them."""
    program = build(NATIVE / "fuzz_uring.c", tmp_path / "fuzz", "-fsanitize=address,undefined", "-Wconversion")

    assert "of 200000 requests accepted" in run(program, 200_000)


def test_fuzz_target_runs_under_libfuzzer(tmp_path: Path) -> None:
    program = build(
        NATIVE / "fuzz_uring.c", tmp_path / "fuzz", "-fsanitize=fuzzer,address,undefined", "-DOVL_LIBFUZZER",
        compiler="clang",
    )  # fmt: skip
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "zeros").write_bytes(bytes(290))

    run(program, "-max_total_time=3", "-seed=1", "-max_len=290", f"-artifact_prefix={tmp_path}/", tmp_path / "seeds")


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_who_replies_is_told_when_the_answer_has_not_left(tmp_path: Path, sanitizer: str) -> None:
    """ENODEV, as writev(2) to the device: the entry's thread has ended, or its ring takes nothing more."""
    program = build(HERE / "uring_mount.c", tmp_path / "uring_mount", f"-fsanitize={sanitizer}")

    assert run(program) == "what needs no mount passed\n"


@pytest.mark.fuse
@pytest.mark.uring
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_every_way_to_serve_and_to_end(
    tmp_path: Path, scratch: Path, uring_switch: Callable[[bool], None], sanitizer: str
) -> None:
    """Replies by any thread, refused ones, a queue that cannot be registered, requests that are out at the end."""
    program = build(HERE / "uring_mount.c", tmp_path / "uring_mount", f"-fsanitize={sanitizer}")
    uring_switch(True)

    assert run(program, scratch) == "all scenarios passed\n"
