"""Embeddings and images that the clip commands are tried on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.image_files import noise, to_folder

ROOT = os.environ.get("CMD_PLUGIN_DATA")  # before a test's surroundings are cleared of it


@pytest.fixture
def real() -> Callable[[str], Path]:
    """Finds a file of the data folder's clip_embeddings, or skips the test."""

    def find(name: str) -> Path:
        path = Path(ROOT or "nowhere", "clip_embeddings", f"{name}.npy")
        if not path.is_file():
            pytest.skip(f"CMD_PLUGIN_DATA names no folder with clip_embeddings/{name}.npy")
        return path

    return find


def draw(count: int, seed: int = 0, dim: int = 6) -> np.ndarray:
    """Correlated rows away from the origin, float32."""
    generator = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(dim, dim))
    return (generator.normal(size=(count, dim)) @ mix + 3.0).astype(np.float32)


@pytest.fixture(scope="session")
def rows() -> np.ndarray:
    """Rows [240, 6], enough for a fit without shrinkage."""
    return draw(240)


@pytest.fixture
def saved(rows: np.ndarray, tmp_path: Path) -> Path:
    """The rows as a file."""
    np.save(tmp_path / "rows.npy", rows)
    return tmp_path / "rows.npy"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty images of several sizes, some in folders, and two files that are none."""
    files = {f"{n}.png": noise(n, size=(10 + n % 5, 12)) for n in range(30)}
    files |= {f"more/{n}.jpg": noise(30 + n, "JPEG", (9, 20)) for n in range(20)}
    files |= {"broken.png": b"no image", "more/cut.png": noise(77, size=(40, 40))[:900]}
    return to_folder(tmp_path_factory.mktemp("photos"), files)
