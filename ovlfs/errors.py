"""The errors that a user sees as one line on stderr.

Errors of requests on a mounted tree are plain `OSError`s with an errno, as the kernel gives them.  These here are
errors of commands: `ovlfs: <text>` on stderr and exit code 1 (usage: 2).
"""

import os


def printable(raw: bytes | str) -> str:
    """`raw` for a message: printable, on one line, not to be mistaken for terminal control.

    Names in an image are hostile input (newline, ESC, right-to-left override): everything that is not printable
    is shown as an escape.
    """
    text = os.fsdecode(raw) if isinstance(raw, bytes) else raw
    out = []
    for char in text:
        code = ord(char)
        if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as os.fsdecode carries it
            out.append(f"\\x{code - 0xDC00:02x}")
        elif char.isprintable() and char != "\\":
            out.append(char)
        else:
            out.append(char.encode("unicode_escape").decode("ascii"))
    return "".join(out)


class OvlfsError(Exception):
    """Something the user can act on.  The text is one line, without a trailing full stop."""

    exit_code = 1


class UsageError(OvlfsError):
    """The command line makes no sense; exit code 2."""

    exit_code = 2


class ImageError(OvlfsError):
    """An image that cannot be used: which file, and which rule it breaks."""


class LayerError(ImageError):
    """A layer tar or index that breaks a rule.

    Attributes:
        offset: byte position in the uncompressed tar where the rule is broken, or None.
        rule: what should hold there, in a few words.
    """

    def __init__(self, where: str, rule: str, offset: int | None = None) -> None:
        at = "" if offset is None else f" at byte {offset}"
        super().__init__(f"{where}{at}: {rule}")
        self.offset = offset
        self.rule = rule


class MountError(OvlfsError):
    """A mount that cannot be made, or an upperdir or workdir that cannot be used."""
