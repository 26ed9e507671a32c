"""Recursive least squares of every weight against its mode's profile, one snapshot at a time."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from torch import Tensor

from cmd_plugin.errors import InputError, require
from cmd_plugin.kernels._checks import require_state
from cmd_plugin.kernels.flat_view import FlatView
from cmd_plugin.kernels.update_affine import _blocked

__all__ = ["update_affine"]


def update_affine(
    weights: FlatView,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    gain: Tensor,
    blend: float,
    decay: float = 1.0,
    total: Tensor | None = None,
    backend: Literal["auto", "torch", "numba"] = "auto",
) -> float:
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

    Args:
        weights: The N weights of the new snapshot.
        mode: [N] uint8.
        slope: [N] :math:`\sigma`, changed in place.
        mean: [N] :math:`\bar w`, changed in place.
        gain: [M] :math:`g`.
        blend: :math:`1/n'`.
        decay: :math:`\lambda` in (0, 1].
        total: [N] sum of squared deviations, changed in place when given:
            ``total = decay total + (1 - blend) e^2``.
        backend: ``"numba"`` makes one compiled pass over contiguous CPU weights (extra ``fast``),
            ``"torch"`` works everywhere; ``"auto"`` takes the first where it can.

    Returns:
        The sum of e^2 over all weights: times ``1 - blend`` it is what the snapshot adds to the
        total sum of squares.

    Raises:
        ShapeError: If a state vector does not have N values in the dtype of ``weights``.
        InputError: If ``backend="numba"`` cannot address these weights.
        MissingDependency: If ``backend="numba"`` and numba is not installed.
    """
    arrays = {"slope": slope, "mean": mean, "total": total}
    require_state(weights.numel, weights.dtype, mode, arrays, {"gain": gain})
    pieces = weights.pieces() if backend != "torch" and mean.device.type == "cpu" else None
    if backend == "numba" and pieces is None:
        raise InputError(
            "backend='numba' needs contiguous CPU weights in the state's dtype: use 'auto'."
        )
    if pieces is not None and (backend == "numba" or find_spec("numba") is not None):
        require("numba", "fast")
        # Imported here: numba costs a second, and only who follows a run on a CPU needs it.
        from cmd_plugin.kernels.update_affine import _numba

        return _numba.update_affine(pieces, mode, slope, mean, gain, blend, decay, total)
    return _blocked.update_affine(weights, mode, slope, mean, gain, blend, decay, total)
