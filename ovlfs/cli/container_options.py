"""The command line that `ovlfs run` and `ovlfs bundle` share: what is run, and how it differs from the config."""

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from ovlfs.cli.main import Parser
from ovlfs.errors import OvlfsError, UsageError, printable

if TYPE_CHECKING:
    from ovlfs.cli.uppers import Place
    from ovlfs.run.container import Settings
    from ovlfs.run.process import Overrides
    from ovlfs.run.spec import Bind

FAILED = 125
"""Our own failures, as with `docker run`: all other codes can be the command's."""


class CommandParser(Parser):
    """A Parser for `OPTIONS PLACES -- COMMAND ...`: nothing after `--` is ours."""

    failure = FAILED

    def parse_intermixed_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> Namespace:
        """As argparse's, with the command in `command`."""
        words = list(args or ())
        cut = words.index("--") if "--" in words else len(words)
        found = super().parse_intermixed_args(words[:cut], namespace)
        assert found is not None
        found.command = tuple(words[cut + 1 :])
        return found

    def error(self, message: str) -> NoReturn:  # noqa: D102
        error = UsageError(f"{printable(message)} (see `{self.prog} --help`)")
        raise failed(error) if self.failure == FAILED else error


def failed(error: OvlfsError) -> OvlfsError:
    """The error as one that ends with exit code 125."""
    found = OvlfsError(str(error))
    found.exit_code = FAILED
    return found


def add_options(parser: Parser) -> None:
    """What both verbs take."""
    add = parser.add_argument
    add("-e", "--env", action="append", default=[], metavar="NAME=VALUE", help="NAME alone takes our own value")
    add("-w", "--workdir", metavar="DIR", help="where to run it")
    add("-u", "--user", metavar="USER[:GROUP]", help="as whom: names of the image, or numbers")
    add("-v", "--volume", action="append", default=[], metavar="PATH:DIR[:ro]", help="show our PATH as DIR")
    add("--entrypoint", metavar="PROGRAM", help="in place of the image's entrypoint and command; '' for none")
    add("--hostname", default="", metavar="NAME")
    add("--network", choices=("host", "none"), default="host", help="the host's network (default), or none")
    add("--read-only", action="store_true", help="the root cannot be written; volumes can")
    add("-t", "--tty", action="store_true", help="give it a terminal of its own")
    add("--platform", default="", metavar="OS/ARCH", help="which of an image's platforms")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--name", metavar="NAME", help="keep the changes in the store, under this name")
    kept.add_argument("--upper", metavar="DIR", type=os.fsencode, help="keep the changes in DIR")


def overrides(args: Namespace) -> "Overrides":
    """What the command line says about the process."""
    from ovlfs.run.process import Overrides  # noqa: PLC0415

    for one in args.env:
        if one.partition("=")[0] == "":
            raise UsageError(f"--env '{printable(one[:100])}': should be NAME=VALUE, or NAME")
    env = [one if "=" in one else f"{one}={os.environ[one]}" for one in args.env if "=" in one or one in os.environ]
    entrypoint = None
    if args.entrypoint is not None:
        entrypoint = (args.entrypoint,) if args.entrypoint else ()
    return Overrides(args.command, entrypoint, tuple(env), args.workdir, args.user, args.tty)


def settings(args: Namespace) -> "Settings":
    """What it says about the container."""
    from ovlfs.run.container import Settings  # noqa: PLC0415

    binds = tuple(_bind(text) for text in args.volume)
    return Settings(args.hostname, args.network == "host", args.read_only, binds)


def _bind(text: str) -> "Bind":
    from ovlfs.run.spec import Bind  # noqa: PLC0415

    source, _, rest = text.partition(":")
    destination, _, mode = rest.partition(":")
    if not source or not destination.startswith("/") or mode not in {"", "ro", "rw"}:
        raise UsageError(f"volume '{printable(text[:200])}' should be PATH:/DIR or PATH:/DIR:ro")
    path = os.path.realpath(os.fsencode(source))
    if not os.path.exists(path):
        raise UsageError(f"volume '{printable(text[:200])}': {printable(path)} is not there")
    return Bind(path, os.fsencode(destination), mode == "ro")


def chosen_place(args: Namespace, store: bytes) -> "Place | None":
    """Where the changes are kept; None: nowhere."""
    from ovlfs.cli import uppers  # noqa: PLC0415

    if args.name is not None:
        return uppers.named(store, args.name)
    return None if args.upper is None else uppers.chosen(args.upper, None)


def volumes_of(place: "Place | None", temporary: bytes) -> bytes:
    """Where the image's volumes are: beside a kept upperdir, or with what is thrown away."""
    return temporary + b"/volumes" if place is None else os.path.realpath(place.upperdir) + b".volumes"


def with_volumes(found: "Settings", volumes: "tuple[Bind, ...]") -> "Settings":
    """The settings with the image's volumes below the user's binds."""
    return replace(found, binds=(*volumes, *found.binds))
