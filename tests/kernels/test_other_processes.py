"""Triton's interpreter, which needs a process of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from kernel_toys import run_python

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
FOLDERS = [
    str(HERE),
    str(HERE.parent / "callbacks" / "test_kernels.py"),
    str(HERE.parent / "modes" / "test_ahead.py"),
]


def test_triton_kernels_equal_the_specification() -> None:
    """The tests of this folder once more, on Triton's interpreter."""
    output = run_python(
        [
            *("-m", "pytest", *FOLDERS, "-m", "interpret", "-q", "-p", "no:cacheprovider"),
            f"--ignore={HERE / 'test_point_kernels_triton.py'}",  # starts a process of its own
            *("-W", "ignore::RuntimeWarning"),  # NumPy warns of the NaN that some tests are about
        ],
        TRITON_INTERPRET="1",
        HYPOTHESIS_PROFILE="interpret",
    )
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None, output
    assert int(passed[1]) > 200, output
    assert "skipped" not in output
