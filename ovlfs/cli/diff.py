"""`ovlfs diff`: what was changed in a mount, or in what one image differs from another."""

import argparse
import contextlib
import json
import os
import stat
from typing import TYPE_CHECKING, Any

from ovlfs.cli.main import Parser
from ovlfs.errors import UsageError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ovlfs.layer.base import Layer
    from ovlfs.layer.merge import Found, Layers
    from ovlfs.overlay.changes import Change

_DESCRIPTION = """\
Lists what was changed, one path a line, as `docker diff` does: A added, C changed, D deleted.  A directory counts as
changed when something in it is; what was in a deleted directory is not listed.

  ovlfs diff /mnt/root                 what was changed in a mount
  ovlfs diff UPPER                     what an upperdir changes, mounted or not
  ovlfs diff image.tar:v1 image.tar:v2 what one image has that another has not

The upperdir of a mount is read after a syncfs(2); what is written at the same time may be listed or not.
"""
_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
}


def parser() -> Parser:
    """The command line."""
    found = Parser("ovlfs diff", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("places", nargs="+", type=os.fsencode, metavar="MOUNT|UPPER|IMAGE IMAGE")
    how = found.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="for programs: one list of objects")
    how.add_argument("--stat", action="store_true", help="with the bytes of each file, and sums")
    found.add_argument(
        "--image", metavar="IMAGE[:TAG]", help="the image below UPPER, where it is not known or was moved"
    )
    found.add_argument("--platform", metavar="OS/ARCH", default="", help="which of an image's platforms")
    return found


def run(args: argparse.Namespace) -> int:
    """Compare, and print."""
    from ovlfs.overlay import changes  # noqa: PLC0415  # heavy

    if len(args.places) > 2:
        raise UsageError("diff: one MOUNT or UPPER, or two IMAGEs should be given (see `ovlfs diff --help`)")
    if len(args.places) == 2 and args.image is not None:
        raise UsageError("diff: --image goes with an UPPER, not with two images")
    with _trees(args) as (now, before):
        found = changes.changes(now, before)
        if args.json:
            print(json.dumps([_described(now, before, change) for change in found], indent=2))
        elif args.stat:
            _print_sizes(now, before, found)
        else:
            for change in found:
                print(_line(change))
    return 0


@contextlib.contextmanager
def _trees(args: argparse.Namespace) -> "Iterator[tuple[Layers, Layers]]":
    """The tree now and the tree before."""
    from ovlfs.cli import changed  # noqa: PLC0415

    if len(args.places) == 1:
        with changed.opened(changed.find(args.places[0], args.image), args.platform) as upper:
            yield upper.now, upper.before
        return
    from ovlfs.image.image import open_image  # noqa: PLC0415
    from ovlfs.image.platform import parse_platform  # noqa: PLC0415

    platform = parse_platform(args.platform) if args.platform else None
    with contextlib.ExitStack() as stack:
        with changed.progress() as progress:
            images = [open_image(place, platform=platform, progress=progress) for place in args.places]
        before, now = ([*stack.enter_context(changed.layers_of(image))] for image in images)
        chains = [[layer.chain_id for layer in image.layers] for image in images]
        shared: list[Layer] = []
        for one, other, layer in zip(*chains, reversed(before), strict=False):
            if one != other:
                break
            shared.append(layer)
        # The same layers at the bottom are the same objects, so that nothing is compared that cannot differ.
        yield [None, *now[: len(now) - len(shared)], *reversed(shared)], [None, *before]


def _line(change: "Change") -> str:
    assert change.kind is not None
    return f"{change.kind.value} /{printable(change.path)}"


def _type(layers: "Layers", found: "Found | None") -> str | None:
    from ovlfs.overlay import changes  # noqa: PLC0415

    return None if found is None else _TYPES[stat.S_IFMT(changes.attr_of(layers, found).mode)]


def _size(layers: "Layers", found: "Found | None") -> int | None:
    """Bytes of a regular file; None for anything else."""
    from ovlfs.overlay import changes  # noqa: PLC0415

    if found is None or found.is_dir:
        return None
    attr = changes.attr_of(layers, found)
    return attr.size if stat.S_ISREG(attr.mode) else None


def _described(now: "Layers", before: "Layers", change: "Change") -> dict[str, Any]:
    assert change.kind is not None
    return {
        "kind": change.kind.value,
        "path": "/" + os.fsdecode(change.path),
        "type": _type(now, change.now),
        "type_before": _type(before, change.before),
        "size": _size(now, change.now),
        "size_before": _size(before, change.before),
        "differs_in": list(change.aspects),
    }


def _print_sizes(now: "Layers", before: "Layers", found: "list[Change]") -> None:
    from ovlfs.overlay import changes  # noqa: PLC0415

    counts = dict.fromkeys(changes.Kind, 0)
    more = less = 0
    for change in found:
        assert change.kind is not None
        counts[change.kind] += 1
        size, was = _size(now, change.now), _size(before, change.before)
        if change.before is not None and change.before.is_dir and (change.now is None or not change.now.is_dir):
            was = changes.content_bytes(before, change.before)
        more, less = more + (size or 0), less + (was or 0)
        sizes = ""
        if size is not None or was is not None:
            parts = [*([f"-{was}"] if was is not None else []), *([f"+{size}"] if size is not None else [])]
            sizes = f"  {' '.join(parts)}"
        print(_line(change) + sizes)
    kinds = ", ".join(f"{counts[kind]} {kind.name.lower()}" for kind in changes.Kind)
    print(f"{kinds}; -{less} +{more} bytes")
