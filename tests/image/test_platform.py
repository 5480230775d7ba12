"""Platforms: one spelling, and what runs in place of what."""

import pytest

from ovlfs.errors import UsageError
from ovlfs.image.platform import fallbacks, normalise, parse_platform


@pytest.mark.parametrize(
    ("typed", "normal"),
    [
        ("linux/x86_64", "linux/amd64"),
        ("linux/amd64/v1", "linux/amd64"),
        ("linux/amd64/v3", "linux/amd64/v3"),
        ("aarch64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm64/8", "linux/arm64"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/armhf", "linux/arm/v7"),
        ("linux/armel", "linux/arm/v6"),
        ("linux/i386", "linux/386"),
        ("macos/arm64", "darwin/arm64"),
    ],
)
def test_normalise_spellings(typed: str, normal: str) -> None:
    """Each processor has one name."""
    assert str(parse_platform(typed)) == normal


@pytest.mark.parametrize(
    ("wanted", "order"),
    [
        ("linux/amd64/v3", ["linux/amd64/v3", "linux/amd64/v2", "linux/amd64", "linux/386"]),
        ("linux/amd64", ["linux/amd64", "linux/386"]),
        ("linux/arm64", ["linux/arm64", "linux/arm/v8", "linux/arm/v7", "linux/arm/v6", "linux/arm/v5"]),
        ("linux/arm/v6", ["linux/arm/v6", "linux/arm/v5"]),
        ("linux/riscv64", ["linux/riscv64"]),
    ],
)
def test_fallbacks_best_first(wanted: str, order: list[str]) -> None:
    """The order is containerd's."""
    assert [str(one) for one in fallbacks(parse_platform(wanted))] == order


def test_fallbacks_arm64_variants_descend_to_plain() -> None:
    """v9.1 runs v9, v8.6 and below, then 32-bit ARM."""
    found = [str(one) for one in fallbacks(normalise("linux", "arm64", "v9.1"))]

    assert found[:3] == ["linux/arm64/v9.1", "linux/arm64/v9", "linux/arm64/v8.6"]
    assert found[8:10] == ["linux/arm64", "linux/arm/v8"]


@pytest.mark.parametrize("typed", ["", "a/b/c/d", "linux/", "linux/../x", "linux/a b"])
def test_parse_platform_nonsense_is_usage_error(typed: str) -> None:
    with pytest.raises(UsageError, match="should be os/architecture"):
        parse_platform(typed)
