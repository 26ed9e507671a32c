"""Networks a user might have: none of them knows of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class FunctionalMax(nn.Module):
    """Channels first, functional ReLU, ``torch.max`` in forward, tuple output."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 24, 1)
        self.norm = nn.BatchNorm1d(24)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(24, classes)

    def features(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(self.b(functional.relu(self.a(x)))))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        pooled = torch.max(self.features(x), 2, keepdim=True)[0]
        pooled = pooled.view(-1, 24)
        return self.head(self.drop(pooled)), {"pooled": pooled}


class Pooled(nn.Module):
    """Points last but one, any way to pool: the function is given."""

    def __init__(self, pool: Any, twice: int = 1) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 12), nn.Linear(12 * twice, 4)
        self.pool = pool

    def features(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=1, keepdim=True)  # a mean over the points that is no pool
        scaled = centred / centred.abs().amax(dim=1, keepdim=True)
        return functional.leaky_relu(self.layer(scaled), 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.features(x)))


POOLS = {
    "max method": lambda x: x.max(dim=1).values,
    "torch.max": lambda x: torch.max(x, 1)[0],
    "max keepdim": lambda x: x.max(dim=-2, keepdim=True)[0].squeeze(1),
    "amax": lambda x: x.amax(dim=1),
    "amax of a tuple": lambda x: x.amax(dim=(1,)),
    "max_pool1d": lambda x: functional.max_pool1d(x.transpose(1, 2), x.shape[1]).squeeze(-1),
    "MaxPool1d": lambda x: nn.MaxPool1d(x.shape[1])(x.transpose(1, 2)).flatten(1),
    "adaptive_max_pool1d": lambda x: functional.adaptive_max_pool1d(x.transpose(1, 2), 1).flatten(
        1
    ),
    "adaptive with indices": lambda x: functional.adaptive_max_pool1d(
        x.transpose(1, 2), 1, return_indices=True
    )[0].flatten(1),
    "max_pool2d": lambda x: functional.max_pool2d(
        x.transpose(1, 2)[..., None], (x.shape[1], 1)
    ).flatten(1),
    "adaptive_max_pool2d": lambda x: functional.adaptive_max_pool2d(
        x.transpose(1, 2)[..., None], (1, 1)
    ).flatten(1),
    "topk": lambda x: x.topk(1, dim=1).values[:, 0],
}


class AttentionHead(nn.Module):
    """A class token instead of a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.query = nn.Linear(3, 12), nn.Parameter(torch.randn(1, 1, 12))
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.layer(x)
        read, _ = self.attention(self.query.expand(len(x), -1, -1), tokens, tokens)
        return self.head(read[:, 0])


class TwoLevels(nn.Module):
    """Two maxima side by side feed the head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 6), nn.Linear(6, 9), nn.Linear(15, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = functional.relu(self.a(x))
        second = functional.relu(self.b(first))
        return self.head(torch.cat((first.amax(1), second.amax(1)), dim=1))


class Gated(nn.Module):
    """The pooled vector passes a small head and gates the points, which are summed up by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(3, 12), nn.Linear(12, 12)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = functional.relu(self.layer(x))
        gate = torch.sigmoid(self.gate(features.amax(dim=1)))
        scores = self.out(features * gate.unsqueeze(1))
        weights = torch.full((x.shape[0], 1, x.shape[1]), 1.0 / x.shape[1])
        return torch.bmm(weights, scores).squeeze(1)


class Overwriting(nn.Module):
    """Changes the pooled tensor in place after the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = self.layer(x)
        pooled = features.amax(dim=1)
        features.zero_()
        return self.head(pooled)


class Sampling(nn.Module):
    """Keeps every other point as a token, in random order."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.randperm(x.shape[1])[: x.shape[1] // 2]
        tokens = x[:, chosen]
        return self.head(functional.relu(self.layer(tokens)).amax(dim=1))


class Scattered(nn.Module):
    """Points of all clouds in one axis, as PyTorch Geometric keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor, cloud: Tensor, clouds: int) -> Tensor:
        features = functional.relu(self.layer(x))
        index = cloud.view(-1, 1).expand_as(features)
        start = features.new_zeros(clouds, features.shape[1])
        pooled = start.scatter_reduce_(0, index, features, reduce="amax", include_self=False)
        return self.head(pooled)


class Linear3(nn.Module):
    """The linear point-wise network W p with a maximum and nothing else."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T).amax(dim=1)
