"""From the tokens a network pools back to the points of the clouds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.pointcloud._pools import Watch
from cmd_plugin.pointcloud._probes import agree, matched, shuffled

__all__ = ["Way", "in_order", "way_back"]

Again = Callable[[Tensor], tuple[Tensor, Watch]]


@dataclass(frozen=True)
class Way:
    """From M tokens back to N points.

    Attributes:
        index: [B, N] int64, the token nearest to each point.
        mask: [B, M] bool or None, the tokens that stand at real points.
        points_mask: [B, N] bool or None.
    """

    index: Tensor
    mask: Tensor | None
    points_mask: Tensor | None

    def spread(self, x: Tensor) -> Tensor:
        """[B, M] over tokens to [B, N] over points."""
        result = x.gather(1, self.index)
        return result if self.points_mask is None else result.masked_fill(~self.points_mask, 0)


def way_back(
    features: Tensor,
    points: Tensor,
    mask: Tensor | None,
    watch: Watch,
    tokens: Tensor | None,
    again: Again,
) -> Way | None:
    """How tokens become points again; None if they are the points, in their order.

    Args:
        features: [B, F, M] of the tokens.
        points: [B, N, C].
        mask: [B, N] bool, True for real points.
        watch: What was seen in the forward pass.
        tokens: [B, M, 3] coordinates of the tokens, if the caller knows them.
        again: Runs the network on other points [B, N, C]: features, and what was seen.

    Raises:
        InputError: If it cannot be told which token belongs to which point.
        ShapeError: If ``tokens`` are not [B, M, 3].
    """
    count, places = features.shape[2], points[..., :3]
    if tokens is None and count == points.shape[1]:
        if not watch.reordered:
            return None
        tokens = _reordered(features, points, mask, watch, again)
        if tokens is None:
            return None
    elif tokens is None:
        tokens = _sampled(count, places, watch)
    if tokens.shape != (len(points), count, 3):
        raise ShapeError(f"tokens must be {(len(points), count, 3)}, got {tuple(tokens.shape)}.")
    distance = _distances(places, tokens.to(places.dtype))
    token_mask = None
    if mask is not None:
        token_mask = mask.gather(1, distance.argmin(dim=1))
        distance = distance.masked_fill(~token_mask.unsqueeze(1), torch.inf)
    return Way(distance.argmin(dim=2), token_mask, mask)


def in_order(features: Tensor, points: Tensor, mask: Tensor | None, again: Again) -> bool:
    """Whether the tokens are the points in their order: they move with the points."""
    order = shuffled(points, mask)
    moved, _ = again(_rows(points, order))
    if moved.shape != features.shape:
        return False
    return agree(moved, _columns(features, order), mask)


def _reordered(
    features: Tensor, points: Tensor, mask: Tensor | None, watch: Watch, again: Again
) -> Tensor | None:
    """Coordinates of as many tokens as points; None if they are the points in their order."""
    order = shuffled(points, mask)
    moved, seen = again(_rows(points, order))
    if moved.shape == features.shape:
        if agree(moved, _columns(features, order), mask):
            return None
        places = points[..., :3]
        here, there = _last_places(watch, places), _last_places(seen, places)
        if here is not None and there is not None:
            found = matched(there.to(places.dtype), here.to(places.dtype))
            if agree(moved, _columns(features, found)):
                return here
    raise InputError(
        f"the network brings the {points.shape[1]} points into another order before it pools them, "
        "and which token is which point was not recognised: pass the tokens' coordinates by "
        "tokens=, [B, M, 3], or name a layer before that by layer=NAME."
    )


def _last_places(watch: Watch, places: Tensor) -> Tensor | None:
    count = places.shape[1]
    return next(
        (t for t in reversed(watch.coordinates) if t.shape[1] == count and _among(t, places)), None
    )


def _sampled(count: int, places: Tensor, watch: Watch) -> Tensor:
    found = [t for t in watch.coordinates if t.shape[1] == count and _among(t, places)]
    if not found:
        raise InputError(
            f"the network pools over {count} tokens for {places.shape[1]} points and their "
            "coordinates were not recognised: pass them by tokens=, [B, M, 3], or name a layer "
            "with one vector for each point by layer=NAME."
        )
    if any(not other.equal(found[-1]) for other in found[:-1]):
        raise InputError(
            f"the network samples {count} of the {places.shape[1]} points several times, and which "
            "sample are the tokens cannot be told: pass their coordinates by tokens=, [B, M, 3]."
        )
    return found[-1]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))


def _columns(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index.unsqueeze(1).expand(-1, x.shape[1], -1))


def _among(tokens: Tensor, places: Tensor) -> bool:
    """Whether these are coordinates of points of the clouds."""
    near = _distances(tokens.to(places.dtype), places).amin(dim=2)
    return bool((near <= 1e-6 * (1.0 + places.abs().amax())).all())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
