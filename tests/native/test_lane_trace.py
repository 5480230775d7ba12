"""What the lane tells of its answers: latencies always, records while somebody looks."""

import errno
import subprocess
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from test_lane import LOOKUP, NATIVE, laned, request

from ovlfs._native import Trace, Tree
from ovlfs.layer.directory import USER, DirLayer, InoMap
from ovlfs.layer.tree import Tree as ReferenceTree

HERE = Path(__file__).parent
ANSWER, MERGE = 0, 1


@pytest.fixture
def layer(scratch: Path) -> DirLayer:
    """A directory with two names."""
    root = scratch / "layer"
    (root / "etc").mkdir(parents=True)
    (root / "motd").touch()
    return DirLayer(bytes(root), InoMap(), prefixes=(USER,))


def test_answers_are_recorded_only_between_start_and_stop(layer: DirLayer) -> None:
    tree, trace = Tree([None, layer]), Trace()
    tree.tell_merged(trace)
    with laned(tree=tree, trace=trace) as bench:

        def look(name: bytes) -> None:
            bench.kernel.send(request(LOOKUP, 2, name + b"\0"))
            bench.kernel.recv(4096)

        def wait() -> list[tuple[int, int, int, int, int, int, int, int, bool, bytes]]:
            found: list[tuple[int, int, int, int, int, int, int, int, bool, bytes]] = []
            while not found:
                found += trace.drain()[0]
            return found

        look(b"motd")
        while LOOKUP not in trace.latencies():
            pass
        assert trace.drain() == ([], 0)
        trace.start(16)
        with pytest.raises(OSError, match="progress") as busy:
            trace.start(16)
        assert busy.value.errno == errno.EALREADY
        look(b"motd")
        ((kind, opcode, at_ns, took_ns, nodeid, number, error, layer_, by_starter, name),) = wait()
        look(b"none")
        ((*_, absent, _, none, _, other),) = wait()
        trace.stop()
        look(b"motd")

        assert (kind, opcode, nodeid, error, layer_, by_starter, name) == (ANSWER, LOOKUP, 1, 0, 1, False, b"motd")
        assert number == tree.lookup(1, b"motd")  # type: ignore[arg-type]
        assert at_ns > took_ns > 0
        assert (absent, none, other) == (0, -1, b"none")
        assert trace.drain() == ([], 0)
    assert sum(count for _, count in trace.latencies()[LOOKUP]) == 4


def test_the_layer_of_an_answer_is_that_of_the_lanes_own_tree(layer: DirLayer, scratch: Path) -> None:
    """The trace outlives trees that told it of merges; only that of a lane is sure to live while it answers."""
    (scratch / "empty").mkdir()
    above = DirLayer(bytes(scratch / "empty"), layer.inos, prefixes=(USER,))
    other, tree, trace = Tree([None, layer]), Tree([None, above, layer]), Trace()
    other.tell_merged(trace)
    nodeid = other.lookup(1, b"motd")  # type: ignore[arg-type]
    trace.start(16)
    for _ in range(2):
        with laned(tree=tree, trace=trace) as bench:
            bench.kernel.send(request(LOOKUP, 2, b"motd\0"))
            bench.kernel.recv(4096)
        answers = [(record[5], record[7]) for record in trace.drain()[0] if record[0] == ANSWER]
        assert answers == [(nodeid, 2)]
        other = tree  # the first is gone


@pytest.mark.parametrize("make", [Tree, ReferenceTree])
def test_a_merge_is_told_by_both_trees(make: Callable[..., Tree], layer: DirLayer) -> None:
    tree, trace = make([None, layer]), Trace()
    tree.tell_merged(trace)
    trace.start(16)

    tree.lookup(1, b"motd")  # type: ignore[arg-type]
    tree.lookup(1, b"etc")  # type: ignore[arg-type]

    records, dropped = trace.drain()
    ((kind, _, _, _, nodeid, number, _, _, by_starter, layers),) = records
    assert (kind, nodeid, number, by_starter, list(array("H", layers))) == (MERGE, 1, 2, True, [1])
    assert dropped == 0
    assert tree.counts() == (3, 1, 2)


def test_what_is_no_trace_is_refused(layer: DirLayer) -> None:
    with pytest.raises(TypeError, match="Trace is needed"):
        Tree([None, layer]).tell_merged(cast("Trace", object()))
    for capacity in (0, -1, 1 << 40):
        with pytest.raises(OSError, match="Invalid") as error:
            Trace().start(capacity)
        assert error.value.errno == errno.EINVAL


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_trace_is_clean_under_the_sanitizers(tmp_path: Path, sanitizer: str) -> None:
    """No access out of bounds for damaged messages, no race between tellers and the one who drains."""
    program = tmp_path / "lane_trace"
    compiled = subprocess.run(
        [
            "gcc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Werror",
            "-fno-sanitize-recover=all", f"-fsanitize={sanitizer}",
            "-I", NATIVE, HERE / "test_lane_trace.c", NATIVE / "lane_trace.c",
            "-o", program, "-lpthread",
        ],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([program], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "done\n"
