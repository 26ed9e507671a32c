"""Embedded weights of a network in training: written, tied, and continued after a stop."""

from __future__ import annotations

from pathlib import Path
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
    momentum_sgd,
    on_the_line,
    same_state,
    same_tensors,
    snapshot,
    train_step,
    walks,
)
from torch import Tensor

from cmd_plugin.errors import NonFiniteError, PluginError, ShapeError, StateMismatch
from cmd_plugin.modes import Embedding, Layout, OnlineModes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_projection_writes_the_embedded_weights_alone(dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    modes = embedding_run(net, buffers="keep")
    embedded = modes.embedded
    assert 0.2 < modes.embedded_fraction < 0.9
    train_step(net, momentum_sgd(net), 99)
    before, kept = flat_weights(net, modes), snapshot(net)
    assert modes.project() == int(embedded.sum())
    after = flat_weights(net, modes)
    assert torch.equal(after[~embedded], before[~embedded])
    assert torch.equal(after[embedded], on_the_line(modes, before)[embedded])
    assert not torch.equal(after[embedded], before[embedded])
    others = [n for n in kept if n not in modes.layout.names]
    assert others
    assert same_tensors({n: kept[n] for n in others}, {n: net.state_dict()[n] for n in others})
    modes.project()
    assert torch.equal(flat_weights(net, modes), after)  # once more changes nothing


def test_values_change_in_place() -> None:
    net = Net()
    modes = embedding_run(net)
    places = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in net.named_parameters()}
    train_step(net, momentum_sgd(net), 99)
    modes.project()
    after = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in net.named_parameters()}
    assert after == places


@pytest.mark.parametrize("kind", ["state_dict", "vector", "model"])
def test_any_source_is_written(kind: str) -> None:
    net, other = Net(), Net(seed=4)
    modes = embedding_run(net)
    before = flat_weights(other, modes)
    expected = torch.where(modes.embedded, on_the_line(modes, before), before)
    for variance in modes.layout.variances():
        expected[variance].clamp_(min=0.0)
    kept = snapshot(net)
    if kind == "vector":
        modes.project(before)
        assert torch.equal(before, expected)
    else:
        modes.project(other if kind == "model" else other.state_dict())
        assert torch.equal(flat_weights(other, modes), expected)
    assert same_tensors(kept, snapshot(net))


def test_given_profiles_are_used() -> None:
    net = Net()
    modes = embedding_run(net, buffers="keep")
    before, values = flat_weights(net, modes), torch.tensor([0.5, -1.0, 2.0])
    modes.project(profile=values)
    expected = modes.scale * values[modes.assignment.long()] + modes.offset
    assert torch.equal(flat_weights(net, modes), torch.where(modes.embedded, expected, before))
    with pytest.raises(ShapeError, match=r"\[3\], one value a mode"):
        modes.project(profile=values[:2])


def test_no_variance_goes_negative() -> None:
    net = Net()
    modes = embedding_run(net, epochs=40)
    at = modes.layout.variances()[0]
    embedded = modes.embedded[at]
    assert embedded.any()
    values = torch.full((3,), -1e4)
    modes.project(profile=values)
    model = modes.scale * values[modes.assignment.long()] + modes.offset
    expected = model[at].clamp(min=0.0)
    assert (model[at][embedded] < 0).any()
    assert torch.equal(net.norm.running_var[embedded], expected[embedded])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_references_do_not_spread(bad: float) -> None:
    row = walks(30, 100).float()
    modes = follow(row, **OPTIONS, embedding=Embedding(3, 20))
    weights = row[-1].clone()
    weights[modes.references[1]] = bad
    before = weights.clone()
    with pytest.raises(NonFiniteError) as caught:
        modes.project(weights)
    assert_one_sentence(caught.value, "reference weight is NaN or infinite")
    assert torch.equal(weights.nan_to_num(7.0), before.nan_to_num(7.0))


def test_mean_profiles_follow_all_samples() -> None:
    net = Net()
    modes = embedding_run(net, profile="mean", buffers="keep")
    choice, before = modes.tracker.choice, flat_weights(net, modes)
    assert not modes.embedded[choice.members].any()
    modes.project()
    values = choice.profile(before[choice.members].double()).float()
    expected = modes.scale * values[modes.assignment.long()] + modes.offset
    assert torch.equal(flat_weights(net, modes), torch.where(modes.embedded, expected, before))


def test_swap_shows_frozen_weights_and_gives_the_raw_ones_back() -> None:
    net = Net()
    modes = embedding_run(net)
    train_step(net, momentum_sgd(net), 99)
    before = snapshot(net)
    with modes.swap():
        inside = flat_weights(net, modes)
        with pytest.raises(PluginError, match=r"project\(\) inside swap\(\)"):
            modes.project()
    assert torch.equal(inside, modes.reconstruct())
    at = modes.embedded
    for variance in modes.layout.variances():
        at[variance] = False
    profile = modes.tracker.profile.float()[modes.assignment.long()]
    assert torch.equal(inside[at], (modes.scale * profile + modes.offset)[at])
    assert same_tensors(snapshot(net), before)


def test_half_precision_weights_get_rounded_values() -> None:
    net = Net().to(torch.bfloat16)
    with torch.no_grad():
        for p in net.parameters():  # movements that bfloat16 can show
            p.mul_(0.1)
    modes = embedding_run(net, epochs=14, buffers="keep")
    assert modes.embedded.any()
    before = flat_weights(net, modes)
    modes.project()
    expected = on_the_line(modes, before.float()).bfloat16()
    assert torch.equal(flat_weights(net, modes), torch.where(modes.embedded, expected, before))


# -- optimizer slots -----------------------------------------------------------------------------


@pytest.mark.parametrize("slots", ["leave", "zero"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_slots_of_embedded_weights(slots: Any, kind: str) -> None:
    net = Net()
    modes = embedding_run(net, embedding=Embedding(3, 20, slots=slots))
    optimizer = momentum_sgd(net) if kind == "sgd" else torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(3):
        train_step(net, optimizer, step)
    before = {
        p: {k: v.clone() for k, v in state.items() if isinstance(v, Tensor)}
        for p, state in optimizer.state.items()
    }
    assert modes.project(optimizers=[optimizer]) == int(modes.embedded.sum())
    masks = modes.layout.split(modes.embedded)
    zeroed = 0
    for name, p in net.named_parameters():
        for key, value in optimizer.state[p].items():
            if not isinstance(value, Tensor):
                continue
            old = before[p][key]
            if key == "step" or slots == "leave":
                assert torch.equal(value, old)
                continue
            assert torch.equal(value, torch.where(masks[name], 0.0, old))
            zeroed += int(masks[name].sum())
    slots_a_weight = 1 if kind == "sgd" else 2
    parameters = sum(int(masks[name].sum()) for name, _ in net.named_parameters())
    assert zeroed == (slots_a_weight * parameters if slots == "zero" else 0)


# -- resume is exact -------------------------------------------------------------------------------

# Snapshots 0 to 4 are the warm-up; events are at 6, 9 and 12, after the update of that number.
VARIANTS: dict[str, dict[str, Any]] = {
    "absolute": {"embedding": Embedding(3, 20)},
    "relative": {"embedding": Embedding(3, 20, relative=True, project="step")},
    "mean": {"embedding": Embedding(3, 20), "profile": "mean", "shrink": True},
    "pool": {"embedding": Embedding(3, 20, project="pool"), "buffers": "keep"},
}


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("stop", [0, 3, 5, 6, 7, 8, 10])
def test_stop_and_continue_anywhere(variant: str, stop: int, tmp_path: Path) -> None:
    options = {**OPTIONS, **VARIANTS[variant]}
    results = []
    for interrupted in (False, True):
        net = Net()
        net.train()
        optimizer = momentum_sgd(net)
        modes = OnlineModes(net, **options)
        for epoch in range(14):
            if interrupted and epoch == stop:
                saved = {"net": net.state_dict(), "modes": modes.state_dict()}
                torch.save({**saved, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
                state = torch.load(tmp_path / "state.pt", weights_only=True)
                assert same_state(state["modes"], modes.state_dict())
                net = Net(seed=9)  # another process, another network object
                net.train()
                net.load_state_dict(state["net"])
                optimizer = momentum_sgd(net)
                optimizer.load_state_dict(state["optimizer"])
                modes = OnlineModes(net, **options)
                modes.load_state_dict(state["modes"])
                assert same_state(modes.state_dict(), state["modes"])
            torch.manual_seed(epoch)
            train_step(net, optimizer, epoch)
            modes.project(optimizers=[optimizer])
            modes.update()
        results.append((snapshot(net), modes))
    (weights, whole), (other_weights, parts) = results
    assert whole.embedded_fraction > 0.3
    assert same_tensors(weights, other_weights)
    assert same_state(whole.state_dict(), parts.state_dict())
    assert torch.equal(whole.embedded, parts.embedded)
    assert torch.equal(whole.reconstruct(), parts.reconstruct())
    for name in ("saved_percent", "volume_percent", "volume_bytes", "state_bytes"):
        assert getattr(whole, name) == getattr(parts, name), name


@pytest.mark.parametrize(
    "other", [None, Embedding(4, 20), Embedding(3, 20, project="step"), Embedding(3, 21)]
)
def test_another_schedule_is_refused(other: Embedding | None) -> None:
    state = embedding_run(Net()).state_dict()
    modes = OnlineModes(Net(), **OPTIONS, embedding=other)
    before = modes.state_dict()
    with pytest.raises(StateMismatch) as caught:
        modes.load_state_dict(state)
    assert_one_sentence(caught.value, "embedding=", "use the same value to continue")
    assert same_state(modes.state_dict(), before)


def test_a_state_of_before_embedding_existed_still_loads() -> None:
    rows = walks(12, 50).float()
    state = follow(rows, **OPTIONS).state_dict()
    del state["embedder"], state["config"]["embedding"]
    modes = OnlineModes(Layout.of_vector(50), **OPTIONS)
    modes.load_state_dict(state)
    assert torch.equal(modes.reconstruct(), follow(rows, **OPTIONS).reconstruct())


def test_broadcast_gives_everyone_the_same_projection() -> None:
    rows = walks(20, 100).float()
    options = {**OPTIONS, "embedding": Embedding(3, 20)}
    leader = OnlineModes(Layout.of_vector(100), **options)
    sent: list[Tensor] = []
    follower = OnlineModes(Layout.of_vector(100), **options, broadcast=lambda _: sent[-1])
    for row in rows:
        index = leader.references if leader.ready else leader.samples
        sent.append(row[index].double())
        leader.update(row)
        follower.update(row)
    mine, theirs = rows[-1].clone(), rows[-1].clone()
    theirs[leader.references] += 1.0  # a process whose buffers differ
    leader.project(mine)
    sent.append(rows[-1][leader.references].double())
    follower.project(theirs)
    at = leader.embedded
    assert at.any()
    assert torch.equal(mine[at], theirs[at])
