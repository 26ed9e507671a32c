"""Which points speak for one class: what its score loses without each of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.networks.measuring import undisturbed
from cmd_plugin.pointcloud._interception import Forward, as_it_is, scores_of

__all__ = ["class_evidence"]


def class_evidence(
    model: nn.Module,
    points: Tensor,
    label: int,
    *,
    forward: Forward = as_it_is,
    batch_size: int = 32,
) -> Tensor:
    r"""Score every point of a cloud by what a class's output loses when the point is left out.

    :math:`e_i = z_c(P) - z_c(P \setminus \{i\})`, of the network's own output z: above 0 for points
    that speak for the class, below 0 for those that speak against it, and 0 for what a maximum does
    not let through. Exact for any network, and costs N forward passes; FBI and counts cost one, but
    hold for the whole output.

    The network runs in evaluation mode, without gradients; afterwards it is as it was.

    Args:
        model: Any network that gives one row of class scores a cloud.
        points: One cloud, [N, C], N at least 2.
        label: Number of the class.
        forward: How to call the network, by default ``model(points)``.
        batch_size: Clouds in a pass.

    Returns:
        [N], in the dtype of the scores.

    Raises:
        ShapeError: If points are not one cloud of at least two, or the scores not [B, classes].
        InputError: If there is no such class.
    """
    if points.ndim != 2 or len(points) < 2:
        raise ShapeError(f"points must be one cloud [N, C] of two or more, got {points.shape}.")
    count = len(points)
    others = torch.arange(count - 1, device=points.device)
    parts = []
    with undisturbed(model, device=points.device):
        whole = scores_of(forward(model, points.unsqueeze(0)))
        if whole.ndim != 2:
            raise ShapeError(f"scores of a cloud must be [1, classes], got {tuple(whole.shape)}.")
        if not 0 <= label < whole.shape[1]:
            raise InputError(f"there is no class {label}: the network has {whole.shape[1]}.")
        for start in range(0, count, batch_size):
            left_out = torch.arange(start, min(start + batch_size, count), device=points.device)
            kept = others + (others >= left_out.unsqueeze(1)).long()
            parts.append(scores_of(forward(model, points[kept]))[:, label])
    return whole[0, label] - torch.cat(parts)
