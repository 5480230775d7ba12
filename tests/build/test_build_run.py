"""RUN, stages, the cache, and what a build prints and writes."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_build import Builds, Ovlfs, fill, history, rootfs, run_config

from ovlfs.build.cache import Cache
from ovlfs.image.store import Store

pytestmark = [pytest.mark.fuse, pytest.mark.root]

ROOT = Path(__file__).parent.parent.parent
ENGINES = {"crun": (), "chroot": ("--chroot",)}


@pytest.fixture
def builds(scratch: Path, ovlfs: Ovlfs) -> Builds:
    found = Builds(scratch, ovlfs)
    (found.context / "rootfs.tar.xz").write_bytes(rootfs().read_bytes())
    return found


BASE = "FROM scratch\nADD rootfs.tar.xz /\n"


@pytest.mark.parametrize("engine", ENGINES)
def test_run_forms_and_what_they_see(builds: Builds, engine: str) -> None:
    """Shell, exec and here-document; ENV, ARG, USER and WORKDIR; stdin is empty."""
    image = builds.image(
        BASE + "ENV e=env\nARG a=arg\nWORKDIR /w\nRUN echo $e $a $HOME > shell; cat > stdin\n"
        'RUN ["/bin/sh", "-c", "echo \\"$e\\" > exec"]\n'
        "RUN <<EOF\necho first > heredoc\nif true; then\n  echo $e >> heredoc\nfi\nEOF\n"
        "RUN cat <<a > both; cat <<'b' >> both\n$e\na\n$e\nb\n"
        "RUN <<EOF\n#!/bin/cat\nEOF\n"
        "RUN --network=none ls /sys/class/net > net\n"
        'SHELL ["/bin/sh", "-ec"]\nRUN false || echo $0 > shell2\n'
        "RUN echo 'u:x:33:44::/w:/bin/sh' >> /etc/passwd && chmod 777 .\nUSER u\n"
        "RUN id -u > id; id -g >> id; pwd >> id\n",
        *ENGINES[engine],
    )  # fmt: skip
    with builds.mounted(image) as mountpoint:
        found = {path.name: path.read_text() for path in (mountpoint / "w").iterdir()}
        assert (mountpoint / "w/id").stat().st_uid == 33
        assert not (mountpoint / ".ovlfs-heredoc").exists()
    assert found == {
        "shell": "env arg /root\n",
        "stdin": "",
        "exec": "env\n",
        "heredoc": "first\nenv\n",
        "both": "env\n$e\n",
        "net": "lo\n",
        "shell2": "/bin/sh\n",
        "id": "33\n44\n/w\n",
    }
    assert history(image.config)[4] == (
        "|1 a=arg /bin/sh -c echo $e $a $HOME > shell; cat > stdin", False
    )  # fmt: skip
    assert "a=arg" not in run_config(image.config)["Env"]


def test_a_run_leaves_only_its_changes(builds: Builds) -> None:
    """No mountpoints, no resolv.conf; a step that changes nothing makes no layer."""
    with tarfile.open(rootfs()) as archive:
        busybox = archive.extractfile("./usr/bin/busybox")
        assert busybox is not None
        (builds.context / "busybox").write_bytes(busybox.read())
    os.chmod(builds.context / "busybox", 0o755)
    text = (
        'FROM scratch\nCOPY busybox /b/\nRUN ["/b/busybox", "true"]\n'
        'RUN ["/b/busybox", "touch", "/b/made"]\n'
        'RUN ["/b/busybox", "sh", "-c", "/b/busybox touch /x; /b/busybox rm /x"]\n'
        'RUN ["/b/busybox", "rm", "/b/made"]\n'
    )
    image = builds.image(text)
    assert [empty for _, empty in history(image.config)] == [False, True, False, True, False]
    with builds.mounted(image) as mountpoint:
        assert sorted(str(path.relative_to(mountpoint)) for path in mountpoint.rglob("*")) == ["b", "b/busybox"]


def test_a_command_that_fails_ends_the_build(builds: Builds, ovlfs: Ovlfs) -> None:
    result = builds.run(BASE + "RUN echo said; exit 3\nRUN never\n", code=1)
    lines = result.stderr.splitlines()
    assert lines[-2:] == [
        "said",
        "ovlfs: Dockerfile:3: RUN: the command '/bin/sh -c echo said; exit 3' returned a non-zero code: 3",
    ]
    assert "Step 3/4 : RUN echo said; exit 3" in lines
    assert result.stdout == ""
    assert builds.run(BASE + 'RUN ["/nope"]\n', code=1).stderr.endswith("returned a non-zero code: 127\n")
    store = Path(os.environ["OVLFS_STORE"])
    assert os.listdir(store / "builds") == os.listdir(store / "tmp") == []


def test_quiet_prints_the_image_id_and_the_output_of_what_fails(builds: Builds) -> None:
    out = builds.scratch / "o.tar"
    result = builds.run(BASE + "RUN echo noise\n", "-q", "-t", f"{out}:app:1")
    assert result.stderr == ""
    raw = subprocess.run(["tar", "xOf", out, "manifest.json"], check=True, capture_output=True).stdout
    assert result.stdout == "sha256:" + json.loads(raw)[0]["Config"].rpartition("/")[2] + "\n"
    result = builds.run(BASE + "RUN echo noise; exit 1\n", "-q", code=1)
    assert result.stderr.splitlines()[0] == "noise"
    assert result.stdout == ""


def test_what_is_printed(builds: Builds) -> None:
    """As the classic builder does, on stderr."""
    result = builds.run("ARG b=scratch\nFROM $b\nADD rootfs.tar.xz /\nCMD a\n", "-t", builds.scratch / "o.tar:t:1")
    shown = re.sub(r"[0-9a-f]{12}", "ID", result.stderr)
    assert shown.splitlines() == [
        "Step 1/4 : ARG b=scratch",
        "Step 2/4 : FROM $b",
        " ---> ",
        "Step 3/4 : ADD rootfs.tar.xz /",
        " ---> ID",
        "Step 4/4 : CMD a",
        " ---> ID",
        "Successfully built ID",
        f"Successfully tagged {builds.scratch / 'o.tar:t:1'}",
    ]


# ---- the cache -------------------------------------------------------------------------------------------------------


def cached(result: "subprocess.CompletedProcess[str]") -> list[bool]:
    """Of each step, whether it came from the cache."""
    steps = re.split(r"^Step .*$", result.stderr, flags=re.MULTILINE)[1:]
    return [" ---> Using cache" in step for step in steps]


def test_the_cache_goes_by_content(builds: Builds) -> None:
    fill(builds.context, {"f": b"1", "d/x": b"2"})
    text = BASE + "ARG v=0\nCOPY f /f\nCOPY d /d\nRUN date +%N > /now; echo $v\nCMD x\n"
    first = builds.image(text)
    again = builds.run(text, "-t", builds.scratch / "again.tar")
    assert cached(again) == [False, True, True, True, True, True, True]
    assert builds.config(text).raw == first.config.raw
    os.utime(builds.context / "f")
    assert all(cached(builds.run(text))[1:])
    (builds.context / "d/y").write_bytes(b"")
    assert cached(builds.run(text)) == [False, True, True, True, False, False, False]
    (builds.context / "d/y").unlink()
    assert all(cached(builds.run(text))[1:])
    os.chmod(builds.context / "d/x", 0o600)
    assert cached(builds.run(text))[4] is False
    assert cached(builds.run(text, "--build-arg", "v=1")) == [False, True, True, True, True, False, False]
    assert cached(builds.run(text.replace("CMD x", "CMD y"), "--build-arg", "v=1")) == [False] + [True] * 5 + [False]
    assert not any(cached(builds.run(text, "--no-cache")))


def test_a_damaged_or_missing_layer_is_made_again(builds: Builds) -> None:
    first = builds.config(BASE)
    layers = Path(os.environ["OVLFS_STORE"]) / "layers/sha256"
    (layer,) = layers.iterdir()
    layer.unlink()
    assert cached(builds.run(BASE)) == [False, False]
    with layer.open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    assert cached(builds.run(BASE)) == [False, False]
    assert builds.config(BASE).diff_ids == first.diff_ids


def test_builds_at_the_same_time_share_the_store(builds: Builds) -> None:
    (builds.context / "Dockerfile").write_text(BASE + "RUN echo x > /x\nCMD y\n")
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "ovlfs.cli.main", "build", "-q", builds.context],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    assert [(len(build.communicate()[0]), build.returncode) for build in running] == [(len("sha256:") + 65, 0)] * 3
    assert all(cached(builds.run(BASE + "RUN echo x > /x\nCMD y\n"))[1:])


def kept(what: str) -> list[Path]:
    """Files of the store."""
    return [path for path in (Path(os.environ["OVLFS_STORE"]) / what).rglob("*") if path.is_file()]


def test_pruning_removes_what_no_build_has_used_for_so_long(builds: Builds, ovlfs: Ovlfs) -> None:
    shared, old, new = BASE + "RUN echo x > /x\n", "RUN echo old > /y\n", "RUN echo new > /y\n"
    builds.run(shared + old)
    assert ovlfs("build", "--prune", "1").stdout == "pruned steps: 0, layers: 0, bytes: 0\n"
    for record in kept("build"):
        os.utime(record, (0, 0))
    builds.run(shared + new)
    layers = {path: path.stat().st_size for path in kept("layers")}
    indexes = sum(path.stat().st_size for path in kept("index"))
    assert len(layers) == 4

    said = ovlfs("build", "--prune", "1").stdout

    (gone,) = layers.keys() - set(kept("layers"))
    freed = layers[gone] + indexes - sum(path.stat().st_size for path in kept("index"))
    assert said == f"pruned steps: 1, layers: 1, bytes: {freed}\n"
    assert all(cached(builds.run(shared + new))[1:])
    assert cached(builds.run(shared + old)) == [False, True, True, False]


def test_pruning_everything_leaves_no_layer_of_a_build(builds: Builds, ovlfs: Ovlfs) -> None:
    """Also none of a step that was done again, and came to something else."""
    text = BASE + "RUN cat /proc/sys/kernel/random/uuid > /new\n"
    builds.run(text)
    builds.run(text, "--no-cache")
    assert len(kept("layers")) == 3
    assert ovlfs("build", "--prune").stdout.startswith("pruned steps: 3, layers: 3, bytes: ")
    assert [*kept("layers"), *kept("build"), *kept("index")] == []
    assert cached(builds.run(text)) == [False] * 3


def test_pruning_leaves_the_layers_of_images(builds: Builds, ovlfs: Ovlfs, small_image: Callable[..., Path]) -> None:
    image = small_image(compress=True)
    ovlfs("ls", f"{image}:/")
    of_the_image = kept("layers")
    builds.run(f"FROM {image}\nCOPY rootfs.tar.xz /\n")
    assert len(kept("layers")) == 2
    ovlfs("build", "--prune")
    assert kept("layers") == of_the_image


def test_pruning_waits_for_builds(builds: Builds) -> None:
    builds.run(BASE)
    command = [sys.executable, "-m", "ovlfs.cli.main", "build", "--prune"]
    with contextlib.ExitStack() as building:
        cache = Cache(Store())
        for _ in range(2):  # several builds at a time
            building.enter_context(cache.in_use())
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as pruning:
            assert pruning.stderr is not None
            assert pruning.stderr.readline() == "waiting for a build to end\n"
            assert len(kept("build")) == 1
            building.close()
            assert pruning.communicate(timeout=20)[0].startswith("pruned steps: 1, layers: 1, bytes: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prune", "."], "a number of days"),
        (["--prune", "-1"], "--prune"),
        ([".", "--prune"], "CONTEXT"),
        ([], "CONTEXT"),
    ],
)
def test_pruning_builds_nothing(ovlfs: Ovlfs, words: list[str], said: str) -> None:
    assert said in ovlfs("build", *words, code=2).stderr


# ---- stages, bases, triggers -----------------------------------------------------------------------------------------


def test_stages_and_target(builds: Builds) -> None:
    text = (
        BASE.replace("scratch", "scratch AS Base")
        + "ENV a=1\nFROM base AS two\nRUN echo $a > /a\nFROM two\nRUN exit 9\n"
    )
    image = builds.image(text, "--target", "TWO")
    with builds.mounted(image) as mountpoint:
        assert (mountpoint / "a").read_text() == "1\n"
    assert len(builds.image(text, "--target", "0").layers) == 1
    assert "target stage 'nope' could not be found" in builds.fails(text, "--target", "nope")


def test_an_image_as_base_with_triggers(builds: Builds) -> None:
    """Its config and history go on; the triggers run in the build that takes it, and are gone then."""
    first = builds.image(BASE + "ENV a=1\nONBUILD COPY f /f\nONBUILD RUN echo $a > /t\nCMD x\n")
    fill(
        builds.context,
        {
            "f": b"1",
            "base.tar": first.path.read_bytes()
            if isinstance(first.path, Path)
            else Path(os.fsdecode(first.path)).read_bytes(),
        },
    )
    result = builds.run("FROM base.tar:built:1\nUSER 5\n")
    assert "# Executing 2 build triggers" in result.stderr.splitlines()
    image = builds.image("FROM base.tar:built:1\nUSER 5\n")
    assert run_config(image.config) == {
        "Env": run_config(first.config)["Env"],
        "Cmd": ["/bin/sh", "-c", "x"],
        "User": "5",
    }
    assert history(image.config)[: len(first.config.history)] == history(first.config)
    assert image.layers[0].diff_id == first.layers[0].diff_id
    with builds.mounted(image) as mountpoint:
        assert [(mountpoint / name).read_text() for name in "ft"] == ["1", "1\n"]
    assert "trigger" not in builds.run(f"FROM {os.fsdecode(image.path)}\nUSER 6\n").stderr
    bad = builds.image(BASE + "ONBUILD COPY nope /f\n")
    assert builds.fails(f"# x\nFROM {os.fsdecode(bad.path)}\n").startswith("Dockerfile:2: COPY: file not found")


def test_a_base_for_another_machine_can_be_copied_to_but_not_run(builds: Builds) -> None:
    first = builds.image(BASE, "--platform", "linux/s390x")
    base = f"FROM {os.fsdecode(first.path)}\n"
    assert builds.image(base + "COPY Dockerfile /\n").config.platform.architecture == "s390x"
    assert "its programs cannot be run" in builds.run(base + "RUN true\n", code=1).stderr


@pytest.mark.slow
def test_the_output_is_read_by_others(builds: Builds, ovlfs: Ovlfs) -> None:
    """A docker-archive and an OCI layout: skopeo reads both, and sees the config that we wrote."""
    text = BASE + 'ENV a=1\nRUN echo x > /x\nENTRYPOINT ["/bin/sh"]\n'
    out, layout = builds.scratch / "o.tar", builds.scratch / "layout"
    builds.run(text, "-t", f"{out}:app:v1")
    builds.run(text, "-t", f"{layout}/:v1")
    seen = []
    for reference in (f"docker-archive:{out}:app:v1", f"oci:{layout}:v1"):
        found = subprocess.run(["skopeo", "inspect", "--config", "--raw", reference], capture_output=True, check=True)
        seen.append(found.stdout)
    assert seen[0] == seen[1]
    assert json.loads(seen[0])["config"]["Env"][1:] == ["a=1"]
    subprocess.run(["umoci", "unpack", "--image", f"{layout}:v1", builds.scratch / "bundle"], check=True)
    assert (builds.scratch / "bundle/rootfs/x").read_text() == "x\n"


def test_the_output_is_no_part_of_the_context(builds: Builds) -> None:
    """Or each build would copy the image of the one before, and no COPY of everything would come from the cache."""
    (builds.context / "f").write_bytes(b"")
    text = "FROM scratch\nCOPY . /\n"
    for out in ("o.tar", "layout/"):
        builds.run(text, "-t", f"{builds.context}/{out}")
        assert all(cached(builds.run(text, "-t", f"{builds.context}/{out}"))[1:])
        assert builds.ovlfs("ls", f"{builds.context}/{out.rstrip('/')}:/").stdout.split().count("f") == 1
        subprocess.run(["rm", "-r", builds.context / out], check=True)


def test_usage_errors(builds: Builds, ovlfs: Ovlfs) -> None:
    assert "should be a directory" in ovlfs("build", builds.scratch / "nope", code=2).stderr
    assert "no such file; name the Dockerfile with -f" in ovlfs("build", builds.context, code=1).stderr
    assert "a tag should follow the colon" in builds.run(BASE, "-t", "x.tar:", code=2).stderr
    result = ovlfs("build", "-f", "-", builds.context, input="FROM scratch\nCOPY rootfs.tar.xz /\nFOO", code=1)
    assert result.stderr == "ovlfs: Dockerfile:3: unknown instruction: FOO\n"
