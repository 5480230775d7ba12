"""The pure C under AddressSanitizer and UndefinedBehaviorSanitizer, over good and broken input."""

import os
import subprocess
from pathlib import Path

import pytest
from tarblocks import END, file, hard_link, pax, symlink
from test_tarscan_format import SAMPLE, gnu_sparse, pax_sparse
from test_tarscan_index import PARTS

NATIVE = Path(__file__).resolve().parents[2] / "native"
SOURCES = [NATIVE / name for name in ("fuzz_tarscan.c", "tarscan.c", "build.c", "index.c")]
FLAGS = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Wconversion", "-Werror", f"-I{NATIVE}"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
MUTATIONS = 1500
"""Per file of the corpus, each of a tar and of an index: about ten seconds in all."""


def corpus(folder: Path) -> list[Path]:
    """Tars in which every feature of the scanner has its turn."""
    regions = [(i * 4096, 512) for i in range(30)]
    tars = {
        "sample": SAMPLE,
        "parts": b"".join(PARTS),
        "oldgnu": gnu_sparse(regions[:4], 200000, 30 * 512, more=[regions[4:25], regions[25:]]) + bytes(30 * 512),
        "sparse00": pax_sparse("0.0", [(100, 200), (4096, 10)], 9000),
        "sparse01": pax_sparse("0.1", [(100, 200), (4096, 10)], 9000),
        "sparse10": pax_sparse("1.0", [(100, 200), (4096, 10)], 9000),
        "links": b"".join(
            [
                symlink(b"l0", b"l1/../d"),
                symlink(b"l1", b"/d/./e"),
                file(b"l1/x"),
                hard_link(b"l0/h", b"l1/x"),
                hard_link(b"fwd", b"l0/later"),
                file(b"d/later"),
                file(b"d"),
                file(b"d/z"),
            ]
        ),
        "deep": pax((b"path", b"d/" * 2000 + b"f")) + file(b"x") + pax((b"path", b"d/" * 40 + b".wh.d")) + file(b"x"),
        "empty": b"",
    }
    paths = []
    for name, content in tars.items():
        path = folder / f"{name}.tar"
        path.write_bytes(content + END)
        paths.append(path)
    return paths


def compile_with(compiler: str, out: Path, *flags: str) -> None:
    done = subprocess.run([compiler, *FLAGS, *flags, "-o", out, *SOURCES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_scanner_and_index_on_mutated_input_are_clean(compiler: str, tmp_path: Path) -> None:
    """No access out of bounds, no undefined arithmetic, no leak, whatever the bytes; and what the scanner writes, the
    reader accepts.
    """
    compile_with(compiler, tmp_path / "fuzz", *SANITIZERS)
    done = subprocess.run(
        [tmp_path / "fuzz", str(MUTATIONS), *corpus(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1"},
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "mutated tars accepted" in done.stdout


def test_fuzz_target_runs_under_libfuzzer(tmp_path: Path) -> None:
    """The same entry point, driven by coverage, for a few seconds."""
    compile_with("clang", tmp_path / "fuzz", "-fsanitize=fuzzer,address,undefined", *SANITIZERS[1:], "-DOVL_LIBFUZZER")
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    corpus(seeds)
    done = subprocess.run(
        [tmp_path / "fuzz", "-max_total_time=3", "-seed=1", "-max_len=16384", seeds],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr[-3000:]
