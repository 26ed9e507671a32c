"""Scores of compiled, half-precision and wrapped networks are those of the plain one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError
from cmd_plugin.pointcloud import (
    ImportanceHead,
    build_network,
    channels_first,
    point_importance,
)
from tests.helpers.foreign_networks import POOLS, FunctionalMax, Pooled


def cloud(batch: int = 2, count: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, 3, generator=torch.Generator().manual_seed(seed)) / 2


@pytest.mark.compile
def test_compiled_networks_give_the_scores_of_the_plain_one() -> None:
    network, points = FunctionalMax().eval(), cloud()
    expected = point_importance(network, points, forward=channels_first).scores
    compiled = torch.compile(network, backend="aot_eager")
    with torch.no_grad():
        before = compiled(points.transpose(1, 2))[0]
    seen = point_importance(compiled, points, forward=channels_first)
    assert torch.equal(seen.scores, expected)
    with torch.no_grad():
        assert torch.equal(compiled(points.transpose(1, 2))[0], before)


@pytest.mark.compile
def test_networks_compiled_in_place_or_in_parts_are_seen_as_well() -> None:
    network, points = Pooled(POOLS["amax"]).eval(), cloud()
    expected = point_importance(network, points).scores
    network.compile(backend="aot_eager")
    network.layer = torch.compile(network.layer, backend="aot_eager")  # type: ignore[assignment]
    with torch.no_grad():
        network(points)
    torch.testing.assert_close(point_importance(network, points).scores, expected)


@pytest.mark.compile
def test_the_head_returns_scores_from_inside_a_full_graph() -> None:
    network, points = build_network("pointnet", 4, width=0.25).eval(), cloud(2, 256)
    head = ImportanceHead(network, points)  # as many points as channels: axes must not be mixed up
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    for seed in (1, 2):
        other = cloud(2, 256, seed)
        with torch.no_grad():
            output, scores = compiled(other)
        seen = point_importance(network, other)
        torch.testing.assert_close(scores, seen.scores)
        torch.testing.assert_close(output, seen.output)
    with pytest.raises(InputError, match="brings tokens back to points"):
        ImportanceHead(build_network("pct", 4, width=0.25), cloud(1, 600))


def test_the_head_lets_gradients_through() -> None:
    network, points = build_network("pointnet", 4, width=0.25), cloud(4, 32)
    output, scores = ImportanceHead(network, points)(points)
    output.sum().backward()
    assert not scores.requires_grad
    assert all(p.grad is not None for p in network.parameters())


def test_autocast_scores_are_summed_in_single_precision() -> None:
    network, points = FunctionalMax().eval(), cloud()
    exact = point_importance(network, points, forward=channels_first).scores
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = point_importance(network, points, forward=channels_first).scores
    assert rough.dtype == torch.float32
    # Three roundings to eight bits on the way to each feature.
    torch.testing.assert_close(rough, exact, rtol=3 * 2**-8, atol=3 * 2**-8)


def test_data_parallel_wrappers_are_looked_through() -> None:
    network, points = FunctionalMax().eval(), cloud()
    expected = point_importance(network, points, forward=channels_first).scores
    wrapped = nn.DataParallel(network)
    assert torch.equal(point_importance(wrapped, points, forward=channels_first).scores, expected)
