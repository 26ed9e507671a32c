"""Flower may be missing, and writes a page a round into its log."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator

import pytest

collect_ignore: list[str] = []
if importlib.util.find_spec("flwr") is None:  # pure tests still run
    collect_ignore = [
        "test_admission.py",
        "test_baselines.py",
        "test_composition.py",
        "test_lightning.py",
        "test_refusals.py",
        "test_rotated.py",
        "test_state.py",
        "test_strategy.py",
        "test_traffic.py",
        "test_training.py",
    ]


@pytest.fixture(autouse=True)
def quiet_flower() -> Iterator[None]:
    """Flower writes a page a round into its log."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)
