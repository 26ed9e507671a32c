"""Which axis holds the points, and which token is which point, whatever sizes coincide."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError
from cmd_plugin.pointcloud import ImportanceHead, build_network, point_importance
from cmd_plugin.pointcloud.networks import NETWORKS
from tests.helpers.public_networks import (
    POINTWISE,
    SAMPLING,
    AlongTheFirstAxis,
    DynamicGraph,
    Gate,
    GlobalTwice,
    SetAbstraction,
    SortedFeatures,
    Squeezing,
    StableAttention,
    farthest_point_sample,
)

WIDTH = 40
SIZES = (WIDTH, 24, 32, 57)  # channels; tokens of the second and first sampling; neither


def cloud(batch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(batch, count, 3, generator=generator, dtype=torch.float64) / 2


def made(kind: Callable[[int], nn.Module], width: int = WIDTH) -> nn.Module:
    torch.manual_seed(0)
    return kind(width).double().eval()


def check_equivariance(network: nn.Module, points: Tensor, *, first_stays: bool = False) -> None:
    """Points in another order have their scores in that order."""
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(points.shape[1], generator=generator)
    if first_stays:  # a farthest point sample starts there
        order = torch.cat((torch.tensor([0]), order[order != 0]))
    measure = "fbi" if isinstance(network, Gate) else "critical++"  # a mean has no counts
    plain, moved = (
        point_importance(network, clouds, measure, ties="split")
        for clouds in (points, points[:, order])
    )
    assert float(plain.norm.std()) > 1e-3 * float(plain.norm.mean())  # or any order would do
    torch.testing.assert_close(moved.norm, plain.norm[:, order], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(moved.scores, plain.scores[:, order], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("kind", POINTWISE)
@pytest.mark.parametrize("batch", [1, 2])
def test_scores_of_public_networks_move_with_the_points(
    kind: Callable[[int], nn.Module], count: int, batch: int
) -> None:
    network, points = made(kind), cloud(batch, count)
    check_equivariance(network, points)
    seen = point_importance(network, points)
    assert (seen.channels, seen.tokens) == (WIDTH, count)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("kind", SAMPLING)
def test_scores_of_networks_that_sample_belong_to_the_points_sampled(
    kind: Callable[[int], nn.Module], count: int
) -> None:
    check_equivariance(made(kind), cloud(2, count), first_stays=count > 24)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("count", [64, 256, 128, 97])
def test_scores_of_our_networks_move_with_the_points(name: str, count: int) -> None:
    torch.manual_seed(0)
    network = build_network(name, 5, width=0.25).double().eval()  # 256 channels enter the pool
    samples = name in ("pct", "pointnet2")
    tokens = {"pct": 256, "pointnet2": 128}.get(name, count)
    check_equivariance(network, cloud(1, count), first_stays=samples and count > tokens)


@pytest.mark.parametrize(("count", "width"), [(512, 0.5), (1024, 1.0), (256, 0.25)])
def test_pct_is_scored_where_channels_are_as_many_as_points(count: int, width: float) -> None:
    torch.manual_seed(0)
    network, points = build_network("pct", 5, width=width).eval(), cloud(1, count).float()
    seen = point_importance(network, points)
    assert seen.pool == f"adaptive_max_pool1d over 256 tokens of {count} channels"
    entered: list[Tensor] = []
    network.conv_fuse.register_forward_hook(lambda *call: entered.append(call[2]))
    with torch.no_grad():
        network(points)
        tokens = network.token_points(points)
    own = entered[0].abs().sum(dim=1)
    torch.testing.assert_close(seen.norm.gather(1, tokens), own)


@pytest.mark.parametrize("count", [24, 57])
def test_entropy_is_that_of_the_tokens_and_points_have_the_counts_of_theirs(count: int) -> None:
    network, points = made(SetAbstraction), cloud(2, count)
    seen = point_importance(network, points, "critical++")
    entered: list[Tensor] = []
    network.b.register_forward_hook(lambda *call: entered.append(torch.relu(call[2])[:, :, 0]))
    with torch.no_grad():
        network(points)
    winners = entered[0].argmax(dim=2)  # [B, F] numbers of tokens
    counts = torch.stack([row.bincount(minlength=24) for row in winners])
    share = (counts.double() + 1e-6) / (counts.double() + 1e-6).sum(dim=1, keepdim=True)
    expected = -(share * share.log2()).sum(dim=1) / math.log2(24)
    torch.testing.assert_close(seen.entropy, expected)
    chosen = farthest_point_sample(points, 24)
    assert torch.equal(seen.scores.gather(1, chosen), counts.to(seen.scores.dtype))


def test_as_many_clouds_as_points_change_nothing() -> None:
    points = cloud(24, 24)
    for kind in (Squeezing, DynamicGraph, SetAbstraction, StableAttention):
        network = made(kind, 24)
        together = point_importance(network, points).scores[:2]
        alone = torch.cat([point_importance(network, one[None]).scores for one in points[:2]])
        torch.testing.assert_close(together, alone)


def test_as_many_neighbours_as_points_change_nothing() -> None:
    for count in (24, WIDTH):
        torch.manual_seed(0)
        check_equivariance(DynamicGraph(WIDTH, k=count).double().eval(), cloud(2, count))


def test_points_sorted_on_the_way_keep_their_own_scores() -> None:
    for count in SIZES:
        network, points = made(AlongTheFirstAxis), cloud(2, count)
        check_equivariance(network, points)
        with torch.no_grad():
            own = torch.relu(network.b(torch.relu(network.a(points)))).sum(dim=2)
        torch.testing.assert_close(point_importance(network, points).scores, own)


def test_an_order_that_cannot_be_followed_is_not_scored() -> None:
    network, points = made(SortedFeatures), cloud(2, 57)
    with pytest.raises(InputError, match=r"into another order.*tokens=.*layer=NAME"):
        point_importance(network, points)
    with pytest.raises(InputError, match="not over the 57 points in their order"):
        ImportanceHead(network, points)
    assert point_importance(network, points, layer="a").scores.shape == (2, 57)


def test_a_mask_is_kept_while_the_order_is_checked() -> None:
    network, points = made(AlongTheFirstAxis), cloud(2, 30)
    mask = torch.arange(30) % 3 != torch.tensor([[1], [2]])

    def masked(model: nn.Module, clouds: Tensor) -> Tensor:
        away = torch.tensor([9.0, 0.0, 0.0], dtype=clouds.dtype)  # hidden points come last
        order = torch.where(mask[..., None], clouds, away)[..., 0].argsort(dim=1, stable=True)
        x = torch.relu(model.a(torch.take_along_dim(clouds, order[..., None], dim=1)))
        hidden = ~mask.gather(1, order)
        return model.head(model.b(x).masked_fill(hidden[..., None], -torch.inf).amax(dim=1))

    seen = point_importance(network, points, mask=mask, forward=masked, layer="b")
    with torch.no_grad():
        own = network.b(torch.relu(network.a(points))).abs().sum(dim=2) * mask
    torch.testing.assert_close(seen.scores, own)


def test_a_global_feature_joined_to_the_points_asks_which_pool() -> None:
    network, points = made(GlobalTwice), cloud(2, WIDTH)
    with pytest.raises(InputError, match=r"choose one by pool=NUMBER.*last one is nearest"):
        point_importance(network, points)
    assert point_importance(network, points, pool=1).tokens == WIDTH


class PoolsBy(nn.Module):
    """Pools by a function that cannot be followed."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.head, self.pool = nn.Linear(3, 12), nn.Linear(12, 4), pool

    def forward(self, points: Tensor) -> Tensor:
        return self.head(self.pool(self.layer(points)))


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("sort", lambda x: x.sort(dim=1, descending=True)[0][:, 0]),
        ("aminmax", lambda x: torch.aminmax(x, dim=1)[1]),
        (
            "segment_reduce",
            lambda x: torch.segment_reduce(
                x.flatten(0, 1), "max", lengths=torch.full((len(x),), x.shape[1])
            ),
        ),
    ],
)
def test_pools_that_cannot_be_followed_are_named(
    name: str, pool: Callable[[Tensor], Tensor]
) -> None:
    network, points = PoolsBy(pool).eval(), cloud(2, 57).float()
    with pytest.raises(InputError, match=rf"calls {name}, which may be one.*layer=NAME"):
        point_importance(network, points)
    assert point_importance(network, points, layer="layer").scores.shape == (2, 57)
