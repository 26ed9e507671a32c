"""The shape of a cloud of embeddings: a thin ellipsoidal shell away from the origin.

Source: Levi and Gilboa, "The Double-Ellipsoid Geometry of CLIP" (ICML 2025), section 4. An
"ellipsoid" is a mean and a covariance there; nothing is fitted to a surface.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmd_plugin.clip._checks import embeddings
from cmd_plugin.clip._rows import Rows
from cmd_plugin.errors import InputError

__all__ = ["Ellipsoid", "fit_ellipsoid"]


@dataclass(frozen=True)
class Ellipsoid:
    """Mean and covariance of embeddings, and what they say of the shape.

    Attributes:
        count: Number of rows N.
        mean: Centre m, shape [d], float64.
        covariance: Shape [d, d], float64, divided by N - 1.
        eigenvalues: Of the covariance, shape [d], largest first.
        radius: Mean of the centred norms ||x - m||.
        thickness: Their standard deviation; far below ``radius`` in a thin shell.
        offset: ||m|| over the norm of the features' standard deviations: how far the centre lies
            from the origin in units of the cloud.
        dominance: ``sum_{j != i} |C_ij| / C_ii`` of each feature, shape [d]; 0 where the axes are
            the features, far above 1 in a tilted ellipsoid. NaN for a feature that does not vary.
        diagonal_share: ``sum |C_ii| / sum |C_ij|``, in (0, 1]; 1 for a diagonal covariance.
        participation: (sum of eigenvalues)^2 / (d * sum of their squares), in (0, 1]; 1 for a
            sphere, 1 / d for a line.
    """

    count: int
    mean: Tensor
    covariance: Tensor
    eigenvalues: Tensor
    radius: float
    thickness: float
    offset: float
    dominance: Tensor
    diagonal_share: float
    participation: float

    @property
    def anisotropy(self) -> float:
        """1 - participation: 0 for a sphere, near 1 where few directions hold all the spread."""
        return 1.0 - self.participation


def fit_ellipsoid(x: Rows) -> Ellipsoid:
    """Measure the shape of a cloud of embeddings, of one modality.

    Args:
        x: Raw embeddings, shape [N, d], N at least 2.

    Raises:
        ShapeError: If ``x`` is no matrix.
        InputError: If there are fewer than 2 rows, or all are equal.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    wide = embeddings(x, "x", least=2)
    mean = wide.mean(dim=0)
    centred = wide - mean
    covariance = centred.T @ centred / (len(wide) - 1)
    norms = centred.norm(dim=1)
    variances, size = covariance.diagonal(), covariance.abs()
    total = float(variances.sum())
    if not total > 0.0:
        raise InputError("all rows of x are equal: such a cloud has no shape.")
    others = size.sum(dim=1) - variances
    return Ellipsoid(
        count=len(wide),
        mean=mean,
        covariance=covariance,
        # Below zero only by rounding.
        eigenvalues=torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0.0),
        radius=float(norms.mean()),
        thickness=float(norms.std()),
        offset=float(mean.norm()) / total**0.5,
        dominance=torch.where(variances > 0, others / variances, torch.nan),
        diagonal_share=total / float(size.sum()),
        participation=total**2 / (len(mean) * float(covariance.square().sum())),
    )
