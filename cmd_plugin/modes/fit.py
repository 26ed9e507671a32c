"""Fit all weights to chosen modes, and account for what the fit explains."""

from __future__ import annotations

from math import frexp, isfinite, ldexp, nan

import torch
from torch import Tensor

from cmd_plugin.kernels import AffineFit, assign_and_fit
from cmd_plugin.kernels.flat_view import BLOCK
from cmd_plugin.kernels.mode_table import ModeTable
from cmd_plugin.modes.choice import ModeChoice
from cmd_plugin.modes.layout import Layout
from cmd_plugin.runs.process import own_threads

__all__ = [
    "explained_by_layer",
    "explained_share",
    "fit_modes",
    "sum_in_double",
    "sum_of_squares",
    "total_by_layer",
]


_LONG = 1 << 24  # weights of a block on a GPU


def sum_of_squares(profiles: Tensor) -> Tensor:
    """Return S_m, the squared deviations of each profile [M, T] from its mean, [M] float64."""
    return (profiles - profiles.mean(dim=1, keepdim=True)).square().sum(dim=1)


def fit_modes(
    trajectory: Tensor, base: Tensor | None, choice: ModeChoice, profiles: Tensor
) -> AffineFit:
    """Assign and fit all weights; see :func:`cmd_plugin.kernels.assign_and_fit`.

    A reference that is its mode's profile gets exactly mode k, scale 1 and the profile's mean,
    whatever the store rounded.
    """
    fit = assign_and_fit(trajectory, profiles, base)
    if torch.equal(choice.members, choice.references):
        at = choice.references.to(fit.mode.device)
        fit.mode[at] = torch.arange(choice.modes, dtype=torch.uint8, device=at.device)
        fit.scale[at] = 1.0
        fit.mean[at] = profiles.mean(dim=1).to(at.device, fit.mean.dtype)
        fit.total[at] = sum_of_squares(profiles).to(at.device, fit.total.dtype)
    return fit


@own_threads(1)  # a block is too short to be worth waiting for a second thread
def explained_by_layer(
    layout: Layout,
    mode: Tensor,
    slope: Tensor,
    energy: Tensor,
    total: Tensor | None = None,
) -> Tensor:
    """Return the sum of squares the model explains in each tensor of the layout, [L] float64.

    A weight's least-squares fit explains E = slope^2 energy[mode]. With ``total`` V the fit is
    shrunk by rho^2 = E / V and explains
    E (2 rho^2 - rho^4).

    Args:
        layout: Layout of the N weights.
        mode: [N] uint8.
        slope: [N] slopes, in any unit.
        energy: [M] sums of squares of the profiles, in the unit that makes slope^2 energy a sum of
            squares of the weight.
        total: [N] sum of squared deviations of each weight, when the slopes will be shrunk.
    """
    # In units of a power of two near the largest energy: a float32 need not hold the squares.
    _, exponent = frexp(float(energy.max()) if energy.numel() else 0.0)
    # Where launching costs more than the work of a block, blocks are longer.
    block_size = BLOCK if slope.device.type == "cpu" else _LONG
    length = min(block_size, max(layout.sizes, default=0))
    table = ModeTable((energy * ldexp(1.0, -exponent)).to(slope.device, slope.dtype), length)
    scratch = torch.empty(length, dtype=slope.dtype, device=slope.device)
    layers, parts = [], []
    for layer, (start, size) in enumerate(zip(layout.offsets, layout.sizes, strict=True)):
        for low in range(start, start + size, block_size):
            block = slice(low, min(start + size, low + block_size))
            part = table.lookup(mode[block], scratch[: block.stop - low])
            part.mul_(slope[block]).mul_(slope[block])
            if total is not None:
                share = part / total[block] * ldexp(1.0, exponent)
                share = share.nan_to_num_(0.0).clamp_(0.0, 1.0)
                part.mul_(share.mul_(2.0 - share))
            layers.append(layer)
            parts.append(part.sum(dtype=torch.float64))
    sums = torch.zeros(len(layout.names), dtype=torch.float64)
    # One answer of the device to wait for, not one a block.
    sums.index_add_(0, torch.tensor(layers), torch.stack(parts).cpu())
    return sums * ldexp(1.0, exponent)


def explained_share(explained: float, total: float) -> float:
    """Return which share of the movement is explained, at most 1.

    nan if nothing moves, or if either sum is not a number: never a perfect score then.
    """
    share = explained / total if total > 0.0 else nan
    return min(share, 1.0) if isfinite(share) else nan  # min(1.0, nan) would be 1.0


def total_by_layer(layout: Layout, total: Tensor) -> Tensor:
    """Return the sum of ``total`` [N] over each tensor of the layout, [L] float64."""
    return torch.stack([_sum_in_double(part) for part in layout.split(total).values()]).cpu()


def sum_in_double(values: Tensor) -> float:
    """Return the float64 sum of a tensor, block by block.

    PyTorch's own ``sum(dtype=float64)`` converts the whole tensor first on a CPU, which at N
    weights is the largest temporary of a decomposition.
    """
    return float(_sum_in_double(values))


@own_threads(1)
def _sum_in_double(values: Tensor) -> Tensor:
    parts = torch.split(values.reshape(-1), BLOCK if values.device.type == "cpu" else _LONG)
    return torch.stack([part.sum(dtype=torch.float64) for part in parts]).sum()
