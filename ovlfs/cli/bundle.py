"""`ovlfs bundle`: a directory that any OCI runtime can run: config.json, and the image mounted as rootfs."""

import argparse
import contextlib
import os
import shutil
from typing import TYPE_CHECKING

from ovlfs.cli.container_options import (
    CommandParser,
    add_options,
    chosen_place,
    overrides,
    settings,
    volumes_of,
    with_volumes,
)
from ovlfs.cli.ending import end_in_order
from ovlfs.errors import MountError, printable

if TYPE_CHECKING:
    from ovlfs.image.config import Config

_DESCRIPTION = """\
Makes DIR a runtime-spec bundle: config.json, made of the image's config, and rootfs, where the image is mounted.
The options are those of `ovlfs run`.

  ovlfs bundle image.tar b
  crun run --bundle b NAME
  ovlfs umount b/rootfs

Without root the bundle is for a runtime that the same user starts: config.json asks for a user namespace in which the
user is root, and nobody else exists.
"""


def parser() -> CommandParser:
    """The command line."""
    found = CommandParser(
        "ovlfs bundle",
        usage="ovlfs bundle [OPTIONS] IMAGE DIR [-- COMMAND ...]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.failure = 2
    found.add_argument("image", metavar="IMAGE", help="PATH, PATH:TAG or PATH:@N")
    found.add_argument("directory", metavar="DIR", type=os.fsencode, help="is made; if it is there, it should be empty")
    add_options(found)
    return found


def run(args: argparse.Namespace) -> int:
    """Make the bundle."""
    from ovlfs.cli.run import open_config  # noqa: PLC0415

    overrides(args), settings(args)
    config = open_config(args.image, args.platform)
    directory = os.path.abspath(args.directory)
    end_in_order()
    with contextlib.ExitStack() as undo:
        suid = _make_directory(directory, undo)
        said = _fill(args, config, directory, undo, suid=suid)
        undo.pop_all()
    shown = printable(args.directory)
    print(said)
    if not suid:
        print(f"set-uid programs have no effect in it: {shown} is open to others, or you are not root")
    print(f"run it with `crun run --bundle {shown} NAME`; at the end, `ovlfs umount {shown}/rootfs`")
    return 0


def _make_directory(directory: bytes, undo: contextlib.ExitStack) -> bool:
    """Make it, or take it if it is empty.  Whether set-uid programs of a stranger's image may work below it.

    That needs to be root's, who alone can mount so, and closed to all others.
    """
    try:
        os.mkdir(directory, 0o700)
        undo.callback(os.rmdir, directory)
    except FileExistsError:
        if not os.path.isdir(directory) or os.listdir(directory):
            raise MountError(f"{printable(directory)}: should be an empty directory, or not be there") from None
    except OSError as error:
        raise MountError(f"{printable(directory)}: {error.strerror}") from error
    found = os.stat(directory)
    return os.geteuid() == 0 and found.st_uid == 0 and not found.st_mode & 0o077


def _fill(
    args: argparse.Namespace, config: "Config", directory: bytes, undo: contextlib.ExitStack, *, suid: bool
) -> str:
    """Mount, and write config.json.  What is said about the mount."""
    from ovlfs.cli import start, umount  # noqa: PLC0415
    from ovlfs.image.store import Store  # noqa: PLC0415
    from ovlfs.overlay.params import MountFlags, Params  # noqa: PLC0415
    from ovlfs.run import container, inside, namespaces, spec, volumes  # noqa: PLC0415

    rootfs = directory + b"/rootfs"
    mapping, users, groups = namespaces.seen_by_a_runtime()
    params = Params()
    if users:
        # fusermount3 mounts outside the runtime's user namespace: what shall be root's there is the user's here.
        params = Params(
            uidmapping=tuple((one.inside, one.outside, one.count) for one in users),
            gidmapping=tuple((one.inside, one.outside, one.count) for one in groups),
        )
    kept = chosen_place(args, Store().path)
    os.mkdir(rootfs, 0o700)
    undo.callback(os.rmdir, rootfs)
    said = start.mount(
        start.Request(
            mountpoint=rootfs,
            image=args.image,
            params=params,
            flags=MountFlags(suid=suid, platform=args.platform, ephemeral=kept is None),
            upper=None if kept is None else kept.upperdir,
            work=None if kept is None else kept.workdir,
        )
    )
    undo.callback(umount.unmount, rootfs, lazy=False)
    undo.callback(_remove_files, directory)
    found = settings(args)
    taken = tuple(bind.destination for bind in found.binds)
    rootfd = inside.open_root(rootfs)
    try:
        binds = volumes.image_volumes(config, rootfd, volumes_of(kept, directory), mapping, taken)
        prepared = container.prepare(config, overrides(args), with_volumes(found, binds), rootfd, directory, mapping)
    finally:
        os.close(rootfd)
    document = spec.runtime_spec(
        prepared.container,
        rootfs,
        tty_group=mapping.has_group(spec.TTY_GROUP),
        in_user_namespace=mapping.user_namespace,
        set_groups=mapping.set_groups,
        uid_map=users,
        gid_map=groups,
    )
    with open(directory + b"/config.json", "xb") as file:
        file.write(document)
    return said


def _remove_files(directory: bytes) -> None:
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if name == b"volumes":
            shutil.rmtree(path)
        elif name != b"rootfs":
            os.unlink(path)
