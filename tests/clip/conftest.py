"""Embeddings on disk, for the numbers that were measured on them elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = os.environ.get("CMD_PLUGIN_DATA")  # before a test's surroundings are cleared of it


@pytest.fixture(scope="session")
def stored() -> Callable[[str], Tensor]:
    """Reads an array of the data folder's clip_embeddings, or skips the test."""

    def read(name: str) -> Tensor:
        path = Path(ROOT or "") / "clip_embeddings" / f"{name}.npy"
        if ROOT is None or not path.is_file():
            pytest.skip(f"CMD_PLUGIN_DATA names no folder with clip_embeddings/{name}.npy")
        return torch.from_numpy(np.load(path).astype(np.float32))

    return read
