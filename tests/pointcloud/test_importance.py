"""Scores of any user's network, without a change to it: exact values and invariances."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.pointcloud import (
    build_network,
    channels_first,
    point_importance,
    refocus,
)
from cmd_plugin.pointcloud.networks import NETWORKS
from tests.helpers.foreign_networks import (
    POOLS,
    AttentionHead,
    FunctionalMax,
    Gated,
    Linear3,
    Overwriting,
    Pooled,
    Sampling,
    Scattered,
    TwoLevels,
)


def cloud(batch: int = 2, count: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, 3, generator=torch.Generator().manual_seed(seed)) / 2


def hooks_of(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


# -- any network ----------------------------------------------------------------------------------


def test_a_users_network_with_a_functional_maximum_works_unmodified() -> None:
    network, points = FunctionalMax().eval(), cloud()
    seen = point_importance(network, points, "critical++", forward=channels_first)
    with torch.no_grad():
        features = network.features(points.transpose(1, 2))
        output = network(points.transpose(1, 2))[0]
    torch.testing.assert_close(seen.norm, features.abs().sum(dim=1))
    winners = features.argmax(dim=2)
    expected = torch.stack([row.bincount(minlength=40) for row in winners])
    assert torch.equal(seen.wins, expected)  # type: ignore[arg-type]
    assert torch.equal(seen.output, output)
    assert (seen.channels, seen.tokens, seen.signed) == (24, 40, False)


@pytest.mark.parametrize("name", POOLS)
def test_every_way_to_write_a_maximum_is_seen(name: str) -> None:
    network, points = Pooled(POOLS[name]).eval(), cloud()
    seen = point_importance(network, points, "critical++")
    with torch.no_grad():
        features = network.features(points)
    torch.testing.assert_close(seen.norm, features.abs().sum(dim=2))
    assert seen.wins is not None
    assert seen.wins.sum(dim=1).tolist() == [12, 12]
    assert len(seen.candidates) == 1  # centring and scaling of the input are no pools
    assert seen.signed


@pytest.mark.parametrize("name", NETWORKS)
def test_reference_networks_are_scored_and_left_alone(name: str) -> None:
    network, points = build_network(name, 4, width=0.25), cloud(2, 48)
    network(points)  # running statistics other than the initial ones
    network.train()
    network.get_submodule(next(n for n, m in network.named_modules() if "bn" in n)).eval()
    modes = [module.training for module in network.modules()]
    state = copy.deepcopy(network.state_dict())
    random = torch.get_rng_state()
    first = point_importance(network, points, "critical++")
    again = point_importance(network, points, "critical++")
    assert torch.equal(first.scores, again.scores)
    assert torch.equal(random, torch.get_rng_state())
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
    assert hooks_of(network) == 0
    network.eval()
    with torch.no_grad():
        assert torch.equal(network(points), first.output)
    assert first.scores.shape == (2, 48)
    assert (first.norm >= 0).all()


def test_of_three_pools_the_one_behind_the_alignments_is_taken() -> None:
    network, points = build_network("pointnet-aligned", 4, width=0.25).eval(), cloud(2, 48)
    seen = point_importance(network, points)
    assert len(seen.candidates) == 3
    with torch.no_grad():
        features = network.feat(points.transpose(1, 2))
    torch.testing.assert_close(seen.scores, features.abs().sum(dim=1))
    assert seen.signed
    earlier = point_importance(network, points, pool=0)
    assert not torch.equal(earlier.scores, seen.scores)


def test_max_and_mean_of_the_same_tensor_are_one_pool() -> None:
    both = Pooled(lambda x: torch.cat((x.amax(1), x.mean(1)), 1), twice=2).eval()
    seen = point_importance(both, cloud(), "critical++")
    assert len(seen.candidates) == 2
    assert seen.pool.startswith("amax")


def test_two_different_maxima_are_listed_and_one_is_asked_for() -> None:
    network, points = TwoLevels().eval(), cloud()
    with pytest.raises(InputError, match=r"pool=NUMBER: 0: amax.*6 channels; 1: amax.*9 channels"):
        point_importance(network, points)
    assert point_importance(network, points, pool=0).channels == 6
    assert point_importance(network, points, pool=1).channels == 9
    with pytest.raises(InputError, match="pool=2"):
        point_importance(network, points, pool=2)


def test_a_pool_that_feeds_points_again_is_not_taken_silently() -> None:
    network, points = Gated().eval(), cloud()
    with pytest.raises(InputError, match="works on points again"):
        point_importance(network, points)
    assert point_importance(network, points, "critical++", pool=0).channels == 12
    by_layer = point_importance(network, points, layer="layer")
    assert by_layer.pool == "layer layer"


def test_a_tensor_overwritten_after_the_pool_is_scored_as_it_was() -> None:
    network, points = Overwriting().eval(), cloud()
    with torch.no_grad():
        expected = network.layer(points).abs().sum(dim=2)
    torch.testing.assert_close(point_importance(network, points).scores, expected)


def unseen(x: Tensor) -> Tensor:
    """Change a tensor as an extension may: without a torch function that a mode could see."""
    with torch._C.DisableTorchFunction():
        return x.sub_(0.5)


@pytest.mark.parametrize(
    ("tail", "signed"),
    [
        (torch.relu, False),
        (lambda x: torch.relu(x).sub_(0.5), True),  # the ReLU's own output, changed since
        (lambda x: torch.relu(x).amax(dim=2, keepdim=True) - x, False),
        (lambda x: torch.relu(x).mul(torch.tensor([1.0] * 11 + [-1.0])), True),
        (lambda x: unseen(torch.relu(x)), True),
        (lambda x: x.exp(), False),
        (lambda x: x.relu_(), False),
        (lambda x: x.relu_().index_fill_(2, torch.tensor([11]), -2.0), True),
    ],
)
def test_the_sign_of_features_is_found_and_norms_need_no_activation(
    tail: Callable[[Tensor], Tensor], signed: bool
) -> None:
    network, points = Pooled(lambda x: tail(x).amax(dim=1)).eval(), cloud()
    with torch.no_grad():
        expected = tail(network.features(points)).abs().sum(dim=2)
    seen = point_importance(network, points)
    assert seen.signed is signed
    torch.testing.assert_close(seen.scores, expected)


def test_one_negative_channel_among_many_is_found() -> None:
    weight = torch.ones(40, 3)
    weight[39] = -1.0
    seen = point_importance(Linear3(weight), cloud().abs())
    assert seen.signed
    torch.testing.assert_close(seen.scores, 40 * cloud().abs().sum(dim=2))


def test_large_finite_points_are_no_infinite_ones() -> None:
    points = cloud()
    points[0, :4] = 3e38  # their sum is beyond float32
    seen = point_importance(Linear3(torch.eye(3) * 1e-3), points)
    assert seen.scores.isfinite().all()


def test_a_network_that_refuses_evaluation_leaves_everything_as_it_was() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def train(self, mode: bool = True) -> Stubborn:
            raise RuntimeError(f"never {mode}")

    network = Stubborn()
    random = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="never False"):
        point_importance(network, cloud())
    assert torch.is_grad_enabled()
    assert torch.equal(random, torch.get_rng_state())
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1.0, 1.0]
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        assert dynamo.eval_frame._stance.stance == "default"


def test_means_have_fbi_and_no_counts() -> None:
    network, points = Pooled(lambda x: x.mean(dim=1)).eval(), cloud()
    with torch.no_grad():
        expected = network.features(points).abs().sum(dim=2)
    torch.testing.assert_close(point_importance(network, points).scores, expected)
    for measure in ("critical", "critical++", "entropy"):
        with pytest.raises(InputError, match=r"mean over 40 tokens.*not a maximum"):
            point_importance(network, points, measure)  # type: ignore[arg-type]


def test_attention_heads_ask_for_a_layer_and_have_no_counts() -> None:
    network, points = AttentionHead().eval(), cloud()
    with pytest.raises(InputError, match="name the layer"):
        point_importance(network, points)
    with torch.no_grad():
        expected = network.layer(points).abs().sum(dim=2)
    for layer in ("layer", network.layer):
        torch.testing.assert_close(point_importance(network, points, layer=layer).scores, expected)
    with pytest.raises(InputError, match="counts, critical points and entropy mean nothing"):
        point_importance(network, points, "entropy", layer="layer")
    assert hooks_of(network) == 0


def test_wrong_layers_are_refused_and_no_hook_stays() -> None:
    network, points = FunctionalMax().eval(), cloud()
    with pytest.raises(InputError, match="has no layer 'conv9'"):
        point_importance(network, points, layer="conv9", forward=channels_first)
    with pytest.raises(InputError, match="no module of this network"):
        point_importance(network, points, layer=nn.Linear(1, 1), forward=channels_first)
    with pytest.raises(ShapeError, match="one vector for each point"):
        point_importance(network, points, layer="head", forward=channels_first)
    with pytest.raises(ShapeError, match="token_axis"):  # as many channels as points
        point_importance(network, cloud(2, 24), layer="b", forward=channels_first)
    right = point_importance(network, cloud(2, 24), layer="b", token_axis=2, forward=channels_first)
    assert right.scores.shape == (2, 24)
    with pytest.raises(RuntimeError, match="channels"):  # the network itself fails
        point_importance(network, cloud(2, 40).repeat(1, 1, 2), layer="b")
    assert hooks_of(network) == 0
    assert not network.training


# -- tokens, masks, scattered clouds --------------------------------------------------------------


def test_points_get_the_score_of_the_token_nearest_to_them() -> None:
    network, points = Sampling().eval(), cloud()
    seen = point_importance(network, points, "critical++")
    state = torch.get_rng_state()
    chosen = torch.randperm(40)[:20]  # what the network drew, from the same state
    torch.set_rng_state(state)
    with torch.no_grad():
        own = torch.relu(network.layer(points[:, chosen])).sum(dim=2)
    torch.testing.assert_close(seen.norm[:, chosen], own)
    nearest = torch.cdist(points, points[:, chosen]).argmin(dim=2)
    torch.testing.assert_close(seen.norm, own.gather(1, nearest))
    assert seen.tokens == 20


def test_unknown_tokens_are_asked_for() -> None:
    network = Sampling().eval()

    def hidden(model: nn.Module, points: Tensor) -> Any:
        rows = torch.cat((torch.arange(20), torch.arange(40, 60)))
        tokens = points.reshape(-1, 3)[rows]  # coordinates never appear as [B, M, 3]
        return model.head(torch.relu(model.layer(tokens)).view(2, 20, 12).amax(dim=1))

    points = cloud()
    with pytest.raises(InputError, match="pass them by tokens="):
        point_importance(network, points, forward=hidden)
    seen = point_importance(network, points, forward=hidden, tokens=points[:, :20])
    assert seen.scores.shape == (2, 40)
    with pytest.raises(ShapeError, match="tokens must be"):
        point_importance(network, points, forward=hidden, tokens=points[:, :19])


def test_a_mask_makes_ragged_clouds_equal_to_clouds_on_their_own() -> None:
    network, points = Pooled(lambda x: x.amax(dim=1)).eval(), cloud(2, 30)
    counts = (30, 17)
    mask = torch.arange(30) < torch.tensor(counts)[:, None]

    def masked(model: Any, x: Tensor) -> Tensor:
        features = torch.relu(model.layer(x)).masked_fill(~mask.unsqueeze(2), -math.inf)
        return model.head(features.amax(dim=1))

    def alone(model: Any, x: Tensor) -> Tensor:
        return model.head(torch.relu(model.layer(x)).amax(dim=1))

    together = point_importance(network, points, "critical++", mask=mask, forward=masked)
    for number, count in enumerate(counts):
        single = point_importance(
            network, points[number : number + 1, :count], "critical++", forward=alone
        )
        torch.testing.assert_close(together.norm[number, :count], single.norm[0])
        assert torch.equal(together.wins[number, :count], single.wins[0])  # type: ignore[index]
        assert together.scores[number, count:].sum() == 0
        torch.testing.assert_close(together.entropy[number], single.entropy[0])  # type: ignore[index]
    with pytest.raises(NonFiniteError, match="pass mask="):
        point_importance(network, points, forward=masked)


def test_scattered_clouds_are_brought_back_together() -> None:
    network, points = Scattered().eval(), cloud(3, 20)
    number = torch.arange(3).repeat_interleave(20)
    seen = point_importance(
        network, points, "critical++", forward=lambda m, p: m(p.reshape(-1, 3), number, 3)
    )
    with torch.no_grad():
        features = torch.relu(network.layer(points))
    torch.testing.assert_close(seen.norm, features.sum(dim=2))
    mask = torch.arange(20) < torch.tensor([20, 11, 5])[:, None]
    ragged = point_importance(
        network,
        points,
        "critical++",
        mask=mask,
        forward=lambda m, p: m(p[mask], number[mask.flatten()], 3),
    )
    torch.testing.assert_close(ragged.norm, features.sum(dim=2) * mask)
    assert ragged.wins is not None
    assert ragged.wins.sum(dim=1).tolist() == [12, 12, 12]


def test_pytorch_geometric_pools_are_seen_if_it_is_installed() -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    network, points = Scattered().eval(), cloud(3, 20)
    number = torch.arange(3).repeat_interleave(20)

    def forward(model: Any, x: Tensor) -> Tensor:
        features = torch.relu(model.layer(x.reshape(-1, 3)))
        return model.head(geometric.global_max_pool(features, number))

    seen = point_importance(network, points, "critical++", forward=forward)
    with torch.no_grad():
        torch.testing.assert_close(seen.norm, torch.relu(network.layer(points)).sum(dim=2))


# -- the measures ----------------------------------------------------------------------------------


def test_the_measures_agree_with_each_other() -> None:
    network, points = build_network("pointnet", 4, width=0.25).eval(), cloud(2, 64)
    counts = point_importance(network, points, "critical++")
    assert counts.wins is not None
    assert counts.entropy is not None
    assert counts.wins.sum(dim=1).tolist() == [256, 256]
    assert torch.equal(counts.scores, counts.wins.float())
    critical = point_importance(network, points, "critical").scores
    assert torch.equal(critical, (counts.wins > 0).float())
    parts = point_importance(network, points, "entropy").scores
    torch.testing.assert_close(parts.double().sum(dim=1), counts.entropy, rtol=1e-5, atol=1e-6)
    fbi = point_importance(network, points)
    assert fbi.wins is None
    assert torch.equal(fbi.scores, counts.norm)
    assert fbi.display().amax(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_critical_points_alone_give_the_same_answer_in_a_point_wise_network() -> None:
    network, points = build_network("pointnet", 4, width=0.25).eval(), cloud(1, 200)
    wins = point_importance(network, points, "critical++").wins
    assert wins is not None
    with torch.no_grad():
        whole = network(points)
        torch.testing.assert_close(network(points[:, wins[0] > 0]), whole, rtol=1e-4, atol=1e-4)
        unseen = int((wins[0] == 0).nonzero()[0])
        rest = torch.cat((points[:, :unseen], points[:, unseen + 1 :]), dim=1)
        torch.testing.assert_close(network(rest), whole, rtol=1e-4, atol=1e-4)


def test_critical_points_alone_do_not_speak_for_graph_networks() -> None:
    network, points = build_network("dgcnn", 4, width=0.25).eval(), cloud(1, 100)
    wins = point_importance(network, points, "critical++").wins
    assert wins is not None
    with torch.no_grad():
        assert not torch.allclose(network(points[:, wins[0] > 0]), network(points), atol=1e-4)


def test_scores_move_with_the_points_and_ignore_far_away_copies() -> None:
    network, points = build_network("pointnet", 4, width=0.25).double().eval(), cloud(2, 50)
    points = points.double()
    order = torch.randperm(50)
    plain = point_importance(network, points, "critical++", ties="split")
    moved = point_importance(network, points[:, order], "critical++", ties="split")
    torch.testing.assert_close(moved.norm, plain.norm[:, order])
    torch.testing.assert_close(moved.wins, plain.wins[:, order])  # type: ignore[index]
    further = torch.cat((points, points[:, :1] + 50.0), dim=1)
    torch.testing.assert_close(point_importance(network, further).scores[:, :50], plain.norm)


def test_a_point_far_along_the_weights_wins_every_channel_it_likes() -> None:
    weight = torch.eye(3).repeat(4, 1)
    points = cloud(1, 30).abs() * torch.tensor([1.0, 1.0, 1.0])
    points[0, 7] = 10.0
    seen = point_importance(Linear3(weight), points, "critical++")
    assert seen.wins is not None
    assert int(seen.wins[0, 7]) == 12


def test_zero_features_score_zero_and_no_others_do() -> None:
    points = cloud(1, 10)
    points[0, 4] = 0.0
    seen = point_importance(Linear3(torch.randn(6, 3)), points)
    assert (seen.scores[0] == 0).nonzero().flatten().tolist() == [4]


# -- layouts and types ----------------------------------------------------------------------------


def test_a_network_that_takes_channels_first_says_how_to_call_it() -> None:
    network, points = FunctionalMax().eval(), cloud()
    with pytest.raises(ShapeError, match=r"takes \[B, C, N\].*forward=channels_first"):
        point_importance(network, points)
    with pytest.raises(ShapeError, match=r"look like \[B, C, N\].*forward=channels_first"):
        point_importance(network, points.transpose(1, 2))
    with pytest.raises(ShapeError, match="forward=channels_first"):
        refocus(network, points)
    assert point_importance(network, points, forward=channels_first).scores.shape == (2, 40)


def test_arrays_and_float64_are_taken() -> None:
    network, points = build_network("pointnet", 4, width=0.25).eval(), cloud()
    expected = point_importance(network, points).scores
    for given in (points.numpy(), points.double(), points.double().numpy()):
        assert torch.equal(point_importance(network, given).scores, expected)
    assert torch.equal(refocus(network, points.numpy()).kept, refocus(network, points).kept)


# -- bad input ------------------------------------------------------------------------------------


def test_bad_points_are_refused() -> None:
    network = FunctionalMax()
    with pytest.raises(ShapeError, match=r"\[B, N, C\]"):
        point_importance(network, torch.zeros(5, 3))
    with pytest.raises(ShapeError, match="floating"):
        point_importance(network, torch.zeros(1, 5, 3, dtype=torch.int64))
    with pytest.raises(InputError, match="unknown measure"):
        point_importance(network, cloud(), "lime")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="mask must be"):
        point_importance(network, cloud(), mask=torch.ones(2, 39, dtype=torch.bool))
    bad = cloud()
    bad[0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="1 NaN"):
        point_importance(network, bad)
    with torch.no_grad():
        network.b.weight[0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="max over 40 tokens"):
        point_importance(network, cloud(), forward=channels_first)
