"""P-BFGS (Li et al., TPAMI 2022, "Low Dimensional Trajectory Hypothesis"), as a baseline."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

__all__ = ["train_in_subspace"]

_BATCH = 128


def train_in_subspace(
    model: nn.Module, snapshots: Tensor, images: Tensor, labels: Tensor, evaluations: int
) -> int:
    """Minimise the training loss by BFGS in the span of early snapshots, in place.

    Starts from the last snapshot. The gradient is that of the whole training set, so one evaluation
    costs what an epoch's forward and backward passes cost. BatchNorm uses batch statistics
    meanwhile; the caller re-estimates them.

    Args:
        model: Network whose parameters are set to the best point found.
        snapshots: [T, P] float32 parameter vectors of the first epochs; T - 1 directions are used.
        images: Training images.
        labels: Training labels.
        evaluations: Budget of loss-and-gradient evaluations.

    Returns:
        Evaluations used.
    """
    origin = snapshots[-1]
    centred = (snapshots - snapshots.mean(dim=0)).double()
    # Principal directions from the small T x T Gram matrix.
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    keep = values > values[-1] * 1e-10
    basis = (centred.T @ vectors[:, keep] / values[keep].sqrt()).float()
    parameters = list(model.parameters())
    model.train()
    used = 0

    class _Spent(Exception):
        pass

    best = (np.inf, np.zeros(basis.shape[1]))

    def loss_and_gradient(z: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal used, best
        if used >= evaluations:
            raise _Spent
        used += 1
        vector_to_parameters(origin + basis @ torch.from_numpy(z).float(), parameters)
        model.zero_grad(set_to_none=True)
        total = 0.0
        for start in range(0, len(labels), _BATCH):
            part = slice(start, start + _BATCH)
            loss = cross_entropy(model(images[part]), labels[part], reduction="sum") / len(labels)
            loss.backward()
            total += loss.item()
        flat = parameters_to_vector([p.grad for p in parameters if p.grad is not None])
        if total < best[0]:
            best = (total, z.copy())
        return total, (basis.T @ flat).double().numpy()

    with contextlib.suppress(_Spent):  # the best point seen counts, whatever ended the search
        minimize(loss_and_gradient, best[1], jac=True, method="BFGS")
    with torch.no_grad():
        vector_to_parameters(origin + basis @ torch.from_numpy(best[1]).float(), parameters)
    model.zero_grad(set_to_none=True)
    return used
