"""What needs a process of its own: Triton's interpreter, and its compiler without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FOLDERS = [
    str(HERE),
    str(HERE.parent / "callbacks" / "test_kernels.py"),
    str(HERE.parent / "modes" / "test_ahead.py"),
]


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


class Variant(NamedTuple):
    """One line of ``compile_offline.py``."""

    sm: str
    kernel: str
    function: str
    warps: int
    registers: int
    spilled: int
    shared: int
    load: int
    store: int
    pointers: list[str]
    launch: str


def read_variant(line: str) -> Variant:
    words = line.split()
    return Variant(*words[:3], *map(int, words[3:9]), words[9].split(","), words[10])


# Kernels that stream the state of all weights once.
STREAMS = {"apply_embedding", "coefficient_drift", "fold_gradients", "reconstruct"}
STREAMS |= {"select_smallest", "snapshot_delta", "swap", "update_affine", "assign_and_fit"}
# Those of them that read a state of float32 at least, whatever the weights are.
WIDE = {"apply_embedding", "reconstruct", "update_affine"}


def test_every_shipped_kernel_compiles_for_capability_80_and_90(tmp_path: Path) -> None:
    """No GPU needed: Triton's compiler, from the launches the public functions make."""
    output = run([str(HERE / "compile_offline.py")], TRITON_CACHE_DIR=str(tmp_path))
    variants = [read_variant(line) for line in output.splitlines() if line.startswith("sm")]
    assert {variant.sm for variant in variants} == {"sm80", "sm90"}
    others = {"curve_walk", "farthest_point_sampling", "knn", "mahalanobis"}
    assert {variant.kernel for variant in variants} >= STREAMS | others
    # In the compiled code no load and store of one pointer may overtake one another, but for the
    # kernel that was written to show that this is found.
    races = {line.split(":")[0] for line in output.splitlines() if line.startswith("race ")}
    assert races == {f"race {sm} __main__ _racing %values" for sm in ("sm80", "sm90")}
    for variant in variants:
        assert not variant.spilled, variant
        if variant.kernel in STREAMS and variant.launch == "contiguous":
            single = "fp64" not in variant.pointers or variant.kernel == "update_affine"
            # The counting pass that knows no prefix yet has no mask to wait for, and loads ahead.
            ahead = variant.function == "_count"
            assert variant.registers <= (64 if single and not ahead else 128), variant
            assert variant.warps == 8, variant
        # The rest of a vector is a launch of its own, with masks.
        if variant.kernel in WIDE and "i64" in variant.pointers:
            assert variant.load == 16, variant
            assert variant.kernel != "update_affine" or variant.store == 16, variant
