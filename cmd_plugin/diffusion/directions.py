"""Directions on a sphere that are the same for every image, noise level and device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cmd_plugin.errors import InputError

__all__ = ["DIRECTIONS", "sphere_directions"]

DIRECTIONS = ("antithetic", "independent", "orthogonal")


def sphere_directions(
    shape: Sequence[int], count: int, kind: str = "antithetic", seed: int = 0
) -> Tensor:
    r"""Return directions of length :math:`\sqrt d`, the length noise has.

    Args:
        shape: Shape of one image, d scalars.
        count: How many.
        kind: ``"antithetic"``: pairs u, -u, whose errors cancel; ``"independent"``; or
            ``"orthogonal"``: pairs along axes at right angles, at most 2 d of them.
        seed: Drawn on the CPU, so that every device sees the same ones.

    Returns:
        [count, ...] float64; of pairs the two lie next to one another.

    Raises:
        InputError: If there are too few or too many, or an odd number that should be pairs.
    """
    d = torch.Size(shape).numel()
    if kind not in DIRECTIONS:
        raise InputError(f"unknown directions {kind!r}: choose one of {', '.join(DIRECTIONS)}.")
    if count < 1 or (kind != "independent" and count % 2):
        raise InputError(
            f"directions must be at least 1, and even where they are pairs; got {count} {kind}."
        )
    if kind == "orthogonal" and count > 2 * d:
        raise InputError(f"an image of {d} scalars has at most {2 * d} orthogonal directions.")
    generator = torch.Generator().manual_seed(seed)
    drawn = count if kind == "independent" else count // 2
    points = torch.randn(drawn, d, generator=generator, dtype=torch.float64)
    if kind == "orthogonal":
        points = torch.linalg.qr(points.T).Q.T
    points = points * (math.sqrt(d) / points.norm(dim=1, keepdim=True))
    if kind != "independent":
        points = torch.stack([points, -points], dim=1)
    return points.reshape(count, *shape)
