"""Whether a network and a cloud agree on which axis points up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.pointcloud._interception import Forward, as_it_is
from cmd_plugin.pointcloud.refocusing import run_on

__all__ = ["AxisOrder", "axis_doubt", "axis_orders"]


@dataclass(frozen=True)
class AxisOrder:
    """How well clouds suit a network with their axes in some order.

    Attributes:
        axes: Order of the axes: (0, 2, 1) exchanges the second and the third.
        accuracy: Share of right answers; None without labels.
        confidence: Mean probability of the answers given.
    """

    axes: tuple[int, int, int]
    accuracy: float | None
    confidence: float


@torch.no_grad()
def axis_orders(
    model: nn.Module,
    points: Tensor,
    labels: Tensor | None = None,
    forward: Forward = as_it_is,
) -> list[AxisOrder]:
    """Try all six orders of the axes and rank them: a network trained z up fails on clouds y up.

    That is the usual reason why a network "does not work on real scans". Ranked by accuracy if
    there are labels, else by confidence, which can mislead for single clouds: give many.

    Args:
        model: A classifier.
        points: [B, N, 3].
        labels: [B] int64, if known.
        forward: How to call the network.

    Returns:
        Best first; ties keep the order of the axes as given.

    Raises:
        ShapeError: If the points are not [B, N, 3].
    """
    if points.ndim != 3 or points.shape[2] != 3:
        raise ShapeError(f"points must be [B, N, 3], got {tuple(points.shape)}.")
    everything = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
    orders = []
    for first, second, third in itertools.permutations(range(3)):
        axes = (first, second, third)
        output = run_on(model, points[..., list(axes)], everything, forward)
        confidence, answers = output.softmax(dim=1).max(dim=1)
        right = None if labels is None else float((answers == labels).double().mean())
        orders.append(AxisOrder(axes, right, float(confidence.double().mean())))
    return sorted(orders, key=lambda o: -(o.confidence if o.accuracy is None else o.accuracy))


def axis_doubt(orders: Sequence[AxisOrder], margin: float = 0.1) -> AxisOrder | None:
    """The order of axes that suits a network better than the one given; None if none surely does.

    With labels, by accuracy; without, by confidence. Of a single cloud in the wrong order a network
    can be sure as well, so silence is no proof: ``benchmarks/point_importance.py`` counts that.

    Args:
        orders: From :func:`axis_orders`.
        margin: By how much another order must be better, in (0, 1).

    Raises:
        InputError: If the order as given is not among them.
    """
    given = next((order for order in orders if order.axes == (0, 1, 2)), None)
    if given is None:
        raise InputError("orders lack (0, 1, 2), the axes as given: take all of axis_orders().")
    best = orders[0]
    if best.accuracy is None or given.accuracy is None:
        return best if best.confidence - given.confidence > margin else None
    return best if best.accuracy - given.accuracy > margin else None
