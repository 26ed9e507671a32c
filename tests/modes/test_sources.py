"""Following networks: wrapped, tied, frozen, of any dtype and layout, moved while they train."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mode_toys import (
    Net,
    assert_one_sentence,
    fitted,
    generator,
    images,
    same_state,
    sgd,
    snapshot,
    train_step,
    training,
    walks,
)
from torch import Tensor, nn

from cmd_plugin.errors import NonFiniteError, PluginError, ShapeError, StateMismatch
from cmd_plugin.modes import Layout, OnlineModes, decompose

SETTINGS: dict[str, Any] = {"modes": 3, "warmup": 4, "samples": 60, "buffers": "model"}


def flat(model: nn.Module, modes: OnlineModes) -> Tensor:
    """The modelled weights as the network holds them now."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    parts = [state[name].detach().reshape(-1) for name in modes.layout.names]
    return torch.cat([part.to(modes.layout.state_dtype) for part in parts])


def test_all_sources_say_the_same() -> None:
    net = Net()
    optimizer = sgd(net)
    layout = Layout.of_model(net)
    by_model, by_call, by_state, by_vector, by_copy = (
        OnlineModes(source, **SETTINGS) for source in (net, layout, layout, layout, net)
    )
    for epoch in range(8):
        train_step(net, optimizer, epoch)
        by_model.update()
        by_call.update(net)
        by_state.update(net.state_dict())
        by_vector.update(flat(net, by_model).requires_grad_())
        by_copy.update(copy.deepcopy(net))
    expected = by_model.state_dict()
    for other in (by_call, by_state, by_vector, by_copy):
        assert same_state(other.state_dict(), expected)
        assert not other.scale.requires_grad


def test_references_follow_the_network() -> None:
    net = Net()
    modes = fitted(net)
    raw = flat(net, modes)
    assert torch.equal(modes.reconstruct()[modes.references], raw[modes.references])
    error = (modes.reconstruct() - raw).square().mean()
    assert 0 < error < raw.var()


def test_wrapped_networks_share_names_and_states() -> None:
    plain = fitted(Net())
    for wrap in (nn.DataParallel, lambda net: torch.compile(net, backend="eager")):
        net = Net()
        net.train()
        modes = OnlineModes(wrap(net), **SETTINGS)
        assert modes.layout.names == plain.layout.names
        training(net, modes, 7)
        assert same_state(modes.state_dict(), plain.state_dict())
        other = OnlineModes(Net(), **SETTINGS)
        other.load_state_dict(modes.state_dict())
        other.update(net)
        modes.update()
        assert same_state(modes.state_dict(), other.state_dict())
        with modes.swap() as shown:
            assert shown
            assert torch.equal(flat(net, modes), modes.reconstruct())
        with other.swap(wrap(net)):
            assert torch.equal(flat(net, modes), modes.reconstruct())


def test_modelled_state_dict_has_the_wrappers_names() -> None:
    net = nn.DataParallel(Net())
    modes = OnlineModes(net, **SETTINGS)
    net.train()
    training(net, modes, 6)
    state = modes.modelled_state_dict()
    assert state.keys() == net.state_dict().keys()
    net.load_state_dict(state, strict=True)


def test_tied_weights_are_followed_once() -> None:
    net = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    net[2].weight = net[0].weight
    modes = OnlineModes(net, **SETTINGS)
    assert modes.numel == 35
    for epoch in range(6):
        with torch.no_grad():
            for number, parameter in enumerate(net.parameters()):
                parameter += 0.1 * torch.randn(
                    parameter.shape, generator=generator(10 * epoch + number)
                )
        modes.update()
    raw = snapshot(net)
    with modes.swap():
        assert net[0].weight is net[2].weight
        assert not torch.equal(net[0].weight, raw["0.weight"])
        assert torch.equal(net[0].weight.reshape(-1), modes.reconstruct()[:25])
    state = modes.modelled_state_dict()
    assert torch.equal(state["0.weight"], state["2.weight"])
    result = modes.decomposition()
    net.load_state_dict(result.state_dict_at(-1), strict=True)
    for name, value in result.state_dict_at(-1).items():
        torch.testing.assert_close(value, state[name])


def test_frozen_parameters_stay_out_of_it() -> None:
    net = Net()
    net.fc.weight.requires_grad_(False)
    frozen = net.fc.weight.clone()
    modes = fitted(net)
    assert "fc.weight" not in modes.layout.names
    with modes.swap():
        assert torch.equal(net.fc.weight, frozen)
    assert torch.equal(modes.modelled_state_dict()["fc.weight"], frozen)
    assert torch.equal(modes.decomposition().state_dict_at(0)["fc.weight"], frozen)


def test_a_parameter_frozen_in_the_middle_is_still_followed() -> None:
    net = Net()
    modes = fitted(net)
    net.fc.requires_grad_(False)
    training(net, modes, 3, start=7)
    raw = snapshot(net)
    with modes.swap() as shown:
        assert shown
        assert not torch.equal(net.fc.weight, raw["fc.weight"])
    assert torch.equal(net.fc.weight, raw["fc.weight"])
    again = OnlineModes(Net(), **SETTINGS)
    again.load_state_dict(modes.state_dict())
    again.update(net)
    again.update(net.state_dict())
    assert again.updates == modes.updates + 2


def test_a_parameter_thawed_later_is_ignored() -> None:
    net = Net()
    net.fc.weight.requires_grad_(False)
    modes = fitted(net)
    net.fc.weight.requires_grad_(True)
    training(net, modes, 3, start=7)
    raw = net.fc.weight.clone()
    with modes.swap():
        assert torch.equal(net.fc.weight, raw)


def test_scalar_parameters() -> None:
    net = Net()
    modes = fitted(net)
    assert modes.layout.shapes[0] == ()
    with modes.swap():
        assert net.gain.shape == ()
        assert torch.equal(net.gain.reshape(1), modes.reconstruct()[:1])


def test_channels_last_weights() -> None:
    plain, permuted = Net(), Net()
    permuted.to(memory_format=torch.channels_last)
    permuted.conv.weight.data = permuted.conv.weight.data.contiguous(
        memory_format=torch.channels_last
    )
    with torch.no_grad():
        wide = torch.empty(5, 64, 2)[..., 0].copy_(permuted.fc.weight)
    permuted.fc.weight.data = wide
    assert not permuted.fc.weight.is_contiguous()
    one, other = OnlineModes(plain, **SETTINGS), OnlineModes(permuted, **SETTINGS)
    optimizer = sgd(plain)
    for epoch in range(7):
        train_step(plain, optimizer, epoch)
        with torch.no_grad():
            for source, target in zip(plain.parameters(), permuted.parameters(), strict=True):
                target.copy_(source)
            for source, target in zip(plain.buffers(), permuted.buffers(), strict=True):
                target.copy_(source)
        one.update()
        other.update()
    assert same_state(one.state_dict(), other.state_dict())
    strides = permuted.fc.weight.stride()
    with other.swap():
        assert torch.equal(flat(permuted, other), one.reconstruct())
    assert permuted.fc.weight.stride() == strides
    assert torch.equal(permuted.fc.weight, plain.fc.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_networks_of_other_dtypes(dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    modes = OnlineModes(net, **SETTINGS)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    for epoch in range(8):
        with torch.no_grad():
            for number, weight in enumerate([*net.parameters(), net.norm.running_mean]):
                noise = torch.randn(weight.shape, generator=generator(100 * epoch + number))
                weight += (0.1 * noise).to(dtype)
        modes.update()
    assert modes.reconstruct().dtype == modes.scale.dtype == modes.offset.dtype == state
    raw = snapshot(net)
    at = modes.references
    assert torch.equal(modes.reconstruct()[at], flat(net, modes)[at])
    with modes.swap():
        assert {p.dtype for p in net.parameters()} == {dtype}
        shown = flat(net, modes)
        assert torch.equal(shown, modes.reconstruct().to(dtype).to(state))
        assert torch.equal(
            shown[at], torch.cat([raw[n].reshape(-1) for n in modes.layout.names]).to(state)[at]
        )
    assert all(torch.equal(raw[name], value) for name, value in net.state_dict().items())
    size = 17 if state == torch.float64 else 9
    assert modes.state_bytes == size * modes.numel


@pytest.mark.parametrize("layout_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("numel", [61, 300001])
def test_vectors_are_converted_to_the_dtype_of_the_layout(
    layout_dtype: torch.dtype, weight_dtype: torch.dtype, numel: int
) -> None:
    rows = walks(6, numel).to(weight_dtype)
    modes = OnlineModes(Layout.of_vector(numel, layout_dtype), modes=2, warmup=3, samples=40)
    other = OnlineModes(Layout.of_vector(numel, layout_dtype), modes=2, warmup=3, samples=40)
    for number, row in enumerate(rows):
        modes.update(row)
        other.update(row.to(layout_dtype))
        if number == 1:
            other.load_state_dict(other.state_dict())  # dtypes do not change on the way
    assert modes.scale.dtype == layout_dtype
    torch.testing.assert_close(modes.scale, other.scale, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(modes.reconstruct(), other.reconstruct(), rtol=1e-5, atol=1e-5)


def test_moving_a_network_replaces_its_buffers() -> None:
    """What Module.to() does to buffers when a device or dtype changes; tested by dtype."""
    net = Net()
    modes = fitted(net)
    old = net.norm.running_mean
    net.double()
    net.float()
    assert net.norm.running_mean is not old
    training(net, modes, 1, start=7)
    assert torch.equal(flat(net, modes)[modes.references], modes.reconstruct()[modes.references])
    mean = flat(net, modes)[modes.layout.offsets[7] : modes.layout.offsets[8]]
    assert torch.equal(mean, net.norm.running_mean)
    twin = fitted(Net())
    twin.update(net)
    assert same_state(twin.state_dict(), modes.state_dict())
    raw = snapshot(net)
    with modes.swap():
        shown = modes.reconstruct()[modes.layout.offsets[7] : modes.layout.offsets[8]]
        assert torch.equal(net.norm.running_mean, shown)
    assert torch.equal(net.norm.running_mean, raw["norm.running_mean"])


@pytest.mark.parametrize("way", ["assign", "parameter", "module", "data"])
def test_replaced_tensors_are_noticed(way: str) -> None:
    net = Net()
    modes = fitted(net)
    new = torch.randn(net.fc.weight.shape, generator=generator(1))
    if way == "assign":
        net.load_state_dict({**snapshot(net), "fc.weight": new}, assign=True)
    elif way == "parameter":
        net.fc.weight = nn.Parameter(new)
    elif way == "module":
        layer = nn.Linear(64, 5)
        layer.weight.data = new
        layer.bias.data = net.fc.bias.data
        net.fc = layer
    else:
        net.fc.weight.data = new
    twin = fitted(Net())
    twin.update({**net.state_dict()})
    modes.update()
    assert same_state(modes.state_dict(), twin.state_dict())
    raw = new.clone()  # some ways above make `new` the network's own storage
    with modes.swap():
        assert not torch.equal(net.fc.weight, raw)
    assert torch.equal(net.fc.weight, raw)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda net: setattr(net, "fc", nn.Linear(64, 6)), ("fc.weight", "(6, 64)", "(5, 64)")),
        (lambda net: delattr(net, "gain"), ("'gain'",)),
        (lambda net: setattr(net, "gain", None), ("'gain'",)),
    ],
)
def test_a_network_that_changed_its_shape(change: Any, parts: tuple[str, ...]) -> None:
    net = Net()
    modes = fitted(net)
    before = modes.state_dict()
    change(net)
    for ask in (
        modes.update,
        lambda: modes.update(net.state_dict()),
        lambda: modes.swap().__enter__(),
    ):
        with pytest.raises(StateMismatch) as caught:
            ask()
        assert_one_sentence(caught.value, *parts)
    assert same_state(modes.state_dict(), before)


def test_another_network_is_refused() -> None:
    modes = fitted(Net())
    before = modes.state_dict()
    for other in (nn.Linear(3, 3), nn.Linear(3, 3).state_dict(), {}):
        with pytest.raises(StateMismatch) as caught:
            modes.update(other)
        assert_one_sentence(caught.value, "lacks the tensor 'gain'")
    with pytest.raises(ShapeError):
        modes.update({**snapshot(Net()), "gain": torch.tensor(3)})
    assert same_state(modes.state_dict(), before)


def test_divergence_names_the_tensor() -> None:
    net = Net()
    modes = fitted(net)
    before = modes.state_dict()
    with torch.no_grad():
        net.fc.weight[2, 3] = float("nan")
        net.fc.bias[:2] = float("inf")
    with pytest.raises(NonFiniteError) as caught:
        modes.update()
    assert_one_sentence(caught.value, "3 of 382", "snapshot 7", "'fc.weight' at position 131")
    assert same_state(modes.state_dict(), before)


def test_include_and_exclude() -> None:
    net = Net()
    modes = OnlineModes(net, include=["fc.*", "conv.*"], exclude=["*.bias"], **SETTINGS)
    assert modes.layout.names == ("conv.weight", "fc.weight")
    net.train()
    training(net, modes, 6)
    raw = snapshot(net)
    with modes.swap():
        changed = {n for n, v in net.state_dict().items() if not torch.equal(v, raw[n])}
    assert changed == {"conv.weight", "fc.weight"}


def test_no_graph_is_kept_and_no_gradient_touched() -> None:
    net = Net()
    modes = fitted(net)
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    versions = {name: p._version for name, p in net.named_parameters()}
    modes.update()
    assert {name: p._version for name, p in net.named_parameters()} == versions
    loss = net(images()).sum()  # a graph that needs the weights ...
    modes.update()
    loss.backward()  # ... is not disturbed by an update
    assert set(gradients) == {name for name, _ in net.named_parameters()}
    assert not any(t.requires_grad for t in (modes.scale, modes.offset, modes.reconstruct()))


@pytest.mark.parametrize("outer", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_updates_inside_any_gradient_mode(outer: Any) -> None:
    net = Net()
    modes = OnlineModes(net, **SETTINGS)
    net.train()
    optimizer = sgd(net)
    for epoch in range(9):
        torch.manual_seed(epoch)
        train_step(net, optimizer, epoch)
        if epoch % 2:
            with outer():
                modes.update()
        else:
            modes.update()
    with outer():
        inside = modes.reconstruct()
        state = modes.state_dict()
    assert torch.equal(inside, modes.reconstruct())
    assert same_state(fitted(Net(), epochs=9).state_dict(), state)
    fresh = OnlineModes(net, **SETTINGS)
    with outer():
        fresh.load_state_dict(state)
    fresh.update()
    modes.update()
    assert same_state(fresh.state_dict(), modes.state_dict())


def test_autocast_does_not_reach_the_state() -> None:
    net = Net()
    modes = OnlineModes(net, **SETTINGS)
    optimizer = sgd(net)
    net.train()
    for epoch in range(9):
        torch.manual_seed(epoch)
        train_step(net, optimizer, epoch)
        with torch.autocast("cpu", torch.bfloat16):
            modes.update()
    assert same_state(fitted(Net(), epochs=9).state_dict(), modes.state_dict())


def test_store_device() -> None:
    net = Net()
    modes = OnlineModes(net, store_device="cpu", **SETTINGS)
    net.train()
    training(net, modes, 7)
    assert same_state(fitted(Net()).state_dict(), modes.state_dict())


def test_online_equals_decomposing_the_same_states() -> None:
    net = Net()
    modes = OnlineModes(net, modes=3, warmup=6, samples=80, buffers="model")
    optimizer = sgd(net)
    states = []
    for epoch in range(7):
        train_step(net, optimizer, epoch)
        modes.update()
        states.append(snapshot(net))
    ordered = [{name: state[name] for name in modes.layout.names} for state in states]
    batch = decompose(ordered, modes=3, samples=80)
    assert torch.equal(batch.references, modes.references)
    assert torch.equal(batch.assignment, modes.assignment)
    torch.testing.assert_close(batch.scale, modes.scale)


def test_a_model_is_needed_for_a_state_dict() -> None:
    modes = OnlineModes(Layout.of_vector(20), modes=2, warmup=3)
    for row in walks(5, 20).float():
        modes.update(row)
    for ask in (modes.modelled_state_dict, lambda: modes.swap().__enter__()):
        with pytest.raises(PluginError) as caught:
            ask()
        assert_one_sentence(caught.value, "no model")
    fresh = OnlineModes(Net(), **SETTINGS)
    with pytest.raises(PluginError) as caught:
        fresh.modelled_state_dict()
    assert_one_sentence(caught.value, "no modes yet")
