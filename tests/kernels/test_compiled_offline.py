"""Triton's compiler without a GPU: what is shipped compiles, within limits, and has no race."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from kernel_toys import run_python

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


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
    output = run_python([str(HERE / "compile_offline.py")], TRITON_CACHE_DIR=str(tmp_path))
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
        # The rest of a vector is a launch of its own, with masks. What an update that waits for
        # nothing does before and after reads weights alone, or a handful of numbers.
        around = variant.function in ("_check", "_plan", "_finish")
        if variant.kernel in WIDE and "i64" in variant.pointers and not around:
            assert variant.load == 16, variant
            assert variant.kernel != "update_affine" or variant.store == 16, variant
