"""A saved state continues bit for bit from any phase, or is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from mode_toys import (
    Net,
    assert_one_sentence,
    embedding_run,
    fitted,
    follow,
    same_state,
    sgd,
    train_step,
    walks,
)
from torch import nn

from cmd_plugin.errors import StateMismatch
from cmd_plugin.modes import Layout, OnlineModes

OPTIONS: dict[str, Any] = {"modes": 3, "warmup": 4, "samples": 60, "buffers": "model"}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "fp32 store": {"storage": "fp32"},
    "shrink": {"shrink": True},
    "forgetting": {"forgetting": 0.8},
    "mean profile": {"profile": "mean"},
    "keep": {"buffers": "keep"},
    "seed": {"seed": 5},
}


def through_file(state: Any, path: Path) -> Any:
    torch.save(state, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 6, 9])
def test_stop_and_continue_anywhere(variant: str, stop: int, tmp_path: Path) -> None:
    options = {**OPTIONS, **VARIANTS[variant]}
    net = Net()
    net.train()
    whole = OnlineModes(net, **options)
    optimizer = sgd(net)
    parts: OnlineModes | None = OnlineModes(net, **options)
    for epoch in range(11):
        if epoch == stop:
            assert parts is not None
            state = through_file(parts.state_dict(), tmp_path / "state.pt")
            assert same_state(state, parts.state_dict())
            parts = OnlineModes(Net(seed=9), **options)  # another process, another network object
            parts.load_state_dict(state)
            assert same_state(parts.state_dict(), state)
            assert parts.state_bytes == whole.state_bytes
            assert parts.ready == whole.ready
        train_step(net, optimizer, epoch)
        whole.update(label=2 * epoch)
        assert parts is not None
        parts.update(net, label=2 * epoch)
    assert parts is not None
    assert same_state(parts.state_dict(), whole.state_dict())
    assert torch.equal(parts.reconstruct(), whole.reconstruct())
    assert parts.explained_variance() == whole.explained_variance()
    one, other = whole.decomposition(), parts.decomposition()
    assert list(one.epochs) == list(other.epochs) == list(range(0, 22, 2))
    assert torch.equal(one.profiles, other.profiles)
    assert parts.updates == 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("stop", [2, 12])
def test_of_vectors(dtype: torch.dtype, stop: int, tmp_path: Path) -> None:
    rows = walks(16, 50).to(dtype)
    whole = follow(rows, **OPTIONS)
    state = through_file(follow(rows[:stop], **OPTIONS).state_dict(), tmp_path / "state.pt")
    parts = OnlineModes(Layout.of_vector(50, dtype), **OPTIONS)
    parts.load_state_dict(state)
    for row in rows[stop:]:
        parts.update(row)
    assert same_state(parts.state_dict(), whole.state_dict())


def test_a_thinned_history_continues(tmp_path: Path) -> None:
    rows = walks(1500, 20).float()
    options = {"modes": 2, "warmup": 3, "samples": 10}
    whole = follow(rows, **options)
    state = through_file(follow(rows[:1101], **options).state_dict(), tmp_path / "state.pt")
    parts = OnlineModes(Layout.of_vector(20), **options)
    parts.load_state_dict(state)
    for row in rows[1101:]:
        parts.update(row)
    assert same_state(parts.state_dict(), whole.state_dict())


def test_a_run_that_stood_still(tmp_path: Path) -> None:
    modes = OnlineModes(Layout.of_vector(20), modes=2, warmup=2)
    modes.update(torch.ones(20))
    modes.update(torch.ones(20))
    with pytest.warns(UserWarning, match="nothing is modelled"):
        modes.update(torch.ones(20))
    again = OnlineModes(Layout.of_vector(20), modes=2, warmup=2)
    again.load_state_dict(through_file(modes.state_dict(), tmp_path / "state.pt"))
    again.update(torch.zeros(20))  # does not begin a second warm-up
    assert not again.ready
    assert again.updates == 4
    assert again.state_bytes == 0


def test_the_state_is_a_copy() -> None:
    for epochs in (3, 7):
        net = Net()
        modes = fitted(net, epochs=epochs)
        state = modes.state_dict()
        kept = copy.deepcopy(state)
        train_step(net, sgd(net), 99)
        modes.update()
        assert same_state(state, kept)
        other = OnlineModes(Net(), **OPTIONS)
        other.load_state_dict(state)
        other.update(net)
        assert same_state(state, kept)


def test_the_state_holds_plain_things_only() -> None:
    def check(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            assert type(value) is torch.Tensor
            assert value.device.type == "cpu"
            assert not value.requires_grad
        elif isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            list(map(check, value.values()))
        elif isinstance(value, list):
            list(map(check, value))
        else:
            assert value is None or type(value) in (int, float, str, bool)

    for epochs in (0, 3, 7):
        check(fitted(epochs=epochs).state_dict())


def test_size_of_the_state() -> None:
    rows = walks(12, 20000).float()
    state = follow(rows, **OPTIONS).state_dict()
    assert len(pickle.dumps(state)) < 9.2 * 20000 + 20000


def test_samples_come_from_the_state() -> None:
    # The draw of another version of torch may differ; the stored rows belong to these samples.
    rows = walks(8, 200).float()
    state = follow(rows[:3], **OPTIONS).state_dict()
    parts = OnlineModes(Layout.of_vector(200), **OPTIONS)
    parts.samples = torch.arange(60)
    parts.load_state_dict(state)
    for row in rows[3:]:
        parts.update(row)
    assert torch.equal(parts.references, follow(rows, **OPTIONS).references)


def test_correlation_is_not_saved() -> None:
    modes = fitted()
    assert modes.correlation is not None
    other = OnlineModes(Net(), **OPTIONS)
    other.load_state_dict(modes.state_dict())
    assert other.correlation is None


def wider() -> nn.Module:
    net = Net()
    net.fc = nn.Linear(64, 6)
    return net


def renamed() -> nn.Module:
    net = Net()
    net.head = net.fc
    del net.fc
    return net


@pytest.mark.parametrize("epochs", [0, 3, 7])
@pytest.mark.parametrize(
    ("model", "options", "parts"),
    [
        (wider, {}, ("'fc.weight'", "(5, 64)", "(6, 64)")),
        (renamed, {}, ("'head.weight'",)),
        (lambda: Net().double(), {}, ("float32", "float64")),
        (lambda: nn.Linear(3, 3), {}, ("'weight'",)),
        (Net, {"modes": 4}, ("modes=3", "4")),
        (Net, {"warmup": 5}, ("warmup=4", "5")),
        (Net, {"samples": 61}, ("samples=60", "61")),
        (Net, {"seed": 1}, ("seed=0", "1")),
        (Net, {"storage": "fp32"}, ("storage='delta-bf16'", "'fp32'")),
        (Net, {"profile": "mean"}, ("profile='reference'", "'mean'")),
        (Net, {"shrink": True}, ("shrink=False", "True")),
        (Net, {"forgetting": 0.9}, ("forgetting=1.0", "0.9")),
        (Net, {"buffers": "keep"}, ("'norm.running_mean'",)),
        (Net, {"exclude": ["gain"]}, ("'gain'",)),
    ],
)
def test_another_model_or_configuration_is_refused(
    epochs: int, model: Any, options: dict[str, Any], parts: tuple[str, ...]
) -> None:
    state = fitted(epochs=epochs).state_dict()
    other = OnlineModes(model(), **{**OPTIONS, **options})
    before = other.state_dict()
    with pytest.raises(StateMismatch) as caught:
        other.load_state_dict(state)
    assert_one_sentence(caught.value, *parts)
    assert same_state(other.state_dict(), before)  # nothing is changed then


@pytest.mark.parametrize("state", [{}, {"version": 0}, {"version": 99}, {"version": None}])
def test_another_version_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(StateMismatch) as caught:
        OnlineModes(Net(), **OPTIONS).load_state_dict(state)
    assert_one_sentence(caught.value, "version", repr(state.get("version")))


@pytest.mark.parametrize(
    "path",
    ["samples", "updates", "tracker/mode", "tracker/labels", "embedder/scale", "warmup/store"],
)
def test_a_damaged_state_changes_nothing(path: str) -> None:
    """Everything is made new before the first attribute changes."""
    *outer, key = path.split("/")
    epochs = 3 if outer == ["warmup"] else 14
    state = embedding_run(Net(), epochs=epochs).state_dict()
    modes = embedding_run(Net(), epochs=9)
    before = modes.state_dict()
    part = state[outer[0]] if outer else state
    del part[key]
    with pytest.raises((KeyError, StateMismatch)):
        modes.load_state_dict(state)
    assert same_state(modes.state_dict(), before)


def test_a_state_replaces_what_was_there() -> None:
    early, late = fitted(epochs=3), fitted(epochs=8)
    net = Net()
    modes = fitted(net, epochs=7)
    for state in (early.state_dict(), late.state_dict(), early.state_dict()):
        modes.load_state_dict(state)
        assert same_state(modes.state_dict(), state)
