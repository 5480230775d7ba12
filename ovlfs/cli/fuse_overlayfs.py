"""`ovlfs-fuse`: the command line of fuse-overlayfs(1), for podman's and buildah's `mount_program`.

    [storage.options.overlay]
    mount_program = "/usr/bin/ovlfs-fuse"

containers/storage runs `mount_program -o OPTIONS MOUNTPOINT` with relative lower directories in its own directory,
reads what is said on stderr if the exit code is not 0, and unmounts with fusermount3 or umount(2).

Differences from fuse-overlayfs: an unknown option is an error; without `upperdir` the mount is read-only, too.
"""

import os
import sys
from collections.abc import Iterator

from ovlfs import __version__
from ovlfs.cli import start
from ovlfs.cli.main import guarded
from ovlfs.errors import UsageError, printable
from ovlfs.overlay.params import MountFlags, parse_mount_options

PROGRAM = "ovlfs-fuse"
_USAGE = f"""\
usage: {PROGRAM} [-f] [-d | --debug] -o OPTIONS MOUNTPOINT

Stacks directories as fuse-overlayfs does:
  {PROGRAM} -o lowerdir=l1:l2,upperdir=u,workdir=w /mnt/root
"""


def main(argv: list[str] | None = None) -> int:
    """The program `ovlfs-fuse`."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(PROGRAM, lambda: _run(argv))


def _run(argv: list[str]) -> int:
    options: list[str] = []
    places: list[str] = []
    foreground = False
    arguments = iter(argv)
    for argument in arguments:
        match argument:
            case "--version" | "-V":
                # "fuse-overlayfs: version" is what tools look for; the second line says what it is really.
                print(f"fuse-overlayfs: version 1.13 (compatible)\novlfs {__version__}")
                return 0
            case "--help" | "-h":
                print(_USAGE, end="")
                return 0
            case "-f":
                foreground = True
            case "-d" | "--debug":
                options.append("debug")
                foreground = foreground or argument == "-d"  # as libfuse has it
            case "-s":
                pass  # one thread: there is no other way
            case "-o":
                options.append(_following(arguments))
            case _ if argument.startswith("-o"):
                options.append(argument[2:])
            case _ if argument.startswith("-"):
                raise UsageError(f"unknown option '{printable(argument)}'")
            case _:
                places.append(argument)
    if len(places) != 1:
        raise UsageError(f"a mountpoint should be given: {PROGRAM} -o OPTIONS MOUNTPOINT")
    text = ",".join(options)
    # As fuse-overlayfs: what root mounts is for containers, whose programs may be set-uid and use devices.
    root = os.geteuid() == 0
    params, flags = parse_mount_options(text, flags=MountFlags(suid=root, dev=root))
    if not params.lowerdirs:
        raise UsageError("option 'lowerdir' is missing")
    start.mount(
        start.Request(
            mountpoint=os.fsencode(places[0]),
            source="fuse-overlayfs",
            params=params,
            flags=flags,
            foreground=foreground,
            options=text,
        )
    )
    return 0


def _following(arguments: Iterator[str]) -> str:
    value = next(arguments, None)
    if value is None:
        raise UsageError("-o needs a value")
    return value


if __name__ == "__main__":
    sys.exit(main())
