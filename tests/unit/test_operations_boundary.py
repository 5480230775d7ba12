"""No request can end the session: the boundary of every handler (fuse/operations.py)."""

import errno
import logging
from collections.abc import Callable
from pathlib import Path

import pyfuse3
import pytest

from ovlfs.fuse.operations import Operations
from ovlfs.overlay.params import Params
from ovlfs.overlay.stack import open_stack


def failing(error: Exception) -> Callable[..., object]:
    def fail(*_: object) -> object:
        raise error

    return fail


@pytest.fixture
def operations(scratch: Path) -> Operations:
    """The handlers over one empty directory."""
    (scratch / "lower").mkdir()
    return Operations(open_stack(Params(lowerdirs=(bytes(scratch / "lower"),), read_only=True)))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("unforeseen"), errno.EIO),
        (AssertionError("an invariant"), errno.EIO),
        (MemoryError(), errno.EIO),
        (OSError("no errno"), errno.EIO),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
    ],
)
async def test_handler_answers_every_exception_with_an_errno(
    operations: Operations,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    code: int,
) -> None:
    """An OSError keeps its errno; anything else is EIO, and its traceback is in the log."""
    monkeypatch.setattr(operations, "_get", failing(error))

    with caplog.at_level(logging.ERROR, "ovlfs"), pytest.raises(pyfuse3.FUSEError) as raised:
        await operations.getattr(pyfuse3.InodeT(1), None)  # type: ignore[arg-type]

    assert raised.value.errno == code
    if code == errno.EIO:
        assert "Traceback" in caplog.text
    else:
        assert caplog.text == ""


async def test_forget_never_raises(
    operations: Operations, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """FORGET has no reply to put an error in; the log has it."""
    monkeypatch.setattr(operations, "_tree", None)

    await operations.forget([(pyfuse3.InodeT(1), 1)])

    assert "Traceback" in caplog.text
