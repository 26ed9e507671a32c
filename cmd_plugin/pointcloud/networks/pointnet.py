"""PointNet, plain (five convolutions) and with its two learned alignments (T-Nets)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from typing_extensions import override

from cmd_plugin.pointcloud.networks._widths import scaled

__all__ = ["PointNet", "PointNetAligned"]


class _Features(nn.Module):
    """Point-wise features: conv1..conv5 with bn1..bn5, each followed by ReLU."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        for number, (inputs, outputs) in enumerate(zip([3, *widths], widths, strict=False), 1):
            self.add_module(f"conv{number}", nn.Conv1d(inputs, outputs, 1))
        for number, outputs in enumerate(widths, 1):
            self.add_module(f"bn{number}", nn.BatchNorm1d(outputs))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, N] to [B, F, N]."""
        for number in range(1, 6):
            x = relu(getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x)))
        return x


class PointNet(nn.Module):
    """PointNet without T-Nets: a max over independent points, so its critical points are exact.

    Layer names are those of learning3d (MIT), whose ModelNet40 weights load as they are; see
    :func:`cmd_plugin.networks.load_weights`.

    Args:
        classes: Number of classes.
        width: Multiplies every hidden width.
        dropout: Share of dropped activations in the head.

    Source: Qi et al., CVPR 2017 (arXiv 1612.00593).
    """

    def __init__(self, classes: int, width: float = 1.0, dropout: float = 0.3) -> None:
        super().__init__()
        widths = [scaled(c, width) for c in (64, 64, 64, 128, 1024)]
        first, second = scaled(512, width), scaled(256, width)
        self.feature_model = _Features(widths)
        self.linear1 = nn.Linear(widths[-1], first)
        self.bn1 = nn.BatchNorm1d(first)
        self.dropout1 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(first, second)
        self.bn2 = nn.BatchNorm1d(second)
        self.dropout2 = nn.Dropout(dropout)
        self.linear3 = nn.Linear(second, classes)

    @override
    def forward(self, points: Tensor) -> Tensor:
        """Class scores [B, classes] of clouds [B, N, 3]."""
        x = self.feature_model(points.transpose(1, 2)).amax(dim=2)
        x = self.dropout1(relu(self.bn1(self.linear1(x))))
        x = self.dropout2(relu(self.bn2(self.linear2(x))))
        scores: Tensor = self.linear3(x)
        return scores


class _Alignment(nn.Module):
    """A T-Net: predicts a matrix [B, k, k] from the whole cloud, starting near the identity."""

    def __init__(self, k: int, width: float) -> None:
        super().__init__()
        a, b, c, d, e = (scaled(size, width) for size in (64, 128, 1024, 512, 256))
        self.conv1, self.conv2 = nn.Conv1d(k, a, 1), nn.Conv1d(a, b, 1)
        self.conv3 = nn.Conv1d(b, c, 1)
        self.fc1, self.fc2, self.fc3 = nn.Linear(c, d), nn.Linear(d, e), nn.Linear(e, k * k)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm1d(a), nn.BatchNorm1d(b), nn.BatchNorm1d(c)
        self.bn4, self.bn5 = nn.BatchNorm1d(d), nn.BatchNorm1d(e)
        self.k = k

    @override
    def forward(self, x: Tensor) -> Tensor:
        """[B, k, N] to [B, k, k]."""
        x = relu(self.bn1(self.conv1(x)))
        x = relu(self.bn2(self.conv2(x)))
        x = relu(self.bn3(self.conv3(x))).amax(dim=2)
        x = relu(self.bn4(self.fc1(x)))
        x = self.fc3(relu(self.bn5(self.fc2(x))))
        identity = torch.eye(self.k, dtype=x.dtype, device=x.device)
        return x.view(-1, self.k, self.k) + identity


class _AlignedFeatures(nn.Module):
    """Three convolutions behind two T-Nets; the last one has no activation."""

    def __init__(self, width: float) -> None:
        super().__init__()
        a, b, c = (scaled(size, width) for size in (64, 128, 1024))
        self.stn = _Alignment(3, width)
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv1d(3, a, 1),
            nn.Conv1d(a, b, 1),
            nn.Conv1d(b, c, 1),
        )
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm1d(a), nn.BatchNorm1d(b), nn.BatchNorm1d(c)
        self.fstn = _Alignment(a, width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, N] to signed features [B, F, N]."""
        x = (x.transpose(1, 2) @ self.stn(x)).transpose(1, 2)
        x = relu(self.bn1(self.conv1(x)))
        x = (x.transpose(1, 2) @ self.fstn(x)).transpose(1, 2)
        x = relu(self.bn2(self.conv2(x)))
        features: Tensor = self.bn3(self.conv3(x))
        return features


class PointNetAligned(nn.Module):
    """PointNet with T-Nets, in the layer names of Pointnet_Pointnet2_pytorch (``feat.stn`` ...).

    Args:
        classes: Number of classes.
        width: Multiplies every hidden width.
        dropout: Share of dropped activations in the head.
    """

    def __init__(self, classes: int, width: float = 1.0, dropout: float = 0.4) -> None:
        super().__init__()
        c, d, e = (scaled(size, width) for size in (1024, 512, 256))
        self.feat = _AlignedFeatures(width)
        self.fc1, self.fc2, self.fc3 = nn.Linear(c, d), nn.Linear(d, e), nn.Linear(e, classes)
        self.dropout = nn.Dropout(dropout)
        self.bn1, self.bn2 = nn.BatchNorm1d(d), nn.BatchNorm1d(e)

    @override
    def forward(self, points: Tensor) -> Tensor:
        """Class scores [B, classes] of clouds [B, N, 3]."""
        x = self.feat(points.transpose(1, 2)).amax(dim=2)
        x = relu(self.bn1(self.fc1(x)))
        x = relu(self.bn2(self.dropout(self.fc2(x))))
        scores: Tensor = self.fc3(x)
        return scores
