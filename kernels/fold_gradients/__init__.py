"""The chain rule of embedded weights: hand their gradients to their modes' profiles."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.errors import ShapeError
from cmd_plugin.kernels._checks import require_state, require_vector
from cmd_plugin.kernels._dispatch import Backend, choose
from cmd_plugin.kernels.fold_gradients import _blocked

__all__ = ["fold_gradients"]


def fold_gradients(
    gradient: Tensor,
    embedded: Tensor,
    mode: Tensor,
    scale: Tensor,
    modes: int,
    backend: Backend = "auto",
) -> Tensor:
    r"""Sum the gradients of embedded weights by mode, and zero them, in place.

    For :math:`w_i = a_i r_{m(i)} + b_i` the chain rule gives

    .. math:: G_m = \sum_{i \in E, m(i) = m} a_i\, g_i

    as what the embedded weights add to the gradient of :math:`r_m`. The sums are taken in float64
    and always in the same order, so that processes with equal gradients keep equal weights.

    Args:
        gradient: [N] floating, changed in place: zero where embedded.
        embedded: [N] bool.
        mode: [N] uint8.
        scale: [N] float32 or float64, :math:`a`.
        modes: Number of modes M, 1..256.
        backend: See :func:`cmd_plugin.kernels.update_affine`.

    Returns:
        [M] float64, :math:`G`.

    Raises:
        ShapeError: If shapes, dtypes or devices do not fit.
        InputError: If ``backend`` cannot address these tensors.
        MissingDependency: If ``backend`` needs a package that is not installed.
    """
    if torch.compiler.is_compiling():
        sums: Tensor = _operator(gradient, embedded, mode, scale, modes, backend)
        return sums
    if gradient.ndim != 1 or not gradient.is_floating_point():
        raise ShapeError(
            f"gradient must be a floating vector [N], got {tuple(gradient.shape)} {gradient.dtype}."
        )
    require_state(len(gradient), scale.dtype, mode, {"scale": scale}, {})
    require_vector("embedded", embedded, len(gradient), torch.bool, gradient.device)
    compiled = gradient.is_contiguous() and gradient.dtype in (torch.float32, torch.float64)
    chosen = choose(
        "fold_gradients",
        backend,
        gradient.device,
        len(gradient),
        numba=gradient.device.type == "cpu" and compiled,
        triton=gradient.is_contiguous(),
    )
    if chosen == "triton":
        from cmd_plugin.kernels.fold_gradients import _triton

        return _triton.fold_gradients(gradient, embedded, mode, scale, modes)
    if chosen == "numba":
        from cmd_plugin.kernels.fold_gradients import _numba

        return _numba.fold_gradients(gradient, embedded, mode, scale, modes)
    return _blocked.fold_gradients(gradient, embedded, mode, scale, modes)


_operator = torch.library.custom_op(
    "cmd_plugin::fold_gradients",
    fold_gradients,
    mutates_args=("gradient",),
    schema="(Tensor(a!) gradient, Tensor embedded, Tensor assignment, Tensor scale, int modes, "
    "str backend) -> Tensor",
)


@_operator.register_fake
def _fake(*arguments: object) -> Tensor:
    gradient, modes = arguments[0], arguments[4]
    assert isinstance(gradient, Tensor)
    assert isinstance(modes, int)
    return gradient.new_empty(modes, dtype=torch.float64)
