"""Models whose noise estimate is known exactly: Gaussian mixtures, and the score of a data set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cmd_plugin.diffusion.schedules import NoiseSchedule
from cmd_plugin.errors import InputError, ShapeError

__all__ = ["data_noise", "mixture_noise"]

_Predict = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def _shares(weights: Tensor | None, count: int, like: Tensor) -> Tensor:
    """Return the logarithms of weights that sum to 1."""
    given: Tensor = torch.ones(count).to(like) if weights is None else weights.to(like)
    if given.shape != (count,) or not bool((given > 0).all()) or not bool(given.isfinite().all()):
        raise InputError(f"weights must be {count} finite numbers above 0.")
    return (given / given.sum()).log()


def mixture_noise(
    weights: Tensor, means: Tensor, covariances: Tensor, schedule: NoiseSchedule
) -> _Predict:
    r"""Return the exact noise estimate of data drawn from a Gaussian mixture.

    Noised data is a mixture of :math:`N(a\mu_k, a^2 C_k + s^2 I)`; its score is a posterior mean of
    the components', taken with logsumexp, and the estimate is :math:`-s` times the score.

    Args:
        weights: [K], above 0; they are divided by their sum.
        means: [K, ...].
        covariances: [K] variances of round components, [K, d] variances along the axes, or
            [K, d, d] covariance matrices, with d scalars in one image.
        schedule: What times mean.

    Raises:
        InputError: If weights or covariances are impossible.
        ShapeError: If shapes do not fit.
    """
    count, d = len(means), means[0].numel()
    logs = _shares(weights, count, means)
    centres = means.reshape(count, d)
    if covariances.shape == (count,):
        covariances = covariances[:, None].expand(count, d)
    axes: Tensor | None = None
    if covariances.shape == (count, d, d):
        variances, axes = torch.linalg.eigh(covariances)  # columns of axes[k] are C_k's axes
        centres = torch.einsum("kij,ki->kj", axes, centres)
    elif covariances.shape == (count, d):
        variances = covariances
    else:
        raise ShapeError(
            f"covariances must be [{count}], [{count}, {d}] or [{count}, {d}, {d}], got "
            f"{tuple(covariances.shape)}."
        )
    if not bool((variances >= 0).all()):
        raise InputError("a covariance has a negative or NaN eigenvalue: it is none.")

    def predict(y: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        signal, noise = (level.to(y) for level in schedule.levels(t))
        flat = y.reshape(len(y), d)
        spread = signal[:, None, None] ** 2 * variances + noise[:, None, None] ** 2  # [N, K, d]
        turned = flat[:, None] if axes is None else torch.einsum("kij,ni->nkj", axes, flat)
        away = turned - signal[:, None, None] * centres
        whitened = away / spread
        log_likelihood = logs - 0.5 * ((away * whitened).sum(-1) + spread.log().sum(-1))
        share = log_likelihood.softmax(dim=1)[..., None]
        if axes is not None:
            whitened = torch.einsum("kij,nkj->nki", axes, whitened)
        found: Tensor = noise[:, None] * (share * whitened).sum(dim=1)
        return found.reshape(y.shape)

    return predict


def data_noise(
    data: Tensor, schedule: NoiseSchedule, weights: Tensor | None = None, bandwidth: float = 0.0
) -> _Predict:
    r"""Return the noise estimate of a model that knows its training set by heart.

    The noised training set is a mixture of :math:`N(a x_i, (s^2 + a^2 b^2) I)`, so the estimate is
    :math:`s (y - a \sum_i r_i x_i) / (s^2 + a^2 b^2)` with posterior shares :math:`r_i`.

    Args:
        data: [n, ...] training images.
        schedule: What times mean.
        weights: [n] how often each is in the training set; by default once.
        bandwidth: Standard deviation b of a kernel put on each, 0 for none.

    Raises:
        InputError: If there is no image, or weights or bandwidth are impossible.
    """
    if not len(data) or not data.is_floating_point():
        raise InputError("data must hold at least one image, in floating point.")
    if not bandwidth >= 0.0:
        raise InputError(f"bandwidth must not be negative, got {bandwidth}.")
    logs = _shares(weights, len(data), data)
    flat = data.reshape(len(data), -1)
    squares = (flat**2).sum(1)

    def predict(y: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        signal, noise = (level.to(y)[:, None] for level in schedule.levels(t))
        rows = y.reshape(len(y), -1)
        variance = noise**2 + (signal * bandwidth) ** 2
        near = (signal * (rows @ flat.T) - 0.5 * signal**2 * squares) / variance
        mean = (near + logs).softmax(dim=1) @ flat
        return (noise * (rows - signal * mean) / variance).reshape(y.shape)

    return predict
