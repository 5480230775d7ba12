"""Which of several platforms is meant, and what will do in its place?

Names are normalised first (x86_64 is amd64, armhf is arm/v7, arm64/v8 is arm64); then the entries are tried in
the order of `fallbacks`: the platform itself, then what its processor also runs, best first.  Within one platform
the first matching entry of the index wins.

Spec: image-spec image-index.md; the names and the order are those of containerd/platforms.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ovlfs.errors import UsageError, printable

_ARCHITECTURES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv6l": ("arm", "v6"),
    "armv7l": ("arm", "v7"),
    "armv8l": ("arm", "v7"),
    "loongarch64": ("loong64", ""),
}
_SYSTEMS = {"macos": "darwin"}
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_ARM64_VARIANT = re.compile(r"v([89])(?:\.([0-9]{1,2}))?")


@dataclass(frozen=True, slots=True)
class Platform:
    """An operating system, an architecture and a variant of it ("" for the plain one), normalised."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        """As it is typed: linux/arm/v7."""
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    @property
    def known(self) -> bool:
        """False for `unknown/unknown`, which BuildKit gives its attestation manifests."""
        return "unknown" not in {self.os, self.architecture}


def normalise(system: str, architecture: str, variant: str = "") -> Platform:
    """The one spelling of a platform."""
    system = system.lower()
    system = _SYSTEMS.get(system, system)
    architecture, variant = architecture.lower(), variant.lower()
    architecture, implied = _ARCHITECTURES.get(architecture, (architecture, ""))
    variant = variant or implied
    if variant.isdigit():
        variant = "v" + variant
    match architecture, variant:
        case ("amd64", "v1") | ("arm64", "v8" | "v8.0"):
            variant = ""
        case ("arm", ""):
            variant = "v7"
    return Platform(system, architecture, variant)


def parse_platform(text: str) -> Platform:
    """`os/arch[/variant]`, or an architecture alone, as the user typed it."""
    parts = text.split("/")
    if not 1 <= len(parts) <= 3 or not all(_PART.fullmatch(part) for part in parts):
        raise UsageError(f"platform '{printable(text)}' should be os/architecture[/variant], e.g. linux/arm64")
    if len(parts) == 1:
        return normalise("linux", parts[0])
    return normalise(*parts)


def host_platform() -> Platform:
    """The platform of this machine; the system is always linux, since that is what can be mounted."""
    return normalise("linux", os.uname().machine)


def fallbacks(wanted: Platform) -> Iterator[Platform]:
    """`wanted` and then what also runs there, best first."""
    system = wanted.os
    yield wanted
    match wanted.architecture:
        case "amd64":
            for level in range(_level(wanted.variant, 1) - 1, 1, -1):
                yield Platform(system, "amd64", f"v{level}")
            if wanted.variant:
                yield Platform(system, "amd64")
            yield Platform(system, "386")
        case "arm64":
            yield from _arm64_below(system, wanted.variant)
            for level in (8, 7, 6, 5):
                yield Platform(system, "arm", f"v{level}")
        case "arm":
            for level in range(_level(wanted.variant, 7) - 1, 4, -1):
                yield Platform(system, "arm", f"v{level}")


def _level(variant: str, default: int) -> int:
    """The number in `v3`; anything else is the default.  Bounded, since an image can claim v999999999."""
    number = variant[1:]
    return min(int(number), 32) if variant[:1] == "v" and number.isdigit() and len(number) < 4 else default


def _arm64_below(system: str, variant: str) -> Iterator[Platform]:
    """v9.x runs v9.(x-1) and v8.(x+5), and so on down to plain arm64 (v8)."""
    match = _ARM64_VARIANT.fullmatch(variant)
    if match is None:
        return
    major, minor = int(match[1]), int(match[2] or 0)
    if major == 9:
        for lower in range(minor - 1, -1, -1):
            yield Platform(system, "arm64", f"v9.{lower}" if lower else "v9")
        minor = min(minor + 5, 9)
        yield Platform(system, "arm64", f"v8.{minor}")
    for lower in range(minor - 1, 0, -1):
        yield Platform(system, "arm64", f"v8.{lower}")
    yield Platform(system, "arm64")
