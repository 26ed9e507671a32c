"""Tied gradients: the chain rule of embedded weights, against finite differences and autograd."""

from __future__ import annotations

import pytest
import torch
from mode_toys import EMBEDDING_OPTIONS as OPTIONS
from mode_toys import (
    Net,
    assert_one_sentence,
    embedding_run,
    flat_weights,
    follow,
    images,
    walks,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cmd_plugin.errors import InputError, PluginError
from cmd_plugin.modes import Embedding, OnlineModes


def loss_of(net: nn.Module) -> Tensor:
    labels = torch.arange(16) % 5
    return cross_entropy(net(images().double()), labels)


@pytest.mark.parametrize("profile", ["reference", "mean"])
def test_tied_gradients_equal_finite_differences(profile: str) -> None:
    net = Net().double()
    net.drop.p = 0.0
    modes = embedding_run(
        net, buffers="keep", profile=profile, embedding=Embedding(3, 20, project="tie")
    )
    net.eval()
    modes.project()
    weights, embedded = flat_weights(net, modes), modes.embedded
    net.zero_grad()
    loss_of(net).backward()
    plain = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
    modes.tie_gradients()
    tied = torch.cat([p.grad.reshape(-1) for p in net.parameters()])

    def loss_at(position: int, step: float) -> float:
        moved = weights.clone()
        moved[position] += step
        modes.project(moved)  # what depends on this weight follows it
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(moved, net.parameters())
            return float(loss_of(net))

    assert not tied[embedded].any()
    members = modes.tracker.choice.members
    others = (~embedded).clone()
    others[members] = False
    assert torch.equal(tied[others], plain[others])
    for position in members[:8].tolist():
        step = 1e-5
        slope = (loss_at(position, step) - loss_at(position, -step)) / (2 * step)
        assert float(tied[position]) == pytest.approx(slope, rel=1e-6, abs=1e-8)
    assert (tied[members] != plain[members]).any()


def test_tied_gradients_take_many_calls() -> None:
    """Gradients that are accumulated over calls: folding is linear."""
    net = Net().double()
    net.drop.p = 0.0
    modes = embedding_run(net, buffers="keep", embedding=Embedding(3, 20, project="tie"))
    net.eval()
    results = []
    for calls in (1, 2):
        net.zero_grad()
        for call in range(2):
            (loss_of(net) * (call + 1)).backward()
            if calls == 2 or call == 1:
                modes.tie_gradients()
        results.append(torch.cat([p.grad.reshape(-1) for p in net.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_an_optimizer_moves_its_own_weights_only() -> None:
    net = Net().double()
    modes = embedding_run(net, buffers="keep", embedding=Embedding(3, 20, project="tie"))
    head = torch.optim.SGD(net.fc.parameters(), lr=0.1)
    loss_of(net).backward()
    before = {name: p.grad.clone() for name, p in net.named_parameters()}
    modes.tie_gradients(head)
    after = {name: p.grad.clone() for name, p in net.named_parameters()}
    for name in before:
        assert torch.equal(before[name], after[name]) == (not name.startswith("fc"))


def test_a_reference_without_a_gradient_gets_one() -> None:
    net = Net().double()
    modes = embedding_run(net, buffers="keep", embedding=Embedding(3, 20, project="tie"))
    position = int(modes.references[0])
    name, inside = modes.layout.locate(position)
    parameters = dict(net.named_parameters())
    other = next(
        n
        for n, mask in modes.layout.split(modes.embedded & (modes.assignment == 0)).items()
        if n != name and mask.any()
    )
    net.zero_grad()
    parameters[other].grad = torch.ones_like(parameters[other])
    modes.tie_gradients()
    mask = (modes.embedded & (modes.assignment == 0)).double()
    expected = modes.layout.split(mask * modes.scale)[other].sum()
    gradient = parameters[name].grad
    assert gradient is not None
    assert float(gradient.reshape(-1)[inside]) == pytest.approx(float(expected), rel=1e-12)
    untouched = set(parameters) - {other} - {modes.layout.locate(r)[0] for r in modes.references}
    assert all(parameters[n].grad is None for n in untouched)


def test_strided_gradients() -> None:
    nets = [Net().double() for _ in range(2)]
    results = []
    for net, memory in zip(nets, (torch.contiguous_format, torch.channels_last), strict=True):
        modes = embedding_run(net, buffers="keep", embedding=Embedding(3, 20, project="tie"))
        loss_of(net.train()).backward()
        net.conv.weight.grad = net.conv.weight.grad.contiguous(memory_format=memory)
        modes.tie_gradients()
        results.append(torch.cat([p.grad.reshape(-1) for p in net.parameters()]))
    assert torch.equal(*results)


def test_sparse_gradients_are_refused() -> None:
    net = nn.Sequential(nn.Embedding(20, 3), nn.Linear(3, 2)).double()
    modes = OnlineModes(net, **OPTIONS, embedding=Embedding(3, 50, project="tie"))
    rows = walks(12, modes.numel)
    for row in rows:
        torch.nn.utils.vector_to_parameters(row, net.parameters())
        modes.update()
    net[0].weight.grad = torch.zeros(20, 3).double().to_sparse()
    with pytest.raises(InputError) as caught:
        modes.tie_gradients()
    assert_one_sentence(caught.value, "'0.weight'", "sparse")


def test_tied_training_is_training_of_the_free_weights() -> None:
    """Two steps of plain SGD on the free weights, written out with autograd through a r + b."""
    net, twin = Net().double(), Net().double()
    net.drop.p = twin.drop.p = 0.0
    modes = embedding_run(net, buffers="keep", embedding=Embedding(3, 20, project="tie"))
    net.eval()
    modes.project()
    start, embedded = flat_weights(net, modes), modes.embedded
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(net).backward()
        modes.tie_gradients(optimizer)
        optimizer.step()
        modes.project()

    twin.load_state_dict(net.state_dict())
    twin.eval()
    free = start.clone().requires_grad_()
    scale, offset, mode = modes.scale, modes.offset, modes.assignment.long()
    for _ in range(2):
        whole = torch.where(embedded, scale * free[modes.references][mode] + offset, free)
        names = [name for name, _ in twin.named_parameters()]
        parts = modes.layout.split(whole)
        outputs = torch.func.functional_call(twin, {n: parts[n] for n in names}, images().double())
        loss = cross_entropy(outputs, torch.arange(16) % 5)
        (gradient,) = torch.autograd.grad(loss, free)
        free = (free - 0.05 * gradient * ~embedded).detach().requires_grad_()
    whole = torch.where(embedded, scale * free[modes.references][mode] + offset, free)
    torch.testing.assert_close(flat_weights(net, modes), whole.detach(), rtol=1e-10, atol=1e-12)


def test_tie_needs_gradients() -> None:
    with pytest.raises(InputError) as caught:
        OnlineModes(Net(), buffers="model", embedding=Embedding(project="tie"))
    assert_one_sentence(caught.value, "'norm.running_mean'", "buffers='keep'")
    OnlineModes(nn.Linear(3, 3), embedding=Embedding(project="tie"))


def test_tie_needs_a_model() -> None:
    modes = follow(walks(20, 50), **OPTIONS, embedding=Embedding(3, 20, project="tie"))
    with pytest.raises(PluginError, match="no model"):
        modes.tie_gradients()
