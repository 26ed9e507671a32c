"""Likelihood of a row among its nearest neighbours: one whitening for every query.

Betser, Hofman, Vainshtein, Gilboa: CLIDE (WACV 2026, arXiv 2512.05590). Independent implementation.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmd_plugin.clip._rows import Rows, check_rows, row_blocks
from cmd_plugin.errors import InputError, NonFiniteError

__all__ = ["ConditionalWhitening"]

_Vector = NDArray[np.float64]

_GRAM_ROWS = 8192  # products of all pairs are kept up to here: 512 MiB
_TOLD_APART = 1e-10  # share of the largest eigenvalue below which products are rounding
_QUERIES = 256  # queries whose products with all rows are held at once


class ConditionalWhitening:
    r"""Whiten every row by those representative rows that are nearest to it.

    .. math:: \ell(x) = -\tfrac12 \left( m \log 2\pi + \lVert W (x - \bar X) \rVert^2 \right)

    with the mean :math:`\bar X` and the whitening W of the m largest principal components of the k
    rows of largest cosine with x.

    No covariance is made. With centred neighbours :math:`X_c`, :math:`z = X_c (x - \bar X)` and the
    eigenpairs :math:`(g_j, u_j)` of the Gram matrix :math:`X_c X_c^T`, the squared norm is
    :math:`(k - 1) \sum_{j \le m} (u_j \cdot z)^2 / g_j^2`. The Gram matrix is a part of that of all
    rows. Turned so that its first axis is z, and made tridiagonal, it gives :math:`(u_j \cdot z)^2`
    from its eigenvalues and those without its first row, so that no eigenvectors are computed.

    Computed in float64 on the CPU. Memory: the features, and up to 8192 rows all their products.

    Args:
        features: Representative rows [N, d], raw.
        neighbours: k, at most N.
        components: m, at most k - 1 and d.
        floor: Least variance of a component as a share of the largest; smaller ones are raised.

    Raises:
        ShapeError: If they are not floating [N, d].
        NonFiniteError: If one is NaN or infinite.
        InputError: If k or m is out of range.
    """

    def __init__(
        self,
        features: Rows,
        neighbours: int = 500,
        components: int = 400,
        *,
        floor: float = 1e-6,
    ) -> None:
        check_rows(features)
        rows, dim = features.shape
        if not 2 <= neighbours <= rows:
            raise InputError(f"neighbours must be in 2..{rows}, the rows, got {neighbours}.")
        most = min(neighbours - 1, dim)
        if not 1 <= components <= most:
            raise InputError(
                f"components must be in 1..{most} for {neighbours} neighbours of {dim} features, "
                f"got {components}."
            )
        if not 0.0 <= floor < 1.0:
            raise InputError(f"floor must be in [0, 1), got {floor}.")
        self.features = torch.cat([block.cpu().double() for block in row_blocks(features, 4096)])
        if not bool(self.features.isfinite().all()):
            raise NonFiniteError("representative features hold NaN or infinite values.")
        self.neighbours, self.components, self.floor = neighbours, components, floor
        norm = torch.linalg.vector_norm(self.features, dim=1)
        self._inverse_norm = torch.where(norm > 0, 1 / norm, 0.0)
        self._gram = self.features @ self.features.T if rows <= _GRAM_ROWS else None

    def squared_norm(self, x: Rows) -> Tensor:
        r"""Return :math:`\lVert W (x - \bar X) \rVert^2` of every row, [B] float64.

        Args:
            x: [B, d]; rows that are not finite give NaN.

        Raises:
            ShapeError: If they are not floating [B, d].
            InputError: If the neighbours of a row span less than m directions.
        """
        check_rows(x, self.features.shape[1])
        result = []
        for block in row_blocks(x, _QUERIES):
            products = block.cpu().double() @ self.features.T
            finite = products.isfinite().all(dim=1).tolist()
            nearest = (products * self._inverse_norm).topk(self.neighbours, dim=1).indices
            nearest = nearest.sort(dim=1).values  # reads the products of pairs in their order
            near = products.gather(1, nearest).numpy()
            for good, places, product in zip(finite, nearest, near, strict=True):
                result.append(self._one(places, product) if good else math.nan)
        return torch.tensor(result, dtype=torch.float64)

    def log_likelihood(self, x: Rows) -> Tensor:
        """Return the log-likelihood of every row among its neighbours, [B] float64.

        Args:
            x: [B, d]; rows that are not finite give NaN.

        Raises:
            ShapeError: If they are not floating [B, d].
            InputError: If the neighbours of a row span less than m directions.
        """
        return -0.5 * (self.components * math.log(2 * math.pi) + self.squared_norm(x))

    def _one(self, places: Tensor, product: _Vector) -> float:
        """Return the squared norm of x from its neighbours and its products with them, [k]."""
        if self._gram is None:
            near = self.features[places]
            gram = (near @ near.T).numpy()
        else:
            gram = self._gram[places[:, None], places].numpy()
        towards_mean = gram.mean(axis=1)
        size = towards_mean.mean()
        gram -= towards_mean[:, None] + (towards_mean - size)
        z = product - product.mean() - (towards_mean - size)
        values, weights = _spectrum(gram, z, self.components)
        if values[0] <= _TOLD_APART * values[-1]:
            raise InputError(
                f"the neighbours of a row span less than {self.components} directions: take more "
                "neighbours or fewer components."
            )
        raised = np.maximum(values, self.floor * values[-1])
        return (len(z) - 1) * float((weights / (values * raised)).sum())


def _spectrum(matrix: _Vector, z: _Vector, count: int) -> tuple[_Vector, _Vector]:
    r"""Return the largest eigenvalues of a matrix and how much of z lies along each.

    A reflection turns z to the first axis, which Householder's reduction to tridiagonal form leaves
    in place. For a tridiagonal T with eigenvalues :math:`\lambda`, and :math:`\mu` of T without its
    first row and column, the first entry of the j-th eigenvector is
    :math:`\prod_i (\lambda_j - \mu_i) / \prod_{i \ne j} (\lambda_j - \lambda_i)`, squared.

    Args:
        matrix: [k, k] symmetric; overwritten.
        z: [k].
        count: How many eigenvalues.

    Returns:
        Ascending eigenvalues [count], and :math:`(u_j \cdot z)^2` [count].
    """
    from scipy.linalg import lapack

    size = len(z)
    length = float(np.linalg.norm(z))
    if length > 0.0:
        mirror = z / length
        mirror[0] += math.copysign(1.0, mirror[0])
        mirror *= math.sqrt(2.0) / np.linalg.norm(mirror)
        image = matrix @ mirror
        image -= 0.5 * (mirror @ image) * mirror
        outer = np.outer(mirror, image)
        matrix -= outer
        matrix -= outer.T
    work = int(lapack.dsytrd_lwork(size, lower=1)[0])
    # The transpose of a symmetric matrix in rows is the same one in columns, as LAPACK wants it.
    _, diagonal, beside, _, _ = _done(lapack.dsytrd(matrix.T, lower=1, lwork=work, overwrite_a=1))
    inner, _ = _done(lapack.dsterf(diagonal[1:], beside[1:])) if size > 2 else (diagonal[1:], 0)
    values, _ = _done(lapack.dsterf(diagonal, beside))
    top = values[-count:]
    place = np.arange(size - count, size)[:, None]
    # Paired so that each quotient is in [0, 1]: the inner eigenvalues lie between the others.
    other = np.arange(size - 1)
    apart = np.where(other < place, values[:-1], values[1:]) - top[:, None]
    share = np.divide(inner - top[:, None], apart, out=np.ones_like(apart), where=apart != 0.0)
    return top, length**2 * share.clip(0.0, 1.0).prod(axis=1)


def _done(result: tuple[Any, ...]) -> tuple[Any, ...]:
    if result[-1] != 0:
        raise InputError("the eigenvalues of a row's neighbours were not found: are they finite?")
    return result
