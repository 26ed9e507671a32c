"""A network that was measured is the network it was: every way a pass can change one is tried."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmd_plugin.networks import kept_buffers, undisturbed


class Oops(Exception):
    pass


class Touchy(nn.Module):
    """Changes all that a forward pass can change: statistics, counters, the random stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.instance = nn.InstanceNorm1d(4, track_running_stats=True)
        self.drop = nn.Dropout(0.5)
        self.still = nn.Dropout(0.5).eval()  # a mixed state must come back as it was
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("trace", torch.zeros(4))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.trace = self.trace + x.detach().mean(0)  # another tensor, not another value
        x = self.instance(self.norm(x)[:, :, None].expand(-1, -1, 2)).mean(2)
        return self.linear(self.still(self.drop(x + torch.randn_like(x))))


def prepared() -> Touchy:
    network = Touchy()
    network(torch.randn(6, 4)).sum().backward()
    return network


def all_of(network: nn.Module) -> dict[str, Any]:
    """Values and identities of everything."""
    return {
        "flags": [module.training for module in network.modules()],
        "state": {name: value.clone() for name, value in network.state_dict().items()},
        "tensors": [id(t) for t in (*network.parameters(), *network.buffers())],
        "gradients": [(id(p.grad), p.grad.clone()) for p in network.parameters()],
        "hooks": [len(module._forward_hooks) for module in network.modules()],
        "random": torch.get_rng_state(),
        "others": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("evaluation", [False, True])
def test_everything_comes_back(evaluation: bool, gradients: bool, fails: bool) -> None:
    network = prepared()
    before = all_of(network)
    try:
        with undisturbed(network, evaluation=evaluation, gradients=gradients) as inside:
            assert torch.is_grad_enabled() is gradients
            assert network.training is not evaluation
            assert network.drop.training is not evaluation
            assert not network.still.training
            inside.hooks.append(network.linear.register_forward_hook(lambda *_: None))
            output = network(torch.randn(6, 4))
            assert output.requires_grad is gradients
            if gradients:
                assert network.linear.weight.grad is None
                output.sum().backward()
                assert network.linear.weight.grad is not None
            network.train()
            network(torch.randn(6, 4))
            assert not same(before, all_of(network) if gradients else {})
            if fails:
                raise Oops
    except Oops:
        assert fails
    assert same(before, all_of(network))


def test_gradients_that_were_not_there_are_not_there_afterwards() -> None:
    network = nn.Linear(3, 2)
    with undisturbed(network, gradients=True):
        network(torch.randn(4, 3)).sum().backward()
        assert network.weight.grad is not None
    assert network.weight.grad is None


def test_training_goes_on_as_if_nothing_had_been_measured() -> None:
    def weights(measured: bool) -> list[Tensor]:
        torch.manual_seed(1)
        network = Touchy()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            network(torch.randn(6, 4)).square().sum().backward()
            if measured:
                with undisturbed(network, gradients=True):
                    network(torch.randn(9, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [*network.parameters(), *network.buffers()]

    assert all(map(torch.equal, weights(False), weights(True)))


def test_only_what_is_asked_for_is_kept() -> None:
    network = prepared()
    calls, state = int(network.calls), torch.get_rng_state()
    with undisturbed(network, buffers=False, random=False):
        network(torch.randn(6, 4))
    assert int(network.calls) == calls + 1
    assert not torch.equal(state, torch.get_rng_state())


def test_several_networks_and_modules_they_share() -> None:
    shared = nn.Dropout(0.5)
    one, other = nn.Sequential(shared), nn.Sequential(shared, nn.BatchNorm1d(3)).eval()
    shared.train()
    before = copy.deepcopy(other.state_dict())
    with undisturbed(one, other):
        assert not one.training
        assert not shared.training
        other.train()(torch.randn(5, 3))
    assert [one.training, shared.training, other.training, other[1].training] == [
        *(True, True),
        *(False, False),
    ]
    assert same(dict(before), dict(other.state_dict()))


def test_without_a_network_the_random_stream_alone_is_kept() -> None:
    state = torch.get_rng_state()
    with undisturbed():
        torch.randn(3)
    assert torch.equal(state, torch.get_rng_state())


class Merging(nn.Linear):
    """Adds a low-rank part to its weight for evaluation, and takes it off again, as adapters do."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.part, self.alone = torch.ones(3, 3), self.weight.detach().clone()

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        with torch.no_grad():
            self.weight.copy_(self.alone if mode else self.alone + self.part)
        return self


def test_what_eval_made_a_network_do_is_undone_by_its_own_train() -> None:
    network = nn.Sequential(Merging())
    weight = network[0].weight.detach().clone()
    with undisturbed(network):
        assert not torch.equal(network[0].weight, weight)
    assert torch.equal(network[0].weight, weight)
    assert network[0].training


@pytest.mark.parametrize("refused", [False, True])
def test_a_train_that_raises_loses_nothing_else(refused: bool) -> None:
    class Stubborn(Touchy):
        def train(self, mode: bool = True) -> Stubborn:
            if mode is refused:
                raise Oops
            return super().train(mode)  # type: ignore[return-value]

    network = Stubborn()
    network(torch.randn(6, 4)).sum().backward()
    before = all_of(network)
    with pytest.raises(Oops), undisturbed(network):
        network(torch.randn(6, 4))
    assert same(before, all_of(network))


def test_one_context_serves_again() -> None:
    network = prepared()
    before, context = all_of(network), undisturbed(network)
    for _ in range(2):
        with context as inside:
            inside.hooks.append(network.linear.register_forward_hook(lambda *_: None))
            network(torch.randn(6, 4))
        assert same(before, all_of(network))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_other_gradient_modes(mode: Any) -> None:
    network = prepared()
    before = all_of(network)
    with mode(), undisturbed(network):
        network(torch.randn(6, 4))
    assert same(before, all_of(network))
    network(torch.randn(6, 4)).sum().backward()  # no tensor of inference mode is left behind


def test_kept_buffers_are_those_of_the_modules_given() -> None:
    network = prepared()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with kept_buffers([network.norm]):
        network(torch.randn(6, 4))
    after = network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"calls", "trace", "instance.running_mean", "instance.running_var"}


def test_kept_values_go_where_a_network_was_converted_to() -> None:
    network = nn.BatchNorm1d(3)
    network.running_mean.fill_(0.5)
    with kept_buffers([network]):
        network(torch.randn(8, 3))
        network.double()
    assert network.running_mean.dtype == torch.float64
    assert network.running_mean.tolist() == [0.5] * 3


@pytest.mark.compile
def test_compiled_networks_run_uncompiled_when_asked_to() -> None:
    seen: list[bool] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(torch.compiler.is_compiling())
        return x + 1

    compiled = torch.compile(forward, backend="eager")
    compiled(torch.zeros(2))
    seen.clear()
    with undisturbed(eager=True):
        assert compiled(torch.zeros(2)).tolist() == [1.0, 1.0]
    assert seen == [False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("said", [False, True])
def test_the_random_stream_of_the_device_comes_back(said: bool) -> None:
    device = torch.device("cuda")
    network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).to(device)
    state = torch.cuda.get_rng_state(device)
    with undisturbed(network, evaluation=False, device=device if said else None):
        network(torch.randn(6, 4, device=device))
    assert torch.equal(state, torch.cuda.get_rng_state(device))
