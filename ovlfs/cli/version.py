"""`ovlfs version`: for bug reports."""

import argparse
import importlib.metadata
import os
import platform

from ovlfs import __version__
from ovlfs.cli.main import Parser

_USED = ("pyfuse3", "trio", "zstandard", "isal")


def parser() -> Parser:
    """The command line."""
    return Parser("ovlfs version", description="Prints versions.")


def run(_args: argparse.Namespace) -> int:
    """Print."""
    print(f"ovlfs {__version__}")
    used = [f"python {platform.python_version()}"]
    for name in _USED:
        try:
            used.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            used.append(f"no {name}")
    print(", ".join(used))
    print(f"linux {os.uname().release}")
    return 0
