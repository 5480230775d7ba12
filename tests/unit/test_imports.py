"""Who may use the C extension: lint-imports cannot see it, as it is no Python module."""

import ast
from collections.abc import Iterator
from pathlib import Path

import ovlfs

PACKAGE = Path(ovlfs.__file__).parent


def users_of_native() -> Iterator[str]:
    """Modules of the package that import ovlfs._native, relative to it."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if any(name.startswith("ovlfs._native") for name in names):
                yield str(path.relative_to(PACKAGE))


def test_native_is_used_behind_layer_and_lane_only() -> None:
    """DESIGN, rooms: ovlfs._native only behind layer/ and fuse/lane.py (and the session that makes the lane)."""
    found = set(users_of_native())

    assert found
    assert {user for user in found if not user.startswith("layer/")} <= {"fuse/lane.py", "fuse/session.py"}
