"""Scores of the tokens that enter a global maximum: norms over channels, channels won, entropy."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.kernels._dispatch import choose
from cmd_plugin.kernels.point_importance import _blocked, reference

__all__ = ["PointScores", "entropy_parts", "normalised_entropy", "point_importance"]

_SMOOTHING = 1e-6  # added to every count before the entropy, as in the authors' code


class PointScores(NamedTuple):
    """What :func:`point_importance` found.

    Attributes:
        norm: [B, M] float32 (float64 for float64 features), at least 0.
        wins: [B, M] channels won: int64 for ``ties="first"``, floating for ``"split"``; None
            if it was not asked for.
    """

    norm: Tensor
    wins: Tensor | None


def point_importance(
    features: Tensor,
    mask: Tensor | None = None,
    *,
    order: float = 1.0,
    ties: Literal["first", "split"] = "first",
    wins: bool = True,
    nonnegative: bool = False,
    backend: Literal["auto", "torch", "triton"] = "auto",
) -> PointScores:
    r"""Score the tokens whose features X [B, F, M] a maximum over M reduces to [B, F].

    .. math:: s_{bm} = \lVert X_{b \cdot m} \rVert_p, \qquad
              n_{bm} = \#\{f : \arg\max_{m'} X_{bfm'} = m\}

    Sums are accumulated in float32 (float64 for float64 features). Counts are exact. Features that
    hold NaN give a NaN norm; nothing is checked here.

    Args:
        features: [B, F, M], any floating dtype, any strides.
        mask: [B, M] bool, True for real tokens; the others score 0 and win nothing. Every cloud
            needs one real token.
        order: p, one of 1, 2 and ``inf``.
        ties: Several tokens may share a channel's maximum. ``"first"`` gives it to the lowest
            index; ``"split"`` gives each an equal share, which alone is independent of the order
            of the tokens.
        wins: Whether to count.
        nonnegative: A promise that no feature is below zero, as behind a ReLU. The CPU path then
            takes sums without absolute values, in one read; a broken promise gives wrong norms.
        backend: ``"triton"`` reads the features once (CUDA; counts with ``ties="first"`` only),
            ``"torch"`` works everywhere; ``"auto"`` takes the first where it can.

    Raises:
        ShapeError: If shapes or dtypes do not fit.
        InputError: If ``order`` or ``ties`` is unknown, or the backend cannot run on these.
        MissingDependency: If ``backend="triton"`` and Triton is not installed.
    """
    _check(features, mask, order, ties)
    features = features.detach()
    split = wins and ties == "split"
    if backend == "triton" and split:
        raise InputError("backend='triton' gives ties to the first token: use 'auto' to split.")
    used = choose("point_importance", backend, features.device, triton=not split)
    if used == "triton":
        # Imported here: only who has a GPU needs Triton.
        from cmd_plugin.kernels.point_importance import _triton

        return PointScores(*_triton.point_importance(features, mask, order, wins=wins))
    if features.device.type != "cpu":
        norm = reference.norms(features, mask, order)
        return PointScores(norm, reference.wins(features, mask, ties) if wins else None)
    norm = _blocked.norms(features, mask, order, nonnegative=nonnegative)
    if split:
        return PointScores(norm, reference.wins(features, mask, ties))
    return PointScores(norm, _blocked.wins(features, mask) if wins else None)


def entropy_parts(wins: Tensor, mask: Tensor | None = None, *, bits: bool = False) -> Tensor:
    r"""Each token's part of the entropy of the counts, :math:`-p_i \log_2 p_i / \log_2 M`.

    Args:
        wins: [B, M] counts.
        mask: [B, M] bool, True for real tokens; the others have no part.
        bits: Do not divide by :math:`\log_2 M`.

    Returns:
        [B, M] float64.

    Raises:
        ShapeError: If the shapes do not fit.
    """
    if wins.ndim != 2 or (mask is not None and mask.shape != wins.shape):
        raise ShapeError(f"wins and mask must both be [B, M], got {tuple(wins.shape)}.")
    real = torch.ones_like(wins, dtype=torch.bool) if mask is None else mask
    smooth = (wins.double() + _SMOOTHING).masked_fill(~real, 0.0)
    share = smooth / smooth.sum(dim=1, keepdim=True)
    parts: Tensor = -torch.special.xlogy(share, share) / math.log(2.0)
    if bits:
        return parts
    tokens = real.sum(dim=1, keepdim=True).double()
    return torch.where(tokens > 1, parts / tokens.log2(), share)


def normalised_entropy(wins: Tensor, mask: Tensor | None = None, *, bits: bool = False) -> Tensor:
    r"""Entropy of the counts: 1 if all tokens win alike, near 0 if one wins everything.

    .. math:: p_i = \frac{n_i + 10^{-6}}{\sum_j (n_j + 10^{-6})}, \qquad
              H = -\frac{\sum_i p_i \log_2 p_i}{\log_2 M}

    M is the number of real tokens of each cloud, so that H compares clouds of equal size only.
    With a single real token H is 1: everything is shared by all there is.

    Args:
        wins: [B, M] counts.
        mask: [B, M] bool, True for real tokens.
        bits: Return the entropy in bits, not divided by :math:`\log_2 M`.

    Returns:
        [B] float64.

    Raises:
        ShapeError: If the shapes do not fit.
    """
    return entropy_parts(wins, mask, bits=bits).sum(dim=1)


def _check(features: Tensor, mask: Tensor | None, order: float, ties: str) -> None:
    if features.ndim != 3 or not features.is_floating_point() or 0 in features.shape:
        raise ShapeError(
            "features must be floating [B, F, M] without an empty axis, got "
            f"{tuple(features.shape)} {features.dtype}."
        )
    if mask is not None:
        expected = (features.shape[0], features.shape[2])
        if mask.shape != expected or mask.dtype != torch.bool:
            raise ShapeError(f"mask must be {expected} bool, got {tuple(mask.shape)} {mask.dtype}.")
        if not bool(mask.any(dim=1).all()):
            raise ShapeError("mask leaves a cloud without any point.")
    if order not in (1.0, 2.0, float("inf")):
        raise InputError(f"order must be 1, 2 or inf, got {order}.")
    if ties not in ("first", "split"):
        raise InputError(f"ties must be first or split, got {ties!r}.")
