"""Further passes that settle what the sizes of one pass leave open; only run where they do.

Which axis holds the points: of a cloud whose points lie at two places only, tokens are of two
kinds, whatever sampling and neighbourhoods there are, while channels differ. Whether the tokens are
still the points in their order: with the points in another order, the features must come in that
order too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cmd_plugin.pointcloud._pools import POOLS, Pool, reduced_view

__all__ = ["Kinds", "agree", "few_places", "matched", "shuffled", "verdict"]

_PLACES = (
    (0.5, -0.25, 0.375),
    (-0.375, 0.125, -0.5),
    (0.25, 0.5, -0.125),
    (-0.125, -0.5, 0.25),
    (0.0625, 0.375, 0.5),
)
_MOST = 16  # kinds told apart
_ALIKE = 1e-2  # of the largest feature; tokens of one kind differ by rounding only
_FEW = 4  # kinds of tokens: two, and some more where neighbourhoods mix them
_SAME = 0.1  # of the usual difference between two tokens


def few_places(points: Tensor, count: int) -> Tensor:
    """Clouds of the same shape whose points take turns between 2 to 5 places.

    Args:
        points: [B, N, C]; channels beyond three become constant.
        count: Number of places.
    """
    result = torch.full_like(points, 0.25)
    for number, place in enumerate(_PLACES[:count]):
        result[:, number::count, :3] = result.new_tensor(place)
    return result


class Kinds(TorchFunctionMode):
    """Counts the kinds of tokens and of channels that enter pools, on :func:`few_places`.

    Args:
        pools: The doubtful ones.

    Attributes:
        seen: By call number: kinds of tokens, and kinds of channels, at most 16. Missing where a
            pool was not found again or its features are zero or not finite.
    """

    def __init__(self, pools: list[Pool]) -> None:
        super().__init__()
        self.wanted = {pool.call: pool for pool in pools}
        self.seen: dict[int, tuple[int, int]] = {}
        self._calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function; look at what enters a doubtful pool."""
        name = getattr(func, "__name__", "")
        if name in POOLS:
            pool = self.wanted.get(self._calls)
            if pool is not None and pool.op == name and isinstance(args[0], Tensor):
                self._count(pool, args[0].detach())
            self._calls += 1
        return func(*args, **(kwargs or {}))

    def _count(self, pool: Pool, x: Tensor) -> None:
        if pool.squeezed:
            x = x.unsqueeze(0)
        if x.ndim < 2 or pool.axis + pool.squeezed >= x.ndim:
            return
        seen = reduced_view(x, pool.axis + pool.squeezed)
        if seen is None or seen.shape[1:] != pool.shape[1:]:
            return
        cloud = seen[0].float()  # [F, M]
        scale = float(cloud.abs().amax())
        if not 0.0 < scale < float("inf"):  # NaN as well
            return
        tolerance = _ALIKE * scale
        self.seen[pool.call] = _kinds(cloud.T, tolerance), _kinds(cloud, tolerance)


def verdict(two: tuple[int, int] | None, five: tuple[int, int] | None) -> bool | None:
    """Whether a pool reduces tokens; None if that cannot be told.

    Args:
        two: Kinds of tokens and of channels with points at two places.
        five: The same with five, where that is needed: as many kinds of one as of the other.
    """
    if two is None:
        return None
    tokens, channels = two
    if tokens != channels:
        return tokens < channels if min(two) <= _FEW else None
    if five is None or tokens > _FEW:
        return None
    if five[1] == channels:  # all its channels are of few kinds
        return True if five[0] > tokens else None
    return False if five[0] in (five[1], tokens) else None  # both axes hold tokens, or the other


def _kinds(rows: Tensor, tolerance: float) -> int:
    """How many different rows there are, at most 16."""
    count = 0
    while len(rows) and count < _MOST:
        rows = rows[(rows - rows[0]).abs().amax(dim=1) > tolerance]
        count += 1
    return count


def shuffled(points: Tensor, mask: Tensor | None) -> Tensor:
    """Another order [B, N] int64 of the points, in which real ones stay in the places of real ones.

    Args:
        points: [B, N, C].
        mask: [B, N] bool or None.
    """
    batch, count = points.shape[:2]
    moved = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(points.device)
    moved = moved.expand(batch, count)
    if mask is None:
        return moved
    # Real places in ascending order get the real points in shuffled order; likewise the others.
    into = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    hidden = (~mask).gather(1, moved).to(torch.uint8)
    out_of = moved.gather(1, hidden.argsort(dim=1, stable=True))
    return torch.empty_like(into).scatter_(1, into, out_of)


def matched(here: Tensor, there: Tensor) -> Tensor:
    """For each of the places [B, M, 3] ``here``, the row of ``there`` at the same place, [B, M]."""
    distance = torch.cdist(here, there, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.argmin(dim=2)


def agree(one: Tensor, other: Tensor, mask: Tensor | None = None) -> bool:
    """Whether two features [B, F, M] are the same, but for what the order of points may change.

    Grouping by the first points in a ball, say, depends on the order, so they need not be equal:
    corresponding tokens must differ far less than other ones do.

    Args:
        one: Features.
        other: Features brought into the order of the first.
        mask: [B, M] bool, True for the tokens that count.
    """
    one, other = one.float(), other.float()
    apart = (one - other).abs().mean(dim=1)
    usual = (one - other.roll(1, dims=2)).abs().mean(dim=1)
    size = one.abs().mean(dim=1)
    if mask is not None:
        apart, usual, size = apart[mask], usual[mask], size[mask]
    return bool(apart.mean() <= torch.maximum(_SAME * usual.mean(), 1e-5 * size.mean()))
