"""What needs a process of its own: Triton's interpreter, and its compiler without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FOLDERS = [str(HERE), str(HERE.parent / "callbacks" / "test_kernels.py")]


def run(command: list[str], **variables: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "CMD_PLUGIN_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *command],
        env={**kept, "PYTHONPATH": path, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    return output


def test_triton_kernels_equal_the_specification() -> None:
    """The tests of this folder once more, on Triton's interpreter."""
    output = run(
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


def test_every_shipped_kernel_compiles_for_capability_80_and_90(
    tmp_path: Path,
) -> None:
    """No GPU needed: Triton's compiler, from the launches the public functions make. No races."""
    output = run([str(HERE / "compile_offline.py")], TRITON_CACHE_DIR=str(tmp_path))
    lines = [line.split() for line in output.splitlines() if line.startswith("sm")]
    kernels = {line[1] for line in lines}
    assert {line[0] for line in lines} == {"sm80", "sm90"}
    assert kernels >= {
        "apply_embedding",
        "assign_and_fit",
        "coefficient_drift",
        "curve_walk",
        "farthest_point_sampling",
        "fold_gradients",
        "knn",
        "mahalanobis",
        "reconstruct",
        "select_smallest",
        "snapshot_delta",
        "swap",
        "update_affine",
    }
    # In the compiled code no load and store of one pointer may overtake one another, but for the
    # kernel that was written to show that this is found.
    races = {line.split(":")[0] for line in output.splitlines() if line.startswith("race ")}
    assert races == {f"race {sm} __main__ _racing %values" for sm in ("sm80", "sm90")}
