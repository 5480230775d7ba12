"""The life and death of a mount, by the real commands: ready when it answers, gone when it is all on disk."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]
SmallImage = Callable[..., Path]

pytestmark = pytest.mark.fuse


@pytest.fixture
def mountpoint(scratch: Path) -> Path:
    path = scratch / "mnt"
    path.mkdir()
    return path


def listed(ovlfs: Run, mountpoint: Path) -> dict[str, Any]:
    return processes.described(ovlfs("mounts", "--json").stdout, mountpoint)


def kill(ovlfs: Run, mountpoint: Path, number: int = signal.SIGKILL) -> int:
    """Send the daemon a signal and wait until it is gone; its pid."""
    pid = int(listed(ovlfs, mountpoint)["pid"])
    processes.kill(pid, number)
    return pid


# ---- birth


def test_mount_answers_when_the_command_returns(ovlfs: Run, small_image: SmallImage, mountpoint: Path) -> None:
    image = small_image({"etc/motd": b"one"}, {"etc/motd": b"two", "etc/.wh.issue": b"", "bin": None})
    result = ovlfs("mount", image, mountpoint)

    first, second = result.stdout.splitlines()
    assert first == f"mounted {image} (2 layers, 2 files) on {mountpoint}"
    assert second.startswith("changes are kept in ")
    assert result.stderr == ""
    assert (mountpoint / "etc/motd").read_bytes() == b"two"
    ovlfs("umount", mountpoint)
    assert not processes.is_mounted(mountpoint)


def test_changes_are_found_again_by_the_next_mount(ovlfs: Run, small_image: SmallImage, mountpoint: Path) -> None:
    image = small_image()
    for number in range(3):
        ovlfs("mount", image, mountpoint)
        assert len(os.listdir(mountpoint / "etc")) == 2 + number
        (mountpoint / "etc" / f"new{number}").write_text("x")
        ovlfs("umount", mountpoint)
    ovlfs("mount", "--ro", image, mountpoint)
    assert sorted(os.listdir(mountpoint / "etc")) == ["hosts", "motd"]
    ovlfs("umount", mountpoint)
    ovlfs("mount", image, mountpoint)
    assert sorted(os.listdir(mountpoint / "etc")) == ["hosts", "motd", "new0", "new1", "new2"]
    ovlfs("umount", mountpoint)


def test_read_only_mount_refuses_writes(ovlfs: Run, small_image: SmallImage, mountpoint: Path) -> None:
    result = ovlfs("mount", "--ro", small_image(), mountpoint)
    assert "read-only" in result.stdout
    with pytest.raises(OSError, match="Read-only"):
        (mountpoint / "x").touch()
    ovlfs("umount", mountpoint)


def test_ephemeral_changes_are_dropped(ovlfs: Run, small_image: SmallImage, mountpoint: Path) -> None:
    image = small_image()
    assert "dropped" in ovlfs("mount", "--ephemeral", image, mountpoint).stdout
    (mountpoint / "etc/hosts").write_text("changed")
    upper = Path(listed(ovlfs, mountpoint)["upper"])
    assert (upper / "etc/hosts").read_text() == "changed"
    ovlfs("umount", mountpoint)

    assert not upper.parent.exists()
    ovlfs("mount", "--ephemeral", image, mountpoint)
    assert (mountpoint / "etc/hosts").read_bytes() == b"localhost\n"
    ovlfs("umount", mountpoint)


def test_upper_and_work_are_made_and_remembered(ovlfs: Run, small_image: SmallImage, mountpoint: Path) -> None:
    image, upper = small_image(), mountpoint.parent / "up"
    ovlfs("mount", "--upper", upper, image, mountpoint)
    (mountpoint / "etc/hosts").unlink()
    ovlfs("umount", mountpoint)

    assert sorted(path.name for path in mountpoint.parent.glob("up*")) == ["up", "up.image.json", "up.work"]
    assert os.listdir(upper) == ["etc"]  # nothing of ours in it
    other = small_image({"etc/passwd": b"x"}, name="other.tar")
    result = ovlfs("mount", "--upper", upper, other, mountpoint, code=1)
    assert "were made over another image" in result.stderr
    assert not processes.is_mounted(mountpoint)


def test_a_new_upperdir_looks_like_the_images_root(ovlfs: Run, small_image: SmallImage, mountpoint: Path) -> None:
    image = small_image({"./": None, "etc": None})
    upper = mountpoint.parent / "up"
    upper.mkdir(mode=0o700)
    for _ in range(2):
        ovlfs("mount", "--upper", upper, image, mountpoint)
        found = mountpoint.stat()
        assert (found.st_mode & 0o7777, found.st_uid, found.st_mtime) == (0o755, 0, 1_700_000_000)
        ovlfs("umount", mountpoint)


def test_directories_are_mounted_by_options(ovlfs: Run, mountpoint: Path) -> None:
    base = mountpoint.parent
    for name in ("l:1", "l,2", "u", "w"):
        (base / name).mkdir()
        (base / name / f"in-{name}").touch()
    options = r"lowerdir=l\:1:l\,2,upperdir=u,workdir=w,nofail,x-test"
    ovlfs("mount", "-o", options, "mnt", cwd=base, env=os.environ | {"PYTHONPATH": os.getcwd()})

    assert sorted(os.listdir(mountpoint)) == ["in-l,2", "in-l:1", "in-u"]
    ovlfs("umount", mountpoint)


def test_foreground_logs_to_stderr_and_ends_with_the_mount(
    small_image: SmallImage, mountpoint: Path, ovlfs: Run
) -> None:
    image = small_image()

    process = subprocess.Popen(
        [sys.executable, "-m", "ovlfs.cli.main", "mount", "-f", "--debug", image, mountpoint],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("mounted ")
    os.stat(mountpoint / "etc/hosts")
    assert listed(ovlfs, mountpoint)["pid"] == process.pid
    assert listed(ovlfs, mountpoint)["log"] is None
    ovlfs("umount", mountpoint)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "lookup" in said.lower()


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nothing.tar", "mnt"], 1, "nothing.tar: no such file"),
        (["image.tar", "nowhere"], 1, "nowhere: No such file or directory"),
        (["image.tar", "image.tar"], 1, "is not a directory"),
        (["image.tar:v9", "mnt"], 1, "small:latest"),
        (["-o", "foo", "image.tar", "mnt"], 2, "'foo'"),
        (["-o", "nfs_export=on", "image.tar", "mnt"], 2, "'nfs_export=on'"),
        (["-o", "lowerdir=nothing", "mnt"], 1, "nothing: No such file or directory"),
        (["-o", "lowerdir=mnt,upperdir=mnt2", "mnt"], 2, "workdir"),
        (["-o", "lowerdir=mnt", "image.tar", "mnt"], 2, "cannot be combined"),
        (["mnt"], 2, "what shall be mounted"),
        ([], 2, "MOUNTPOINT"),
        (["a", "b", "c"], 2, "MOUNTPOINT"),
        (["--nonsense", "image.tar", "mnt"], 2, "--nonsense"),
        (["--ro", "--ephemeral", "image.tar", "mnt"], 2, "not allowed with"),
        (["--work", "w", "image.tar", "mnt"], 2, "--upper"),
        (["--platform", "a/b/c/d", "image.tar", "mnt"], 2, "platform"),
        (["--platform", "linux/arm64", "image.tar", "mnt"], 1, "linux/arm64"),
        (["-o", "ephemeral,upperdir=u,workdir=w", "image.tar", "mnt"], 2, "contradict"),
        (["inner/image.tar", "inner"], 1, "would be hidden"),
        (["--upper", "mnt/up", "image.tar", "mnt"], 1, "would be hidden"),
    ],
)
def test_what_cannot_be_mounted_is_said_in_one_line(
    ovlfs: Run, small_image: SmallImage, scratch: Path, arguments: list[str], code: int, said: str
) -> None:
    (scratch / "mnt").mkdir()
    (scratch / "inner").mkdir()
    small_image()
    small_image(name="inner/image.tar")
    result = ovlfs("mount", *arguments, code=code, cwd=scratch, env=os.environ | {"PYTHONPATH": os.getcwd()})

    assert result.stderr.startswith("ovlfs: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
    assert not processes.is_mounted(scratch / "mnt")


def test_an_upperdir_in_use_is_refused(ovlfs: Run, small_image: SmallImage, scratch: Path, mountpoint: Path) -> None:
    image, other = small_image(), scratch / "other"
    other.mkdir()
    ovlfs("mount", image, mountpoint)

    assert "in use by another mount" in ovlfs("mount", image, other, code=1).stderr
    upper = listed(ovlfs, mountpoint)["upper"]
    for name in ("l", "w"):
        (scratch / name).mkdir()
    again = f"lowerdir={scratch}/l,upperdir={upper},workdir={scratch}/w"
    assert "in use by another mount" in ovlfs("mount", "-o", again, other, code=1).stderr
    ovlfs("mount", "--ro", image, other)
    ovlfs("mount", "--ephemeral", image, mountpoint)  # over the first one
    for place in (other, mountpoint, mountpoint):
        ovlfs("umount", place)


# ---- listing


def test_mounts_says_who_serves_what(ovlfs: Run, small_image: SmallImage, mountpoint: Path) -> None:
    image = small_image()
    ovlfs("mount", "-o", "nodev,noexec", image, mountpoint)
    found = listed(ovlfs, mountpoint)

    assert found["alive"]
    assert found["source"] == str(image)
    assert found["options"] == "nodev,noexec"
    assert "noexec" in found["mount_options"]
    assert "nosuid" in found["mount_options"]
    assert processes.is_running(found["pid"])
    assert Path(found["log"]).exists()
    assert time.time() - 60 < found["since"] < time.time() + 1
    text = ovlfs("mounts").stdout
    assert f"{image} on {mountpoint}\n" in text
    assert found["log"] in text
    ovlfs("umount", mountpoint)
    assert str(mountpoint) not in ovlfs("mounts").stdout


def test_mounts_is_an_empty_list_when_nothing_is_mounted(ovlfs: Run, mountpoint: Path) -> None:
    assert all(one["mountpoint"] != str(mountpoint) for one in json.loads(ovlfs("mounts", "--json").stdout))


# ---- death


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts_in_order(ovlfs: Run, small_image: SmallImage, mountpoint: Path, number: int) -> None:
    image = small_image()
    ovlfs("mount", image, mountpoint)
    (mountpoint / "etc/hosts").write_text("changed")
    kill(ovlfs, mountpoint, number)

    assert not processes.is_mounted(mountpoint)
    ovlfs("mount", image, mountpoint)
    assert (mountpoint / "etc/hosts").read_text() == "changed"
    ovlfs("umount", mountpoint)


def test_sigterm_removes_an_ephemeral_upperdir(ovlfs: Run, small_image: SmallImage, mountpoint: Path) -> None:
    ovlfs("mount", "--ephemeral", small_image(), mountpoint)
    upper = Path(listed(ovlfs, mountpoint)["upper"])
    kill(ovlfs, mountpoint, signal.SIGTERM)
    assert not upper.parent.exists()


def test_after_kill_9_the_next_mount_cleans_up_and_goes_on(
    ovlfs: Run, small_image: SmallImage, mountpoint: Path
) -> None:
    image = small_image()
    ovlfs("mount", image, mountpoint)
    (mountpoint / "etc/hosts").write_text("changed")
    (mountpoint / "etc/motd").unlink()
    work = Path(listed(ovlfs, mountpoint)["work"])
    kill(ovlfs, mountpoint)
    (work / "work" / "#1").write_text("a temp of the killed daemon")
    with pytest.raises(OSError, match=r"not connected|connection abort"):
        os.listdir(mountpoint)
    found = listed(ovlfs, mountpoint)
    assert not found["alive"]
    assert "dead" in ovlfs("mounts").stdout

    ovlfs("mount", image, mountpoint)
    assert (mountpoint / "etc/hosts").read_text() == "changed"
    assert os.listdir(mountpoint / "etc") == ["hosts"]
    assert not (work / "work" / "#1").exists()
    ovlfs("umount", mountpoint)
    assert not processes.is_mounted(mountpoint)


def test_an_ephemeral_upperdir_of_a_killed_daemon_goes_with_the_next_mount(
    ovlfs: Run, small_image: SmallImage, scratch: Path, mountpoint: Path
) -> None:
    image, other = small_image(), scratch / "other"
    other.mkdir()
    ovlfs("mount", "--ephemeral", image, other)
    ovlfs("mount", "--ephemeral", image, mountpoint)
    alive, dead = (Path(listed(ovlfs, place)["upper"]) for place in (other, mountpoint))
    (mountpoint / "etc/hosts").write_text("changed")
    kill(ovlfs, mountpoint)
    assert dead.exists()
    ovlfs("mount", image, mountpoint)

    assert not dead.parent.exists()
    assert alive.exists()
    for place in (other, mountpoint):
        ovlfs("umount", place)


def test_umount_removes_a_dead_mount(ovlfs: Run, small_image: SmallImage, mountpoint: Path) -> None:
    ovlfs("mount", small_image(), mountpoint)
    kill(ovlfs, mountpoint)
    ovlfs("umount", mountpoint)
    assert not processes.is_mounted(mountpoint)


def test_umount_returns_when_the_daemon_has_gone(ovlfs: Run, small_image: SmallImage, mountpoint: Path) -> None:
    for _ in range(5):
        ovlfs("mount", small_image(), mountpoint)
        pid = listed(ovlfs, mountpoint)["pid"]
        ovlfs("umount", mountpoint)
        assert not processes.is_running(pid)


def test_umount_of_a_busy_mount_fails_and_leaves_it_working(
    ovlfs: Run, small_image: SmallImage, mountpoint: Path
) -> None:
    ovlfs("mount", small_image(), mountpoint)
    with (mountpoint / "etc/hosts").open("rb") as file:
        result = ovlfs("umount", mountpoint, code=1)
        assert "is busy" in result.stderr
        assert result.stderr.count("\n") == 1
        assert (mountpoint / "etc/motd").exists()
        assert file.read() == b"localhost\n"
    ovlfs("umount", mountpoint)


def test_lazy_umount_lets_open_files_work_on(ovlfs: Run, small_image: SmallImage, mountpoint: Path) -> None:
    ovlfs("mount", small_image(), mountpoint)
    pid = listed(ovlfs, mountpoint)["pid"]
    with (mountpoint / "etc/hosts").open("rb") as file:
        ovlfs("umount", "--lazy", mountpoint)
        assert not processes.is_mounted(mountpoint)
        assert processes.is_running(pid)
        assert file.read() == b"localhost\n"
    processes.wait_until(lambda: not processes.is_running(pid), "the daemon ended with the last open file")


@pytest.mark.root
@pytest.mark.parametrize("copied_by", ["unshare", "bind"])
def test_umount_says_what_it_waits_for(ovlfs: Run, small_image: SmallImage, mountpoint: Path, copied_by: str) -> None:
    ovlfs("mount", small_image(), mountpoint)
    daemon, copy = listed(ovlfs, mountpoint)["pid"], mountpoint.parent / "copy"
    copy.mkdir()
    command = ["unshare", "--mount", "--propagation", "private", "sleep", "100"]
    if copied_by == "bind":
        subprocess.run(["mount", "--bind", mountpoint, copy], check=True)
        command = ["sleep", "100"]
    impatient = "import sys; from ovlfs.cli import main, umount; umount._PATIENCE_SECONDS = 0.2; sys.exit(main.main())"
    with subprocess.Popen(command) as holder:
        comm = Path(f"/proc/{holder.pid}/comm")
        processes.wait_until(lambda: comm.read_text() == "sleep\n", "it sleeps in its own mount namespace")
        with subprocess.Popen(
            [sys.executable, "-c", impatient, "umount", mountpoint], stderr=subprocess.PIPE, text=True
        ) as umount:
            assert umount.stderr is not None
            said = umount.stderr.readline()
            assert umount.poll() is None
            if copied_by == "bind":
                subprocess.run(["umount", copy], check=True)
            holder.kill()
            assert umount.wait(20) == 0
            assert umount.stderr.read() == ""
    where = f"process {holder.pid} (sleep) in its mount namespace, on {mountpoint}"
    assert said == (
        f"ovlfs: {mountpoint}: is unmounted here; waiting for its daemon, process {daemon}, since it is still mounted "
        f"elsewhere: {where if copied_by == 'unshare' else f'on {copy}'}\n"
    )


def test_umount_of_something_else_is_refused(ovlfs: Run, mountpoint: Path) -> None:
    assert "is not mounted" in ovlfs("umount", mountpoint, code=1).stderr
    assert "is not a mount of ovlfs, but proc" in ovlfs("umount", "/proc", code=1).stderr


def test_unmount_is_another_word_for_umount(ovlfs: Run, small_image: SmallImage, mountpoint: Path) -> None:
    ovlfs("mount", small_image(), mountpoint)
    ovlfs("unmount", mountpoint)
    assert not processes.is_mounted(mountpoint)


def test_a_mount_that_is_taken_away_by_others_ends_the_daemon(
    ovlfs: Run, small_image: SmallImage, mountpoint: Path
) -> None:
    """`umount`, `fusermount3 -u`: what podman does."""
    ovlfs("mount", small_image(), mountpoint)
    pid = listed(ovlfs, mountpoint)["pid"]
    program = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    subprocess.run([*program, mountpoint], check=True)
    processes.wait_until(lambda: not processes.is_running(pid), "the daemon ended")
    assert os.listdir(os.environ["OVLFS_RUNTIME_DIR"]) == []


def test_a_failed_mount_leaves_nothing_behind(ovlfs: Run, small_image: SmallImage, mountpoint: Path) -> None:
    image = small_image(compress=True)
    raw = image.read_bytes()
    image.write_bytes(raw.replace(b"\x1f\x8b\x08", b"\x1f\x8b\x08\xff", 1))
    ovlfs("mount", "--ephemeral", image, mountpoint, code=1)

    assert not processes.is_mounted(mountpoint)
    store = Path(os.environ["OVLFS_STORE"])
    assert not list(store.glob("ephemeral/*"))
    assert not list(store.glob("tmp/*"))
