"""The measurement itself: one row a kernel, with errors that are those of float32."""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest
import torch

from cmd_plugin import kernels
from cmd_plugin.errors import InputError
from cmd_plugin.kernels import _dispatch, bench, last_backend
from cmd_plugin.kernels.bench import KERNELS, measure_kernels

KEYS = {
    "kernel",
    "backend",
    "bytes_per_weight",
    "gbps",
    "fraction_of_copy",
    "fastest_of_copy",
    "speedup_vs_eager",
    "max_error",
}
# A result of one rounding is that exact, a least-squares fit of 21 snapshots a few units worse.
EXACT = {"select_smallest": 0.0, "snapshot_delta": 2.0**-8, "swap_out": 0.0}


def test_every_public_kernel_is_measured() -> None:
    """All kernels on weights: those on clouds and embeddings have measurements of their own."""
    things = {name: getattr(kernels, name) for name in kernels.__all__}
    modules = {name: sys.modules.get(getattr(t, "__module__", "")) for name, t in things.items()}
    dispatched = {n for n, m in modules.items() if getattr(m, "choose", None) is _dispatch.choose}
    clouds = {"Neighbours", "PointScores", "curve_walk", "entropy_parts", "knn"}
    clouds |= {"farthest_point_sampling", "normalised_entropy", "point_importance"}
    others = {"AffineFit", "last_backend", "mahalanobis", "reconstruct_into"}
    assert {*KERNELS} == dispatched - others - clouds


def test_one_row_a_kernel() -> None:
    rows = list(measure_kernels(3000, device="cpu", repeats=1, compiled=False))
    assert [row["kernel"] for row in rows] == list(KERNELS)
    for row in rows:
        assert row.keys() >= KEYS
        assert row["backend"] == "torch" == last_backend(row["kernel"])
        assert row["gbps"] == pytest.approx(row["bytes_per_weight"] * 3e-6 / row["seconds"])
        assert row["fraction_of_copy"] == pytest.approx(row["gbps"] / row["copy_gbps"])
        assert row["fastest_of_copy"] >= row["fraction_of_copy"] * (1 - 1e-9)
        assert row["speedup_vs_eager"] == pytest.approx(row["eager_seconds"] / row["seconds"])
        assert row["speedup_vs_compile"] is None
        assert math.isfinite(row["max_error"])
        assert row["max_error"] <= EXACT.get(row["kernel"], 64 * 2.0**-24), row["kernel"]


def test_an_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is off by a thousandth shows in its row."""
    from cmd_plugin.kernels.coefficient_drift import _blocked

    right = _blocked.coefficient_drift

    def wrong(*arguments: torch.Tensor) -> None:
        right(*arguments)
        arguments[-1].mul_(1.001)

    monkeypatch.setattr(_blocked, "coefficient_drift", wrong)
    options = {"device": "cpu", "repeats": 1, "compiled": False}
    (row,) = measure_kernels(3000, ["coefficient_drift"], **options)
    assert row["max_error"] == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("where", ["the kernel", "the specification"])
def test_a_row_that_needs_too_much_memory_does_not_end_the_others(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    options = {"device": "cpu", "repeats": 1, "compiled": False}
    names = ["snapshot_delta", "coefficient_drift"]
    case = next(case for case in bench.CASES if case.name == "coefficient_drift")

    def prepare(problem: object) -> tuple[object, object]:
        run, specification = case.prepare(problem)
        return (too_much, specification) if where == "the kernel" else (run, too_much)

    broken = dataclasses.replace(case, prepare=prepare)
    monkeypatch.setattr(bench, "CASES", [broken if c is case else c for c in bench.CASES])
    monkeypatch.setattr(bench, "_error", lambda *_: 0.0)
    whole, torn = measure_kernels(3000, names, **options)
    assert whole.keys() >= torn.keys() - {"note"}
    assert torn["note"] == f"not enough memory for {where}"
    assert torn["eager_seconds"] is None
    assert (torn["seconds"] is None) == (where == "the kernel")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 10}, "size must be at least 1000"),
        ({"names": ["nonsense"]}, "unknown kernel 'nonsense': choose from snapshot_delta"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        next(measure_kernels(**options))


def test_a_missing_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device here"):
        next(measure_kernels(device="cuda"))


@pytest.mark.compile
def test_the_specification_through_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler the row says so; that of Inductor is timed by the benchmark itself."""
    monkeypatch.setattr("shutil.which", lambda _: None)
    (row,) = measure_kernels(3000, ["reconstruct"], device="cpu", repeats=1)
    assert row["compile_seconds"] is None
    assert "C++ compiler" in row["note"]
