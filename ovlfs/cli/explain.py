"""`ovlfs explain MOUNT|IMAGE PATH`: which layer a path comes from, by which rule, and what is hidden below.

A mount is asked itself, over its control socket: it has the layers open, and answers between two requests, so what it
says is the truth of one moment.  An image is opened here, as a read-only mount would open it.

`--json` prints one object.  Names are text with everything unprintable escaped; layers are numbers from the top (0 the
upperdir), `layers` says what they are called.  Its keys are stable; there may be more of them one day:

    path, resolved    as asked; where symlinks on the way lead
    error, reason     the errno by name that stat(2) would say, or null; why
    object            what it is: kind, from (layers, top first), attributes_from, data_from, metacopy, mode, uid, gid,
                      size, target (of a symlink), device, other_names (hard links in the same layer); or null
    steps             for each component: name, path, found, follows (a symlink's target), answers ({layer, asked, says,
                      rule, because, room, size, redirect}, in the order of asking), not_asked ({layers, asked, by,
                      redirected})
    hidden            what other layers have: {layers, path, kind, size, by}
    write             what opening it for writing would do: {read_only, in_place, upper, directories, completes, steps,
                      size_bytes, data_bytes, metadata_alone, names}; with `creates`: what making it would do; or null
    layers            {layer, name, data_only, where, diff_id, created_by}
    notes             what else there is to know
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from ovlfs.cli.main import Parser


def parser() -> Parser:
    """The command line."""
    found = Parser(
        "ovlfs explain", description="Says which layer a path comes from, by which rule, and what is hidden."
    )
    found.add_argument("what", metavar="MOUNT|IMAGE[:TAG]", type=os.fsencode)
    found.add_argument("path", metavar="PATH", type=os.fsencode, help="from the root of the mount or image")
    found.add_argument("--json", action="store_true", help="for programs; the keys are stable")
    found.add_argument("--platform", metavar="OS/ARCH", default="", help="which of the image's platforms")
    return found


def run(args: argparse.Namespace) -> int:
    """Explain.  A path that does not exist is explained, too: exit code 0."""
    from ovlfs.explain.text import text  # noqa: PLC0415
    from ovlfs.fuse import client, mounting  # noqa: PLC0415

    show: Callable[[dict[str, Any]], str] = functools.partial(json.dumps, indent=2) if args.json else text
    mountpoint = mounting.find_mount(args.what)
    if mountpoint is not None and mountpoint.fstype == mounting.FSTYPE:
        mounted = client.find(args.what)
        with client.understanding(mounted):
            shown = show(client.ask(mounted, "explain", path=os.fsdecode(args.path)))
    else:
        shown = show(_of_image(args))
    print(shown)
    return 0


def _of_image(args: argparse.Namespace) -> dict[str, Any]:
    from ovlfs.cli.progress import Progress  # noqa: PLC0415
    from ovlfs.explain.explain import explain  # noqa: PLC0415
    from ovlfs.explain.image import opened  # noqa: PLC0415
    from ovlfs.fuse import mounting  # noqa: PLC0415
    from ovlfs.image.form import Form, recognise  # noqa: PLC0415
    from ovlfs.image.reference import parse_reference  # noqa: PLC0415
    from ovlfs.image.store import Store  # noqa: PLC0415

    if os.path.isdir(args.what) and recognise(args.what, Store).form is Form.DIRECTORY:
        mounting.refuse_inside(args.what, args.path)  # any directory could be meant as an image, but this one is not
    with Progress(sys.stderr if sys.stderr.isatty() else None) as progress:
        with opened(parse_reference(args.what), args.platform, progress) as stack:
            progress.close()
            return explain(stack, args.path)
