"""Where images and texts lie apart: features that tell them apart, the gap, and two shifts.

Sources: Levi and Gilboa (ICML 2025), section 4; Liang et al., "Mind the Gap" (NeurIPS 2022);
Schrodi et al., "Two Effects, One Trigger" (ICLR 2025); Wang and Isola (ICML 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cmd_plugin.clip._checks import embeddings, pairs, same_width, unit
from cmd_plugin.clip._rows import Rows
from cmd_plugin.errors import InputError

__all__ = [
    "ModalityGap",
    "Shift",
    "alignment",
    "modality_gap",
    "separability",
    "separating_accuracy",
    "shift_along_gap",
    "shift_to_origin",
    "uniformity",
]

Shift = Literal["both", "image", "text"]
_BLOCK = 2048  # rows of a distance matrix at a time


def separability(images: Rows, texts: Rows) -> Tensor:
    """How far apart a feature keeps the modalities, ``|m_i - m_t| / sqrt(var_i + var_t)``.

    Args:
        images: Raw image embeddings, shape [N, d], N at least 2.
        texts: Raw text embeddings of the same model, shape [M, d], M at least 2; not pairs.

    Returns:
        Of each feature, shape [d], float64; infinite where two constants differ, 0 where they do
        not. Feature numbers count from 0 (the paper's 93 and 134 count from 1).

    Raises:
        ShapeError: If shapes do not fit.
        InputError: If there are too few rows.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    left, right = embeddings(images, "images", 2), embeddings(texts, "texts", 2)
    same_width(left, right, ("images", "texts"))
    apart = (left.mean(dim=0) - right.mean(dim=0)).abs()
    spread = (left.var(dim=0) + right.var(dim=0)).sqrt()
    return torch.where(apart > 0, apart / spread, 0.0)


def separating_accuracy(images: Rows, texts: Rows) -> Tensor:
    """Best balanced accuracy of one threshold on each feature at telling images from texts.

    Args:
        images: Raw image embeddings, shape [N, d].
        texts: Raw text embeddings of the same model, shape [M, d].

    Returns:
        Of each feature, shape [d], float64, in [0.5, 1]; 1 where no value of one modality lies
        among those of the other.

    Raises:
        ShapeError: If shapes do not fit.
        InputError: If there are too few rows.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    left, right = embeddings(images, "images"), embeddings(texts, "texts")
    same_width(left, right, ("images", "texts"))
    values, order = torch.cat((left, right)).sort(dim=0)
    is_left = order < len(left)
    below_left = is_left.double().cumsum(dim=0) / len(left)
    below_right = (~is_left).double().cumsum(dim=0) / len(right)
    gain = (below_left - below_right).abs()
    # A threshold cannot pass between equal values.
    gain[:-1][values[:-1] == values[1:]] = 0.0
    return 0.5 + gain.amax(dim=0) / 2.0


@dataclass(frozen=True)
class ModalityGap:
    """How far apart paired modalities lie on the unit sphere.

    Attributes:
        count: Number of pairs.
        l2m: Distance between the mean unit vectors of images and texts (Liang et al.).
        rmg: Mean distance (1 - cosine) / 2 of pairs over itself plus the mean distance within the
            modalities, in [0, 1] (Schrodi et al.); 0 when pairs coincide.
        paired_cosine: Mean cosine of a pair.
        image_cosine: Mean cosine of two different images.
        text_cosine: Mean cosine of two different texts.
    """

    count: int
    l2m: float
    rmg: float
    paired_cosine: float
    image_cosine: float
    text_cosine: float


def modality_gap(images: Rows, texts: Rows) -> ModalityGap:
    """Measure the gap between image and text embeddings of pairs.

    Args:
        images: Shape [N, d], N at least 2; only directions count.
        texts: Shape [N, d], row i the text of image i.

    Raises:
        ShapeError: If shapes do not fit.
        InputError: If there are too few rows, or one is zero.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    left, right = pairs(images, texts)
    left, right = unit(left, "images"), unit(right, "texts")
    count = len(left)
    means = left.mean(dim=0), right.mean(dim=0)
    # Mean over pairs of different rows, from the mean alone.
    inner = [(count * float(m @ m) - 1.0) / (count - 1) for m in means]
    paired = float((left * right).sum(dim=1).mean())
    between, within = (1.0 - paired) / 2.0, (1.0 - (inner[0] + inner[1]) / 2.0) / 2.0
    return ModalityGap(
        count=count,
        l2m=float((means[0] - means[1]).norm()),
        rmg=between / (between + within) if between + within > 0 else 0.0,
        paired_cosine=paired,
        image_cosine=inner[0],
        text_cosine=inner[1],
    )


def alignment(images: Rows, texts: Rows) -> float:
    """Mean squared distance of the unit vectors of pairs, in [0, 4]; lower is closer (Wang, Isola).

    Args:
        images: Shape [N, d].
        texts: Shape [N, d], row i the text of image i.

    Raises:
        ShapeError: If shapes do not fit.
        InputError: If there are no rows, or one is zero.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    left, right = pairs(images, texts, least=1)
    return float((unit(left, "images") - unit(right, "texts")).square().sum(dim=1).mean())


def uniformity(x: Rows, sharpness: float = 2.0) -> float:
    """Log of the mean of exp(-t ||u - u'||^2) over different rows; lower is more even.

    Wang and Isola (ICML 2020), equation 8, of unit vectors.

    Args:
        x: Shape [N, d], N at least 2; O(N^2 d) time, O(N d) memory.
        sharpness: t, above 0.

    Raises:
        ShapeError: If ``x`` is no matrix.
        InputError: If there are too few rows, one is zero, or ``sharpness`` is not above 0.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    if not sharpness > 0.0:
        raise InputError(f"sharpness must be above 0, it is {sharpness!r}.")
    units = unit(embeddings(x, "x", least=2), "x")
    count, sums = len(units), []
    for start in range(0, count, _BLOCK):
        exponents = 2.0 * sharpness * (units[start : start + _BLOCK] @ units.T - 1.0)
        own = torch.arange(len(exponents), device=units.device)
        exponents[own, start + own] = -math.inf  # a row is no pair with itself
        sums.append(exponents.flatten().logsumexp(dim=0))
    return float(torch.stack(sums).logsumexp(dim=0)) - math.log(count * (count - 1))


def shift_along_gap(images: Rows, texts: Rows, amount: float) -> tuple[Tensor, Tensor]:
    """Move both modalities along the gap and put them back on the sphere (Liang et al., sec. 5).

    Args:
        images: Shape [N, d]; taken as unit vectors.
        texts: Shape [M, d]; taken as unit vectors.
        amount: Images move by ``-amount / 2`` and texts by ``amount / 2`` times the gap, the
            difference of the means: 0 changes nothing, 1 closes it but for the renormalising,
            negative values widen it.

    Returns:
        Unit vectors [N, d] and [M, d], float64.

    Raises:
        ShapeError: If shapes do not fit.
        InputError: If there are no rows, or one is zero before or after.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    left, right = embeddings(images, "images"), embeddings(texts, "texts")
    same_width(left, right, ("images", "texts"))
    left, right = unit(left, "images"), unit(right, "texts")
    half = (left.mean(dim=0) - right.mean(dim=0)) * (amount / 2.0)
    return unit(left - half, "shifted images"), unit(right + half, "shifted texts")


def shift_to_origin(
    images: Rows, texts: Rows, alpha: float, shift: Shift = "both"
) -> tuple[Tensor, Tensor]:
    """Move each modality towards the origin: x - alpha * mean (Levi and Gilboa, section 6).

    Args:
        images: Shape [N, d].
        texts: Shape [M, d].
        alpha: 0 changes nothing, 1 centres at the origin, -1 doubles the offset.
        shift: Which modality moves.

    Returns:
        Shapes [N, d] and [M, d], float64, not renormalised.

    Raises:
        ShapeError: If shapes do not fit.
        InputError: If there are no rows, or ``shift`` is unknown.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    if shift not in ("both", "image", "text"):
        raise InputError(f"shift must be both, image or text, it is {shift!r}.")
    left, right = embeddings(images, "images"), embeddings(texts, "texts")
    same_width(left, right, ("images", "texts"))
    if shift != "text":
        left = left - alpha * left.mean(dim=0)
    if shift != "image":
        right = right - alpha * right.mean(dim=0)
    return left, right
