"""Overwrite the embedded weights by what their modes say, and touch no other."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.kernels._checks import require_state, require_vector
from cmd_plugin.kernels._dispatch import Backend, choose
from cmd_plugin.kernels.apply_embedding import _blocked
from cmd_plugin.kernels.flat_view import Weights, as_view, tensors_of

__all__ = ["apply_embedding"]


def apply_embedding(
    weights: Weights,
    embedded: Tensor,
    mode: Tensor,
    scale: Tensor,
    offset: Tensor,
    profile: Tensor,
    backend: Backend = "auto",
) -> None:
    r"""Write :math:`w_i = a_i r_{m(i)} + b_i` into the embedded weights, in place.

    All other weights keep their bits, whatever dtype they have. The product is rounded before the
    sum is taken, so that the result is the same on every machine and backend. It reads a byte a
    weight, and 9 more bytes and writes 4 where one is embedded.

    Args:
        weights: The N weights.
        embedded: [N] bool, which ones to overwrite.
        mode: [N] uint8.
        scale: [N] of the view's dtype, :math:`a`.
        offset: [N] of the view's dtype, :math:`b`.
        profile: [M] current value :math:`r` of every mode's profile, on any device.
        backend: See :func:`cmd_plugin.kernels.update_affine`.

    Raises:
        ShapeError: If shapes, dtypes or devices do not fit.
        InputError: If ``backend`` cannot address these tensors.
        MissingDependency: If ``backend`` needs a package that is not installed.
    """
    if torch.compiler.is_compiling():
        _operator(tensors_of(weights), embedded, mode, scale, offset, profile, backend)
        return
    view = as_view(weights, scale.dtype)
    arrays: dict[str, Tensor | None] = {"scale": scale, "offset": offset}
    require_state(view.numel, view.dtype, mode, arrays, {"profile": profile}, view.device)
    require_vector("embedded", embedded, view.numel, torch.bool, view.device)
    chosen = choose(
        "apply_embedding",
        backend,
        view.device,
        view.numel,
        numba=view.pieces() is not None,
        triton=view.addressable,
    )
    if chosen == "triton":
        from cmd_plugin.kernels.apply_embedding import _triton

        _triton.apply_embedding(view, embedded, mode, scale, offset, profile)
    elif chosen == "numba":
        from cmd_plugin.kernels.apply_embedding import _numba

        _numba.apply_embedding(view, embedded, mode, scale, offset, profile)
    else:
        _blocked.apply_embedding(view, embedded, mode, scale, offset, profile)


_operator = torch.library.custom_op(
    "cmd_plugin::apply_embedding",
    apply_embedding,
    mutates_args=("weights",),
    schema="(Tensor(a!)[] weights, Tensor embedded, Tensor assignment, Tensor scale, "
    "Tensor offset, Tensor profile, str backend) -> ()",
)


@_operator.register_fake
def _fake(*arguments: object) -> None:
    """Nothing is returned."""
