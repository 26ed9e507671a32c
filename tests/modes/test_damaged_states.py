"""A damaged state is refused with its entry named and nothing changed, or all goes on as ever."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from mode_toys import Net, assert_one_sentence, embedding_run, fitted, same_state, sgd, train_step
from torch import Tensor

from cmd_plugin.errors import StateMismatch
from cmd_plugin.modes import Embedding, OnlineModes

OPTIONS: dict[str, Any] = {"modes": 3, "warmup": 4, "samples": 60, "buffers": "model"}
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "empty": ({}, 0),
    "warm-up": ({}, 3),
    "warm-up in fp32": ({"storage": "fp32"}, 2),
    "fitted": ({}, 8),
    "shrink": ({"shrink": True, "forgetting": 0.9}, 8),
    "mean": ({"profile": "mean"}, 8),
    "embedded": ({"embedding": Embedding(3, 20)}, 11),
}
MISSING = object()
NAN, INF = float("nan"), float("inf")


def made(case: str) -> OnlineModes:
    options, epochs = CASES[case]
    if "embedding" in options:
        return embedding_run(Net(), epochs, **options)
    return fitted(epochs=epochs, **options)


def entries(state: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all entries, those of states inside included."""
    for name, value in state.items():
        yield (*path, name)
        if isinstance(value, Mapping):
            yield from entries(value, (*path, name))


def at(state: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        state = state[name]
    return state


def mutations(value: Any, random: random.Random) -> list[Any]:
    """What an entry might be replaced by."""
    plain = [None, True, -1, 0, 1, 7, 2**70, 0.5, NAN, INF, -1e300, 1e300, "x", b"x", [], {}, (1,)]
    others: list[Any] = [*plain, torch.zeros(()), torch.zeros(2, 3), [1] * 5000, [NAN] * 5]
    if isinstance(value, list) and value:
        others += [value[:-1], [*value, 1], [str(v) for v in value], [2**63, *value[1:]]]
    if isinstance(value, Tensor):
        others += [
            value.double(),
            value.half(),
            value.long(),
            value.bool(),
            value[:-1],
            torch.cat([value, value]),
            value[None],
            value.to("meta"),
            value.to_sparse() if value.numel() and value.dtype != torch.bool else None,
            torch.zeros_like(value),
            torch.ones_like(value),
            -value if value.dtype != torch.bool else ~value,
            list(value),
            value.float().requires_grad_(),
        ]
        if value.numel():
            for new in (NAN, INF, -INF, 1e30, -1e30, 1e12, -1.0, 255.0, 1e-40):
                spoilt = value.clone()
                wide = value.dtype.is_floating_point or (abs(new) < 1e30 and new == new)
                if wide and value.dtype != torch.bool:
                    spoilt.view(-1)[random.randrange(value.numel())] = (
                        new if value.dtype.is_floating_point else int(new) % 256
                    )
                others.append(spoilt)
            others.append(value.clone().fill_(torch.finfo(value.dtype).max)) if (
                value.dtype.is_floating_point
            ) else None
    return others


def check_works(modes: OnlineModes, net: Net) -> None:
    """Go on: update, model, swap, save; whatever comes out is finite."""
    for epoch in range(3):
        train_step(net, sgd(net), 100 + epoch)
        modes.project()
        modes.update(net)
        share = modes.explained_variance()
        assert share != share or share <= 1.0
        if modes.ready:
            assert bool(modes.reconstruct().isfinite().all())
            assert bool(modes.scale.isfinite().all())
            assert bool(modes.offset.isfinite().all())
    if modes.ready:
        before = copy.deepcopy(net.state_dict())
        with modes.swap(net):
            assert all(bool(t.isfinite().all()) for t in net.state_dict().values())
        assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
        modes.decomposition()._require_sound()
    again = OnlineModes(Net(), **_options(modes))
    again.load_state_dict(modes.state_dict())
    assert same_state(again.state_dict(), modes.state_dict())


def _options(modes: OnlineModes) -> dict[str, Any]:
    names = ("storage", "profile", "shrink", "forgetting", "embedding")
    return {**OPTIONS, **{name: getattr(modes.settings, name) for name in names}}


@pytest.mark.filterwarnings("ignore:only")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("case", list(CASES))
def test_every_entry_in_every_wrong_way(case: str) -> None:
    run = made(case)
    state = run.state_dict()
    net = Net()
    holder = OnlineModes(Net(), **_options(run))
    holder.load_state_dict(fitted(epochs=3, **CASES[case][0]).state_dict())
    known = holder.state_dict()
    random_ = random.Random(sorted(CASES).index(case))
    refused = taken = 0
    for path in [(), *entries(state)]:
        value = at(state, path)
        for new in [MISSING, *mutations(value, random_)] if path else [None, [1, 2]]:
            spoilt = copy.copy(state) if path else new
            table = spoilt
            for name in path[:-1]:
                table[name] = copy.copy(table[name])
                table = table[name]
            if new is MISSING:
                table.pop(path[-1])
            elif path:
                table[path[-1]] = new
            try:
                holder.load_state_dict(spoilt)
            except StateMismatch as error:
                refused += 1
                assert_one_sentence(error)
                assert same_state(holder.state_dict(), known)
            else:
                taken += 1
                try:
                    check_works(holder, copy.deepcopy(net))
                except Exception as error:
                    raise AssertionError(f"{path} {new} {error}") from error
                holder.load_state_dict(known)
    assert refused > 3 * taken
    assert refused + taken > 400


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("tracker", "mode"), torch.full((382,), 255, dtype=torch.uint8)),
        (("tracker", "references"), torch.tensor([1, 2, 382])),
        (("tracker", "squares"), torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)),
        (("tracker", "seen"), 99),
        (("tracker", "labels"), [1, 2]),
        (("updates",), 2),
        (("samples",), torch.arange(60) * 0),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_the_entry_is_named(path: tuple[str, ...], value: Any) -> None:
    run = fitted(epochs=8)
    state = run.state_dict()
    at(state, path[:-1])[path[-1]] = value
    with pytest.raises(StateMismatch) as caught:
        run.load_state_dict(state)
    assert_one_sentence(caught.value, repr(".".join(path)), "damaged")
