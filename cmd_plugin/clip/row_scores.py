"""All scores of rows at once: how usual each is to a whitening, and to a mean direction."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmd_plugin.clip.whitening import Whitening
from cmd_plugin.errors import InputError

__all__ = ["SCORES", "score_rows"]

SCORES: dict[str, dict[str, str]] = {
    "embedding_norm": {
        "formula": "||x||",
        "direction": "none: the length of the embedding as it came; 1 for all means that it was "
        "normalised, and then the likelihood is not the paper's",
    },
    "norm": {
        "formula": "||y||, y = (x - mean) @ matrix",
        "direction": "low is usual, high is rare",
    },
    "squared_norm": {
        "formula": "||y||^2, the squared Mahalanobis distance to the rows of the fit",
        "direction": "low is usual, high is rare",
    },
    "log_likelihood": {
        "formula": "-(r log(2 pi) + ||y||^2) / 2 in nats, r the number of directions",
        "direction": "high is usual, low is rare; a surrogate that ranks within one whitening and "
        "says nothing across models, modalities or whitenings",
    },
    "percentile": {
        "formula": "100 (1 + number of reference rows that are no likelier) / (1 + number of "
        "reference rows), of the leave-one-out scores of the fit",
        "direction": "in (0, 100]: 100 is the most usual, 1 is rarer than 99 % of the reference; "
        "no p-value",
    },
    "conformity": {
        "formula": "<x / ||x||, m>, m the mean of x / ||x|| over the rows of the fit: the mean "
        "cosine to them (of rows of the fit: to the others)",
        "direction": "in [-1, 1]: high is common, low is unique",
    },
}
"""Formula and direction of every score, by name."""


def score_rows(
    x: Tensor, whitening: Whitening, unit_mean: Tensor | None = None, *, leave_one_out: bool = False
) -> dict[str, Tensor]:
    """Return the scores of rows by name, as :data:`SCORES` explains them.

    Args:
        x: Shape [n, d], floating.
        whitening: What scores them; without a reference there is no percentile.
        unit_mean: Mean unit vector of the rows of the fit, [d] float64; without it there is no
            conformity.
        leave_one_out: Whether these are rows of the fit, each to be scored as if it had not been.

    Returns:
        Each [n] float64; NaN where a row is not finite.

    Raises:
        ShapeError: If shapes do not fit.
        InputError: If leave-one-out scores do not exist.
    """
    wide = x.detach().double()
    norms = torch.linalg.vector_norm(wide, dim=1)
    squared = (whitening.leave_one_out if leave_one_out else whitening.squared_norm)(x).double()
    found = {
        "embedding_norm": norms,
        "norm": squared.sqrt(),
        "squared_norm": squared,
        "log_likelihood": -0.5 * (whitening.vectors.shape[1] * math.log(2 * math.pi) + squared),
    }
    if whitening.reference is not None:
        found["percentile"] = whitening.percentile(squared)
    if unit_mean is not None:
        cosines = (wide @ unit_mean.to(wide)) / norms
        if leave_one_out:  # the mean holds the row itself, whose cosine to itself is 1
            if whitening.rows < 2:
                raise InputError("without its one row a fit has no mean: give it more rows.")
            cosines = (whitening.rows * cosines - 1.0) / (whitening.rows - 1)
        found["conformity"] = cosines
    return found
