"""`ovlfs run` without root: by subuids where there are some, by one id otherwise; what it leaves, and what not."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
from helpers_images import images
from helpers_run import holders, make_image
from helpers_users import UID, User, interpreter

pytestmark = [pytest.mark.fuse, pytest.mark.root]

SMALL = "small-docker20.tar"
ENGINES = {"crun": (), "chroot": ("--chroot",)}


@pytest.fixture(params=ENGINES)
def words(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return ENGINES[str(request.param)]


@pytest.fixture
def user(user: User, scratch: Path) -> Iterator[User]:
    """Of whom nothing is left at the end."""
    yield user
    nothing_is_left(user, scratch)


@pytest.fixture
def lent(user: User) -> User:
    """A user who has more ids."""
    user.lend_ids()
    return user


@pytest.fixture
def image(scratch: Path) -> Path:
    return make_image(scratch / "it.tar", {"Cmd": ["sh"], "StopSignal": "SIGUSR1"})


def nothing_is_left(user: User, scratch: Path) -> None:
    processes.wait_until(lambda: not holders(scratch) - {os.getpid()}, "all mounts and their processes are gone")
    store = user.home / ".local/share/ovlfs"

    def swept() -> bool:
        return not any(os.listdir(store / name) for name in ("runs", "ephemeral") if (store / name).exists())

    processes.wait_until(swept, "nothing temporary is left in the store")


def test_with_lent_ids(lent: User, words: tuple[str, ...]) -> None:
    """Everything is as for root: owners, users, supplementary groups, chown."""
    result = lent.ovlfs("run", *words, images() / SMALL)
    assert result.stdout == "serving from /srv/app as app: with two  spaces --port=8080\n"
    assert result.stderr == f"ovlfs: rootless: uid {UID} is root here, and 65536 more ids come from /etc/subuid\n"
    script = (
        "id; stat -c '%u:%g' / /etc/passwd /srv/data/seed; touch /x; chown 5:6 /x; stat -c '%u:%g' /x; "
        "su app -s /bin/sh -c 'id; touch /y || echo denied'; chown 65537 /x || echo beyond"
    )
    result = lent.ovlfs("run", *words, "-u", "0", "--entrypoint", "sh", images() / SMALL, "--", "-c", script)
    assert result.stdout.splitlines() == [
        "uid=0(root) gid=0(root)",
        *["0:0", "0:0", "1000:1000", "5:6"],
        "uid=1000(app) gid=1000(app) groups=46(plugdev),1000(app)",
        "denied",
        "beyond",
    ]


def test_without_lent_ids(user: User, words: tuple[str, ...]) -> None:
    """Root is the only user; one that does not exist is refused in one line."""
    script = (
        "id -u; stat -c '%u:%g' / /etc/passwd /srv/data/seed /opt/links/one; "
        "touch /x /srv/data/x; chown 5 /x || echo no"
    )
    result = user.ovlfs("run", *words, "-u", "0", "--entrypoint", "sh", images() / SMALL, "--", "-c", script)
    assert result.stdout.splitlines() == ["0", "0:0", "0:0", "0:0", "65534:65534", "no"]
    note = f"ovlfs: rootless: uid {UID} is root here, and there are no other users (/etc/subuid lends uid {UID} no ids)"
    assert result.stderr.splitlines()[0] == note
    result = user.ovlfs("run", *words, images() / SMALL, code=125)
    assert result.stderr.splitlines()[0] == note
    assert "the command's uid 1000 does not exist here" in result.stderr.splitlines()[1]
    assert len(result.stderr.splitlines()) == 2


def test_without_newuidmap(lent: User, image: Path, words: tuple[str, ...]) -> None:
    lent.run("sh", "-c", "mount --bind /dev/null /usr/bin/newgidmap", as_root=True)
    try:
        result = lent.ovlfs("run", *words, image, "--", "id", "-u")
    finally:
        lent.run("umount", "/usr/bin/newgidmap", as_root=True)
    assert result.stdout == "0\n"
    assert "newgidmap is missing" in result.stderr


@pytest.mark.parametrize("network", ["host", "none"])
def test_networks(lent: User, image: Path, words: tuple[str, ...], network: str) -> None:
    result = lent.ovlfs("run", *words, "--network", network, image, "--", "ls", "/sys/class/net")
    names = result.stdout.split()
    assert names == ["lo"] if network == "none" else "lo" in names


def test_kept_changes_are_the_users_and_the_same_everywhere(lent: User, scratch: Path) -> None:
    """An upperdir written under lent ids shows the same in a mount of the user's, and under one id."""
    script = (
        "echo x > /x; chown 5:6 /x; chmod 4750 /x; mkdir /d; chown 7 /d; touch /d/f; mkfifo /p; ln -s x /l; "
        "rm -r /opt/zoo"
    )
    words = ["run", "-u", "0", "--entrypoint", "sh", "--upper", "up", images() / SMALL, "--", "-c"]
    lent.ovlfs(*words, script)
    upper = lent.home / "up"
    for path in (upper, *upper.rglob("*")):
        assert os.lstat(path).st_uid == UID, path
    seen = lent.ovlfs(*words, "stat -c '%n %u:%g %a %F' /x /d /d/f /p /l").stdout
    assert seen.splitlines()[0] == "/x 5:6 4750 regular file"
    lent.ovlfs("mount", "--upper", "up", images() / SMALL, lent.directory("mnt"))
    listed = lent.run("stat", "-c", "%n %u:%g %a %F", "mnt/x", "mnt/d", "mnt/d/f", "mnt/p", "mnt/l").stdout
    assert listed.replace("mnt", "") == seen
    lent.ovlfs("umount", "mnt")
    lent.run("umount", "/etc/subuid", as_root=True)
    under_one = lent.ovlfs(*words, "stat -c '%n %u:%g %a %F' /x /d /d/f /p /l").stdout.splitlines()
    assert under_one[0] == "/x 65534:65534 4750 regular file"
    assert under_one[2] == "/d/f 0:0 644 regular empty file"


def test_names(lent: User, image: Path, words: tuple[str, ...]) -> None:
    for _ in range(2):
        lent.ovlfs("run", *words, "--name", "n", image, "--", "sh", "-c", "echo x >> /x; chown 5 /x")
    assert lent.ovlfs("run", *words, "--name", "n", "--rm", image, "--", "cat", "/x").stdout == "x\nx\n"
    assert not (lent.home / ".local/share/ovlfs/uppers/n").exists()


def test_inside_a_user_namespace(user: User, image: Path) -> None:
    """As the root that `unshare -Urm` makes: nothing more is made, and nothing said."""
    result = user.in_namespace('$OVLFS run "$1" -- id -u', image)
    assert result.stdout == "0\n"
    assert result.stderr == ""


FOREVER = "echo ready; while true; do sleep 0.05; done"


@contextlib.contextmanager
def running(user: User, *arguments: object) -> "Iterator[subprocess.Popen[str]]":
    """`ovlfs run` as the user; the process is the command line's own, for signals."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(user.home),
        "XDG_RUNTIME_DIR": str(user.home / "run"),
        "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent.parent.parent), *sys.path)),
    }
    prefix = ["nsenter", f"--mount={user.namespace}", "setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
    with subprocess.Popen(
        [*prefix, interpreter(), "-m", "ovlfs.cli.main", "run", *map(str, arguments)],
        env=environment, cwd=user.home, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        assert run.stderr is not None
        first = run.stdout.readline()
        assert first == "ready\n", run.stderr.read()
        try:
            yield run
        finally:
            if run.poll() is None:
                run.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals(lent: User, image: Path, words: tuple[str, ...], number: signal.Signals) -> None:
    """To a command of another user than ours, too."""
    script = "trap 'exit 5' USR1; touch /tmp/x; " + FOREVER
    with running(lent, *words, "-u", "1000", image, "--", "sh", "-c", script) as run:
        run.send_signal(number)
        run.communicate(timeout=30)
        assert run.returncode == (5 if number == signal.SIGTERM else -number)


def test_killed_daemon(lent: User, image: Path, words: tuple[str, ...]) -> None:
    with running(lent, *words, image, "--", "sh", "-c", FOREVER) as run:
        record = next((lent.home / "run/ovlfs").glob("*.json"))
        os.kill(int(record.name.split("-")[0]), signal.SIGKILL)
        _, said = run.communicate(timeout=30)
        assert run.returncode == 125
        assert "the daemon that serves the root file system has ended" in said
