"""Flower may be missing, and writes a page a round into its log."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator

import pytest

collect_ignore: list[str] = []
if importlib.util.find_spec("flwr") is None:  # what needs no Flower still runs
    collect_ignore = ["test_deployment.py", "test_resume.py", "test_simulate.py"]


@pytest.fixture(autouse=True)
def quiet_flower() -> Iterator[None]:
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)
