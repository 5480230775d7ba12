"""Which layers are measured: a Debian with programs in it, split as a Dockerfile would split it; or those of an
image.

Each step of RECIPE is done in a chroot of what the steps before it made, on kernel overlayfs; its upperdir is the
layer.  So whiteouts, opaque directories and copied-up files are there where a package manager and `rm -rf` leave
them.  This needs a mirror once; the result is kept in the user's cache directory, and nothing is fetched after that.
"""

import os
import random
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark.peers import BenchError, run

VERSION = "2"
"""Of what is made here; the cache of another version is not used."""

OPAQUE = "trusted.overlay.opaque"
_APT = "export DEBIAN_FRONTEND=noninteractive; apt-get -qq update; apt-get -qq install -y --no-install-recommends"
_GCC = "/usr/lib/gcc/*/12"
_CLEAN = "rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin; apt-get clean"

RECIPE: tuple[tuple[str, str], ...] = (
    ("COPY", "etc/app"),
    ("RUN", f"{_APT} ca-certificates git; {_CLEAN}"),
    ("RUN", f"{_APT} gcc libc6-dev; {_CLEAN}; rm -f {_GCC}/lto1 {_GCC}/lib?san*"),
    ("RUN", f"{_APT} python3; {_CLEAN}"),
    ("COPY", "usr/local/lib/python3.11/site-packages"),
    ("COPY", "opt/app"),
    ("RUN", "rm -rf /usr/share/doc/*/changelog* /usr/share/man/??; chmod -R g+w /etc/app; chmod 600 /etc/motd"),
    ("RUN", "rm -rf /opt/app/1; cp -r /opt/app/2 /opt/app/1; chown -R 33 /opt/app/3; mv /opt/app/4/f4 /opt/app/4/new"),
)
"""Above a minbase, bottom first: RUN a script, or COPY some hundred files to a directory."""

INSTALLED = "vim"
"""What `apt-get install` installs later: 2000 files, with what it depends on."""

_IN_CHROOT = """\
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2,workdir=$3,redirect_dir=off,metacopy=off" "$4"
mount -t proc proc "$4/proc"
mount -t tmpfs tmpfs "$4/run"
touch "$4/etc/resolv.conf" "$4/etc/hosts"
mount --bind /etc/resolv.conf "$4/etc/resolv.conf"
mount --bind /etc/hosts "$4/etc/hosts"
exec chroot "$4" sh -ec "$5"
"""


@dataclass(frozen=True, slots=True)
class Image:
    """Layers to measure.

    Attributes:
        directories: topmost first.
        debs: a directory with what is to be installed; None: nothing.
        archive: a docker-archive of the same layers, if it is to be measured.
    """

    directories: tuple[Path, ...]
    debs: Path | None
    archive: Path | None


def cache_directory() -> Path:
    """Where what was made is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ovlfs-bench" / f"v{VERSION}"


def debian() -> Path:
    """The directory with layer0 to layer8, debs and image.tar; made if it is not there."""
    ready = cache_directory()
    if ready.exists():
        return ready
    if shutil.which("debootstrap") is None:
        raise BenchError("debootstrap is missing (scripts/setup --slow installs it); or give an image with --image")
    ready.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="making-", dir=ready.parent) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        run(["debootstrap", "--variant=minbase", "bookworm", made / "layer0"])
        for left in ("var/cache/apt/archives/*.deb", "var/lib/apt/lists/*_*"):  # as published images do
            for path in (made / "layer0").glob(left):
                path.unlink()
        for name in ("work", "mnt"):
            (Path(temporary) / name).mkdir()
        for number, (what, how) in enumerate(RECIPE, 1):
            layer = made / f"layer{number}"
            layer.mkdir()
            if what == "COPY":
                copy_files(layer / how, seed=number)
            else:
                _in_chroot(made, number, layer, Path(temporary), how)
        (downloads := Path(temporary) / "downloads").mkdir()
        _in_chroot(made, len(RECIPE) + 1, downloads, Path(temporary), f"{_APT} --download-only {INSTALLED}")
        (made / "debs").mkdir()
        for deb in (downloads / "var/cache/apt/archives").glob("*.deb"):
            shutil.copy(deb, made / "debs")
        write_archive(layers_of(made), made / "image.tar")
        made.rename(ready)
    return ready


def layers_of(directory: Path) -> tuple[Path, ...]:
    """The layers in it, topmost first."""
    return tuple(sorted(directory.glob("layer*"), key=lambda path: int(path.name[5:]), reverse=True))


def _in_chroot(made: Path, number: int, upper: Path, temporary: Path, script: str) -> None:
    """Run a script on the layers below `number`; its mounts end with it, as they are in a namespace of their own."""
    lower = ":".join(str(made / f"layer{below}") for below in reversed(range(number)))
    run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-ec", _IN_CHROOT, "sh",
         lower, upper, temporary / "work", temporary / "mnt", script],
    )  # fmt: skip
    shutil.rmtree(temporary / "work")
    (temporary / "work").mkdir()


def copy_files(directory: Path, seed: int) -> None:
    """Some hundred files of random content in some directories."""
    rng = random.Random(seed)
    for number in range(800):
        target = directory / f"{number % 23}/f{number}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(rng.randbytes(int(rng.lognormvariate(8, 1.2))))


# ---- images ----------------------------------------------------------------------------------------------------------


def unpack(archive: Path, directory: Path) -> None:
    """The layers of a docker-archive as layer0, ... in the kernel's dialect.  The image is trusted, as it is run."""
    with tarfile.open(archive) as outer:
        import json  # noqa: PLC0415

        member = outer.extractfile("manifest.json")
        if member is None:
            raise BenchError(f"{archive}: manifest.json is no file")
        for number, name in enumerate(json.load(member)[0]["Layers"]):
            layer = directory / f"layer{number}"
            layer.mkdir(parents=True)
            with tarfile.open(fileobj=outer.extractfile(name)) as tar:
                _unpack_layer(tar, layer)


def _unpack_layer(tar: tarfile.TarFile, layer: Path) -> None:
    whiteouts = []
    for member in tar:
        if os.path.basename(member.name).startswith(".wh."):
            whiteouts.append(member.name)
        else:
            tar.extract(member, layer, filter="fully_trusted", numeric_owner=True)
    for path in whiteouts:
        target = layer / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.name == ".wh..wh..opq":
            os.setxattr(target.parent, OPAQUE, b"y")
        else:
            os.mknod(target.with_name(target.name.removeprefix(".wh.")), stat.S_IFCHR, 0)


def write_archive(layers: Sequence[Path], archive: Path) -> None:
    """The layers (topmost first) as a docker-archive: whiteouts as OCI has them; xattrs are left out."""
    import hashlib  # noqa: PLC0415
    import io  # noqa: PLC0415
    import json  # noqa: PLC0415

    def add(name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        outer.addfile(member, io.BytesIO(content))

    diff_ids = []
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as outer:
        for number, layer in enumerate(reversed(layers)):
            with tempfile.NamedTemporaryFile(dir=archive.parent) as file:
                with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
                    _add_tree(tar, layer)
                file.seek(0)
                diff_ids.append("sha256:" + hashlib.file_digest(file, "sha256").hexdigest())
                file.seek(0)
                outer.addfile(outer.gettarinfo(file.name, f"layer{number}.tar"), file)
        rootfs = {"type": "layers", "diff_ids": diff_ids}
        add("config.json", json.dumps({"architecture": "amd64", "os": "linux", "rootfs": rootfs}).encode())
        names = [f"layer{number}.tar" for number in range(len(layers))]
        add(
            "manifest.json",
            json.dumps([{"Config": "config.json", "RepoTags": ["bench:latest"], "Layers": names}]).encode(),
        )


def _add_tree(tar: tarfile.TarFile, layer: Path) -> None:
    for where, names, files in os.walk(layer):
        names.sort()
        if _xattr(where) == "y":
            tar.addfile(tarfile.TarInfo(os.path.relpath(os.path.join(where, ".wh..wh..opq"), layer)))
        for name in sorted(names + files):
            path = os.path.join(where, name)
            member = tar.gettarinfo(path, os.path.relpath(path, layer))
            if member is None:  # a socket
                continue
            if member.ischr() and member.devmajor == member.devminor == 0:
                tar.addfile(tarfile.TarInfo(os.path.join(os.path.dirname(member.name), f".wh.{name}")))
            elif member.isreg():
                with open(path, "rb") as file:
                    tar.addfile(member, file)
            else:
                tar.addfile(member)


def _xattr(path: str) -> str:
    try:
        return os.getxattr(path, OPAQUE).decode()
    except OSError:  # there is none
        return ""


def prepare(directory: Path, image: Path | None, lower: Sequence[Path], *, archive: bool) -> Image:
    """What is measured, below `directory`: copied there, so that all lies on the file system that was asked for."""
    if lower:
        sources, debs, tar = tuple(lower), None, None
    elif image is not None:
        unpack(image, directory / "unpacked")
        sources, debs, tar = layers_of(directory / "unpacked"), None, image
    else:
        made = debian()
        sources, debs, tar = layers_of(made), made / "debs", made / "image.tar"
    if archive and tar is None:
        raise BenchError("--archive and --lower cannot be combined: there is no archive of those layers")
    names = []
    for number, source in enumerate(sources):
        # Short names: the kernel takes one page of mount options.
        run(["cp", "-a", source, directory / f"l{number}"])
        names.append(directory / f"l{number}")
    if debs is not None:
        run(["cp", "-a", debs, directory / "debs"])
        debs = directory / "debs"
    if archive and tar is not None:
        run(["cp", tar, directory / "image.tar"])
    return Image(tuple(names), debs, directory / "image.tar" if archive else None)
