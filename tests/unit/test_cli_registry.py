"""What is mounted where, by which process: mountinfo, the registry, places that must be apart."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from ovlfs.errors import MountError
from ovlfs.fuse import mounting
from ovlfs.fuse.mounting import MountEntry, Record, Registry


def own_record(**changes: object) -> Record:
    started = mounting.start_time(os.getpid())
    assert started is not None
    record = Record(pid=os.getpid(), started=started, mountpoint="/mnt/x", source="image.tar")
    return replace(record, **changes)  # type: ignore[arg-type]


@pytest.fixture
def registry(scratch: Path) -> Registry:
    return Registry(os.fsencode(scratch / "registry"))


# ---- mountinfo


def test_mount_table_reads_octal_escapes() -> None:
    line = rb"46 27 0:41 / /tmp/a\040b\134c\011 rw,nosuid shared:1 master:2 - fuse.ovlfs im\040age.tar rw,user_id=0"
    assert mounting.mount_table(line) == [
        MountEntry(b"/tmp/a b\\c\t", "0:41", b"fuse.ovlfs", b"im age.tar", "rw,nosuid,rw,user_id=0")
    ]


def test_mount_table_reads_an_empty_source() -> None:
    assert mounting.mount_table(b"1 2 0:3 / /mnt rw -  fuse.ovlfs")[0].mountpoint == b"/mnt"


def test_find_mount_finds_the_root() -> None:
    assert mounting.find_mount(b"/proc") is not None
    assert mounting.find_mount(b"/proc/self") is None


def test_resolve_mountpoint_follows_symlinks_on_the_way(scratch: Path) -> None:
    (scratch / "real").mkdir()
    (scratch / "link").symlink_to("real")
    assert mounting.resolve_mountpoint(os.fsencode(scratch / "link")) == os.fsencode((scratch / "real").resolve())


# ---- processes


def test_start_time_tells_the_living_from_the_dead() -> None:
    child = subprocess.Popen(["sleep", "60"])
    assert mounting.start_time(child.pid) is not None
    child.kill()
    child.wait()
    assert mounting.start_time(child.pid) is None


def test_start_time_of_a_zombie_is_none() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert mounting.start_time(pid) is None
    os.waitpid(pid, 0)


def test_watching_sees_the_end_of_a_process() -> None:
    child = subprocess.Popen(["sleep", "60"])
    started = mounting.start_time(child.pid)
    assert started is not None
    record = own_record(pid=child.pid, started=started)
    with mounting.watching(record) as pidfd:
        assert pidfd is not None
        assert not mounting.wait_for_end(pidfd, 0.01)
        child.kill()
        assert mounting.wait_for_end(pidfd, 10)
    child.wait()


def test_watching_is_not_fooled_by_a_pid_used_again() -> None:
    with mounting.watching(own_record(started=1)) as pidfd:
        assert pidfd is None


# ---- the registry


def test_registry_is_private(registry: Registry) -> None:
    assert os.stat(registry.path).st_mode & 0o777 == 0o700
    registry.save(own_record())
    (name,) = os.listdir(registry.path)
    assert os.stat(os.path.join(registry.path, name)).st_mode & 0o777 == 0o600


def test_registry_that_others_could_read_is_closed(scratch: Path) -> None:
    (scratch / "open").mkdir(mode=0o755)
    Registry(os.fsencode(scratch / "open"))
    assert (scratch / "open").stat().st_mode & 0o777 == 0o700


def test_registry_refuses_a_symlink(scratch: Path) -> None:
    (scratch / "real").mkdir()
    (scratch / "link").symlink_to("real")
    with pytest.raises(MountError):
        Registry(os.fsencode(scratch / "link"))


@pytest.mark.root
def test_registry_refuses_the_directory_of_another_user(scratch: Path) -> None:
    (scratch / "theirs").mkdir()
    os.chown(scratch / "theirs", 1234, 1234)
    with pytest.raises(MountError, match="belongs to uid 1234"):
        Registry(os.fsencode(scratch / "theirs"))


def test_records_come_back_as_they_were(registry: Registry) -> None:
    record = own_record(mountpoint=os.fsdecode(b"/mnt/\xff\n"), upper="/u", since=12.5, device="0:99")
    registry.save(record)
    assert registry.records() == [record]
    registry.remove(record)
    registry.remove(record)
    assert registry.records() == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": "x"}', "\0", '{"pid": 1, "started": "2"}', "x" * 100])
def test_damaged_records_are_ignored(registry: Registry, text: str) -> None:
    Path(os.fsdecode(registry.path), "1-2.json").write_text(text)
    assert registry.records() == []


def test_a_symlink_for_a_record_is_ignored(registry: Registry) -> None:
    os.symlink("/etc/passwd", os.path.join(registry.path, b"1-2.json"))
    assert registry.records() == []


def test_sweep_forgets_the_dead_only(registry: Registry) -> None:
    alive, dead = own_record(), own_record(started=1)
    registry.save(alive)
    registry.save(dead)

    assert registry.sweep() == [dead]
    assert registry.records() == [alive]


def test_a_record_of_another_pid_namespace_is_kept(registry: Registry) -> None:
    registry.save(own_record(started=1, pid_namespace=1))
    assert registry.sweep() == []


# ---- places


def test_a_mountpoint_must_be_a_directory(scratch: Path) -> None:
    (scratch / "file").touch()
    with pytest.raises(MountError, match="is not a directory"):
        mounting.check_mountpoint(os.fsencode(scratch / "file"))
    with pytest.raises(MountError, match="No such file"):
        mounting.check_mountpoint(os.fsencode(scratch / "nothing"))


def check(scratch: Path, mountpoint: str, lowers: list[str], upper: str, work: str) -> None:
    for name in (mountpoint, *lowers, upper, work):
        (scratch / name).mkdir(parents=True, exist_ok=True)
    paths = [os.fsencode(scratch / name) for name in lowers]
    mounting.check_lowerdirs(os.fsencode(scratch / mountpoint), tuple(paths))
    mounting.check_places(
        os.fsencode(scratch / mountpoint), tuple(paths), os.fsencode(scratch / upper), os.fsencode(scratch / work)
    )


@pytest.mark.parametrize(
    ("mountpoint", "lowers", "upper", "work"),
    [("m", ["l"], "u", "w"), ("l", ["l"], "u", "w"), ("m", ["m/l"], "u", "w"), ("m", ["l", "l/l"], "x/u", "x/w")],
)
def test_places_that_are_apart_are_fine(
    scratch: Path, mountpoint: str, lowers: list[str], upper: str, work: str
) -> None:
    check(scratch, mountpoint, lowers, upper, work)


@pytest.mark.parametrize(
    ("mountpoint", "lowers", "upper", "work", "said"),
    [
        ("m", ["l"], "u", "u", "must be apart"),
        ("m", ["l"], "u", "u/w", "must be apart"),
        ("m", ["l"], "w/u", "w", "must be apart"),
        ("m", ["l"], "l/u", "w", "must be apart"),
        ("m", ["u/l"], "u", "w", "must be apart"),
        ("m", ["l"], "u", "l/w", "must be apart"),
        ("u/m", ["l"], "u", "w", "must not be in upperdir"),
        ("w/m", ["l"], "u", "w", "must not be in workdir"),
        ("m", ["l"], "m/u", "w", "would be hidden"),
        ("m", ["l"], "u", "m/w", "would be hidden"),
        ("l/m", ["l"], "u", "w", "must not be inside lowerdir"),
    ],
)
def test_places_inside_each_other_are_refused(
    scratch: Path, mountpoint: str, lowers: list[str], upper: str, work: str, said: str
) -> None:
    with pytest.raises(MountError, match=said):
        check(scratch, mountpoint, lowers, upper, work)


def test_a_symlink_does_not_hide_a_place(scratch: Path) -> None:
    (scratch / "u").mkdir()
    (scratch / "link").symlink_to("u")
    with pytest.raises(MountError, match="must be apart"):
        check(scratch, "m", ["l"], "u", "link/w")
