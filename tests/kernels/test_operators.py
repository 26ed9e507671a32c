"""Custom operators: inside torch.compile a kernel is one node, and does what it does outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from cmd_plugin import kernels

pytestmark = [pytest.mark.paths("torch"), pytest.mark.compile]

N = 60


def parts() -> list[Tensor]:
    return [torch.randn(20), torch.randn(5, 8).T]


def state() -> dict[str, Any]:
    return {
        "mode": torch.randint(3, (N,)).to(torch.uint8),
        "slope": torch.randn(N),
        "mean": torch.randn(N),
    }


def table() -> Tensor:
    return torch.randn(3, dtype=torch.float64)


def arguments(name: str) -> tuple[Any, ...]:
    """Return arguments of the operator of a kernel."""
    held = state()
    mode, slope, mean, total = *held.values(), torch.rand(N) + 1
    flags = torch.rand(N) < 0.5
    backup = [torch.empty_like(part) for part in parts()]
    return {
        "update_affine": (parts(), mode, slope, mean, table(), 0.1, 0.9, total, "auto"),
        "reconstruct": (parts(), mode, slope, mean, table(), None, None, "auto"),
        "swap_in": (parts(), backup, mode, slope, mean, table(), None, None, "auto"),
        "swap_out": (parts(), parts(), "auto"),
        "snapshot_delta": (parts(), mean, torch.zeros(N, dtype=torch.bfloat16), "auto"),
        "assign_and_fit": (torch.randn(9, N), torch.randn(3, 9).double(), None, "auto"),
        "coefficient_drift": (slope, mean, total, slope + 1, torch.zeros(N), "auto"),
        "apply_embedding": (parts(), flags, mode, slope, mean, table(), "auto"),
        "fold_gradients": (torch.randn(N), flags, mode, slope, 3, "auto"),
        "select_smallest": (slope, 10, "auto"),
    }[name]


OPERATORS = [
    "apply_embedding",
    "assign_and_fit",
    "coefficient_drift",
    "fold_gradients",
    "reconstruct",
    "select_smallest",
    "snapshot_delta",
    "swap_in",
    "swap_out",
    "update_affine",
]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_what_they_say(name: str) -> None:
    opcheck(getattr(torch.ops.cmd_plugin, name).default, arguments(name))


def snapshots(weights: list[Tensor], held: dict[str, Any]) -> list[Tensor]:
    """Use every kernel once, as a training loop would."""
    mode, slope, mean, step = held["mode"], held["slope"], held["mean"], held["step"]
    delta = kernels.snapshot_delta(weights, mean)
    squares = kernels.update_affine(weights, mode, slope, mean, step, 0.2)
    before = kernels.reconstruct(mode, slope, mean, step)
    more = kernels.update_affine(weights, mode, slope, mean, step, 0.2)
    model = kernels.reconstruct(mode, slope, mean, step)
    fit = kernels.assign_and_fit(torch.stack([before, model, mean, slope]), held["profiles"])
    drift = kernels.coefficient_drift(slope, mean, fit.scale, fit.mean)
    chosen = kernels.select_smallest(drift, 7)
    backup = [torch.empty_like(weight) for weight in weights]
    kernels.swap_in(weights, backup, mode, slope, mean, step)
    shown = torch.cat([weight.reshape(-1) for weight in weights])
    kernels.swap_out(weights, backup)
    kernels.apply_embedding(weights, chosen, mode, slope, mean, step)
    gradient = model.clone()
    sums = kernels.fold_gradients(gradient, chosen, mode, slope, 3)
    return [delta, squares, before, more, model, *fit, drift, chosen, shown, gradient, sums]


def both(function: Callable[..., list[Tensor]], given: tuple[Any, ...]) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    copies = torch.utils._pytree.tree_map(torch.clone, given)
    for one, other in zip(function(*given), compiled(*copies), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(
        torch.utils._pytree.tree_leaves(given),
        torch.utils._pytree.tree_leaves(copies),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_all_kernels_compile_into_one_graph() -> None:
    held = {**state(), "step": table(), "profiles": torch.randn(3, 4, dtype=torch.float64)}
    both(snapshots, (parts(), held))


def test_parameters_and_views_can_be_given() -> None:
    parameter = nn.Parameter(torch.randn(N))
    held = {**state(), "gain": table()}
    before = held["mean"].clone()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(view: kernels.FlatView) -> Tensor:
        return kernels.update_affine(view, **held, blend=0.5)

    squares = update(kernels.FlatView([parameter]))
    expected = (parameter.detach() - before).double().square().sum()
    torch.testing.assert_close(squares, expected, rtol=1e-6, atol=0)
    assert not torch.equal(held["mean"], before)


def test_more_weights_than_32_bits_count() -> None:
    """Shapes only: no memory is taken."""
    numel = 2**31 + 5
    with FakeTensorMode():
        mode = torch.zeros(numel, dtype=torch.uint8)
        mean, total = torch.zeros(numel), torch.zeros(numel)
        gain = torch.zeros(4, dtype=torch.float64)
        operators = torch.ops.cmd_plugin
        squares = operators.update_affine([mean], mode, mean, mean, gain, 0.1, 1.0, total, "auto")
        assert (squares.shape, squares.dtype) == ((), torch.float64)
        rows = torch.zeros(20, numel, dtype=torch.bfloat16)
        fit = operators.assign_and_fit(rows, gain[None].expand(3, 4), mean, "auto")
        assert [part.shape for part in fit] == [(numel,)] * 4
        assert operators.select_smallest(mean, 9, "auto").shape == (numel,)
