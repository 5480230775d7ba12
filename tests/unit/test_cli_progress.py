"""Progress: on a terminal only, and only when it takes long."""

import io
from types import SimpleNamespace

import pytest

from ovlfs.cli import progress
from ovlfs.cli.progress import Progress


def shown(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> str:
    times = iter(clock)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(times)))
    terminal = io.StringIO()
    with Progress(terminal) as told:
        for done in range(1, len(clock)):
            told("decompressing \x1b[2Jx", done, 4)
    return terminal.getvalue()


def test_what_is_quick_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown([0, 0.1, 0.3, 0.49], monkeypatch) == ""


def test_what_takes_long_is_shown_now_and_then_and_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown([0, 0.1, 0.6, 0.65, 0.8], monkeypatch)
    assert text == r"^decompressing \x1b[2Jx 50 %^decompressing \x1b[2Jx 100 %^".replace("^", "\r\x1b[K")


def test_without_a_terminal_it_is_silent() -> None:
    Progress(None)("anything", 1, 0)
