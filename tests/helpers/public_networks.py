"""Small networks written as the public ones are, each with its own habits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def square_distance(a: Tensor, b: Tensor) -> Tensor:
    """As PointNet++ repositories write it: by a matrix product and two sums."""
    distance = -2 * torch.matmul(a, b.permute(0, 2, 1))
    distance += torch.sum(a**2, -1).view(len(a), a.shape[1], 1)
    distance += torch.sum(b**2, -1).view(len(b), 1, b.shape[1])
    return distance


def index_points(points: Tensor, index: Tensor) -> Tensor:
    """Rows by advanced indexing, [B, S, ...]."""
    shape = [len(points)] + [1] * (index.ndim - 1)
    batch = torch.arange(len(points)).view(shape).expand_as(index)
    return points[batch, index, :]


def farthest_point_sample(xyz: Tensor, count: int) -> Tensor:
    """The loop with torch.max, from point 0."""
    batch, total, _ = xyz.shape
    centroids = torch.zeros(batch, count, dtype=torch.long)
    distance = torch.ones(batch, total, dtype=xyz.dtype) * 1e10
    farthest = torch.zeros(batch, dtype=torch.long)
    rows = torch.arange(batch)
    for number in range(count):
        centroids[:, number] = farthest
        centroid = xyz[rows, farthest, :].view(batch, 1, 3)
        distance = torch.min(distance, torch.sum((xyz - centroid) ** 2, -1))
        farthest = torch.max(distance, -1)[1]
    return centroids


def knn_graph(x: Tensor, k: int) -> Tensor:
    """Edge features [B, 2C, N, k] as DGCNN makes them: flat indices, channels first."""
    batch, channels, count = x.shape
    inner = -2 * torch.matmul(x.transpose(2, 1), x)
    xx = torch.sum(x**2, dim=1, keepdim=True)
    index = (-xx - inner - xx.transpose(2, 1)).topk(k=min(k, count), dim=-1)[1]
    k = index.shape[2]
    index = (index + torch.arange(batch).view(-1, 1, 1) * count).view(-1)
    rows = x.transpose(2, 1).contiguous()
    near = rows.view(batch * count, -1)[index, :].view(batch, count, k, channels)
    own = rows.view(batch, count, 1, channels).repeat(1, 1, k, 1)
    return torch.cat((near - own, own), dim=3).permute(0, 3, 1, 2).contiguous()


class TNetPointNet(nn.Module):
    """T-Net, functional maxima with keepdim and view, log-softmax and a second output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.t1, self.t2 = nn.Conv1d(3, width, 1), nn.Linear(width, 9)
        self.a, self.b = nn.Conv1d(3, width, 1), nn.Conv1d(width, width, 1)
        self.width, self.head = width, nn.Linear(width, 5)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        x = points.transpose(2, 1)
        t = torch.max(functional.relu(self.t1(x)), 2, keepdim=True)[0].view(-1, self.width)
        turn = self.t2(t).view(-1, 3, 3) + torch.eye(3, dtype=t.dtype)
        x = torch.bmm(points, turn).transpose(2, 1)
        x = self.b(functional.relu(self.a(x)))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, self.width)
        return functional.log_softmax(self.head(x), dim=1), turn


class Squeezing(nn.Module):
    """Takes axes of one away wherever they are, the batch included."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, width, 1), nn.Conv1d(width, width, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, points: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(points.transpose(1, 2)))))
        return self.head(functional.adaptive_max_pool1d(x, 1).squeeze())


class SqueezedFeatures(Squeezing):
    """Squeezes before the pool: a single cloud is [F, N] there."""

    def forward(self, points: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(points.transpose(1, 2))))).squeeze()
        return self.head(x.max(dim=-1)[0])


class DynamicGraph(nn.Module):
    """DGCNN's way: graph, maximum over the neighbours, then [max ; mean] heads."""

    def __init__(self, width: int, k: int = 9) -> None:
        super().__init__()
        self.k = k
        self.a, self.b = nn.Conv2d(6, 8, 1), nn.Conv1d(8, width, 1)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, points: Tensor) -> Tensor:
        x = functional.leaky_relu(self.a(knn_graph(points.transpose(1, 2), self.k)), 0.2)
        x = functional.leaky_relu(self.b(x.max(dim=-1, keepdim=False)[0]), 0.2)
        first = functional.adaptive_max_pool1d(x, 1).view(len(x), -1)
        second = functional.adaptive_avg_pool1d(x, 1).view(len(x), -1)
        return self.head(torch.cat((first, second), 1))


class OffsetAttention(nn.Module):
    """Attention over all points, its columns divided by their sums; a maximum at the end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.q, self.v = (nn.Conv1d(n, width, 1) for n in (3, width, width))
        self.head = nn.Linear(width, 5)

    def attention(self, x: Tensor) -> Tensor:
        energy = torch.bmm(self.q(x).permute(0, 2, 1), self.q(x))
        attention = torch.softmax(energy, dim=-1)
        return attention / (1e-9 + attention.sum(dim=1, keepdim=True))

    def forward(self, points: Tensor) -> Tensor:
        x = torch.relu(self.a(points.transpose(1, 2)))
        x = x + torch.relu(x - torch.bmm(self.v(x), self.attention(x)))
        return self.head(torch.max(x, 2)[0])


class StableAttention(OffsetAttention):
    """Subtracts the largest energy of each row first: a maximum over points that is no pool."""

    def attention(self, x: Tensor) -> Tensor:
        energy = torch.bmm(self.q(x).permute(0, 2, 1), self.q(x))
        energy = torch.max(energy, -1, keepdim=True)[0].expand_as(energy) - energy
        return torch.softmax(energy, dim=-1).transpose(1, 2)


class Gate(nn.Module):
    """Weighs each point by the mean of its channels, and pools by the mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(3, width), nn.Linear(width, 5)

    def forward(self, points: Tensor) -> Tensor:
        x = torch.relu(self.a(points))
        x = x * torch.sigmoid(x.mean(dim=2, keepdim=True))
        pooled = x.mean(dim=1)
        return self.head(pooled / pooled.abs().sum(dim=1, keepdim=True))


class SetAbstraction(nn.Module):
    """PointNet++: farthest points, groups of the nearest, maxima; channels first throughout."""

    def __init__(self, width: int, tokens: int = 24, k: int = 8) -> None:
        super().__init__()
        self.tokens, self.k = tokens, k
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(19, width, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, points: Tensor) -> Tensor:
        xyz = points.transpose(1, 2).permute(0, 2, 1)
        chosen = farthest_point_sample(xyz, min(self.tokens, xyz.shape[1]))
        centres = index_points(xyz, chosen)
        index = square_distance(centres, xyz).argsort(dim=-1)[:, :, : self.k]
        grouped = (index_points(xyz, index) - centres[:, :, None]).permute(0, 3, 2, 1)
        x = torch.max(torch.relu(self.a(grouped)), 2)[0]
        x = torch.cat((centres.permute(0, 2, 1), x), dim=1)[:, :, None]
        x = torch.max(torch.relu(self.b(x)), 3)[0].view(len(points), -1)
        return self.head(x)


class GeometricMlp(nn.Module):
    """PointMLP's way: groups divided by their deviation, residual blocks, two samplings."""

    def __init__(self, width: int, tokens: tuple[int, int] = (32, 24), k: int = 8) -> None:
        super().__init__()
        self.tokens, self.k = tokens, k
        self.embed = nn.Conv1d(3, 8, 1)
        self.blocks = nn.ModuleList((nn.Conv1d(16, 16, 1), nn.Conv1d(32, width, 1)))
        self.alpha = nn.Parameter(torch.ones(2))
        self.head = nn.Linear(width, 5)

    def forward(self, points: Tensor) -> Tensor:
        xyz, x = points, self.embed(points.permute(0, 2, 1)).permute(0, 2, 1)
        for count, block, alpha in zip(self.tokens, self.blocks, self.alpha, strict=True):
            chosen = farthest_point_sample(xyz, min(count, xyz.shape[1]))
            centres, own = index_points(xyz, chosen), index_points(x, chosen)
            index = torch.cdist(centres, xyz).topk(self.k, dim=2, largest=False)[1]
            offset = index_points(x, index) - own[:, :, None]
            deviation = offset.reshape(len(x), -1).std(dim=-1)[:, None, None, None]
            offset = alpha * offset / (deviation + 1e-5)
            grouped = torch.cat((offset, own[:, :, None].expand_as(offset)), dim=3)
            b, s, k, d = grouped.shape
            flat = torch.relu(block(grouped.permute(0, 1, 3, 2).reshape(-1, d, k)))
            x = functional.adaptive_max_pool1d(flat, 1).view(b, s, -1)
            xyz = centres
        return self.head(functional.adaptive_max_pool1d(x.permute(0, 2, 1), 1).squeeze(dim=-1))


class AlongTheFirstAxis(nn.Module):
    """Sorts the points by their first coordinate before anything else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 8), nn.Linear(8, width), nn.Linear(width, 5)

    def forward(self, points: Tensor) -> Tensor:
        order = points[..., 0].argsort(dim=1)
        points = torch.take_along_dim(points, order[..., None], dim=1)
        return self.head(torch.relu(self.b(torch.relu(self.a(points)))).amax(dim=1))


class SortedFeatures(AlongTheFirstAxis):
    """Sorts feature vectors, so that no coordinates show the order."""

    def forward(self, points: Tensor) -> Tensor:
        x = torch.relu(self.a(points))
        x = torch.take_along_dim(x, x.sum(dim=2).argsort(dim=1)[..., None], dim=1)
        return self.head(torch.relu(self.b(x)).amax(dim=1))


class Normalising(nn.Module):
    """Centres and scales its clouds, normalises each cloud's channels, and pools."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv1d(3, width, 1), nn.InstanceNorm1d(width, affine=True)
        self.b, self.head = nn.Conv1d(width, width, 1), nn.Linear(width, 5)

    def forward(self, points: Tensor) -> Tensor:
        points = points - points.mean(dim=1, keepdim=True)
        points = points / points.norm(dim=2, keepdim=True).amax(dim=1, keepdim=True)
        x = torch.relu(self.norm(self.a(points.transpose(1, 2))))
        return self.head(functional.max_pool1d(self.b(x), x.shape[2]).flatten(1))


class GlobalTwice(nn.Module):
    """PCN's way: the global feature is joined to every point, and all is pooled again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, width, 1), nn.Conv1d(2 * width, width, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, points: Tensor) -> Tensor:
        x = torch.relu(self.a(points.transpose(1, 2)))
        x = torch.cat((x.max(dim=2, keepdim=True)[0].expand_as(x), x), dim=1)
        return self.head(torch.relu(self.b(x)).max(dim=2)[0])


POINTWISE = (
    TNetPointNet,
    Squeezing,
    SqueezedFeatures,
    DynamicGraph,
    OffsetAttention,
    StableAttention,
    Gate,
    Normalising,
)
SAMPLING = (SetAbstraction, GeometricMlp)
