"""Attacks keep their limits and lower the margin; the adaptive one knows the defence."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError
from cmd_plugin.pointcloud import (
    SubsetDefence,
    build_network,
    gradient_attack,
    importance_order,
    point_importance,
    query_attack,
)
from cmd_plugin.pointcloud.adversarial import (
    Attack,
    _margin,
    estimate_normals,
    perturbation_size,
    strongest_attack,
)
from tests.helpers.foreign_networks import Linear3
from tests.helpers.public_networks import TNetPointNet


def ellipsoids(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clouds of 80 points on ellipsoids, and which of their three axes is the longest."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    axes = torch.ones(count, 1, 3).scatter(2, labels.view(-1, 1, 1), 1.4)
    points = torch.randn(count, 80, 3, generator=generator)
    return nn.functional.normalize(points, dim=2) * axes, labels


@cache
def trained() -> nn.Module:
    torch.manual_seed(0)
    network = build_network("pointnet", 3, width=0.25)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(60):
        points, labels = ellipsoids(24, step)
        loss = nn.functional.cross_entropy(network(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return network.eval()


def setting() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that answers these clouds rightly."""
    network = trained()
    points, labels = ellipsoids(3, 1000)
    with torch.no_grad():
        assert torch.equal(network(points).argmax(dim=1), labels)
    return network, points, labels


def test_normals_of_a_sphere_point_outwards_or_inwards() -> None:
    points = torch.nn.functional.normalize(torch.randn(1, 2000, 3), dim=2)
    normals = estimate_normals(points)
    cosine = (normals * points).sum(dim=2).abs()
    assert cosine.median() > 0.999
    plane = torch.cat((torch.rand(1, 50, 2), torch.zeros(1, 50, 1)), dim=2)
    torch.testing.assert_close(estimate_normals(plane)[..., 2].abs(), torch.ones(1, 50))


def test_the_defence_answers_on_the_least_important_points() -> None:
    network, points, _ = setting()
    order = importance_order(point_importance(network, points, "critical++"))
    subset = points.gather(1, order[:, :50].sort(dim=1).values[..., None].expand(-1, -1, 3))
    with torch.no_grad():
        torch.testing.assert_close(SubsetDefence(network, 50)(points), network(subset))
        torch.testing.assert_close(SubsetDefence(network, 600)(points), network(points))
    with pytest.raises(InputError, match="keep must be"):
        SubsetDefence(network, 0)


def test_gradient_attack_fools_within_its_limit() -> None:
    network, points, labels = setting()
    attack = gradient_attack(network, points, labels, steps=60, size=0.03, limit=0.5)
    assert attack.rate == attack.rate_of_right == 1.0
    assert not attack.wrong_before.any()
    with torch.no_grad():
        assert (network(attack.points).argmax(dim=1) != labels).all()
    assert (attack.points - points).norm(dim=2).max() <= 0.5 + 1e-6
    assert all(p.grad is None for p in network.parameters())
    small = gradient_attack(network, points, labels, steps=3, size=1e-3, limit=1e-2)
    assert small.rate == 0.0
    with torch.no_grad():  # it did not fool, but every cloud is nearer to it
        after, before = _margin(network(small.points), labels), _margin(network(points), labels)
    assert (after < before).all()
    assert small.queries.tolist() == [7, 7, 7]


def test_tangential_steps_stay_in_a_plane() -> None:
    network = Linear3(torch.randn(4, 3))
    plane = torch.cat((torch.rand(1, 60, 2), torch.zeros(1, 60, 1)), dim=2)
    label = network(plane).argmax(dim=1)
    inside = gradient_attack(network, plane, label, steps=4)
    torch.testing.assert_close(inside.points[..., 2], torch.zeros(1, 60), atol=1e-6, rtol=0)
    free = gradient_attack(network, plane, label, steps=4, tangential=False)
    assert free.points[..., 2].abs().max() > 1e-3


def test_an_attack_that_knows_the_defence_beats_one_that_does_not() -> None:
    network, _, _ = setting()
    points, _ = ellipsoids(12, 1000)
    defended = SubsetDefence(network, 60)
    with torch.no_grad():
        labels = defended(points).argmax(dim=1)  # an attack has to start from a right answer
    blind = gradient_attack(network, points, labels, steps=10, size=0.01, limit=0.2)
    aware = gradient_attack(
        defended, points, labels, steps=10, size=0.01, limit=0.2, samples=2, noise=0.01
    )
    with torch.no_grad():
        transferred = float((defended(blind.points).argmax(dim=1) != labels).double().mean())
    assert aware.rate_of_right > transferred + 0.3


def test_the_query_attack_moves_points_by_a_step_and_counts_its_queries() -> None:
    network, points, labels = setting()
    calls = 0

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            scores: Tensor = network(x)
            return scores

    wrong = labels.clone()
    wrong[0] = (labels[0] + 1) % 3  # misclassified from the start: a success at one query
    attack = query_attack(Counting(), network, points, wrong, step=0.3, limit=0.16, queries=60)
    assert int(attack.queries.sum()) == calls
    assert attack.wrong_before.tolist() == [True, False, False]
    assert attack.success[0]
    assert int(attack.queries[0]) == 1
    assert attack.queries.max() <= 60
    distance = (attack.points - points).norm(dim=2)
    torch.testing.assert_close(
        distance[distance > 0], torch.full_like(distance[distance > 0], 0.16)
    )
    with torch.no_grad():
        after, before = _margin(network(attack.points), wrong), _margin(network(points), wrong)
    assert (after[1:] < before[1:]).all()


def test_rates_with_and_without_those_wrong_before() -> None:
    network, points, labels = setting()
    all_wrong = gradient_attack(network, points, (labels + 1) % 3, steps=1)
    assert all_wrong.rate == 1.0
    assert math.isnan(all_wrong.rate_of_right)


def test_sizes_of_a_known_change() -> None:
    clean = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]])
    attacked = torch.tensor([[[0.0, 0, 0.1], [1, 0, 0]]])
    size = perturbation_size(clean, attacked)
    assert size["l2"] == pytest.approx(0.1)
    assert size["chamfer"] == pytest.approx(0.01)  # 0.005 each way
    assert size["hausdorff"] == pytest.approx(0.1)


def test_the_published_step_of_the_query_attack_is_not_cut() -> None:
    network, points, labels = setting()
    attack = query_attack(network, network, points, labels, queries=60)
    distance = (attack.points - points).norm(dim=2)
    moved = distance[distance > 0]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.32))


def test_each_point_moves_by_the_size_if_each_gradient_is_normalised() -> None:
    network, points, labels = setting()
    attack = gradient_attack(
        network, points, labels, steps=1, size=0.01, tangential=False, normalise="point"
    )
    distance = (attack.points - points).norm(dim=2)
    seen = distance[distance > 1e-6]  # points without a gradient stay
    torch.testing.assert_close(seen, torch.full_like(seen, 0.01), atol=1e-6, rtol=0)
    assert len(seen) > 10
    with pytest.raises(InputError, match="unknown normalise"):
        gradient_attack(network, points, labels, normalise="axis")  # type: ignore[arg-type]


def test_the_strongest_attack_fools_what_any_of_them_fools() -> None:
    clouds = torch.arange(3.0).view(3, 1, 1).expand(3, 2, 3)
    ones, never = torch.ones(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)
    first = Attack(clouds, torch.tensor([True, False, False]), never, ones)
    second = Attack(-clouds, torch.tensor([True, True, False]), never, 2 * ones)
    both = strongest_attack(first, second)
    assert both.success.tolist() == [True, True, False]
    assert both.points[:, 0, 0].tolist() == [0.0, -1.0, 2.0]
    assert both.queries.tolist() == [3, 3, 3]
    with pytest.raises(InputError, match="same clouds"):
        strongest_attack()


def test_networks_with_several_outputs_are_attacked_and_defended() -> None:
    torch.manual_seed(0)
    network, (points, _) = TNetPointNet(24).eval(), ellipsoids(2, 0)
    with torch.no_grad():
        labels = network(points)[0].argmax(dim=1)
    defended = SubsetDefence(network, 60)
    for target in (network, defended):
        assert gradient_attack(target, points, labels, steps=2).points.shape == points.shape
        assert query_attack(target, network, points, labels, queries=4).queries.max() <= 4
