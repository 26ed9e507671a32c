"""Take a snapshot in and evaluate the model at it, in one pass over the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmd_plugin.kernels._checks import require_pair, require_state, require_vector
from cmd_plugin.kernels._dispatch import Backend, choose
from cmd_plugin.kernels.flat_view import Weights, as_view, tensors_of
from cmd_plugin.kernels.update_and_reconstruct import _blocked

__all__ = ["update_and_reconstruct"]


def update_and_reconstruct(
    weights: Weights,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    gain: Tensor,
    step: Tensor,
    blend: float,
    decay: float = 1.0,
    *,
    total: Tensor | None = None,
    energy: Tensor | None = None,
    out: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """Do :func:`update_affine`, then :func:`reconstruct` with the new state, in one pass.

    It reads 13 bytes a float32 weight and writes 12, where the two kernels in turn move 34.

    Args:
        weights: The N weights of the new snapshot.
        mode: [N] uint8.
        slope: [N], changed in place.
        mean: [N], changed in place.
        gain: [M], see :func:`update_affine`.
        step: [M], see :func:`reconstruct`; of the profiles with the new snapshot in them.
        blend: See :func:`update_affine`.
        decay: See :func:`update_affine`.
        total: [N], changed in place when given.
        energy: [M], see :func:`reconstruct`; needs ``total``.
        out: [N] of the dtype of ``mean``, filled with the modelled weights.
        backend: See :func:`update_affine`.

    Returns:
        [] float64, the sum of squared innovations, as of :func:`update_affine`.

    Raises:
        ShapeError: If shapes, dtypes or devices do not fit.
        InputError: If ``backend`` cannot address these tensors.
        MissingDependency: If ``backend`` needs a package that is not installed.
    """
    if torch.compiler.is_compiling():
        squares: Tensor = _operator(
            tensors_of(weights),
            mode,
            slope,
            mean,
            gain,
            step,
            blend,
            decay,
            total,
            energy,
            out,
            backend,
        )
        return squares
    view = as_view(weights, mean.dtype)
    arrays = {"slope": slope, "mean": mean, "total": total}
    tables = {"gain": gain, "step": step, "energy": energy}
    require_state(view.numel, view.dtype, mode, arrays, tables, view.device)
    require_vector("out", out, view.numel, view.dtype, view.device)
    if energy is not None:
        require_pair(total, energy)
    pieces = view.pieces()
    chosen = choose(
        "update_and_reconstruct",
        backend,
        view.device,
        view.numel,
        numba=pieces is not None and view.device.type == "cpu",
        triton=view.addressable,
    )
    arguments = (mode, slope, mean, gain, step, blend, decay, total, energy, out)
    if chosen == "triton":
        from cmd_plugin.kernels.update_and_reconstruct import _triton

        return _triton.update_and_reconstruct(view, *arguments)
    if chosen == "numba" and pieces is not None:
        from cmd_plugin.kernels.update_and_reconstruct import _numba

        return _numba.update_and_reconstruct(pieces, *arguments)
    return _blocked.update_and_reconstruct(view, *arguments)


def _run(
    weights: Sequence[Tensor],
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    gain: Tensor,
    step: Tensor,
    blend: float,
    decay: float,
    total: Tensor | None,
    energy: Tensor | None,
    out: Tensor,
    backend: Backend,
) -> Tensor:
    return update_and_reconstruct(
        weights,
        mode,
        slope,
        mean,
        gain,
        step,
        blend,
        decay,
        total=total,
        energy=energy,
        out=out,
        backend=backend,
    )


_operator = torch.library.custom_op(
    "cmd_plugin::update_and_reconstruct",
    _run,
    mutates_args=("slope", "mean", "total", "out"),
    schema="(Tensor[] weights, Tensor assignment, Tensor(a!) slope, Tensor(b!) mean, Tensor gain, "
    "Tensor step, float blend, float decay, Tensor(c!)? total, Tensor? energy, Tensor(d!) out, "
    "str backend) -> Tensor",
)


@_operator.register_fake
def _fake(*arguments: object) -> Tensor:
    out = arguments[10]
    assert isinstance(out, Tensor)
    return out.new_empty((), dtype=torch.float64)
