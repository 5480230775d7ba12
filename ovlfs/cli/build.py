"""`ovlfs build`: build an image from a Dockerfile."""

import argparse
import os
import re
import sys
import time
from typing import TYPE_CHECKING

from ovlfs.cli.ending import end_in_order
from ovlfs.cli.main import Parser
from ovlfs.errors import ImageError, UsageError, printable

if TYPE_CHECKING:
    from ovlfs.build.builder import Built, Request
    from ovlfs.build.dockerfile import Dockerfile
    from ovlfs.build.ignore import Ignore
    from ovlfs.image.commit import Output
    from ovlfs.image.store import Store

_DESCRIPTION = """\
Builds an image from a Dockerfile and a directory of files (the context).  RUN steps run on a mount of the layers so
far, as `ovlfs run` runs a command; no daemon is needed, and without root it runs in a user namespace.  What a step made
is kept in the store, and used again as long as nothing that it depends on has changed.

  ovlfs build -t app.tar:app:1.0 .                 writes app.tar, for docker load, skopeo and ovlfs
  ovlfs build -t layout/:v1 -f docker/Dockerfile . writes (into) an OCI layout
  ovlfs build --build-arg BASE=base.tar --target test -q .
  ovlfs build --prune 7                            forgets what no build has used for seven days

FROM takes `scratch`, an earlier stage, or an image in a file or a layout: PATH[:TAG], relative to the context.
"""


def parser() -> Parser:
    """The command line."""
    found = Parser("ovlfs build", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("context", metavar="CONTEXT", type=os.fsencode, nargs="?", help="a directory")
    add("-t", "--tag", metavar="OUT[:TAG]", type=os.fsencode, help="write the image here, and call it TAG")
    add("-f", "--file", metavar="FILE", help="the Dockerfile (default: CONTEXT/Dockerfile; -: stdin)")
    add("--build-arg", metavar="NAME[=VALUE]", action="append", default=[], help="the value of an ARG")
    add("--target", metavar="STAGE", help="build up to this stage")
    add("--platform", metavar="OS/ARCH", default="", help="which of a base image's platforms")
    add("--no-cache", action="store_true", help="do every step")
    add(
        "--prune",
        metavar="DAYS",
        nargs="?",
        const="0",
        help="build nothing; forget the steps that no build has used for DAYS days (all, if it is not said), and "
        "their layers",
    )
    add("--chroot", action="store_true", help="RUN by chroot(2) instead of a runtime: no isolation at all")
    add("-q", "--quiet", action="store_true", help="print nothing but the image's id")
    return found


def run(args: argparse.Namespace) -> int:
    """Build, or prune."""
    from ovlfs.build.cache import Cache  # noqa: PLC0415
    from ovlfs.image.commit import parse_output  # noqa: PLC0415
    from ovlfs.image.store import Store  # noqa: PLC0415

    if args.prune is not None:
        _prune(args)
        return 0
    if args.context is None:
        raise UsageError("build: a CONTEXT should be given (see `ovlfs build --help`)")
    output = None if args.tag is None else parse_output(args.tag)
    request = _request(args, None if output is None else output.path)
    end_in_order()
    store = Store()
    with Cache(store).in_use():
        built = _build(request, store, quiet=args.quiet)
        _write(built, output, quiet=args.quiet)
    return 0


def _prune(args: argparse.Namespace) -> None:
    from ovlfs.build.cache import Cache  # noqa: PLC0415
    from ovlfs.image.store import Store  # noqa: PLC0415

    if args.context is not None:
        raise UsageError("build: --prune builds nothing, so no CONTEXT goes with it")
    if not re.fullmatch(r"[0-9]{1,5}", args.prune):
        raise UsageError(f"--prune should be followed by a number of days, not by '{printable(args.prune[:40])}'")
    unused_since = time.time() - int(args.prune) * 86400
    pruned = Cache(Store()).prune(unused_since, lambda: _tell("waiting for a build to end"))
    print(f"pruned steps: {pruned.steps}, layers: {pruned.layers}, bytes: {pruned.size}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _request(args: argparse.Namespace, output: bytes | None) -> "Request":
    from ovlfs.build.builder import Request  # noqa: PLC0415
    from ovlfs.image.platform import parse_platform  # noqa: PLC0415

    context = os.path.abspath(args.context)
    if not os.path.isdir(context):
        raise UsageError(f"context {printable(args.context)}: should be a directory")
    pairs = (one.partition("=") for one in args.build_arg)
    given = {name: value if equals else os.environ.get(name) for name, equals, value in pairs}
    if "" in given:
        raise UsageError("--build-arg should be NAME=VALUE")
    return Request(
        _dockerfile(args.file, context),
        context,
        _ignore(args.file, context, output),
        {name: value for name, value in given.items() if value is not None},
        args.target,
        parse_platform(args.platform) if args.platform else None,
        no_cache=args.no_cache,
        chroot=args.chroot,
        quiet=args.quiet,
    )


def _dockerfile(typed: str | None, context: bytes) -> "Dockerfile":
    from ovlfs.build.dockerfile import MAX_BYTES, parse  # noqa: PLC0415

    if typed == "-":
        return parse(sys.stdin.buffer.read(MAX_BYTES + 1), "Dockerfile")
    path = os.path.join(context, b"Dockerfile") if typed is None else os.fsencode(typed)
    raw = _read(path, MAX_BYTES)
    if raw is None:
        raise ImageError(f"{printable(path)}: no such file; name the Dockerfile with -f")
    return parse(raw, "Dockerfile" if typed is None else printable(typed))


def _ignore(typed: str | None, context: bytes, output: bytes | None) -> "Ignore":
    """`FILE.dockerignore` beside a Dockerfile that was named, else .dockerignore in the context.

    What is written is never part of the context: the next build would find it there, and copy it.
    """
    from ovlfs.build.ignore import MAX_BYTES, parse_ignore  # noqa: PLC0415

    raw, where = None, ".dockerignore"
    if typed is not None and typed != "-":
        where = f"{printable(typed)}.dockerignore"
        raw = _read(os.fsencode(typed) + b".dockerignore", MAX_BYTES)
    if raw is None:
        raw, where = _read(os.path.join(context, b".dockerignore"), MAX_BYTES), ".dockerignore"
    found = parse_ignore(raw or b"", where)
    inside = None if output is None else os.path.relpath(os.path.realpath(output), os.path.realpath(context))
    if inside is None or inside == b"." or inside.split(b"/")[0] == b"..":
        return found
    return found.without(os.fsdecode(inside))


def _read(path: bytes, limit: int) -> bytes | None:
    from ovlfs.image.files import open_file  # noqa: PLC0415

    if not os.path.lexists(path):
        return None
    with open(open_file(path, (), printable(path)), "rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ImageError(f"{printable(path)}: has more than {limit} bytes")
    return raw


def _build(request: "Request", store: "Store", *, quiet: bool) -> "Built":
    from ovlfs.build.builder import Builder  # noqa: PLC0415
    from ovlfs.build.workshop import Workshop  # noqa: PLC0415
    from ovlfs.cli import uppers  # noqa: PLC0415

    with uppers.temporary(os.path.join(store.path, b"builds")) as place:
        return Builder(request, Workshop(store, place), (lambda _: None) if quiet else _tell).build()


def _write(built: "Built", output: "Output | None", *, quiet: bool) -> None:
    from ovlfs.image.commit import write_image  # noqa: PLC0415

    if output is not None:
        write_image(output, built.config, built.layers)
    if quiet:
        print(built.image_id)
        return
    _tell(f"Successfully built {built.image_id.partition(':')[2][:12]}")
    if output is not None:
        _tell(f"Successfully tagged {output}" if output.tag is not None else f"Successfully written {output}")
