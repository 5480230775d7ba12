"""`ovlfs VERB ...`: which verb, and how its errors look.

A verb is a module of this package with `parser()` and `run(args) -> exit code`.  It is imported only when it is
called, and imports what is heavy only when it runs: `ovlfs --help` answers in a blink.

Exit codes: 0 it is done; 1 it failed, and one line on stderr says why; 2 the command line makes no sense;
130 interrupted.
"""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from ovlfs import __version__
from ovlfs.errors import OvlfsError, UsageError, printable

_VERBS = {
    "mount": "mount an image, or directories, on a directory",
    "umount": "unmount, and wait until every change is on disk",
    "mounts": "list what is mounted",
    "diff": "list what was changed in a mount, or between two images",
    "commit": "write what was changed in a mount as a layer of a new image",
    "fsck": "check an upperdir, and repair it",
    "explain": "say which layer a path comes from, and why",
    "trace": "show every decision of a mount as it is made",
    "stats": "show what a mount was asked, who answered, and what it costs",
    "inspect": "show what an image consists of",
    "layers": "show what each layer of an image brought, and what of it is wasted",
    "ls": "list a directory of an image, without mounting it",
    "cat": "print a file of an image, without mounting it",
    "lesson": "learn overlays on a real one, by predicting what happens",
    "run": "run a command in an image",
    "bundle": "make a directory that an OCI runtime can run",
    "build": "build an image from a Dockerfile",
    "version": "print the versions of ovlfs and of what it uses",
}
_ALIASES = {"unmount": "umount", "--version": "version", "-V": "version"}
_HELP = frozenset(("-h", "--help", "help"))
_PRINTING = frozenset(("mounts", "diff", "explain", "trace", "stats", "inspect", "layers", "ls", "cat", "version"))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ours."""

    def error(self, message: str) -> NoReturn:  # noqa: D102
        raise UsageError(f"{printable(message)} (see `{self.prog} --help`)")


def main(argv: list[str] | None = None) -> int:
    """The program `ovlfs`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        sys.stderr.write(_usage())
        return UsageError.exit_code
    return guarded("ovlfs", lambda: _run(argv))


def _run(argv: list[str]) -> int:
    verb = _ALIASES.get(argv[0], argv[0])
    if verb in _HELP:
        sys.stdout.write(_usage())
        return 0
    if verb not in _VERBS:
        raise UsageError(f"'{printable(verb)}' is no command of ovlfs; there are: {', '.join(_VERBS)}")
    if verb in _PRINTING:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `ovlfs ls ... | head` ends as other programs do
    module = importlib.import_module(f"ovlfs.cli.{verb}")
    code = module.run(module.parser().parse_intermixed_args(argv[1:]))
    assert isinstance(code, int)
    return code


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<9} {what}" for verb, what in _VERBS.items())
    return f"""\
usage: ovlfs COMMAND ...

ovlfs {__version__} mounts a container image as a writable directory, without unpacking it:

  ovlfs mount image.tar /mnt/root
  ovlfs umount /mnt/root

commands:
{verbs}

`ovlfs COMMAND --help` says more.
"""


def guarded(program: str, command: Callable[[], int], *, usage: int = 2, failure: int = 1) -> int:
    """Run a command; errors become one line on stderr and an exit code."""
    try:
        code = command()
        sys.stdout.flush()
    except UsageError as error:
        text, code = str(error), usage
    except OvlfsError as error:
        text, code = str(error), failure if error.exit_code == 1 else error.exit_code
    except KeyboardInterrupt:
        text, code = "interrupted", 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads: let the interpreter's last flush go nowhere
        return 1
    except OSError as error:
        where = "" if error.filename is None else f"{printable(error.filename)}: "
        text, code = f"{where}{error.strerror or error}", failure
    else:
        return code
    print(f"{program}: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
