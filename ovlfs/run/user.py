"""Who is `USER` in this root?

`user`, `uid`, `user:group`, with names or numbers on either side.  Names are looked up in /etc/passwd and /etc/group
inside the root, never in the host's; a name that is not there is an error, a number need not be there.  With a group
there are no supplementary groups, without one they are those that list the user's name.

Both files are hostile: regular, of bounded size, found without leaving the root (CVE-2024-9676, CVE-2026-47262).  Ids
above 2**31-1 are refused, also those that a line of passwd says (CVE-2024-40635: they wrap around to root).

Source: image-spec config.md and conversion.md; the order of the rules is that of moby/sys/user: GetExecUser().
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ovlfs.errors import ImageError, printable
from ovlfs.run import inside

MAX_ID = 2**31 - 1
_MAX_FILE_BYTES = 4 << 20
_MAX_GROUPS = 65536
"""Kernel: NGROUPS_MAX."""


@dataclass(frozen=True, slots=True)
class User:
    """A user as the kernel wants it, and the home directory."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    home: str = "/"


def resolve_user(text: str, rootfd: int) -> User:
    """The user that `text` names in a root.

    Raises:
        ImageError: it names nobody there, or makes no sense.
    """
    if "\0" in text:
        raise ImageError(f"user '{printable(text)}': holds a NUL byte")
    who, colon, group = text.partition(":")
    who = who or "0"
    found = next((line for line in _lines(rootfd, b"/etc/passwd") if who in (line[0], line[2])), None)
    if found is not None:
        uid, gid = _id(found[2], f"uid of '{printable(who)}'"), _id(found[3], f"gid of '{printable(who)}'")
        name, home = found[0], found[5] or "/"
    else:
        uid, gid, name, home = _number(who, "user"), 0, None, "/"
    if colon and group:
        listed = next((line for line in _lines(rootfd, b"/etc/group") if group in (line[0], line[2])), None)
        gid = _number(group, "group") if listed is None else _id(listed[2], f"gid of '{printable(group)}'")
        return User(uid, gid, (), home)
    groups: list[int] = []
    if name is not None:
        for line in _lines(rootfd, b"/etc/group"):
            if name in line[3].split(","):
                groups.append(_id(line[2], f"gid of '{printable(line[0][:100])}'"))
            if len(groups) > _MAX_GROUPS:
                raise ImageError(
                    f"/etc/group in the image: lists more than {_MAX_GROUPS} groups of '{printable(name)}'"
                )
    return User(uid, gid, tuple(dict.fromkeys(groups)), home)


def _lines(rootfd: int, path: bytes) -> Iterator[list[str]]:
    """The lines of a passwd or group file that have four fields at least, made up to seven; others say nothing."""
    raw = inside.read_file(rootfd, path, _MAX_FILE_BYTES) or b""
    for line in raw.decode("utf-8", "surrogateescape").split("\n"):
        fields = line.strip().split(":")
        if len(fields) >= 4 and not line.startswith("#"):
            yield fields + [""] * (7 - len(fields))


def _id(text: str, what: str) -> int:
    """A number in the image."""
    if not text.isascii() or not text.isdigit() or len(text) > 20 or int(text) > MAX_ID:
        raise ImageError(f"{what} in the image: should be a number from 0 to {MAX_ID}, not '{printable(text[:40])}'")
    return int(text)


def _number(text: str, what: str) -> int:
    """A number that the user or the config wrote where no name fits."""
    if text.isascii() and text.lstrip("-").isdigit():
        return _id(text, f"{what} '{printable(text[:40])}'")
    file = "passwd" if what == "user" else "group"
    raise ImageError(f"{what} '{printable(text[:100])}' is not in /etc/{file} of the image")
