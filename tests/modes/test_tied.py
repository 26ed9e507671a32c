"""Tied weights in training: the chain rule, the pooled step, and each optimizer its own."""

from __future__ import annotations

import copy
from typing import Any

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
    momentum_sgd,
    on_the_line,
    snapshot,
    train_step,
    walks,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cmd_plugin.errors import InputError, NonFiniteError, PluginError
from cmd_plugin.kernels import FlatView
from cmd_plugin.modes import Embedding, Layout, OnlineModes
from cmd_plugin.modes.choice import ModeChoice
from cmd_plugin.modes.tied import TiedWeights, moved_by


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


def test_a_sparse_gradient_is_found_before_any_is_changed() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Embedding(20, 3)).double()
    modes = OnlineModes(net, **OPTIONS, embedding=Embedding(3, 50, project="tie"))
    for row in walks(12, modes.numel):
        torch.nn.utils.vector_to_parameters(row, net.parameters())
        modes.update()
    net[0].weight.grad = torch.ones(2, 3).double()
    net[1].weight.grad = torch.zeros(20, 3).double().to_sparse()
    with pytest.raises(InputError, match="sparse"):
        modes.tie_gradients()
    assert bool((net[0].weight.grad == 1).all())


# -- the pooled step -------------------------------------------------------------------------------

POOL = Embedding(3, 20, project="pool")


def pooled_run(net: nn.Module, **options: Any) -> OnlineModes:
    return embedding_run(net, buffers="keep", embedding=POOL, **options)


def dense_fit(modes: OnlineModes, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """References and all weights nearest to ``wanted``, by one dense least-squares fit."""
    embedded, at = modes.embedded, modes.references
    curves = torch.zeros(modes.numel, len(at), dtype=torch.float64)
    curves[torch.arange(modes.numel), modes.assignment.long()] = modes.scale.double()
    curves[at] = torch.eye(len(at)).double()
    shift = torch.where(embedded, modes.offset.double(), 0.0)
    inside = embedded.clone()
    inside[at] = True
    best = torch.linalg.lstsq(curves[inside], (wanted.double() - shift)[inside][:, None]).solution
    fitted = (curves @ best)[:, 0] + shift
    return best[:, 0], torch.where(inside, fitted, wanted.double())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_pooled_step_is_the_least_squares_projection(kind: Any, dtype: torch.dtype) -> None:
    """Against a dense fit of what the optimizer alone would have done."""
    net = Net().to(dtype)
    net.drop.p = 0.0
    modes = pooled_run(net)
    modes.project()
    free = copy.deepcopy(net)
    train_step(free, kind(free.parameters(), lr=0.05), 99)
    alone = flat_weights(free, modes)
    best, fitted = dense_fit(modes, alone)
    optimizer = kind(net.parameters(), lr=0.05)
    train_step(net, optimizer, 99)
    assert modes.project(optimizers=[optimizer]) == int(modes.embedded.sum())
    found = flat_weights(net, modes)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found[modes.references].double(), best, **close)
    torch.testing.assert_close(found.double(), fitted, **close)
    others = ~modes.embedded
    others[modes.references] = False
    assert torch.equal(found[others], alone[others])
    # the step alone has put the references elsewhere
    assert (found - alone)[modes.references].abs().max() > 1e-4
    # members are where the references, as they are stored, say
    assert torch.equal(found[modes.embedded], on_the_line(modes, found)[modes.embedded])


def test_pooling_weights_on_their_curves_moves_nothing_but_roundings() -> None:
    net = Net().double()
    modes = pooled_run(net)
    modes.project()
    before = flat_weights(net, modes)
    modes.project()
    torch.testing.assert_close(flat_weights(net, modes), before, rtol=1e-13, atol=1e-14)


def test_pooled_references_in_half_precision_are_followed_as_stored() -> None:
    net = Net().to(torch.bfloat16)
    with torch.no_grad():
        for p in net.parameters():  # movements that bfloat16 can show
            p.mul_(0.1)
    modes = pooled_run(net)
    assert modes.embedded.any()
    train_step(net, momentum_sgd(net), 99)
    modes.project()
    found = flat_weights(net, modes)
    expected = on_the_line(modes, found.float()).bfloat16()
    assert torch.equal(found[modes.embedded], expected[modes.embedded])


@pytest.mark.parametrize("where", ["reference", "member"])
def test_a_step_that_is_not_finite_is_not_pooled(where: str) -> None:
    net = Net()
    modes = pooled_run(net)
    weights = flat_weights(net, modes)
    at = modes.references[0] if where == "reference" else modes.embedded.nonzero()[0, 0]
    weights[at] = float("nan")
    before = weights.clone()
    with pytest.raises(NonFiniteError):
        modes.project(weights)
    assert torch.equal(weights.nan_to_num(7.0), before.nan_to_num(7.0))


def test_given_profiles_are_not_pooled() -> None:
    net = Net()
    modes = pooled_run(net)
    before, values = flat_weights(net, modes), torch.tensor([0.5, -1.0, 2.0])
    modes.project(profile=values)
    expected = modes.scale * values[modes.assignment.long()] + modes.offset
    assert torch.equal(flat_weights(net, modes), torch.where(modes.embedded, expected, before))


def test_pooling_needs_references_that_an_optimizer_moves() -> None:
    with pytest.raises(InputError) as caught:
        OnlineModes(nn.Linear(3, 3), profile="mean", embedding=POOL)
    assert_one_sentence(caught.value, "project='pool'", "profile='reference'")
    with pytest.raises(InputError) as caught:
        OnlineModes(Net(), buffers="model", embedding=POOL)
    assert_one_sentence(caught.value, "project='pool'", "'norm.running_mean'", "buffers='keep'")
    OnlineModes(Net(), embedding=POOL)


def test_differences_are_fitted_without_offsets() -> None:
    layout, random = Layout.of_vector(40, torch.float64), torch.Generator().manual_seed(0)
    mode = torch.arange(40).remainder(2).to(torch.uint8)
    scale, offset, start, moved = (
        torch.randn(40, generator=random, dtype=torch.float64) for _ in range(4)
    )
    tied = TiedWeights(layout, ModeChoice.of_references(torch.tensor([4, 9])), mode, scale, offset)
    tied.add(torch.arange(40) < 30)
    assert tied.count == 28
    tied.write(FlatView([start]), start[[4, 9]])
    whole = tied.nearest(FlatView([start + moved]))
    step = tied.nearest(FlatView([moved]), differences=True)
    torch.testing.assert_close(start[[4, 9]] + step, whole, rtol=1e-12, atol=1e-12)
    tied.add(torch.arange(40) < 35)  # the equations are those of the larger set
    assert not torch.equal(tied.nearest(FlatView([moved]), differences=True), step)


# -- several optimizers ----------------------------------------------------------------------------


class Pair(nn.Module):
    """A generator and a critic, with batch statistics in both."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.maker = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 6))
            self.judge = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


def play(pair: Pair, modes: OnlineModes, optimizers: list[torch.optim.Optimizer], e: int) -> None:
    """One round: the generator's graph is older than the critic's step."""
    project = modes.settings.embedding.project
    made = pair.maker(torch.randn(16, 4, generator=torch.Generator().manual_seed(e)))
    for optimizer, loss in zip(
        optimizers,
        (
            lambda: pair.judge(made.detach()).mean() - pair.judge(made.detach() + 1).mean(),
            lambda: made.square().mean() - pair.judge(made).mean(),
        ),
        strict=True,
    ):
        optimizer.zero_grad()
        loss().backward()
        if project == "tie":
            modes.tie_gradients(optimizer)
        before = snapshot(pair)
        optimizer.step()
        modes.project(optimizers=[optimizer])
        own = "judge" if optimizer is optimizers[0] else "maker"
        for name, value in pair.state_dict().items():
            assert name.startswith(own) or torch.equal(value, before[name]), name
        if modes.embedded_fraction:
            weights, lines = flat_weights(pair, modes), None
            lines = modes.layout.split(on_the_line(modes, weights))
            masks = modes.layout.split(modes.embedded)
            for name, value in modes.layout.split(weights).items():
                if name.startswith(own) and not name.endswith("running_var"):
                    assert torch.equal(value[masks[name]], lines[name][masks[name]]), name


@pytest.mark.parametrize(
    ("project", "buffers"),
    [("step", "keep"), ("step", "model"), ("tie", "keep"), ("pool", "keep")],
)
def test_a_step_of_one_optimizer_writes_its_own_weights_alone(project: Any, buffers: str) -> None:
    """A GAN with one graph: torch would refuse, or be wrong, if the critic's step changed it."""
    pair = Pair()
    parts = (pair.judge, pair.maker)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.05) for part in parts]
    embedding = Embedding(3, 25, project=project)
    modes = OnlineModes(pair, 3, 4, 60, buffers=buffers, embedding=embedding)
    for epoch in range(14):
        play(pair, modes, optimizers, epoch)
        modes.project(optimizers=optimizers)
        modes.update()
    assert modes.embedded_fraction > 0.5
    masks = modes.layout.split(modes.embedded)
    for part in ("judge", "maker"):
        assert any(mask.any() for name, mask in masks.items() if name.startswith(part))


def test_what_a_step_moves() -> None:
    pair = Pair()
    layout = Layout.of_model(pair)
    tensors = [dict(pair.named_parameters()), dict(pair.named_buffers())]
    found = [{**tensors[0], **tensors[1]}[name] for name in layout.names]
    judge = torch.optim.SGD(pair.judge.parameters(), lr=0.1)
    maker = torch.optim.SGD(pair.maker.parameters(), lr=0.1)
    own = moved_by([judge], layout, found)
    assert own == [name.startswith("judge") for name in layout.names]
    assert any(name.endswith("running_var") for name in layout.names)
    assert moved_by([judge, maker], layout, found) is None
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    assert not any(moved_by([stranger], layout, found) or [True])


def test_a_pooled_step_of_one_optimizer_fits_its_own_weights() -> None:
    net = Net().double()
    modes = pooled_run(net)
    modes.project()
    head = torch.optim.SGD(net.fc.parameters(), lr=0.05)
    start = flat_weights(net, modes)
    train_step(net, head, 99)
    moved = flat_weights(net, modes)
    modes.project(optimizers=[head])
    found = flat_weights(net, modes)
    own = torch.cat(
        [
            torch.full((s,), n.startswith("fc"))
            for n, s in zip(modes.layout.names, modes.layout.sizes, strict=True)
        ]
    )
    assert torch.equal(found[~own], start[~own])
    for number, reference in enumerate(modes.references.tolist()):
        rows = (modes.embedded & own & (modes.assignment == number)).nonzero()[:, 0]
        if own[reference]:
            slopes = torch.cat([modes.scale[rows], torch.ones(1).double()])
            values = torch.cat([moved[rows] - modes.offset[rows], moved[[reference]]])
            best = float((slopes * values).sum() / slopes.square().sum())
            assert float(found[reference]) == pytest.approx(best, rel=1e-10)
        else:
            assert found[reference] == moved[reference]
        line = modes.scale[rows] * found[reference] + modes.offset[rows]
        assert torch.equal(found[rows], line)
