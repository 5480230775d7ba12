"""Who is USER, where does a path lead, which process is it: with hostile roots, without a mount."""

import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovlfs.errors import ImageError, UsageError
from ovlfs.image.config import Config
from ovlfs.image.platform import host_platform, normalise
from ovlfs.run import inside
from ovlfs.run.process import Overrides, check_platform, parse_signal, resolve
from ovlfs.run.user import MAX_ID, User, resolve_user

PASSWD = """\
# a comment:x:1:1::/:
root:x:0:0:root:/root:/bin/sh
app:x:1000:1001:An App:/home/app:/bin/sh
1000:x:77:77:a number for a name:/n:
broken
short:x:5:6
big:x:2147483648:1:::
negative:x:-1:1:::
"""
GROUP = """\
root:x:0:
app:x:1001:
disk:x:6:app,other
again:x:6:app
tape:x:26:other,app
5000:x:88:
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    base = tmp_path / "root"
    (base / "etc").mkdir(parents=True)
    (base / "etc/passwd").write_text(PASSWD)
    (base / "etc/group").write_text(GROUP)
    return base


@pytest.fixture
def rootfd(root: Path) -> Iterator[int]:
    fd = inside.open_root(bytes(root))
    yield fd
    os.close(fd)


# ---- user


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", User(0, 0, (), "/root")),
        ("root", User(0, 0, (), "/root")),
        ("app", User(1000, 1001, (6, 26), "/home/app")),
        ("1000", User(1000, 1001, (6, 26), "/home/app")),  # the first line that fits, by name or number
        ("app:disk", User(1000, 6, (), "/home/app")),
        ("app:7", User(1000, 7, (), "/home/app")),
        ("app:", User(1000, 1001, (6, 26), "/home/app")),
        ("4242", User(4242, 0, (), "/")),
        ("4242:4343", User(4242, 4343, (), "/")),
        (f"{MAX_ID}", User(MAX_ID, 0, (), "/")),
        ("app:5000", User(1000, 88, (), "/home/app")),
        ("short", User(5, 6, (), "/")),
        (":disk", User(0, 6, (), "/root")),
    ],
)
def test_user(rootfd: int, text: str, expected: User) -> None:
    assert resolve_user(text, rootfd) == expected


@pytest.mark.parametrize(
    "text",
    ["nobody", "app:nogroup", "-1", "2147483648", "4294967295", "18446744073709551616", "9" * 5000, "big", "negative",
     "app:-1", "app:4294967296", "a:b:c", "root\0", "٣", "0x0", "../root", " root"],
)  # fmt: skip
def test_user_that_makes_no_sense(rootfd: int, text: str) -> None:
    """H40: one line, which names what is wrong."""
    with pytest.raises(ImageError) as caught:
        resolve_user(text, rootfd)
    assert "\n" not in str(caught.value)


def test_user_without_passwd(root: Path, rootfd: int) -> None:
    (root / "etc/passwd").unlink()
    (root / "etc/group").unlink()
    assert resolve_user("12:34", rootfd) == User(12, 34, (), "/")
    with pytest.raises(ImageError, match="user 'app' is not in /etc/passwd of the image"):
        resolve_user("app", rootfd)


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../../../../../../etc/passwd", "/proc/self/root/etc/passwd"])
def test_passwd_that_links_to_the_hosts_is_the_roots(root: Path, rootfd: int, target: str) -> None:
    """H41, CVE-2024-9676: an absolute target starts at the root of the image, `..` ends there."""
    (root / "etc/passwd").rename(root / "etc/real")
    (root / "etc/passwd").symlink_to(target)
    with pytest.raises(ImageError):
        resolve_user("daemon", rootfd)
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to("/../../etc/real")
    assert resolve_user("app", rootfd).uid == 1000


def test_passwd_that_is_no_file_is_refused_at_once(root: Path, rootfd: int) -> None:
    """H41: a fifo blocks who opens it, a device can do anything."""
    path = root / "etc/passwd"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ImageError, match="/etc/passwd in the image: should be a regular file"):
        resolve_user("root", rootfd)
    path.unlink()
    path.mkdir()
    with pytest.raises(ImageError, match="should be a regular file"):
        resolve_user("root", rootfd)


@pytest.mark.root
def test_passwd_that_is_a_device_is_not_opened(root: Path, rootfd: int) -> None:
    (root / "etc/passwd").unlink()
    os.mknod(root / "etc/passwd", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    with pytest.raises(ImageError, match="should be a regular file"):
        resolve_user("root", rootfd)


def test_passwd_of_a_gigabyte_is_refused(root: Path, rootfd: int) -> None:
    """CVE-2026-47262."""
    os.truncate(root / "etc/group", 1 << 30)
    with pytest.raises(ImageError, match="/etc/group in the image: is larger than"):
        resolve_user("app", rootfd)


# ---- paths


def test_paths_lead_nowhere_outside(root: Path, rootfd: int) -> None:
    (root / "a/b").mkdir(parents=True)
    (root / "abs").symlink_to("/a")
    (root / "up").symlink_to("../../../../a/b")
    (root / "a/b/back").symlink_to("..")
    for typed, found in [
        ("/", b""), ("", b""), ("..", b""), ("/../../etc", b"etc"), ("/a/./b//", b"a/b"), ("abs/b", b"a/b"),
        ("up", b"a/b"), ("/up/back/../etc", b"etc"), ("a/b/back/b", b"a/b"),
    ]:  # fmt: skip
        assert inside.find(rootfd, typed.encode()).path == found, typed


def test_missing_places_are_made_and_taken_away(root: Path, rootfd: int) -> None:
    """Also behind a link whose target is not there yet: /etc/resolv.conf of a systemd image."""
    (root / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    os.utime(root, ns=(1, 2))
    place = inside.find(rootfd, b"/etc/resolv.conf", make="file")
    assert place.absolute == b"/run/systemd/resolve/stub-resolv.conf"
    assert (root / "run/systemd/resolve/stub-resolv.conf").read_bytes() == b""
    inside.remove_stubs(rootfd, place.stubs)
    assert not (root / "run").exists()
    assert root.stat().st_mtime_ns == 2
    assert (root / "etc/resolv.conf").is_symlink()


def test_places_that_a_command_used_stay(root: Path, rootfd: int) -> None:
    place = inside.find(rootfd, b"/new/deep/dir", make="directory")
    (root / "new/kept").touch()
    inside.remove_stubs(rootfd, place.stubs)
    assert sorted(path.name for path in (root / "new").iterdir()) == ["kept"]


@pytest.mark.parametrize(
    ("path", "make", "rule"),
    [
        ("/loop", "directory", "symbolic links"),
        ("/etc/passwd/x", "file", "Not a directory"),
        ("/etc/passwd", "directory", "should be a directory"),
        ("/etc", "file", "should be a file"),
        ("/missing", "", "No such file"),
        ("/x" * 5 + "/" + "y" * 300, "directory", "File name too long"),
        ("/x" * 2048, "directory", "File name too long"),
    ],
)
def test_places_that_cannot_be_had(root: Path, rootfd: int, path: str, make: str, rule: str) -> None:
    (root / "loop").symlink_to("/loop")
    with pytest.raises(ImageError, match=rule):
        inside.find(rootfd, path.encode(), make=make)
    assert sorted(path.name for path in root.iterdir()) == ["etc", "loop"]


# ---- the process


def made(rootfd: int, config: Config, **overrides: object) -> tuple[tuple[str, ...], dict[str, str], bytes]:
    process = resolve(config, Overrides(**overrides), rootfd)  # type: ignore[arg-type]
    return process.argv, dict(one.split("=", 1) for one in process.env), process.cwd


def test_entrypoint_and_command(rootfd: int) -> None:
    config = Config(entrypoint=("e", "1"), cmd=("c", "2"))
    assert made(rootfd, config)[0] == ("e", "1", "c", "2")
    assert made(rootfd, config, argv=("x",))[0] == ("e", "1", "x")
    assert made(rootfd, config, argv=("x",), entrypoint=("f",))[0] == ("f", "x")
    assert made(rootfd, config, entrypoint=("f",))[0] == ("f",)
    assert made(rootfd, config, argv=("x",), entrypoint=())[0] == ("x",)
    with pytest.raises(UsageError, match="does not say what to run"):
        made(rootfd, config, entrypoint=())
    with pytest.raises(UsageError, match="does not say what to run"):
        made(rootfd, Config())


def test_environment(rootfd: int) -> None:
    config = Config(cmd=("c",), env=("A=1", "B=x=y", "EMPTY=", "NOEQUALS", "=novalue", "A=2"), user="app")
    env = made(rootfd, config, env=("B=z", "C=\udcff", "EMPTY"))[1]
    assert env == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "A": "2", "B": "z", "C": "\udcff", "HOME": "/home/app",
    }  # fmt: skip
    env = made(rootfd, Config(cmd=("c",), env=("PATH=/p", "HOME=/h", "TERM=dumb")), tty=True)[1]
    assert env == {"PATH": "/p", "HOME": "/h", "TERM": "dumb"}
    assert made(rootfd, Config(cmd=("c",)), tty=True)[1]["TERM"] == "xterm"


def test_working_directory(root: Path, rootfd: int) -> None:
    (root / "link").symlink_to("/etc")
    assert made(rootfd, Config(cmd=("c",)))[2] == b"/"
    assert made(rootfd, Config(cmd=("c",), working_dir="../../link"))[2] == b"/etc"
    assert made(rootfd, Config(cmd=("c",), working_dir="/etc"), cwd="/new/dir")[2] == b"/new/dir"
    assert (root / "new/dir").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize("path", ["/proc/self/fd/7", "/proc", "/x", "proc/../proc/self/fd/8/../.."])
def test_working_directory_in_proc_is_refused(root: Path, rootfd: int, path: str) -> None:
    """H40, CVE-2024-21626: there the runtime's own descriptors are, and one is the host's root."""
    (root / "x").symlink_to("/proc/self/fd/7/..")
    with pytest.raises(ImageError, match="leads into /proc"):
        made(rootfd, Config(cmd=("c",), working_dir=path))
    assert not (root / "proc").exists()


@pytest.mark.parametrize(
    "config",
    [
        Config(cmd=("a\0b",)),
        Config(entrypoint=("\0",)),
        Config(cmd=("c",), env=("A=\0",)),
        Config(cmd=("c",), working_dir="/a\0b"),
        Config(cmd=("c",), user="\0"),
        Config(cmd=("c",), stop_signal="SIGNOTHING"),
        Config(cmd=("c",), working_dir="/etc/passwd/x"),
    ],
)
def test_config_that_makes_no_sense(rootfd: int, config: Config) -> None:
    with pytest.raises(ImageError) as caught:
        made(rootfd, config)
    assert "\0" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_signals() -> None:
    for text, number in [
        ("SIGTERM", signal.SIGTERM), ("quit", signal.SIGQUIT), ("9", 9), ("SIGRTMIN+3", signal.SIGRTMIN + 3),
        ("RTMAX-1", signal.SIGRTMAX - 1), ("RTMIN", signal.SIGRTMIN),
    ]:  # fmt: skip
        assert parse_signal(text) == number
    for text in ("0", "65", "-1", "SIG_IGN", "RTMIN-1", "RTMAX+1", "1e3", "٣"):
        with pytest.raises(ImageError):
            parse_signal(text)


def test_platforms() -> None:
    host = host_platform()
    check_platform(Config(), "x")
    check_platform(Config(platform=host), "x")
    other = "arm64" if host.architecture != "arm64" else "amd64"
    with pytest.raises(ImageError, match=f"x: is for linux/{other}, and this machine is {host}"):
        check_platform(Config(platform=normalise("linux", other)), "x")
    if host.architecture == "amd64":
        check_platform(Config(platform=normalise("linux", "386")), "x")
        check_platform(Config(platform=normalise("linux", "amd64", "v3")), "x")
