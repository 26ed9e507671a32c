"""The helpers of this folder, and what its tests need beside Flower's absence of network."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def _load_helpers() -> None:
    # With --import-mode=importlib a test folder is not on the path.
    path = Path(__file__).parent / "federated_toys.py"
    spec = importlib.util.spec_from_file_location("federated_toys", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["federated_toys"] = module
    spec.loader.exec_module(module)


collect_ignore: list[str] = []
if importlib.util.find_spec("flwr") is None:  # pure tests still run
    collect_ignore = [
        "test_baselines.py",
        "test_composition.py",
        "test_lightning.py",
        "test_refusals.py",
        "test_state.py",
        "test_strategy.py",
        "test_traffic.py",
        "test_training.py",
    ]
else:
    _load_helpers()


@pytest.fixture(autouse=True)
def quiet_flower() -> Iterator[None]:
    """Flower writes a page a round into its log."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)
