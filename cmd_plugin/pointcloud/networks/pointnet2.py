"""PointNet++ (single scale): PointNets over balls of points, then over balls of balls."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from typing_extensions import override

from cmd_plugin.pointcloud.networks._neighbours import ball_query, farthest_points, gather_points
from cmd_plugin.pointcloud.networks._widths import scaled

__all__ = ["PointNet2"]


class _SetAbstraction(nn.Module):
    """Sample centres, group a ball around each, and take the maximum of a small network over it.

    Args:
        count: Centres; 0 makes one group of the whole cloud.
        radius: Of a ball.
        group: Points in a ball.
        inputs: Channels that come in, coordinates not counted.
        widths: Outputs of the convolutions.
    """

    def __init__(
        self, count: int, radius: float, group: int, inputs: int, widths: list[int]
    ) -> None:
        super().__init__()
        self.count, self.radius, self.group = count, radius, group
        pairs = list(zip([inputs + 3, *widths], widths, strict=False))
        self.mlp_convs = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairs)
        self.mlp_bns = nn.ModuleList(nn.BatchNorm2d(b) for b in widths)

    @override
    def forward(self, points: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, N, 3] and [B, N, C] to centres [B, M, 3] and features [B, M, F]."""
        if self.count == 0:
            centres, grouped = points[:, :1], points.unsqueeze(1)
            around = None if x is None else x.unsqueeze(1)
        else:
            centres = gather_points(points, farthest_points(points, self.count))
            index = ball_query(centres, points, self.radius, self.group)
            grouped = gather_points(points, index) - centres.unsqueeze(2)
            around = None if x is None else gather_points(x, index)
        joined = grouped if around is None else torch.cat((grouped, around), dim=3)
        features = joined.permute(0, 3, 2, 1)  # [B, C, group, M]
        for convolution, norm in zip(self.mlp_convs, self.mlp_bns, strict=True):
            features = relu(norm(convolution(features)))
        return centres, features.amax(dim=2).transpose(1, 2)


class PointNet2(nn.Module):
    """PointNet++ SSG, in the layer names of Pointnet_Pointnet2_pytorch (``sa1.mlp_convs.0`` ...).

    The tokens that enter the global pool are the centres of the second set abstraction. Farthest
    point samples start at point 0, so the result is reproducible.

    Args:
        classes: Number of classes.
        width: Multiplies every hidden width.
        tokens: Centres of the two set abstractions; a smaller cloud keeps all of its points.
        dropout: Share of dropped activations in the head.

    Source: Qi et al., NeurIPS 2017 (arXiv 1706.02413).
    """

    def __init__(
        self,
        classes: int,
        width: float = 1.0,
        tokens: tuple[int, int] = (512, 128),
        dropout: float = 0.4,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        a, b, c, d, e = (scaled(size, width) for size in (64, 128, 256, 512, 1024))
        self.sa1 = _SetAbstraction(tokens[0], 0.2, 32, 0, [a, a, b])
        self.sa2 = _SetAbstraction(tokens[1], 0.4, 64, b, [b, b, c])
        self.sa3 = _SetAbstraction(0, 0.0, 0, c, [c, d, e])
        self.fc1, self.bn1, self.drop1 = nn.Linear(e, d), nn.BatchNorm1d(d), nn.Dropout(dropout)
        self.fc2, self.bn2, self.drop2 = nn.Linear(d, c), nn.BatchNorm1d(c), nn.Dropout(dropout)
        self.fc3 = nn.Linear(c, classes)

    @override
    def forward(self, points: Tensor) -> Tensor:
        """Class scores [B, classes] of clouds [B, N, 3]."""
        centres, x = self.sa1(points, None)
        centres, x = self.sa2(centres, x)
        _, x = self.sa3(centres, x)
        x = x.flatten(1)
        x = self.drop1(relu(self.bn1(self.fc1(x))))
        x = self.drop2(relu(self.bn2(self.fc2(x))))
        scores: Tensor = self.fc3(x)
        return scores

    def token_points(self, points: Tensor) -> Tensor:
        """Input index [B, M] int64 of each token that enters the pool, for clouds [B, N, 3]."""
        first = farthest_points(points, self.tokens[0])
        second = farthest_points(gather_points(points, first), self.tokens[1])
        return first.gather(1, second)
