"""What did the user type: which file, and which of its images?

    PATH                      image.tar  layout-dir  rootfs.tar.xz
    PATH:TAG                  image.tar:app:v2  layout-dir:v1
    PATH:@INDEX               image.tar:@1       the second image, as `ovlfs inspect` lists them
    PATH:@sha256:HEX          the image with this manifest digest or image id
    PATH[:...]:/INSIDE        image.tar:/etc/passwd  image.tar:app:v2:/etc/passwd   (ls, cat)

The rule: of all ways to cut the text at a colon, the one with the longest PATH that exists wins, the whole text
first.  So a file whose own name has colons is always reachable, and `image.tar:app:v2` means the tag `app:v2`
unless there is a file called `image.tar:app`.  What follows the first `:/` behind PATH is a path inside the image.
skopeo's prefixes oci:, oci-archive:, docker-archive: and dir: are accepted and mean nothing, since the form is told
by content.
"""

import os
import re
from dataclasses import dataclass

from ovlfs.errors import ImageError, UsageError, printable
from ovlfs.ids import Digest
from ovlfs.image.digest import parse_digest

_IGNORED = (b"oci-archive:", b"docker-archive:", b"oci:", b"dir:")
_NOT_YET = (
    b"docker://",
    b"docker-daemon:",
    b"containers-storage:",
    b"containerd:",
    b"registry:",
    b"http://",
    b"https://",
    b"ostree:",
    b"sif:",
)
_INDEX = re.compile(r"[0-9]{1,9}")
_MAX_TAG = 1024


@dataclass(frozen=True, slots=True)
class Reference:
    """A file or directory that exists, and the choice of one of its images, if any was made."""

    path: bytes
    tag: str | None = None
    index: int | None = None
    digest: Digest | None = None

    def __str__(self) -> str:
        """As it is typed, for messages."""
        choice = ""
        if self.tag is not None:
            choice = f":{self.tag}"
        elif self.index is not None:
            choice = f":@{self.index}"
        elif self.digest is not None:
            choice = f":@{self.digest}"
        return printable(os.fsdecode(self.path) + choice)


def parse_reference(typed: str | bytes) -> Reference:
    """The reference `typed`.  Raises UsageError (makes no sense) or ImageError (no such file)."""
    path, rest = _cut(os.fsencode(typed))
    return _choose(path, rest)


def split_path(typed: str | bytes) -> tuple[Reference, bytes]:
    """The reference and the path inside it; b"/" where none is given."""
    path, rest = _cut(os.fsencode(typed))
    choice, colon, inside = rest.partition(b":/")
    return _choose(path, choice), b"/" + inside if colon else b"/"


def _cut(typed: bytes) -> tuple[bytes, bytes]:
    """The longest existing path, and the rest with its colon or @."""
    if not typed:
        raise UsageError("an image should be named: PATH[:TAG]")
    if b"\0" in typed:
        raise UsageError("the name of an image has a NUL in it")
    if os.path.lexists(typed):
        return typed, b""
    for prefix in _IGNORED:
        if typed.startswith(prefix) and len(typed) > len(prefix):
            typed = typed[len(prefix) :]
            break
    if os.path.lexists(typed):
        return typed, b""
    for at in range(len(typed) - 1, 0, -1):
        # PATH@sha256:... is accepted too.
        if typed[at : at + 1] in {b":", b"@"} and typed[at - 1 : at + 1] != b":@" and os.path.lexists(typed[:at]):
            return typed[:at], typed[at:]
    for prefix in _NOT_YET:
        if typed.startswith(prefix):
            name = printable(prefix.rstrip(b"/:"))
            raise ImageError(
                f"{printable(typed)}: transport '{name}' is not supported yet; "
                "save the image to a file first (docker save, skopeo copy)"
            )
    first = typed.partition(b":")[0] or typed
    raise ImageError(f"{printable(first)}: no such file or directory")


def _choose(path: bytes, rest: bytes) -> Reference:
    if not rest:
        return Reference(path)
    choice = os.fsdecode(rest[1:] if rest.startswith(b":") else rest)
    if not choice:
        raise UsageError(f"{printable(path + rest)}: a tag should follow the colon")
    if not choice.startswith("@"):
        if len(choice) > _MAX_TAG:
            raise UsageError(f"{printable(path)}: a tag of {len(choice)} characters is too long")
        return Reference(path, tag=choice)
    choice = choice[1:]
    if _INDEX.fullmatch(choice):
        return Reference(path, index=int(choice))
    try:
        return Reference(path, digest=parse_digest(choice, "reference"))
    except ImageError as error:
        raise UsageError(
            f"{printable(path)}: '@{printable(choice[:100])}' should be @INDEX or @sha256:HEX ({error})"
        ) from error


def normalise_name(name: str) -> str:
    """The full name of an image, as docker understands it: `app` is docker.io/library/app:latest.

    The first component is a registry if it has a dot or colon or is localhost (distribution/reference).
    """
    domain, slash, rest = name.partition("/")
    if not slash or not ("." in domain or ":" in domain or domain == "localhost"):
        domain, rest = "docker.io", name
    if domain == "index.docker.io":
        domain = "docker.io"
    if domain == "docker.io" and "/" not in rest:
        rest = "library/" + rest
    if ":" not in rest.rpartition("/")[2] and "@" not in rest:
        rest += ":latest"
    return f"{domain}/{rest}"


def same_name(wanted: str, have: str) -> bool:
    """Whether the tag the user typed names the tag an image has.

    Besides equal full names: podman prefixes what it loaded with localhost/, and nobody types that.
    """
    if wanted == have:
        return True
    full = normalise_name(have)
    return full in {normalise_name(wanted), normalise_name("localhost/" + wanted)}
