"""BatchNorm's statistics for weights that were put into a network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sentences import assert_one_sentence
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.networks import (
    load_statistics,
    recalibrate,
    recalibrated,
    running_statistics,
)


class Oops(Exception):
    pass


class Network(nn.Module):
    """BatchNorms of several kinds, and much else that a pass in training mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4, momentum=0.37)
        self.second = nn.BatchNorm2d(4, momentum=None)
        self.instance = nn.InstanceNorm2d(4, track_running_stats=True)
        self.still = nn.BatchNorm2d(4, track_running_stats=False)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros(()))
        self.still.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        x = self.second(self.norm(self.conv(x)).relu())
        return self.drop(self.still(self.instance(x))).flatten(1)


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def trained() -> Network:
    network = Network()
    network(images(5, 0)).sum().backward()
    return network


def state_of(network: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: value.clone() for name, value in network.state_dict().items()},
        "flags": [module.training for module in network.modules()],
        "momenta": [getattr(module, "momentum", None) for module in network.modules()],
        "gradients": [p.grad.clone() for p in network.parameters() if p.grad is not None],
        "random": torch.get_rng_state(),
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    changed = {key for key in ("flags", "momenta") if one[key] != other[key]}
    changed |= {
        name
        for name, value in one["tensors"].items()
        if not torch.equal(value, other["tensors"][name])
    }
    if not torch.equal(one["random"], other["random"]):
        changed.add("random")
    if not all(map(torch.equal, one["gradients"], other["gradients"])):
        changed.add("gradients")
    return changed


STATISTICS = {
    f"{layer}.{name}"
    for layer in ("norm", "second")
    for name in ("running_mean", "running_var", "num_batches_tracked")
}


def moments(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean over batches of their means and of their unbiased variances, a channel each."""
    means = torch.stack([value.mean(dim=(0, 2, 3)) for value in values])
    variances = torch.stack([value.transpose(0, 1).flatten(1).var(dim=1) for value in values])
    return means.mean(dim=0), variances.mean(dim=0)


@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_the_mean_over_the_batches_by_hand(training: bool) -> None:
    network = trained().train(training)
    batches = [images(5, 1), images(8, 2), images(3, 3)]
    before = state_of(network)
    recalibrate(network, [(batch, "label") for batch in batches])
    with torch.no_grad():
        hidden = [network.conv(batch) for batch in batches]
        mean, variance = moments(hidden)
        torch.testing.assert_close(network.norm.running_mean, mean)
        torch.testing.assert_close(network.norm.running_var, variance)
        # What follows sees batches normalised by their own statistics.
        inner = [
            torch.batch_norm(
                h, network.norm.weight, network.norm.bias, None, None, True, 0.0, 1e-5, False
            ).relu()
            for h in hidden
        ]
        torch.testing.assert_close(network.second.running_mean, moments(inner)[0])
        torch.testing.assert_close(network.second.running_var, moments(inner)[1])
    assert int(network.norm.num_batches_tracked) == 3
    assert differences(before, state_of(network)) == STATISTICS


def test_tensors_stay_the_same_objects() -> None:
    network = trained()
    places = [(id(t), t.data_ptr()) for t in (*network.parameters(), *network.buffers())]
    recalibrate(network, [images(5, 1)])
    assert [(id(t), t.data_ptr()) for t in (*network.parameters(), *network.buffers())] == places


def test_averaged_weights_as_torch_does_it() -> None:
    network = trained()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
        average.update_parameters(network)
    batches = [images(6, seed) for seed in range(4)]
    recalibrate(average, batches)
    ours = [buffer.clone() for buffer in average.module.norm.buffers()]
    torch.optim.swa_utils.update_bn(batches, average)
    assert all(map(torch.equal, ours, average.module.norm.buffers()))


class Stubborn(Network):
    """Keeps one of its layers in evaluation mode, as many a fine-tuning does."""

    def train(self, mode: bool = True) -> Stubborn:
        super().train(mode)
        self.norm.eval()
        return self


@pytest.mark.parametrize("by", ["train()", "frozen"])
@pytest.mark.parametrize("training", [True, False])
def test_layers_frozen_in_training_keep_and_use_their_statistics(by: str, training: bool) -> None:
    network = Stubborn() if by == "train()" else Network()
    network(images(5, 0)).sum().backward()
    network.norm.running_mean += 1.0
    network.train(training)
    before = state_of(network)
    batches = [images(5, 1), images(8, 2)]
    recalibrate(network, batches, frozen=() if by == "train()" else [network.norm])
    assert differences(before, state_of(network)) == {n for n in STATISTICS if "second" in n}
    with torch.no_grad():
        network.norm.eval()
        inner = [network.norm(network.conv(batch)).relu() for batch in batches]
    torch.testing.assert_close(network.second.running_mean, moments(inner)[0])
    torch.testing.assert_close(network.second.running_var, moments(inner)[1])


def test_where_all_layers_are_frozen_no_batch_is_taken() -> None:
    network = trained()
    before, batches = state_of(network), iter([images(5, 1)])
    recalibrate(network, batches, frozen=[network.norm, network.second])
    assert differences(before, state_of(network)) == set()
    assert len(list(batches)) == 1


def test_statistics_are_read_and_written_by_cleaned_name() -> None:
    network, other = trained(), trained()
    recalibrate(network, [images(5, 7)])
    found = {name: value.clone() for name, value in running_statistics(network).items()}
    assert found.keys() == STATISTICS
    compiled = torch.compile(other, backend="eager")
    assert running_statistics(compiled).keys() == STATISTICS
    places = [buffer.data_ptr() for buffer in other.buffers()]
    load_statistics(compiled, found)
    assert [buffer.data_ptr() for buffer in other.buffers()] == places
    assert all(torch.equal(found[n], value) for n, value in running_statistics(other).items())
    assert running_statistics(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"norm.running_mean": torch.zeros(5)}, ("'norm.running_mean'", "(5,)", "(4,)")),
        ({"third.running_mean": torch.zeros(4)}, ("'third.running_mean'", "(4,)", "None")),
        ({"norm.running_var": None}, ("'norm.running_var'", "None", "(4,)")),
    ],
)
def test_statistics_of_another_model_are_refused(change: Any, parts: tuple[str, ...]) -> None:
    network = trained()
    values = {name: value + 1 for name, value in running_statistics(network).items()}
    values = {n: v for n, v in {**values, **change}.items() if v is not None}
    before = state_of(network)
    with pytest.raises(StateMismatch) as caught:
        load_statistics(network, values)
    assert_one_sentence(caught.value, *parts)
    assert differences(before, state_of(network)) == set()


def test_recalibrated_puts_everything_back() -> None:
    network = trained()
    before = state_of(network)
    with recalibrated(network, [images(5, 1), images(5, 2)]):
        assert differences(before, state_of(network)) == STATISTICS
    assert differences(before, state_of(network)) == set()


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_an_error_in_the_batches_changes_nothing(fails_at: int) -> None:
    def batches() -> Iterator[Tensor]:
        for number in range(3):
            if number == fails_at:
                raise Oops
            yield images(5, number)

    network = trained()
    before = state_of(network)
    with pytest.raises(Oops):
        recalibrate(network, batches())
    with pytest.raises(Oops), recalibrated(network, batches()):
        pytest.fail("the body must not run")
    assert differences(before, state_of(network)) == set()


def test_an_error_in_the_body_changes_nothing() -> None:
    network = trained()
    before = state_of(network)
    with pytest.raises(Oops), recalibrated(network, [images(5, 1)]):
        raise Oops
    assert differences(before, state_of(network)) == set()


@pytest.mark.parametrize("batches", [None, [], iter(()), [{"x": 1}], [()], ["text"]])
def test_no_batch_or_none_that_is_a_tensor(batches: Any) -> None:
    network = trained()
    before = state_of(network)
    with pytest.raises(InputError, match="recalibrate"):
        recalibrate(network, batches)
    assert differences(before, state_of(network)) == set()


def test_without_batch_norm_no_batch_is_taken() -> None:
    batches = iter([images(5, 1)])
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    recalibrate(network, batches)
    recalibrate(network, None)
    assert len(list(batches)) == 1
