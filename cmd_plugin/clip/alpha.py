"""The contrastive loss over the offset of the modalities, and what it does to conformity.

Source: Levi and Gilboa, "The Double-Ellipsoid Geometry of CLIP" (ICML 2025), section 6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cmd_plugin.clip._checks import pairs, unit
from cmd_plugin.clip._rows import Rows
from cmd_plugin.clip.conformities import conformity
from cmd_plugin.clip.gap import Shift, alignment, shift_to_origin
from cmd_plugin.errors import InputError

__all__ = ["ALPHAS", "AlphaCurve", "alpha_curve", "conformity_divergence", "nt_xent"]

Divergence = Literal["hist", "gauss"]
Direction = Literal["image_text", "text_image"]

ALPHAS = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 0.9)
"""Offsets of the paper's figure; 1 would centre both modalities."""


@dataclass(frozen=True)
class AlphaCurve:
    """What happens when the modalities move: v' = v - alpha * mean.

    Attributes:
        alphas: Offsets, shape [A], float64.
        loss: NT-Xent of the pairs at each, shape [A], nats.
        divergence: KL divergence between the conformities of images and of texts, shape [A], nats.
        alignment: Mean squared distance of the unit vectors of pairs, shape [A].
        temperature: Of the loss.
        shift: Which modality moved.
        kl: How the divergence was taken.
        direction: From which modality to which.
        bins: Of the histograms.
    """

    alphas: Tensor
    loss: Tensor
    divergence: Tensor
    alignment: Tensor
    temperature: float
    shift: Shift
    kl: Divergence
    direction: Direction
    bins: int

    @property
    def best(self) -> float:
        """The offset of least loss."""
        return float(self.alphas[self.loss.argmin()])


def nt_xent(images: Rows, texts: Rows, temperature: float = 0.01) -> float:
    """Symmetric InfoNCE of pairs, all of them as one batch: mean of the two cross entropies, nats.

    Args:
        images: Shape [N, d], N at least 2; only directions count.
        texts: Shape [N, d], row i the text of image i.
        temperature: Above 0; cosines are divided by it.

    Raises:
        ShapeError: If shapes do not fit.
        InputError: If there are too few rows, one is zero, or ``temperature`` is not above 0.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    if not temperature > 0.0:
        raise InputError(f"temperature must be above 0, it is {temperature!r}.")
    left, right = pairs(images, texts)
    logits = unit(left, "images") @ unit(right, "texts").T / temperature
    own = torch.arange(len(logits), device=logits.device)
    return float((cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2.0)


def conformity_divergence(p: Tensor, q: Tensor, kl: Divergence = "gauss", bins: int = 50) -> float:
    """KL divergence of two samples of conformity, KL(p || q), in nats.

    Args:
        p: Shape [N], N at least 2.
        q: Shape [M], M at least 2.
        kl: ``gauss`` of the normal laws with their means and variances; ``hist`` of histograms over
            their common range, to whose counts half a sample a bin is added, since an empty bin
            would make it infinite.
        bins: Of the histograms.

    Raises:
        InputError: If an option is unknown, or all values of a sample are equal.
    """
    if kl not in ("hist", "gauss"):
        raise InputError(f"kl must be hist or gauss, it is {kl!r}.")
    if bins < 2:
        raise InputError(f"bins must be at least 2, it is {bins!r}.")
    p, q = p.detach().double().cpu(), q.detach().double().cpu()
    if len(p) < 2 or len(q) < 2 or p.std() == 0 or q.std() == 0:
        raise InputError("the conformities of a modality are all equal: their divergence is none.")
    if kl == "gauss":
        ratio = float(p.var() / q.var())
        distance = float((p.mean() - q.mean()).square() / q.var())
        return 0.5 * (ratio + distance - 1.0 - math.log(ratio))
    low, high = float(min(p.min(), q.min())), float(max(p.max(), q.max()))
    shares = []
    for sample in (p, q):
        counts = torch.histc(sample, bins, low, high) + 0.5
        shares.append(counts / counts.sum())
    return float((shares[0] * (shares[0] / shares[1]).log()).sum())


def alpha_curve(
    images: Rows,
    texts: Rows,
    alphas: Sequence[float] = ALPHAS,
    *,
    temperature: float = 0.01,
    shift: Shift = "both",
    kl: Divergence = "gauss",
    direction: Direction = "image_text",
    bins: int = 50,
) -> AlphaCurve:
    """Move the modalities towards and away from the origin, and measure at each step.

    That the loss is least at 0 is the paper's claim; pairs with noise may have it elsewhere.

    Args:
        images: Shape [N, d], N at least 2.
        texts: Shape [N, d], row i the text of image i.
        alphas: Offsets; 1 centres a modality at the origin.
        temperature: Of the loss.
        shift: Which modality moves.
        kl: See :func:`conformity_divergence`.
        direction: KL(images || texts) or KL(texts || images).
        bins: Of the histograms.

    Raises:
        ShapeError: If shapes do not fit.
        InputError: If there are too few rows, or an option is out of range.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    if direction not in ("image_text", "text_image"):
        raise InputError(f"direction must be image_text or text_image, it is {direction!r}.")
    if not len(alphas):
        raise InputError("alphas is empty: give at least one offset.")
    left, right = pairs(images, texts)
    rows = []
    for alpha in alphas:
        moved = shift_to_origin(left, right, alpha, shift)
        spread = [conformity(x) for x in moved]
        p, q = spread if direction == "image_text" else spread[::-1]
        rows.append(
            (
                nt_xent(*moved, temperature),
                conformity_divergence(p, q, kl, bins),
                alignment(*moved),
            )
        )
    loss, divergence, near = torch.tensor(rows, dtype=torch.float64).T
    return AlphaCurve(
        alphas=torch.tensor(list(alphas), dtype=torch.float64),
        loss=loss,
        divergence=divergence,
        alignment=near,
        temperature=temperature,
        shift=shift,
        kl=kl,
        direction=direction,
        bins=bins,
    )
