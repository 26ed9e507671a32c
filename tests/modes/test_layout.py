"""Which tensors are modelled, and where each lies in the flat vector."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mode_toys import Net, assert_one_sentence
from torch import nn

from cmd_plugin.errors import InputError, ShapeError, StateMismatch
from cmd_plugin.modes import Layout
from cmd_plugin.modes.layout import find_weights, named_weights


class Tied(nn.Module):
    """An embedding whose weight is the head's as well, and one BatchNorm used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(4)
        self.again = self.norm


def test_parameters_and_running_statistics() -> None:
    layout = Layout.of_model(Net())
    assert layout.names == (
        "gain",
        "conv.weight",
        "conv.bias",
        "norm.weight",
        "norm.bias",
        "fc.weight",
        "fc.bias",
        "norm.running_mean",
        "norm.running_var",
    )
    assert layout.shapes[0] == ()
    assert layout.sizes[0] == 1
    assert layout.offsets == (0, 1, 37, 41, 45, 49, 369, 374, 378)
    assert layout.numel == 382
    assert layout.variances() == [slice(378, 382)]
    assert layout.aliases == {}
    assert layout.state_dtype == torch.float32


@pytest.mark.parametrize("buffers", ["keep", "recalibrate"])
def test_statistics_are_left_out_on_request(buffers: str) -> None:
    names = Layout.of_model(Net(), buffers=buffers).names
    assert names == Layout.of_model(Net()).names[:-2]


def test_patterns() -> None:
    net = Net()
    assert Layout.of_model(net, include=["fc.*"]).names == ("fc.weight", "fc.bias")
    assert Layout.of_model(net, include=["*.weight"], exclude=["norm.*", "fc.*"]).names == (
        "conv.weight",
    )
    assert "gain" not in Layout.of_model(net, exclude=["gain"]).names
    assert Layout.of_model(nn.Sequential(net), include=["0.fc.bias"]).names == ("0.fc.bias",)
    # Case counts, as in Python.
    assert Layout.of_model(net, include=["FC.*", "gain"]).names == ("gain",)


def test_nothing_left() -> None:
    frozen = Net().requires_grad_(False)
    for model, options in (
        (Net(), {"include": ["nothing"]}),
        (Net(), {"exclude": ["*"]}),
        (frozen, {"buffers": "keep"}),
        (nn.ReLU(), {}),
    ):
        with pytest.raises(InputError) as caught:
            Layout.of_model(model, **options)
        assert_one_sentence(caught.value, "no floating weights")


def test_frozen_parameters_are_left_out() -> None:
    net = Net()
    net.fc.weight.requires_grad_(False)
    assert "fc.weight" not in Layout.of_model(net).names
    assert "fc.bias" in Layout.of_model(net).names


def test_tied_weights_count_once() -> None:
    layout = Layout.of_model(Tied())
    assert layout.names == (
        "embedding.weight",
        "head.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
    )
    assert layout.aliases == {
        "head.weight": "embedding.weight",
        "again.weight": "norm.weight",
        "again.bias": "norm.bias",
        "again.running_mean": "norm.running_mean",
        "again.running_var": "norm.running_var",
    }
    assert Layout.of_tensors(*named_weights(Tied().state_dict())).aliases == layout.aliases


def test_a_tied_weight_keeps_the_name_that_is_not_excluded() -> None:
    layout = Layout.of_model(Tied(), include=["head.*"])
    assert layout.names == ("head.weight", "head.bias")
    assert layout.aliases == {}


def test_views_of_one_storage_are_different_weights() -> None:
    storage = torch.randn(12)
    state = {"a": storage[:6], "b": storage[6:], "c": storage.view(3, 4), "d": storage[:6]}
    tensors, aliases = named_weights(state)
    assert list(tensors) == ["a", "b", "c"]
    assert aliases == {"d": "a"}


def test_what_is_no_weight() -> None:
    state: dict[str, Any] = {
        "weight": torch.ones(2),
        "steps": torch.tensor(3),
        "mask": torch.ones(2, dtype=torch.bool),
        "phase": torch.ones(2, dtype=torch.complex64),
        "empty": torch.ones(0),
        "note": "text",
    }
    assert list(named_weights(state)[0]) == ["weight"]


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["float32"], torch.float32),
        (["float64"], torch.float64),
        (["float64", "float32"], torch.float32),
        (["bfloat16"], torch.float32),
        (["float16", "float64"], torch.float32),
    ],
)
def test_dtype_of_the_state(dtypes: list[str], expected: torch.dtype) -> None:
    tensors = {
        name + str(i): torch.ones(2).to(getattr(torch, name)) for i, name in enumerate(dtypes)
    }
    assert Layout.of_tensors(tensors).state_dtype == expected


@given(st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=6))
def test_split_is_the_inverse_of_concatenation(shapes: list[tuple[int, ...]]) -> None:
    tensors = {f"t{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    layout = Layout.of_tensors(tensors)
    flat = torch.cat([t.reshape(-1) for t in tensors.values()])
    parts = layout.split(flat)
    assert list(parts) == list(tensors)
    assert all(torch.equal(parts[name], tensors[name]) for name in tensors)
    parts["t0"].fill_(7.0)  # views
    assert (flat[: layout.sizes[0]] == 7).all()
    for position in range(layout.numel):
        name, inside = layout.locate(position)
        assert layout.offsets[layout.names.index(name)] + inside == position
        assert 0 <= inside < layout.sizes[layout.names.index(name)]
    assert Layout.from_json(layout.to_json()) == layout


def test_split_of_another_length() -> None:
    with pytest.raises(ShapeError) as caught:
        Layout.of_vector(5).split(torch.ones(6))
    assert_one_sentence(caught.value, "5 weights", "(6,)")


def test_json_keeps_aliases_and_scalars() -> None:
    layout = Layout.of_model(nn.ModuleList([Tied(), Net()]))
    again = Layout.from_json(layout.to_json())
    assert again == layout
    assert again.fingerprint == layout.fingerprint


def test_fingerprints_tell_networks_apart() -> None:
    one = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    others = [
        {"a": torch.ones(3, 2), "b": torch.ones(4)},
        {"a": torch.ones(2, 3), "c": torch.ones(4)},
        {"a": torch.ones(2, 3)},
        {"b": torch.ones(4), "a": torch.ones(2, 3)},
    ]
    prints = {Layout.of_tensors(tensors).fingerprint for tensors in [one, *others]}
    assert len(prints) == 5
    half = {name: tensor.half() for name, tensor in one.items()}
    assert Layout.of_tensors(half).fingerprint == Layout.of_tensors(one).fingerprint
    for other, part in zip(
        others,
        (("'a'", "(3, 2)", "(2, 3)"), ("'b'",), ("'b'",), ("order",)),
        strict=True,
    ):
        with pytest.raises(StateMismatch) as caught:
            Layout.of_tensors(one).require_same(Layout.of_tensors(other), "the file")
        assert_one_sentence(caught.value, "the file", *part)
    with pytest.raises(StateMismatch) as caught:
        Layout.of_tensors(others[2]).require_same(Layout.of_tensors(one), "the file")
    assert_one_sentence(caught.value, "the file", "'b'", "not expected")


def test_two_names_that_become_one_are_refused() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.module = nn.Linear(3, 1, bias=False)

    with pytest.raises(InputError) as caught:
        Layout.of_model(Both())
    assert_one_sentence(caught.value, "'weight'")


def test_unknown_policy() -> None:
    with pytest.raises(InputError) as caught:
        Layout.of_model(Net(), buffers="drop")
    assert_one_sentence(caught.value, "model, recalibrate, keep", "'drop'")


def test_weights_are_found_by_name_wherever_they_are() -> None:
    net = Net()
    layout = Layout.of_model(net)
    for source in (
        net,
        net.state_dict(),
        nn.DataParallel(net),
        dict(reversed(net.state_dict().items())),
    ):
        found = find_weights(layout, source, "it")
        assert tuple(found) == layout.names
        assert found["fc.weight"].data_ptr() == net.fc.weight.data_ptr()
    tied = Tied()
    state = tied.state_dict()
    del state["embedding.weight"]  # as files without shared tensors have it
    found = find_weights(Layout.of_model(tied), state, "it")
    assert found["embedding.weight"].data_ptr() == tied.head.weight.data_ptr()
