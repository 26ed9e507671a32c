"""One pass does what the two kernels do in turn."""

from __future__ import annotations

import pytest
import torch
from kernel_toys import BLOCK
from torch import Tensor

from cmd_plugin.errors import ShapeError
from cmd_plugin.kernels import FlatView, update_and_reconstruct
from cmd_plugin.kernels.update_and_reconstruct import reference

pytestmark = pytest.mark.paths("torch", "numba", "triton")


def state(numel: int, modes: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    return {
        "weights": normal(numel).to(dtype),
        "mode": torch.randint(modes, (numel,), generator=generator).to(torch.uint8),
        "slope": normal(numel).to(dtype),
        "mean": normal(numel).to(dtype),
        "gain": normal(modes),
        "step": normal(modes),
        "total": (1 + normal(numel).square()).to(dtype),
        "energy": normal(modes).square(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("numel", [1, 7, 1001, BLOCK + 3])
@pytest.mark.parametrize("modes", [1, 256])
@pytest.mark.parametrize("follow", ["nothing", "total", "energy"])
def test_oracle_21_equals_the_specification(
    dtype: torch.dtype, numel: int, modes: int, follow: str
) -> None:
    given = state(numel, modes, dtype)
    if follow != "energy":
        given["energy"] = None
    if follow == "nothing":
        given["total"] = None
    exact = {
        name: value if value is None or name == "mode" else value.clone().double()
        for name, value in given.items()
    }
    squares, model = reference.update_and_reconstruct(blend=0.2, decay=0.9, **exact)
    out = torch.empty(numel, dtype=dtype)
    weights = given.pop("weights")
    got = update_and_reconstruct(FlatView([weights]), blend=0.2, decay=0.9, **given, out=out)
    unit = torch.finfo(dtype).eps / 2
    size = 1 + exact["weights"].abs() + exact["mean"].abs()
    table = exact["gain"].abs().max() * size
    reach = 1 + table + exact["slope"].abs()
    assert float(got) == pytest.approx(float(squares), rel=max(64, numel) * unit)
    assert ((given["mean"] - exact["mean"]).abs() <= 4 * unit * size).all()
    assert ((given["slope"] - exact["slope"]).abs() <= 8 * unit * reach).all()
    if given["total"] is not None:
        error = (given["total"] - exact["total"]).abs()
        assert (error <= 8 * unit * (size.square() + exact["total"])).all()
    # rho^2 lies in [0, 1] and errs by a few roundings relative to sigma^2 q / V.
    moved = reach * exact["step"].abs().max() + size
    if exact["energy"] is not None:
        moved *= 1 + reach.square() * exact["energy"].max() / exact["total"]
    assert ((out - model).abs() <= 32 * unit * moved).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_strided_and_scalar_weights(dtype: torch.dtype) -> None:
    given = state(2 * 3 * 4 * 5 + 1, 4, torch.float32)
    weights = given.pop("weights").to(dtype)
    image = weights[:-1].view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    other = {name: value.clone() for name, value in given.items()}
    outs = [torch.empty(121), torch.empty(121)]
    update_and_reconstruct([image, weights[-1]], blend=0.5, **given, out=outs[0])
    update_and_reconstruct([weights.float()], blend=0.5, **other, out=outs[1])
    unit = 2.0**-24  # a contraction of a product and a sum may round once less
    torch.testing.assert_close(outs[0], outs[1], rtol=8 * unit, atol=32 * unit)
    torch.testing.assert_close(given["slope"], other["slope"], rtol=8 * unit, atol=8 * unit)


@pytest.mark.parametrize("name", ["mode", "slope", "mean", "gain", "step", "energy", "out"])
def test_bad_arguments_change_nothing(name: str) -> None:
    given = {**state(10, 3, torch.float32), "out": torch.zeros(10)}
    value = given[name]
    given[name] = value[:, None] if name in ("gain", "step", "energy") else value[:-1]
    kept = {key: value.clone() for key, value in given.items()}
    weights = given.pop("weights")
    with pytest.raises(ShapeError, match="must be"):
        update_and_reconstruct([weights], blend=0.5, **given)
    for key, value in given.items():
        assert torch.equal(value, kept[key])


def test_energy_needs_the_total() -> None:
    given = {**state(10, 3, torch.float32), "total": None, "out": torch.zeros(10)}
    weights = given.pop("weights")
    with pytest.raises(ShapeError, match="together or not at all"):
        update_and_reconstruct([weights], blend=0.5, **given)
