"""On a CUDA device: Triton's results against the specification, at sizes of real networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from cmd_plugin import kernels
from cmd_plugin.kernels import FlatView, last_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = [1, 1023, 1025, 11_173_962]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def inputs(numel: int, dtype: torch.dtype, modes: int = 10) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(numel)
    state = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=generator, dtype=state)

    cut = numel // 3
    weights = normal(numel).to(dtype)
    return {
        "parts": [weights[:cut].clone(), weights[cut:].clone()] if cut else [weights],
        "mode": torch.randint(modes, (numel,), generator=generator).to(torch.uint8),
        "slope": normal(numel),
        "mean": normal(numel),
        "total": normal(numel).square() + 1,
        "table": torch.randn(modes, generator=generator, dtype=torch.float64),
        "flags": torch.rand(numel, generator=generator) < 0.3,
    }


def work(given: dict[str, Any]) -> dict[str, Tensor]:
    """Run all kernels that read weights, and return what they made, on the CPU."""
    view, table = FlatView(given["parts"]), given["table"]
    mode, slope, mean, total = (given[key] for key in ("mode", "slope", "mean", "total"))
    made = {"delta": kernels.snapshot_delta(view, mean)}
    made["squares"] = kernels.update_affine(view, mode, slope, mean, table, 0.1, 0.9, total)
    out = torch.empty_like(mean)
    kernels.update_affine(view, mode, slope, mean, table, 0.2, total=total)
    shrunk = {"total": total, "energy": table.square(), "out": out}
    kernels.reconstruct(mode, slope, mean, table, **shrunk)
    made.update(slope=slope, mean=mean, total=total, model=out)
    backup = view.empty_like()
    kernels.swap_in(view, backup, mode, slope, mean, table)
    made["shown"] = torch.cat([part.reshape(-1) for part in given["parts"]]).clone()
    kernels.swap_out(view, backup)
    kernels.apply_embedding(view, given["flags"], mode, slope, mean, table)
    made["embedded"] = torch.cat([part.reshape(-1) for part in given["parts"]])
    made["drift"] = kernels.coefficient_drift(slope, mean, mean, slope)
    gradient = out.clone()
    made["sums"] = kernels.fold_gradients(gradient, given["flags"], mode, slope, len(table))
    return {name: value.cpu() for name, value in made.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", SIZES)
def test_agrees_with_the_cpu(dtype: torch.dtype, numel: int) -> None:
    given = inputs(numel, dtype)
    there = tree_map_only(Tensor, lambda tensor: tensor.cuda(), given)
    got = work(there)
    assert {last_backend(name) for name in ("update_affine", "swap_in", "apply_embedding")} == {
        "triton"
    }
    expected = work(given)
    unit = torch.finfo(got["mean"].dtype).eps / 2
    coarse = torch.finfo(dtype).eps
    for name, value in got.items():
        assert torch.isfinite(value).all(), name
        rough = {"delta": 2.0**-7, "shown": coarse, "embedded": coarse}
        sums = {"squares": numel * unit, "sums": numel * 2.0**-50}
        tolerance = max(64 * unit, rough.get(name, sums.get(name, 0.0)))
        size = float(expected[name].abs().double().max())
        gap = (value.double() - expected[name].double()).abs().max()
        assert float(gap) <= tolerance * (1 + size), name


@pytest.mark.parametrize("numel", SIZES)
def test_exact_selection(numel: int) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    for num in (1, numel // 10 + 1, numel):
        chosen = kernels.select_smallest(values.cuda(), num)
        assert last_backend("select_smallest") == "triton"
        expected = torch.zeros(numel, dtype=torch.bool)
        expected[values.argsort(stable=True)[:num]] = True
        assert torch.equal(chosen.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("snapshots", "modes"), [(3, 1), (21, 10), (37, 256), (128, 16)])
def test_assignment(dtype: torch.dtype, snapshots: int, modes: int) -> None:
    from cmd_plugin.kernels.assign_and_fit import reference

    generator = torch.Generator().manual_seed(1)
    walk = torch.randn(snapshots, 100_003, generator=generator).cumsum(0).to(dtype)
    profiles = torch.randn(modes, snapshots, generator=generator, dtype=torch.float64)
    fit = kernels.assign_and_fit(walk.cuda(), profiles)
    assert last_backend("assign_and_fit") == "triton"
    mode, scale, mean, total = reference.assign_and_fit(walk, profiles)
    unit = torch.finfo(fit.mean.dtype).eps / 2
    same = fit.mode.cpu() == mode
    assert float((~same).double().mean()) < 1e-4  # near ties only
    reach = float(walk.abs().max())
    assert ((fit.mean.cpu() - mean).abs() <= snapshots * unit * reach).all()
    assert ((fit.total.cpu() - total).abs() <= 4 * snapshots * unit * (total + 1)).all()
    gap = (fit.scale.cpu() - scale).abs()[same]
    assert (gap <= 8 * snapshots * unit * (1 + scale.abs()[same] + total.sqrt()[same])).all()
