"""The fixture images (README.md beside this file), and a store for each test."""

import gzip
import tarfile
from pathlib import Path

import pytest

from ovlfs.image.store import Store

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the fixture images, extracted once."""
    directory = tmp_path_factory.mktemp("images")
    with tarfile.open(HERE / "fixtures.tar.xz") as tar:
        tar.extractall(directory, filter="data")
    raw = (directory / "small-two-docker20.tar").read_bytes()
    (directory / "small-two-docker20.tar.gz").write_bytes(gzip.compress(raw, 1, mtime=0))
    return directory


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(bytes(tmp_path / "store"))


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's own store."""
    monkeypatch.setenv("OVLFS_STORE", str(tmp_path / "default-store"))
