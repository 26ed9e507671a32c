"""Assign every weight to its best-correlated mode and fit it, in one pass over the trajectories."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.kernels._dispatch import Backend, choose
from cmd_plugin.kernels.assign_and_fit import _blocked
from cmd_plugin.kernels.assign_and_fit.reference import UNIT_ROUNDOFF

__all__ = ["AffineFit", "assign_and_fit", "effort"]


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


def assign_and_fit(
    trajectory: Tensor,
    profiles: Tensor,
    base: Tensor | None = None,
    backend: Backend = "auto",
) -> AffineFit:
    r"""Assign each weight to the mode it correlates with most, and fit it by least squares.

    .. math:: m(i) = \arg\max_m |corr(w_i, r_m)|, \qquad
              a_i = \frac{\sum_t (w_i-\bar w_i)(r_m-\bar r_m)}{\sum_t (r_m-\bar r_m)^2}

    (Brokman et al., ICLR 2024, Eq. 2 and its fit.) Ties go to the lowest mode. Rows are pivoted on
    their first snapshot and centred before products are taken, so a mean far larger than the
    movement costs no accuracy. A row whose sum of squared deviations is at most
    ``T (4 u max|w|)^2`` (u the unit roundoff of the weights' dtype) is constant: mode 0, scale 0.

    Everything is computed in the dtype of the result, products in IEEE float32 or float64; the
    trajectories are read once from memory, T values and the 13 bytes of the result a weight.

    Args:
        trajectory: [T, N] weights over time; or, with ``base``, [T-1, N] differences of the later
            snapshots to ``base``.
        profiles: [M, T] float64 trajectories of the modes, M in 1..256, none constant.
        base: [N] first snapshot, when ``trajectory`` holds differences.
        backend: See :func:`cmd_plugin.kernels.update_affine`; the compiled CPU path takes float32,
            bfloat16 and float64 trajectories.

    Returns:
        Mode, scale, mean and total, each [N]; float64 when the weights are float64, else float32.
        Non-finite rows give a non-finite ``total``.

    Raises:
        ShapeError: If shapes do not fit, or the weights' dtype is not one of float64, float32,
            float16 and bfloat16.
        InputError: If a profile is constant, or ``backend`` cannot address these tensors.
        MissingDependency: If ``backend`` needs a package that is not installed.
    """
    if torch.compiler.is_compiling():
        return AffineFit(*_operator(trajectory, profiles, base, backend))
    if trajectory.ndim != 2 or not trajectory.shape[1]:
        raise ShapeError(f"trajectory must be [T, N], got shape {tuple(trajectory.shape)}.")
    snapshots = trajectory.shape[0] + (base is not None)
    numel = trajectory.shape[1]
    if profiles.ndim != 2 or profiles.shape[1] != snapshots or not 1 <= len(profiles) <= 256:
        raise ShapeError(
            f"profiles must be [M, {snapshots}] with M in 1..256, got {tuple(profiles.shape)}."
        )
    if base is not None and (base.shape != (numel,) or base.device != trajectory.device):
        raise ShapeError(
            f"base must be [{numel}] on {trajectory.device}, got {tuple(base.shape)} on "
            f"{base.device}."
        )
    if bool((profiles == profiles[:, :1]).all(dim=1).any()):
        raise InputError("a profile is constant over time, so nothing can be fitted to it.")
    source = trajectory if base is None else base
    if source.dtype not in UNIT_ROUNDOFF:
        raise ShapeError(f"weights of {source.dtype} cannot be fitted: convert them to float32.")
    fit = _allocate(trajectory, base)
    chosen = choose(
        "assign_and_fit",
        backend,
        trajectory.device,
        effort(numel, snapshots, len(profiles)),
        numba=trajectory.device.type == "cpu" and _compilable(trajectory, base, fit.mean.dtype),
    )
    if chosen == "triton":
        from cmd_plugin.kernels.assign_and_fit import _triton

        _triton.assign_and_fit(trajectory, profiles, base, fit)
    elif chosen == "numba":
        from cmd_plugin.kernels.assign_and_fit import _numba

        _numba.assign_and_fit(trajectory, profiles, base, fit)
    else:
        _blocked.assign_and_fit(trajectory, profiles, base, fit)
    return fit


def effort(numel: int, snapshots: int, modes: int) -> int:
    """Return the N of a call a snapshot for which compiled code is worth as much as for one fit.

    A fit is made once in a run. Loading its compiled code takes a second, and five the first time
    ever; what it gains is some 0.1 ns a weight, snapshot and mode.
    """
    return numel * snapshots * modes >> 14


def _allocate(trajectory: Tensor, base: Tensor | None) -> AffineFit:
    source = trajectory if base is None else base
    dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
    numel = trajectory.shape[1]
    return AffineFit(
        trajectory.new_empty(numel, dtype=torch.uint8),
        trajectory.new_empty(numel, dtype=dtype),
        trajectory.new_empty(numel, dtype=dtype),
        trajectory.new_empty(numel, dtype=dtype),
    )


def _compilable(trajectory: Tensor, base: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the compiled path reads these dtypes."""
    first = base is None or (base.dtype == dtype and base.is_contiguous())
    widened = trajectory.dtype == torch.bfloat16 and dtype == torch.float32
    return first and (trajectory.dtype == dtype or widened)


def _run(
    trajectory: Tensor, profiles: Tensor, base: Tensor | None, backend: Backend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return assign_and_fit(trajectory, profiles, base, backend)


_operator = torch.library.custom_op(
    "cmd_plugin::assign_and_fit",
    _run,
    mutates_args=(),
    schema="(Tensor trajectory, Tensor profiles, Tensor? base, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
)


@_operator.register_fake
def _fake(
    trajectory: Tensor,
    profiles: Tensor,  # noqa: ARG001 the operator's signature
    base: Tensor | None,
    backend: Backend,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _allocate(trajectory, base)
