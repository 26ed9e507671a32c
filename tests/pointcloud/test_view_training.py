"""Training on views: it learns, resumes bit for bit, and leaves the global random state alone."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, NonFiniteError, StateMismatch
from cmd_plugin.pointcloud import EPiC, EPiCTraining, PointClouds, ViewTraining, build_network
from cmd_plugin.pointcloud.view_training import augment_clouds

SIZES = {"patch": 16, "curve": 16, "random": 8}


def data(clouds: int = 24, points: int = 32) -> PointClouds:
    """Flat discs and round balls: two classes a tiny network tells apart."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(clouds, points, 3, generator=generator)
    drawn /= drawn.norm(dim=2, keepdim=True)
    labels = torch.arange(clouds) % 2
    drawn[labels == 1, :, 2] *= 0.05
    return PointClouds(drawn, labels, ("ball", "disc"))


def network() -> nn.Module:
    torch.manual_seed(1)
    return build_network("pointnet", 2, 0.06)


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=5e-3)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in module.state_dict().values()])


def test_it_learns() -> None:
    net, clouds = network(), data()
    losses = ViewTraining(net, clouds, 30, batch_size=8, optimizer=adam, augment=False).run()
    assert len(losses) == 30
    # The entropy of labels smoothed to 0.8 and 0.2 is 0.50: no loss is below it.
    assert 0.5 < losses[-1] < 0.58 < losses[0]
    assert not net.training
    with torch.no_grad():
        assert (net(clouds.points).argmax(dim=1) == clouds.labels).double().mean() > 0.9


def test_the_ensemble_learns_and_every_member_is_trained_on_its_part() -> None:
    torch.manual_seed(0)
    ensemble = EPiC(lambda: build_network("pointnet", 2, 0.06), sizes=SIZES)
    before = {view: weights(net) for view, net in ensemble.networks.items()}
    seen: list[tuple[int, int]] = []
    shapes: dict[str, set[torch.Size]] = {view: set() for view in ensemble.networks}
    for view, net in ensemble.networks.items():
        net.register_forward_pre_hook(lambda _, given, v=view: shapes[v].add(given[0].shape))
    losses = EPiCTraining(ensemble, data(), 6, batch_size=8, optimizer=adam, augment=False).run(
        progress=lambda done, total: seen.append((done, total))
    )
    assert shapes == {view: {torch.Size([8, SIZES[view], 3])} for view in SIZES}
    assert losses[-1] < losses[0]
    assert seen == [(number, 18) for number in range(1, 19)]
    for view, net in ensemble.networks.items():
        assert not torch.equal(weights(net), before[view])
    clouds = data()
    with torch.no_grad():
        assert (ensemble(clouds.points).argmax(1) == clouds.labels).double().mean() > 0.8


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_run_equals_one_that_was_not_stopped(stop: int) -> None:
    def training() -> EPiCTraining:
        torch.manual_seed(0)
        ensemble = EPiC(lambda: build_network("pointnet", 2, 0.06), sizes=SIZES)
        return EPiCTraining(ensemble, data(), 3, batch_size=8, rounds=2, seed=7)

    whole, first, second = training(), training(), training()
    losses = whole.run()
    first.run(stop)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    torch.rand(3)  # a global generator in another state must not matter
    assert second.run() == losses
    assert torch.equal(weights(second.ensemble), weights(whole.ensemble))


def test_global_random_state_is_untouched_and_not_used() -> None:
    results = []
    for start in (1, 2):
        net = network()
        torch.manual_seed(start)
        state = torch.get_rng_state()
        ViewTraining(net, data(), 1, batch_size=8).run()
        assert torch.equal(torch.get_rng_state(), state)
        results.append(weights(net))
    assert torch.equal(*results)


def test_views_get_fresh_seeds_and_true_numbers() -> None:
    asked: list[tuple[list[int], int]] = []

    def view(points: Tensor, index: Tensor, seed: int) -> Tensor:
        asked.append((index.tolist(), seed))
        assert not torch.is_grad_enabled()
        return points[:, :10]

    ViewTraining(network(), data(), 2, view=view, rounds=2, batch_size=12).run()
    assert len(asked) == 2 * 2 * 2
    assert len({seed for _, seed in asked}) == 4  # fresh for every epoch and round
    for epoch in (0, 4):
        numbers = asked[epoch][0] + asked[epoch + 2][0]
        assert sorted(numbers) == list(range(24))
        assert asked[epoch][0] == asked[epoch + 1][0]


def test_a_last_batch_of_one_cloud_is_left_out() -> None:
    sizes: list[int] = []

    def view(points: Tensor, index: Tensor, seed: int) -> Tensor:
        sizes.append(len(index) + 0 * seed)
        return points

    ViewTraining(network(), data(17), 1, view=view, batch_size=8).run()
    assert sizes == [8, 8]


def test_rate_follows_the_cosine_and_labels_are_smoothed_over_wrong_classes() -> None:
    rates: list[float] = []
    made: list[torch.optim.Optimizer] = []

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(parameters, lr=0.0))
        made[0].param_groups[0]["lr"] = 0.1
        return made[0]

    def view(points: Tensor, index: Tensor, seed: int) -> Tensor:
        rates.append(made[0].param_groups[0]["lr"] + 0.0 * seed * len(index))
        return points

    training = ViewTraining(network(), data(), 4, view=view, optimizer=optimizer, batch_size=24)
    training.run()
    expected = [0.05 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert rates == pytest.approx(expected)
    # Label smoothing 0.2 over the wrong classes: a network that is sure of 0.8 is at the minimum.
    logits = torch.tensor([[math.log(0.8), math.log(0.2)]])
    loss = nn.functional.cross_entropy(
        logits, torch.tensor([0]), label_smoothing=training._smoothing
    )
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert float(loss) == pytest.approx(entropy, rel=1e-6)


def test_augmentation_stays_in_its_ranges_and_with_its_sample() -> None:
    points = data(200).points
    moved = augment_clouds(points, seed=1, index=torch.arange(200))
    centre = moved.amax(dim=1) / 2 + moved.amin(dim=1) / 2
    width = (moved.amax(dim=1) - moved.amin(dim=1)) / (points.amax(dim=1) - points.amin(dim=1))
    assert 2 / 3 - 1e-5 < width.min() < 0.7
    assert 1.45 < width.max() < 1.5 + 1e-5
    shift = centre - width * (points.amax(dim=1) + points.amin(dim=1)) / 2
    assert shift.abs().max() < 0.2 + 1e-5
    assert shift.abs().max() > 0.18
    picked = torch.tensor([150, 3])
    assert torch.equal(augment_clouds(points[picked], seed=1, index=picked), moved[picked])


def test_bad_input() -> None:
    net, clouds = network(), data()
    for name in ("epochs", "rounds", "batch_size"):
        arguments = {"epochs": 2, name: 0}
        with pytest.raises(InputError, match=f"{name} must be at least 1"):
            ViewTraining(net, clouds, **arguments)
    with pytest.raises(InputError, match="two clouds"):
        ViewTraining(net, clouds.select(torch.tensor([0])), 1)
    with pytest.raises(InputError, match="label_smoothing must be"):
        ViewTraining(net, clouds, 1, label_smoothing=1.0)
    with pytest.raises(InputError, match="leaves nothing of 2 classes"):
        ViewTraining(net, clouds, 1, label_smoothing=0.6)
    training = ViewTraining(net, clouds, 2, batch_size=8)
    training.run(1)
    other = ViewTraining(net, clouds, 3, batch_size=8)
    with pytest.raises(StateMismatch, match="settings"):
        other.load_state_dict(training.state_dict())
    wider = ViewTraining(build_network("pointnet", 2, 0.2), clouds, 2, batch_size=8)
    with pytest.raises(StateMismatch, match="another network"):
        wider.load_state_dict(training.state_dict())
    with pytest.raises(StateMismatch, match="the saved run trains"):
        EPiCTraining(EPiC(network, sizes=SIZES), clouds, 2).load_state_dict({})

    def explode(points: Tensor, index: Tensor, seed: int) -> Tensor:
        return points * (torch.nan + 0 * seed * len(index))

    with pytest.raises(NonFiniteError, match="in epoch 0"):
        ViewTraining(net, clouds, 1, view=explode, batch_size=8).run()
