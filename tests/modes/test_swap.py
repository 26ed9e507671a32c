"""Modelled weights in a live network: passivity, and the way back whatever happens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from mode_toys import (
    Net,
    assert_one_sentence,
    fitted,
    images,
    same_state,
    same_tensors,
    sgd,
    snapshot,
    train_step,
)
from torch import Tensor, nn

from cmd_plugin.errors import InputError, PluginError
from cmd_plugin.modes import OnlineModes


class Oops(Exception):
    pass


def storages(model: nn.Module) -> list[tuple[int, int]]:
    tensors = [*model.parameters(), *model.buffers()]
    return [(id(tensor), tensor.data_ptr()) for tensor in tensors]


def run(observed: bool, buffers: str) -> tuple[list[float], dict[str, Tensor], Tensor]:
    """Losses, final weights and random stream of a run, with or without online CMD beside it."""
    torch.manual_seed(11)
    net = Net()
    optimizer = sgd(net)
    options: dict[str, Any] = {"modes": 3, "warmup": 3, "samples": 50, "buffers": buffers}
    modes = OnlineModes(net, **options) if observed else None
    losses = []
    for epoch in range(9):
        net.train()
        losses.append(train_step(net, optimizer, epoch))
        if modes is None:
            continue
        modes.update()
        with modes.swap(recalibrate=[images(8, 1), images(8, 2)]), torch.inference_mode():
            net.eval()
            net(images())
        net.train()
        modes.explained_variance()
        if modes.ready:
            modes.decomposition()
            modes.modelled_state_dict(recalibrate=[images(8, 1)])
            modes.load_state_dict(modes.state_dict())
    return losses, snapshot(net), torch.get_rng_state()


@pytest.mark.parametrize("buffers", ["model", "recalibrate", "keep"])
def test_training_does_not_notice(buffers: str) -> None:
    streams = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    plain, observed = run(False, buffers), run(True, buffers)
    assert plain[0] == observed[0]
    assert same_tensors(plain[1], observed[1])
    assert torch.equal(plain[2], observed[2])
    assert streams[0] == random.getstate()
    assert streams[1] == np.random.get_state()[1].tolist()  # noqa: NPY002


@pytest.mark.parametrize("buffers", ["model", "recalibrate", "keep"])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_raw_weights_return_bit_for_bit(buffers: str, fails: bool, mode: Any) -> None:
    net = Net()
    modes = fitted(net, buffers=buffers)
    raw, places = snapshot(net), storages(net)
    state = modes.state_dict()
    try:
        with mode(), modes.swap(recalibrate=[images()]) as shown:
            assert shown
            assert not torch.equal(net.fc.weight, raw["fc.weight"])
            assert storages(net) == places  # in place: no tensor is replaced
            net.train()  # as a careless evaluation would: BatchNorm takes statistics
            net(images(8, 3))
            if fails:
                raise Oops
    except Oops:
        assert fails
    assert same_tensors(snapshot(net), raw)
    assert storages(net) == places
    assert same_state(modes.state_dict(), state)
    modes.update()  # and it is not stuck


def test_shows_what_reconstruct_says() -> None:
    net = Net()
    modes = fitted(net)
    with modes.swap():
        parts = modes.layout.split(modes.reconstruct())
        for name, value in net.state_dict().items():
            if name in parts:
                assert torch.equal(value, parts[name])
    state = modes.modelled_state_dict()
    for name, part in parts.items():
        assert torch.equal(state[name], part)
    assert torch.equal(state["norm.num_batches_tracked"], net.norm.num_batches_tracked)
    assert state["fc.weight"].data_ptr() != net.fc.weight.data_ptr()


def test_enter_in_one_gradient_mode_and_leave_in_another() -> None:
    # Lightning enters before its validation loop and leaves after it.
    net = Net()
    modes = fitted(net)
    raw = snapshot(net)
    swap = modes.swap()
    with torch.inference_mode():
        assert swap.__enter__()
    net(images())
    swap.__exit__(None, None, None)
    assert same_tensors(snapshot(net), raw)
    net(images()).sum().backward()


def test_gradients_and_optimizer_state_are_left_alone() -> None:
    net = Net()
    modes = fitted(net)
    optimizer = sgd(net)
    train_step(net, optimizer, 50)
    momenta = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    with modes.swap():
        pass
    assert all(map(torch.equal, momenta, (s["momentum_buffer"] for s in optimizer.state.values())))
    assert all(
        map(torch.equal, gradients, (p.grad for p in net.parameters() if p.grad is not None))
    )
    assert all(p.requires_grad for p in net.parameters())


def test_before_the_fit_nothing_happens() -> None:
    net = Net()
    modes = OnlineModes(net, modes=3, warmup=4, buffers="model")
    modes.update()
    raw = snapshot(net)
    with modes.swap() as shown:
        assert shown is False
        assert same_tensors(snapshot(net), raw)
        modes.update()  # the weights are raw ones
        with modes.swap() as again:
            assert again is False
    assert modes.updates == 2


def test_nested_swaps_and_updates_inside_are_refused() -> None:
    net = Net()
    modes = fitted(net)
    raw = snapshot(net)
    with modes.swap():
        shown = snapshot(net)
        with pytest.raises(PluginError) as caught, modes.swap():
            pytest.fail("a swap inside a swap would keep modelled weights as raw ones")
        assert_one_sentence(caught.value, "swap()")
        for source in (None, net, net.state_dict()):
            with pytest.raises(PluginError) as caught:
                modes.update(source)
            assert_one_sentence(caught.value, "update() inside swap()")
        with pytest.raises(PluginError):
            modes.modelled_state_dict()
        assert same_tensors(snapshot(net), shown)
        assert modes.updates == 7
    assert same_tensors(snapshot(net), raw)


def test_into_another_network() -> None:
    net, other = Net(), Net(seed=3)
    modes = fitted(net)
    raw, theirs = snapshot(net), snapshot(other)
    with modes.swap(other):
        assert torch.equal(other.fc.weight.reshape(-1), modes.reconstruct()[49:369])
        assert same_tensors(snapshot(net), raw)
    assert same_tensors(snapshot(other), theirs)
    modes.update()
    assert torch.equal(modes.reconstruct()[modes.references], _raw(net, modes)[modes.references])


def _raw(net: nn.Module, modes: OnlineModes) -> Tensor:
    state = net.state_dict()
    return torch.cat([state[name].reshape(-1) for name in modes.layout.names])


# -- policies for BatchNorm's statistics ---------------------------------------------------------


def test_modelled_variances_are_never_negative() -> None:
    net = Net()
    modes = OnlineModes(net, modes=1, warmup=4, samples=60, buffers="model")
    for epoch in range(7):
        with torch.no_grad():
            net.fc.weight += 0.1 * (epoch - 1)
            # Falls to almost nothing, which a straight line undershoots.
            net.norm.running_var.fill_([1.0, 0.9, 0.5, 0.1, 0.05, 0.02, 1e-6][epoch])
        modes.update()
    at = modes.layout.variances()[0]
    line = modes.scale * modes.tracker.profile[modes.assignment.long()].float() + modes.offset
    assert (line[at] < 0).any(), "the test must reach below zero without the clamp"
    assert (modes.reconstruct() >= 0)[at].all()
    with modes.swap():
        assert (net.norm.running_var >= 0).all()
        net.eval()
        assert torch.isfinite(net(images())).all()
    assert (modes.modelled_state_dict()["norm.running_var"] >= 0).all()
    assert (modes.decomposition().reconstruct(-1)[at] >= 0).all()


def test_keep_leaves_the_statistics_of_the_raw_run() -> None:
    net = Net()
    modes = fitted(net, buffers="keep")
    raw = snapshot(net)
    with modes.swap():
        for name, buffer in net.named_buffers():
            assert torch.equal(buffer, raw[name])
    state = modes.modelled_state_dict()
    assert torch.equal(state["norm.running_mean"], raw["norm.running_mean"])


def test_recalibrate_estimates_statistics_for_the_modelled_weights() -> None:
    net = Net()
    modes = fitted(net, buffers="recalibrate")
    batches = [images(16, 1), images(16, 2)]
    with modes.swap(recalibrate=batches), torch.no_grad():
        hidden = torch.cat([net.conv(batch) for batch in batches])
        mean = hidden.mean(dim=(0, 2, 3))
        torch.testing.assert_close(net.norm.running_mean, mean)
        assert int(net.norm.num_batches_tracked) == 2
        shown = snapshot(net)
    state = modes.modelled_state_dict(recalibrate=[(batch, "label") for batch in batches])
    assert same_tensors(state, shown)


class Unusual(Net):
    """Momenta of its own, a part in eval mode, and a buffer that a forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm.momentum = 0.37
        self.second = nn.BatchNorm2d(4, momentum=None)
        self.instance = nn.InstanceNorm2d(4, track_running_stats=True)
        self.still = nn.BatchNorm2d(4, track_running_stats=False)
        self.register_buffer("calls", torch.zeros(()))
        self.fc.eval()

    def forward(self, batch: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.still(self.instance(self.second(self.norm(self.conv(batch)))))
        return self.fc(self.drop(hidden).flatten(1))


def settings_of(net: Unusual) -> dict[str, Any]:
    return {
        "momenta": [net.norm.momentum, net.second.momentum],
        "training": [module.training for module in net.modules()],
        "rng": torch.get_rng_state().tolist(),
        "calls": float(net.calls),
        "instance": net.instance.running_mean.tolist(),
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails_at", [None, 0, 1])
def test_recalibrate_restores_everything(training: bool, fails_at: int | None) -> None:
    net = Unusual()
    modes = fitted(net, buffers="recalibrate")
    net.train(training)
    net.fc.eval()
    raw, settings = snapshot(net), settings_of(net)

    def batches() -> Iterator[Tensor]:
        for number in range(3):
            if number == fails_at:
                raise Oops
            yield images(8, number)

    if fails_at is None:
        with modes.swap(recalibrate=batches()):
            assert settings_of(net) == settings
            assert not torch.equal(net.norm.running_mean, raw["norm.running_mean"])
    else:
        with pytest.raises(Oops), modes.swap(recalibrate=batches()):
            pytest.fail("the body must not run")
    assert settings_of(net) == settings
    assert same_tensors(snapshot(net), raw)
    modes.update()


def test_recalibrate_without_batches() -> None:
    net = Net()
    modes = fitted(net, buffers="recalibrate")
    raw = snapshot(net)
    spent = iter([images()])
    next(spent)
    for batches in (None, [], spent):
        with pytest.raises(InputError) as caught, modes.swap(recalibrate=batches):
            pytest.fail("the body must not run")
        assert_one_sentence(caught.value, "recalibrate")
        assert same_tensors(snapshot(net), raw)
    with pytest.raises(InputError):
        modes.modelled_state_dict()


def test_recalibrate_without_batchnorm_needs_no_batches() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    modes = OnlineModes(net, modes=2, warmup=3, buffers="recalibrate")
    for _ in range(5):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += torch.randn_like(parameter)
        modes.update()
    with modes.swap() as shown:
        assert shown
