"""Recursive least squares of every weight against its mode's profile, one snapshot at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmd_plugin.kernels._checks import require_state
from cmd_plugin.kernels._dispatch import Backend, choose
from cmd_plugin.kernels.flat_view import FlatView, Weights, as_view, tensors_of
from cmd_plugin.kernels.update_affine import _blocked
from cmd_plugin.kernels.update_affine.follower import Follower

__all__ = ["Follower", "accepts", "can_follow", "most_squares", "update_affine"]

_PACKED = 1 << 16  # weights up to which many small tensors are worth a copy in one vector
_HEADROOM = 2.0**-20  # sums over a million snapshots, and squares of differences, stay finite


def update_affine(
    weights: Weights,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    gain: Tensor,
    blend: float,
    decay: float = 1.0,
    total: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Update slope and mean of every weight with a new snapshot, in place.

    With forgetting factor :math:`\lambda`, :math:`n' = \lambda n + 1`, and the profile's step
    :math:`d_m = r_m - \bar r_m`:

    .. math:: e_i = w_i - \bar w_i, \quad \bar w_i \leftarrow \bar w_i + e_i/n', \quad
              \sigma_i \leftarrow \lambda \sigma_i + e_i\, g_{m(i)}, \quad g_m =
              \frac{d_m}{Z_m}\frac{\lambda n}{n'}

    :math:`\sigma_i Z_m` is the centred cross moment of weight and profile, so the least-squares
    slope is :math:`a_i = \sigma_i Z_m / S_m` with :math:`S_m` the profile's sum of squares. It is
    algebraically the recursive least squares of the paper's online CMD, in a form that needs one
    look-up per weight and accumulates no error in the offset.

    A snapshot that :func:`accepts` refuses is not taken in, and the state keeps every bit: the
    weights are looked at first.

    It reads 13 bytes a float32 weight and writes 8, after the 4 that :func:`accepts` reads.
    Everything is computed in the dtype of ``mean``; the sum of squares is accumulated in float64.

    Args:
        weights: The N weights of the new snapshot, float16, bfloat16, float32 or float64.
        mode: [N] uint8.
        slope: [N] :math:`\sigma`, changed in place.
        mean: [N] :math:`\bar w`, changed in place.
        gain: [M] :math:`g`.
        blend: :math:`1/n'`.
        decay: :math:`\lambda` in (0, 1].
        total: [N] sum of squared deviations, changed in place when given:
            ``total = decay total + (1 - blend) e^2``.
        backend: ``"numba"`` makes one compiled pass over contiguous CPU weights (extra ``fast``),
            ``"triton"`` one launch over CUDA weights, ``"torch"`` works everywhere; ``"auto"``
            takes the fastest that fits.

    Returns:
        [] float64, the sum of e^2 over all weights: times ``1 - blend`` it is what the snapshot
        adds to the total sum of squares. NaN if the snapshot was not taken in.

    Raises:
        ShapeError: If a state vector does not have N values in the dtype of ``weights``, or lies
            on another device.
        InputError: If ``backend`` cannot address these weights.
        MissingDependency: If ``backend`` needs a package that is not installed.
    """
    if torch.compiler.is_compiling():
        squares: Tensor = _operator(
            tensors_of(weights), mode, slope, mean, gain, blend, decay, total, backend
        )
        return squares
    view = as_view(weights, mean.dtype)
    arrays = {"slope": slope, "mean": mean, "total": total}
    require_state(view.numel, view.dtype, mode, arrays, {"gain": gain}, view.device)
    chosen = _choose(view, backend)
    if view.numel <= _PACKED:
        view = view.packed()
    if not _accepts(view, chosen):
        return torch.full((), math.nan, dtype=torch.float64, device=view.device)
    arguments = (view, mode, slope, mean, gain, blend, decay, total)
    if chosen == "triton":
        from cmd_plugin.kernels.update_affine import _triton

        return _triton.update_affine(*arguments)
    if chosen == "numba":
        from cmd_plugin.kernels.update_affine import _numba

        return _numba.update_affine(*arguments)
    return _blocked.update_affine(*arguments)


def accepts(weights: Weights, backend: Backend = "auto") -> bool:
    """Whether weights are finite, and small enough for a state to hold their squares.

    Refused are NaN, infinities, and weights whose squares sum to more than 2^-20 of the largest
    number of the dtype they are read in: no sum of squares of a run overflows then.

    Args:
        weights: The N weights of a snapshot.
        backend: See :func:`update_affine`.
    """
    view = as_view(weights)
    chosen = _choose(view, backend)
    return _accepts(view.packed() if view.numel <= _PACKED else view, chosen)


def most_squares(dtype: torch.dtype) -> float:
    """Return the largest sum of squares of weights, read in a dtype, that is taken in."""
    return _HEADROOM * torch.finfo(dtype).max


def can_follow(weights: FlatView) -> bool:
    """Whether a :class:`Follower` can take snapshots of these weights in: where Triton runs."""
    return _choose(weights, "auto") == "triton"


def _accepts(view: FlatView, chosen: str) -> bool:
    if chosen == "numba":
        from cmd_plugin.kernels.update_affine import _numba

        squares = _numba.sum_of_squares(view)
    elif chosen == "triton":
        from cmd_plugin.kernels.update_affine import _triton_follow

        squares = float(_triton_follow.sum_of_squares(view))
    else:
        squares = view.sum_of_squares()
    return squares <= most_squares(view.dtype)


def _choose(view: FlatView, backend: Backend) -> str:
    return choose(
        "update_affine",
        backend,
        view.device,
        view.numel,
        numba=view.pieces() is not None,
        triton=view.addressable,
    )


_operator = torch.library.custom_op(
    "cmd_plugin::update_affine",
    update_affine,
    mutates_args=("slope", "mean", "total"),
    schema="(Tensor[] weights, Tensor assignment, Tensor(a!) slope, Tensor(b!) mean, Tensor gain, "
    "float blend, float decay, Tensor(c!)? total, str backend) -> Tensor",
)


@_operator.register_fake
def _fake(*arguments: object) -> Tensor:
    mean = arguments[3]
    assert isinstance(mean, Tensor)
    return mean.new_empty((), dtype=torch.float64)
