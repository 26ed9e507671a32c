"""Averages of the weights of one run, each a row of coefficients over its recorded weights.

Every average of weights is a linear function of the run: ``coefficients @ weights`` with
coefficients that sum to one. For a small network the whole run fits into memory, so all averages
are computed after one training, on the very same weights. All are written from the formulas.
"""

from __future__ import annotations

import torch
from scipy.optimize import brentq
from torch import Tensor

__all__ = [
    "blend",
    "equal",
    "exponential",
    "minimal_polynomial",
    "power",
    "power_exponent",
    "reconstruct_power",
    "reduced_rank",
]


def equal(steps: int, taken: Tensor) -> Tensor:
    """Weigh some steps alike: SWA (Izmailov et al., 2018) and LAWA (Kaddour, 2022).

    Args:
        steps: Recorded steps T.
        taken: Indices of the steps that enter: the ends of the last quarter of all epochs for SWA,
            those of the last k epochs for LAWA.

    Returns:
        [T] float64.
    """
    row = torch.zeros(steps, dtype=torch.float64)
    row[taken] = 1.0 / len(taken)
    return row


def exponential(steps: int, decay: float, taken: Tensor | None = None) -> Tensor:
    """Weigh steps as an exponential moving average does that starts at the first one.

    Args:
        steps: Recorded steps T.
        decay: Share of the old average that stays at each update, in [0, 1).
        taken: Increasing indices of the steps that enter; None for all.

    Returns:
        [T] float64.
    """
    taken = torch.arange(steps) if taken is None else taken
    age = torch.arange(len(taken) - 1, -1, -1, dtype=torch.float64)
    values = (1.0 - decay) * decay**age
    values[0] = decay ** (len(taken) - 1)
    row = torch.zeros(steps, dtype=torch.float64)
    row[taken] = values
    return row


def blend(row: Tensor, share: float) -> Tensor:
    """Return ``(1 - share)`` of the last weights plus ``share`` of an average."""
    mixed = share * row
    mixed[-1] += 1.0 - share
    return mixed


def power(steps: int, exponent: float, until: int) -> Tensor:
    r"""Weigh steps by a power of time: the average :math:`\hat\theta_\gamma` of EDM2.

    Karras et al. (CVPR 2024, arXiv 2312.02696), section 3: the update
    :math:`\hat\theta \leftarrow \beta \hat\theta + (1 - \beta) \theta` with
    :math:`\beta = (1 - 1/t)^{\gamma + 1}` telescopes to
    :math:`(t^{\gamma + 1} - (t - 1)^{\gamma + 1}) / T^{\gamma + 1}`.

    Args:
        steps: Recorded steps.
        exponent: Gamma, above -1.
        until: T, the number of steps averaged; later ones get nothing.

    Returns:
        [steps] float64.
    """
    edges = (torch.arange(until + 1, dtype=torch.float64) / until) ** (exponent + 1.0)
    row = torch.zeros(steps, dtype=torch.float64)
    row[:until] = edges.diff()
    return row


def power_exponent(width: float) -> float:
    r"""Return gamma for a relative width, the profile's standard deviation as a share of the run.

    Solves :math:`\sigma^2 = (\gamma + 1) (\gamma + 2)^{-2} (\gamma + 3)^{-1}` for a width in
    (0, 0.28].
    """

    def excess(gamma: float) -> float:
        return (gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0)) - width**2

    return float(brentq(excess, 0.0, 2.0 / width))


def reconstruct_power(
    exponents: Tensor, times: Tensor, exponent: float, time: float, cutoff: float = 1e-10
) -> Tensor:
    r"""Return the combination of stored power averages that comes closest to another one.

    Karras et al., section 3.2: least squares between the profiles
    :math:`p(t) = (\gamma + 1) t^\gamma / T^{\gamma + 1}` on [0, T], whose inner products are
    :math:`(\gamma_a + 1)(\gamma_b + 1) \min(T_a, T_b)^{\gamma_a + \gamma_b + 1} /
    ((\gamma_a + \gamma_b + 1) T_a^{\gamma_a + 1} T_b^{\gamma_b + 1})`.

    Args:
        exponents: [S] gamma of each stored average.
        times: [S] time at which it was stored.
        exponent: Gamma of the wanted average.
        time: Its time.
        cutoff: Relative size of singular values that count as zero: neighbouring averages are
            nearly dependent, and large coefficients would amplify the rounding of what was stored.

    Returns:
        [S] float64 coefficients.
    """
    gram = _inner(exponents[:, None], times[:, None], exponents[None], times[None])
    wanted = torch.tensor([exponent, time], dtype=torch.float64)
    right = _inner(exponents, times, wanted[0], wanted[1])
    found = torch.linalg.lstsq(gram, right[:, None], rcond=cutoff, driver="gelsd").solution[:, 0]
    return found / found.sum()


def _inner(first: Tensor, first_time: Tensor, second: Tensor, second_time: Tensor) -> Tensor:
    shortest = torch.minimum(first_time, second_time)
    both = first + second + 1.0
    # As powers of ratios, none of which overflows.
    ratios = (shortest / first_time) ** first * (shortest / second_time) ** second
    scale = shortest / (first_time * second_time)
    return (first + 1.0) * (second + 1.0) / both * ratios * scale


def reduced_rank(points: Tensor) -> Tensor:
    r"""Extrapolate a sequence to its limit by reduced-rank extrapolation.

    Eddy (1979), Mesina (1977): with :math:`u_j = x_{j+1} - x_j` the coefficients minimise
    :math:`\|\sum_j \gamma_j u_j\|` and sum to one; the limit is :math:`\sum_j \gamma_j x_j`. Exact
    for a linear iteration whose error has at most k components.

    Args:
        points: [k + 2, P] the sequence.

    Returns:
        [k + 2] float64 coefficients of the points; that of the last one is zero.
    """
    moves = points.double().diff(dim=0).T
    # The last coefficient is one minus the others: least squares without a constraint.
    last = moves[:, -1:]
    others = torch.linalg.lstsq(moves[:, :-1] - last, -last).solution[:, 0]
    return torch.cat([others, 1.0 - others.sum(0, keepdim=True), others.new_zeros(1)])


def minimal_polynomial(points: Tensor) -> Tensor:
    r"""Extrapolate a sequence to its limit by minimal polynomial extrapolation.

    Cabay and Jackson (1976): :math:`c` minimises
    :math:`\|\sum_{j<k} c_j u_j + u_k\|`, :math:`c_k = 1`, :math:`\gamma = c / \sum c`. Where the
    sum comes near zero the coefficients are as large as that makes them.

    Args:
        points: [k + 2, P] the sequence.

    Returns:
        [k + 2] float64 coefficients of the points; that of the last one is zero.
    """
    moves = points.double().diff(dim=0).T
    others = torch.linalg.lstsq(moves[:, :-1], -moves[:, -1:]).solution[:, 0]
    c = torch.cat([others, others.new_ones(1)])
    return torch.cat([c / c.sum(), c.new_zeros(1)])
