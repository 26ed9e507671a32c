"""Assign every weight to its best-correlated mode and fit it, in one pass over the trajectories."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.kernels.assign_and_fit import _blocked
from cmd_plugin.kernels.assign_and_fit.reference import UNIT_ROUNDOFF

__all__ = ["AffineFit", "assign_and_fit"]


class AffineFit(NamedTuple):
    """Modes and least-squares coefficients of N weights.

    ``w(t) ~ mean + scale * (profile[mode](t) - profile_mean[mode])``

    Attributes:
        mode: [N] uint8.
        scale: [N] slope against the mode's profile, in units of weight per unit of profile.
        mean: [N] mean of the weight over the snapshots.
        total: [N] sum over snapshots of the squared deviation from the mean.
    """

    mode: Tensor
    scale: Tensor
    mean: Tensor
    total: Tensor


def assign_and_fit(trajectory: Tensor, profiles: Tensor, base: Tensor | None = None) -> AffineFit:
    r"""Assign each weight to the mode it correlates with most, and fit it by least squares.

    .. math:: m(i) = \arg\max_m |corr(w_i, r_m)|, \qquad
              a_i = \frac{\sum_t (w_i-\bar w_i)(r_m-\bar r_m)}{\sum_t (r_m-\bar r_m)^2}

    (Brokman et al., ICLR 2024, Eq. 2 and its fit.) Ties go to the lowest mode. Rows are pivoted on
    their first snapshot and centred before products are taken, so a mean far larger than the
    movement costs no accuracy. A row whose sum of squared deviations is at most
    ``T (4 u max|w|)^2`` (u the unit roundoff of the weights' dtype) is constant: mode 0, scale 0.

    Args:
        trajectory: [T, N] weights over time; or, with ``base``, [T-1, N] differences of the later
            snapshots to ``base``.
        profiles: [M, T] float64 trajectories of the modes, M in 1..256, none constant.
        base: [N] first snapshot, when ``trajectory`` holds differences.

    Returns:
        Mode, scale, mean and total, each [N]; float64 when the weights are float64, else float32.
        Non-finite rows give a non-finite ``total``.

    Raises:
        ShapeError: If shapes do not fit, or the weights' dtype is not one of float64, float32,
            float16 and bfloat16.
        InputError: If a profile is constant.
    """
    if trajectory.ndim != 2 or not trajectory.shape[1]:
        raise ShapeError(f"trajectory must be [T, N], got shape {tuple(trajectory.shape)}.")
    snapshots = trajectory.shape[0] + (base is not None)
    numel = trajectory.shape[1]
    if profiles.ndim != 2 or profiles.shape[1] != snapshots or not 1 <= len(profiles) <= 256:
        raise ShapeError(
            f"profiles must be [M, {snapshots}] with M in 1..256, got {tuple(profiles.shape)}."
        )
    if base is not None and base.shape != (numel,):
        raise ShapeError(f"base must be [{numel}], got {tuple(base.shape)}.")
    if bool((profiles == profiles[:, :1]).all(dim=1).any()):
        raise InputError("a profile is constant over time, so nothing can be fitted to it.")
    source = trajectory if base is None else base
    if source.dtype not in UNIT_ROUNDOFF:
        raise ShapeError(f"weights of {source.dtype} cannot be fitted: convert them to float32.")
    dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
    device = trajectory.device
    fit = AffineFit(
        torch.empty(numel, dtype=torch.uint8, device=device),
        *(torch.empty(numel, dtype=dtype, device=device) for _ in range(3)),
    )
    _blocked.assign_and_fit(trajectory, profiles, base, fit)
    return fit
