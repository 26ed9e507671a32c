"""How much a sample covariance is drawn towards a multiple of the identity."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cmd_plugin.errors import InputError

__all__ = ["Shrinkage", "check_shrinkage", "fourth_without", "ledoit_wolf", "oas"]

Shrinkage = Literal["auto", "none", "oas", "ledoit-wolf"] | float
"""Which intensity a in [0, 1]: of the covariance S is taken (1 - a) S + a tr(S) / d I."""


def check_shrinkage(shrinkage: Shrinkage) -> None:
    """Raise InputError unless it is a name or a number in [0, 1]."""
    if isinstance(shrinkage, str):
        if shrinkage not in ("auto", "none", "oas", "ledoit-wolf"):
            raise InputError(
                f"shrinkage must be auto, none, oas, ledoit-wolf or a number, got {shrinkage!r}."
            )
    elif not 0.0 <= shrinkage <= 1.0:
        raise InputError(f"shrinkage must be in [0, 1], got {shrinkage}.")


def oas(rows: int, dim: int, trace: Tensor, energy: Tensor) -> Tensor:
    """Return the intensity of Chen, Wiesel, Eldar and Hero (2010), equation 23.

    As in scikit-learn its terms in 2 / d are left out.

    Args:
        rows: Number of rows N.
        dim: Number of features d.
        trace: Trace of the covariance divided by N, of any shape.
        energy: Trace of its square.
    """
    spread = (rows + 1.0) * (energy - trace.square() / dim)
    return torch.where(spread > 0, (energy + trace.square()) / spread, 1.0).clamp(max=1.0)


def ledoit_wolf(rows: int, dim: int, trace: Tensor, energy: Tensor, fourth: Tensor) -> Tensor:
    r"""Return the intensity of Ledoit and Wolf (2004), section 3.2.

    Args:
        rows: Number of rows N.
        dim: Number of features d.
        trace: Trace of the covariance divided by N, of any shape.
        energy: Trace of its square.
        fourth: :math:`\sum \lVert x - \bar x \rVert^4`.
    """
    spread = energy - trace.square() / dim
    noise = (fourth / rows - energy) / rows
    return torch.where(spread > 0, noise / spread, 1.0).clamp(0.0, 1.0)


def fourth_without(
    rows: int, size: Tensor, trace: Tensor, form: Tensor, along: Tensor, fourth: float
) -> Tensor:
    r"""Return :math:`\sum \lVert x - \bar x \rVert^4` of all rows but one, for each row left out.

    Args:
        rows: Number of rows N, the one left out included.
        size: [N] :math:`\lVert z \rVert^2`, for z = x minus the mean of all.
        trace: Trace of :math:`M = \sum z z^T`.
        form: [N] :math:`z^T M z`.
        along: [N] :math:`z \cdot \sum \lVert z \rVert^2 z`.
        fourth: :math:`\sum \lVert z \rVert^4`.
    """
    n = rows - 1  # the mean of the others is that of all minus z / n
    square = size.square()
    return (
        fourth
        - square
        + 4 * (form - square) / n**2
        + 4 * (along - square) / n
        + 2 * size * (trace - size) / n**2
        - 3 * square / n**3
    )
