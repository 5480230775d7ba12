"""`ovlfs run` as root: by crun, by runc and by chroot, with real containers."""

import json
import os
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_images import images
from helpers_run import ENGINES, ROOT, command_line, engine_environment, make_image, nothing_is_left

pytestmark = [pytest.mark.fuse, pytest.mark.root]

Go = Callable[..., "subprocess.CompletedProcess[str]"]
SMALL = "small-docker20.tar"


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def go(engine: str, scratch: Path) -> Go:
    """`go(*arguments, code=0)` is `ovlfs run`; afterwards nothing is left."""

    def run(*arguments: object, code: int = 0, **keywords: object) -> "subprocess.CompletedProcess[str]":
        settings = {"capture_output": True, "text": True, "timeout": 60, "cwd": scratch} | keywords
        result: subprocess.CompletedProcess[str] = subprocess.run(  # type: ignore[call-overload]
            command_line(engine, *arguments), env=engine_environment(engine, scratch), **settings
        )
        assert result.returncode == code, f"exit code {result.returncode}: {result.stdout}{result.stderr}"
        nothing_is_left(scratch, Path(os.environ["OVLFS_STORE"]))
        return result

    return run


@pytest.fixture
def image(scratch: Path) -> Path:
    return make_image(scratch / "it.tar", {"Cmd": ["sh"]})


def test_config_of_a_real_image(go: Go) -> None:
    """Entrypoint, Cmd, Env, WorkingDir and User of the fixture: what `docker run` printed (tests/image/README.md)."""
    result = go(images() / SMALL)
    assert result.stdout == "serving from /srv/app as app: with two  spaces --port=8080\n"
    assert result.stderr == ""
    assert go(images() / SMALL, "--", "echo", "in place of Cmd").stdout == "in place of Cmd\n"
    result = go("--entrypoint", "sh", images() / SMALL, "--", "-c", "id; pwd; echo $HOME $GREETING $EMPTY.")
    assert result.stdout == (
        "uid=1000(app) gid=1000(app) groups=46(plugdev)\n/srv/app\n/home/app hello world, twice .\n"
    )


def test_overrides(go: Go, image: Path) -> None:
    words = ["-u", "5:6", "-w", "/new/dir", "-e", "A=b c", "-e", "HERE", "-e", "UNSET_HERE", "--hostname", "box"]
    script = 'id -u; id -g; pwd; echo "$A/$HERE/${UNSET_HERE-unset}"; hostname; echo $HOSTNAME; cat /etc/hostname'
    os.environ["HERE"] = "ours"
    try:
        result = go(*words, image, "--", "sh", "-c", script)
    finally:
        del os.environ["HERE"]
    assert result.stdout.splitlines() == ["5", "6", "/new/dir", "b c/ours/unset", "box", "box", "box"]


def test_exit_codes(go: Go, image: Path) -> None:
    go(image, "--", "sh", "-c", "exit 3", code=3)
    go(image, "--", "sh", "-c", "exit 1", code=1)
    go(image, "--", "sh", "-c", "exit 255", code=255)
    # sh forks, so that it is not process 1, which no signal of its own can kill
    go(image, "--", "sh", "-c", "sh -c 'kill -9 $$'; exit $?", code=137)


@pytest.mark.parametrize(
    ("command", "code"),
    [("nosuch", 127), ("/no/such", 127), ("/etc/hosts", 126), ("/etc", 126), ("/script", 126), ("/broken", 127)],
)
def test_commands_that_cannot_start(go: Go, engine: str, scratch: Path, command: str, code: int) -> None:
    """As `docker run`: 127 not found, 126 not executable, and the command is named.

    Whether execve(2) likes the file is known when the runtime has become it: then it is 1, with docker too.
    """
    if engine != "chroot" and command in {"/script", "/broken"}:
        code = 1
    hosts = tarfile.TarInfo("etc/hosts")
    image = make_image(
        scratch / "x.tar",
        {},
        {"etc/hosts": hosts, "script": b"no interpreter\n", "broken": b"#!/no/such/interpreter\n"},
    )
    result = go(image, "--", command, code=code)
    assert len(result.stderr.splitlines()) <= 2, result.stderr
    assert command in result.stderr
    assert result.stdout == ""


def test_stdin_is_passed_on(go: Go, image: Path) -> None:
    sent = "x" * 300_000 + "\n"
    assert go(image, "--", "cat", input=sent).stdout == sent


def test_closed_descriptors_are_nobodys(go: Go, engine: str, scratch: Path, image: Path) -> None:
    """Started without stdin, or without any: nothing of ours takes their numbers."""
    words = command_line(engine, "--upper", "up", image, "--", "sh", "-c", "readlink /proc/self/fd/0 >/n; id -u >>/n")
    for closed in ("<&-", "<&- >&- 2>&-"):
        result = subprocess.run(
            ["sh", "-c", f'"$@" {closed}', "sh", *words],
            env=engine_environment(engine, scratch), cwd=scratch, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        stdin, uid = (scratch / "up/n").read_text().splitlines()
        assert stdin == "/dev/null" or (engine == "runc" and stdin.startswith("pipe:")), "runc copies it by a pipe"
        assert uid == "0"
    nothing_is_left(scratch, Path(os.environ["OVLFS_STORE"]))


def test_a_shell_alone_gets_the_stdin(go: Go, image: Path) -> None:
    assert go("-i", image, input="echo one; exit 4\n", code=4).stdout == "one\n"


def test_what_is_around_the_command(go: Go, engine: str, image: Path) -> None:
    """/proc of its own, the devices, no descriptor of ours, and no capability to make devices."""
    script = (
        "ls -d /proc/[0-9]*; ls /proc/self/fd | wc -l; echo x > /dev/null; head -c 3 /dev/zero | wc -c; ls /sys/class"
    )
    inherited = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    try:
        lines = go(image, "--", "sh", "-c", script, pass_fds=(inherited,)).stdout.splitlines()
    finally:
        os.close(inherited)
    assert lines[0] == "/proc/1"
    assert len([line for line in lines if line.startswith("/proc/")]) <= 2
    numbers = [line for line in lines if line.isdigit()]
    assert numbers[0] == "4", "0, 1, 2 and the listing's own"
    assert numbers[1] == "3"
    assert "net" in lines
    if engine != "chroot":
        result = go(image, "--", "sh", "-c", "mknod /dev/sda b 8 0; mknod /sda b 8 0; ls /sda", code=1)
        assert result.stderr.count("Operation not permitted") == 2


def test_devices_of_the_image_are_dead_and_set_uid_works(go: Go, scratch: Path) -> None:
    """The mount is `suid,nodev`: /bin/su must work, the host's disks must not be had from a layer (H21)."""
    disk = tarfile.TarInfo("zero")
    disk.type, disk.devmajor, disk.devminor, disk.mode = tarfile.CHRTYPE, 1, 5, 0o666
    image = make_image(
        scratch / "x.tar", {"User": "1000"}, {"zero": disk, "etc/passwd": b"root::0:0::/:/bin/sh\na:x:1000:1:::\n"}
    )
    for words in ((), ("--read-only",), ("-u", "0"), ("-u", "0", "--read-only")):
        result = go(*words, image, "--", "sh", "-c", "id -u; touch /tmp/x || echo read-only; head -c 1 /zero", code=1)
        assert result.stdout == ("0" if "-u" in words else "1000") + (
            "\nread-only\n" if "--read-only" in words else "\n"
        )
        assert "Permission denied" in result.stderr
    go("--name", "suid", "-u", "0", image, "--", "sh", "-c", "chmod 4755 $(which su)")
    assert go("--name", "suid", "--rm", image, "--", "su", "root", "-c", "id -u").stdout == "0\n"


def test_changes_are_dropped_or_kept(go: Go, image: Path, scratch: Path) -> None:
    script = "cat /x 2>/dev/null; echo again >> /x"
    assert go(image, "--", "sh", "-c", script).stdout == ""
    assert go(image, "--", "sh", "-c", script).stdout == ""
    for words, upper in (
        (("--name", "kept"), Path(os.environ["OVLFS_STORE"]) / "uppers/kept/upper"),
        (("--upper", "up"), scratch / "up"),
    ):
        assert go(*words, image, "--", "sh", "-c", script).stdout == ""
        assert go(*words, image, "--", "sh", "-c", script).stdout == "again\n"
        assert (upper / "x").read_text() == "again\nagain\n"
        # What was made to mount on has gone again: /etc is there (copied up), empty, with the time of the image's.
        assert sorted(path.name for path in upper.rglob("*")) == ["etc", "x"]
    go("--name", "kept", "--rm", image, "--", "sh", "-c", script)
    assert not (Path(os.environ["OVLFS_STORE"]) / "uppers/kept").exists()


def test_volumes_of_the_image(go: Go, scratch: Path) -> None:
    """Filled from the image, writable under --read-only, kept with the changes, and no part of them."""
    config = {"Volumes": {"/data": {}, "/new/one": {}, "/../../link": {}}, "Cmd": ["true"]}
    owned = tarfile.TarInfo("data/owned")
    owned.uid, owned.gid, owned.mode, owned.size = 7, 8, 0o4711, 0
    members = {
        "data": None,
        "data/seed": b"seed\n",
        "data/owned": owned,
        "link": "/target",
        "target": None,
        "target/t": b"",
    }
    image = make_image(scratch / "x.tar", config, members)
    script = "cat /data/seed; stat -c '%u %g %a' /data/owned; ls /target; touch /data/n /new/one/n /target/n; touch /n"
    result = go("--read-only", image, "--", "sh", "-c", script, code=1)
    assert result.stdout == "seed\n7 8 4711\nt\n"
    assert result.stderr.count("Read-only") == 1
    words = ["--upper", "up", image, "--", "sh", "-c"]
    go(*words, "rm /data/seed; echo more > /data/more; touch /changed")
    assert go(*words, "ls /data").stdout == "more\nowned\n"
    assert not (scratch / "up/data").exists()
    go(image, "--", "cat", "/data/seed")


def test_a_volume_of_the_image_at_its_root_is_refused(go: Go, scratch: Path) -> None:
    for path, rule in (("/", "is the root itself"), ("/a/../..", "is the root itself"), ("/proc/x", "nothing can be")):
        image = make_image(scratch / "x.tar", {"Volumes": {path: {}}, "Cmd": ["true"]})
        result = go(image, code=125)
        assert rule in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_binds(go: Go, image: Path, scratch: Path) -> None:
    (scratch / "host").mkdir()
    (scratch / "host/file").write_text("ours\n")
    words = ["-v", "host:/a/b", "-v", f"{scratch}/host:/ro:ro", "-v", "host/file:/etc/one", image, "--", "sh", "-c"]
    result = go(*words, "cat /a/b/file /ro/file /etc/one; touch /a/b/new; touch /ro/new", code=1)
    assert result.stdout == "ours\nours\nours\n"
    assert "Read-only" in result.stderr
    assert sorted(path.name for path in (scratch / "host").iterdir()) == ["file", "new"]
    (scratch / "host/sub").mkdir()
    words = ["-v", "host:/src", "-w", "/src/sub", "--upper", "up", image]
    assert go(*words, "--", "pwd").stdout == "/src/sub\n"
    assert not (scratch / "up/src").exists()


def test_network(go: Go, image: Path) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    script = f"ls /sys/class/net | wc -l; nc -w 2 127.0.0.1 {port} </dev/null && echo there"
    with server:
        script_host = f"echo | nc -w 5 127.0.0.1 {port} && echo there"
        with subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import socket; s = socket.socket(fileno={server.fileno()}); s.accept()[0].close()",
            ],
            pass_fds=(server.fileno(),),
        ) as accepting:
            assert go(image, "--", "sh", "-c", script_host).stdout.endswith("there\n")
            accepting.wait(10)
    result = go("--network", "none", image, "--", "sh", "-c", script, code=1)
    assert "there" not in result.stdout
    assert "127.0.0.1" in go("--network", "none", image, "--", "ip", "addr", "show", "lo").stdout


def test_images_for_other_machines(go: Go, scratch: Path) -> None:
    other = "s390x"
    result = go(make_image(scratch / "o.tar", {"Cmd": ["sh"]}, architecture=other), code=125)
    assert f"is for linux/{other}, and this machine is" in result.stderr
    result = go(make_image(scratch / "w.tar", {"Cmd": ["sh"]}, system="windows"), code=125)
    assert "is for windows" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--user", "nosuch"), "user 'nosuch' is not in /etc/passwd of the image"),
        (("--user", "4294967296"), "should be a number from 0 to 2147483647"),
        (("-w", "/proc/self/fd/7"), "leads into /proc"),
        (("-w", "/etc/passwd"), "should be a directory"),
        (("-e", "=x"), "should be NAME=VALUE, or NAME"),
        (("-v", "nosuch:/x"), "is not there"),
        (("-v", "/:x"), "should be PATH:/DIR"),
        (("-v", "/etc:/proc/x"), "nothing can be mounted there"),
        (("-v", "/etc:/"), "nothing can be mounted there"),
        (("--hostname", "-x y"), "is no host name"),
        (("--name", "../x"), "should be letters"),
        (("--tty",), "stdin is no terminal"),
        (("--rm", "--upper", "up"), "a directory of your own"),
        (("--nosuchoption",), "--nosuchoption"),
        (("--network", "bridge"), "invalid choice"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_125(go: Go, image: Path, words: tuple[str, ...], said: str) -> None:
    result = go(*(f"{word}" for word in words), image, "--", "true", code=125, stdin=subprocess.DEVNULL)
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr


@pytest.mark.parametrize(("config", "words"), [({}, ("-v", "/etc:/proc/x")), ({"StopSignal": "NONSENSE"}, ())])
def test_no_working_directory_is_left_where_no_command_was_run(
    go: Go, scratch: Path, config: dict[str, str], words: tuple[str, ...]
) -> None:
    image = make_image(scratch / "it.tar", {"Cmd": ["true"], "WorkingDir": "/made/here"} | config)
    go("--upper", "up", *words, image, code=125)
    assert not (scratch / "up/made").exists()


def test_a_working_directory_that_was_there_stays(go: Go, image: Path, scratch: Path) -> None:
    go("--upper", "up", "-w", "/made", image, "--", "true")
    go("--upper", "up", "-w", "/made/here", "-v", "/etc:/proc/x", image, "--", "true", code=125)
    assert os.listdir(scratch / "up/made") == []


def test_hostile_roots(go: Go, scratch: Path) -> None:
    """/proc, /etc/hosts and /etc/resolv.conf that lead elsewhere: refused, or inside, and the host's are untouched."""
    before = Path("/etc/hosts").read_bytes()
    members = {"etc/hosts": "/../../../../etc/hostlist", "etc/resolv.conf": "../run/systemd/resolve/stub.conf"}
    image = make_image(scratch / "x.tar", {"Cmd": ["true"]}, members)
    assert go(image, "--", "sh", "-c", "echo evil > /etc/hosts; cat /etc/hostlist; ls /run/systemd/resolve").stdout == (
        "evil\nstub.conf\n"
    )
    assert Path("/etc/hosts").read_bytes() == before
    for name in ("proc", "dev", "sys"):
        hostile = make_image(scratch / f"{name}.tar", {"Cmd": ["true"]}, {name: "/etc"})
        result = go(hostile, code=125)
        assert "is a symlink in the image" in result.stderr


def test_no_runtime(image: Path, scratch: Path) -> None:
    """One line says what to install."""
    hide = "for name in /usr/sbin/runc /sbin/runc; do test ! -e $name || mount --bind /dev/null $name; done"
    words = command_line("crun", "--upper", scratch / "up", "-w", "/made/here", image)
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", hide + '; exec "$@"', "sh", *words],
        env=engine_environment("chroot", scratch),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 125
    assert "no OCI runtime" in result.stderr
    assert not (scratch / "up/made").exists()
    nothing_is_left(scratch, Path(os.environ["OVLFS_STORE"]))


def test_a_root_file_system_without_config(go: Go) -> None:
    assert go(images() / "rootfs.tar.xz", "--", "sh", "-c", "id -u; pwd").stdout == "0\n/\n"
    assert "does not say what to run" in go(images() / "rootfs.tar.xz", code=125).stderr


def test_help_says_the_exit_codes(ovlfs: Go) -> None:
    said = ovlfs("run", "--help").stdout
    for word in ("125", "126", "127", "128+n"):
        assert word in said


def test_start_is_quick_to_say_what_it_can(ovlfs: Go) -> None:
    """`ovlfs --help` imports nothing of it."""
    script = """
import sys
sys.argv = ["ovlfs", "--help"]
from ovlfs.cli.main import main
main()
print([name for name in sys.modules if name.startswith("ovlfs.run") or name == "trio"])
"""
    result = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.stdout.endswith("[]\n")
    assert json.dumps(result.stderr) == '""'
