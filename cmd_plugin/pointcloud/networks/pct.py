"""PCT: self-attention over a quarter of the points, each of which speaks for its neighbourhood."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool1d, leaky_relu, relu
from typing_extensions import override

from cmd_plugin.pointcloud.networks._neighbours import farthest_points, gather_points, nearest
from cmd_plugin.pointcloud.networks._widths import scaled

__all__ = ["PCT"]


class _LocalOperation(nn.Module):
    """Two convolutions over a group of neighbours and their maximum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels, channels, 1, bias=False)
        self.conv2 = nn.Conv1d(channels, channels, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm1d(channels), nn.BatchNorm1d(channels)

    @override
    def forward(self, groups: Tensor) -> Tensor:
        """[B, M, k, C] to [B, M, C]."""
        x = groups.flatten(0, 1).transpose(1, 2)
        x = relu(self.bn1(self.conv1(x)))
        x = relu(self.bn2(self.conv2(x)))
        return adaptive_max_pool1d(x, 1).view(*groups.shape[:2], -1)


class _OffsetAttention(nn.Module):
    """Offset attention: x + act(norm(W (x - attention(x)))); query and key share their weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.q_conv = nn.Conv1d(channels, channels // 4, 1, bias=False)
        self.k_conv = nn.Conv1d(channels, channels // 4, 1, bias=False)
        self.q_conv.weight = self.k_conv.weight
        self.v_conv = nn.Conv1d(channels, channels, 1)
        self.trans_conv = nn.Conv1d(channels, channels, 1)
        self.after_norm = nn.BatchNorm1d(channels)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, M] to [B, C, M]."""
        energy = self.q_conv(x).transpose(1, 2) @ self.k_conv(x)
        attention = energy.softmax(dim=-1)
        attention = attention / (1e-9 + attention.sum(dim=1, keepdim=True))
        offset = x - self.v_conv(x) @ attention
        return x + relu(self.after_norm(self.trans_conv(offset)))


class _Attention(nn.Module):
    """Two convolutions and four offset attentions, joined."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels, channels, 1, bias=False)
        self.conv2 = nn.Conv1d(channels, channels, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm1d(channels), nn.BatchNorm1d(channels)
        self.sa1, self.sa2 = _OffsetAttention(channels), _OffsetAttention(channels)
        self.sa3, self.sa4 = _OffsetAttention(channels), _OffsetAttention(channels)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, M] to [B, 4 C, M]."""
        x = relu(self.bn1(self.conv1(x)))
        x = relu(self.bn2(self.conv2(x)))
        levels = []
        for attention in (self.sa1, self.sa2, self.sa3, self.sa4):
            x = attention(x)
            levels.append(x)
        return torch.cat(levels, dim=1)


class PCT(nn.Module):
    """Point Cloud Transformer: N points become 512, then 256 tokens; maximum over the tokens.

    Layer names are the official ones (``gather_local_0``, ``pt_last``, ``conv_fuse`` ...). The
    farthest point samples start at point 0, so the result is reproducible.

    Args:
        classes: Number of classes.
        width: Multiplies every hidden width.
        tokens: Points kept by the two samplings; a smaller cloud keeps all of its points.
        k: Neighbours in a group.
        dropout: Share of dropped activations in the head.

    Source: Guo et al., CVM 2021 (arXiv 2012.09688).
    """

    def __init__(
        self,
        classes: int,
        width: float = 1.0,
        tokens: tuple[int, int] = (512, 256),
        k: int = 32,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.tokens, self.k = tokens, k
        a, e = scaled(64, width), scaled(1024, width)
        self.conv1 = nn.Conv1d(3, a, 1, bias=False)
        self.conv2 = nn.Conv1d(a, a, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm1d(a), nn.BatchNorm1d(a)
        self.gather_local_0 = _LocalOperation(2 * a)
        self.gather_local_1 = _LocalOperation(4 * a)
        self.pt_last = _Attention(4 * a)
        self.conv_fuse = nn.Sequential(
            nn.Conv1d(20 * a, e, 1, bias=False), nn.BatchNorm1d(e), nn.LeakyReLU(0.2)
        )
        first, second = scaled(512, width), scaled(256, width)
        self.linear1 = nn.Linear(e, first, bias=False)
        self.bn6, self.dp1 = nn.BatchNorm1d(first), nn.Dropout(dropout)
        self.linear2 = nn.Linear(first, second)
        self.bn7, self.dp2 = nn.BatchNorm1d(second), nn.Dropout(dropout)
        self.linear3 = nn.Linear(second, classes)

    @override
    def forward(self, points: Tensor) -> Tensor:
        """Class scores [B, classes] of clouds [B, N, 3]."""
        x = relu(self.bn1(self.conv1(points.transpose(1, 2))))
        x = relu(self.bn2(self.conv2(x))).transpose(1, 2)
        for count, local in zip(
            self.tokens, (self.gather_local_0, self.gather_local_1), strict=True
        ):
            points, groups = self._group(points, x, count)
            x = local(groups)
        x = x.transpose(1, 2)
        x = self.conv_fuse(torch.cat((self.pt_last(x), x), dim=1))
        x = adaptive_max_pool1d(x, 1).flatten(1)
        x = self.dp1(leaky_relu(self.bn6(self.linear1(x)), 0.2))
        x = self.dp2(leaky_relu(self.bn7(self.linear2(x)), 0.2))
        scores: Tensor = self.linear3(x)
        return scores

    def token_points(self, points: Tensor) -> Tensor:
        """Input index [B, M] int64 of each token that enters the pool, for clouds [B, N, 3]."""
        first = farthest_points(points, self.tokens[0])
        second = farthest_points(gather_points(points, first), self.tokens[1])
        return first.gather(1, second)

    def _group(self, points: Tensor, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Centres [B, M, 3] and their neighbours' features [x_j - x_i ; x_i], [B, M, k, 2 C]."""
        chosen = farthest_points(points, count)
        centres, own = gather_points(points, chosen), gather_points(x, chosen).unsqueeze(2)
        around = gather_points(x, nearest(centres, points, self.k))
        return centres, torch.cat((around - own, own.expand_as(around)), dim=3)
