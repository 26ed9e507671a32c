"""DGCNN: edge convolutions over a neighbour graph that is drawn anew in every feature space."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from typing_extensions import override

from cmd_plugin.pointcloud.networks._neighbours import nearest
from cmd_plugin.pointcloud.networks._widths import scaled

__all__ = ["DGCNN"]


class DGCNN(nn.Module):
    """Four edge convolutions, their outputs joined, [max ; mean] over the points.

    Layer names are the official ones (``conv1.0.weight``, ``bn1.weight`` ... ``linear3.bias``), so
    that published weights load.

    Args:
        classes: Number of classes.
        width: Multiplies every hidden width.
        k: Neighbours of a point, itself included; a smaller cloud uses all of its points.
        dropout: Share of dropped activations in the head.

    Source: Wang et al., ACM TOG 2019 (arXiv 1801.07829).
    """

    def __init__(self, classes: int, width: float = 1.0, k: int = 20, dropout: float = 0.5) -> None:
        super().__init__()
        self.k = k
        a, b, c, d, e = (scaled(size, width) for size in (64, 64, 128, 256, 1024))
        self.bn1, self.bn2 = nn.BatchNorm2d(a), nn.BatchNorm2d(b)
        self.bn3, self.bn4 = nn.BatchNorm2d(c), nn.BatchNorm2d(d)
        self.bn5 = nn.BatchNorm1d(e)
        self.conv1 = _edges(3, a, self.bn1)
        self.conv2 = _edges(a, b, self.bn2)
        self.conv3 = _edges(b, c, self.bn3)
        self.conv4 = _edges(c, d, self.bn4)
        self.conv5 = nn.Sequential(
            nn.Conv1d(a + b + c + d, e, 1, bias=False), self.bn5, nn.LeakyReLU(0.2)
        )
        first, second = scaled(512, width), scaled(256, width)
        self.linear1 = nn.Linear(2 * e, first, bias=False)
        self.bn6, self.dp1 = nn.BatchNorm1d(first), nn.Dropout(dropout)
        self.linear2 = nn.Linear(first, second)
        self.bn7, self.dp2 = nn.BatchNorm1d(second), nn.Dropout(dropout)
        self.linear3 = nn.Linear(second, classes)

    @override
    def forward(self, points: Tensor) -> Tensor:
        """Class scores [B, classes] of clouds [B, N, 3]."""
        x, levels = points, []
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = edge_convolution(convolution, x, nearest(x, x, self.k))
            levels.append(x)
        x = self.conv5(torch.cat(levels, dim=2).transpose(1, 2))
        x = torch.cat((x.amax(dim=2), x.mean(dim=2)), dim=1)
        x = self.dp1(leaky_relu(self.bn6(self.linear1(x)), 0.2))
        x = self.dp2(leaky_relu(self.bn7(self.linear2(x)), 0.2))
        scores: Tensor = self.linear3(x)
        return scores


def _edges(inputs: int, outputs: int, norm: nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2 * inputs, outputs, 1, bias=False), norm, nn.LeakyReLU(0.2))


def edge_convolution(convolution: nn.Sequential, x: Tensor, neighbours: Tensor) -> Tensor:
    """Maximum over the neighbours j of act(norm(W [x_j - x_i ; x_i])).

    With W = [P | Q] the product is P x_j + (Q - P) x_i: two small products over points instead of
    one over k times as many edges. The result differs from the published form by rounding only.

    Args:
        convolution: A 1x1 convolution over 2 C channels, a norm and an activation.
        x: [B, N, C].
        neighbours: [B, N, k] int64.

    Returns:
        [B, N, F].
    """
    batch, count, channels = x.shape
    product, norm, activation = convolution
    weight: Tensor = product.weight.flatten(1)  # type: ignore[operator]
    near, own = weight[:, :channels], weight[:, channels:]
    start = torch.arange(batch, device=x.device).view(-1, 1, 1) * count
    there = (x @ near.T).flatten(0, 1)[(neighbours + start).flatten()]
    here = x @ (own - near).T
    edges = there.view(batch, count, -1, len(weight)) + here.unsqueeze(2)
    # Seen as [B, F, N, k] this is channels-last memory, which the norm handles without a copy.
    activated: Tensor = activation(norm(edges.permute(0, 3, 1, 2)))
    return activated.amax(dim=3).transpose(1, 2)
