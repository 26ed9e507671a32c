"""Low-rank adapters: the same network at first, fewer weights to send, one network at the end."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from cmd_plugin.errors import InputError
from cmd_plugin.federated import add_adapters, fold_adapters
from cmd_plugin.networks import build_model


def network(adapters: int | None = None, scale: float = 16.0) -> nn.Module:
    torch.manual_seed(3)
    model = build_model("cnn:16", 3, 10, (16, 16)).eval()
    if adapters is not None:
        add_adapters(model, adapters, scale)
    return model


def test_it_starts_as_the_network_without_adapters() -> None:
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(network(2)(images), network()(images))


def test_the_state_holds_what_is_trained_and_nothing_frozen() -> None:
    plain, model = network(), network(2)
    convolutions = [m for m in plain.modules() if isinstance(m, nn.Conv2d)]
    expected = sum(w.numel() for w in plain.parameters())
    for convolution in convolutions:
        size = convolution.weight.numel()
        ranked = 2 * (size // convolution.out_channels + convolution.out_channels)
        expected += min(size, ranked) - size
    assert sum(w.numel() for w in model.parameters()) == expected
    assert {*model.state_dict()} >= {"conv2.up", "conv2.down", "norm2.running_var", "head.weight"}
    assert not any("frozen" in name for name in model.state_dict())
    torch.manual_seed(3)
    again = build_model("cnn:16", 3, 10, (16, 16))
    assert add_adapters(again, 2) == sum(w.numel() for w in plain.parameters()) - expected


def test_weights_are_the_frozen_ones_and_a_product_of_low_rank() -> None:
    model = network(2, scale=4.0)
    layer = model.conv2  # type: ignore[union-attr]
    nn.init.normal_(layer.up)
    product = torch.einsum("or,rk->ok", layer.up, layer.down).reshape(32, 16, 3, 3)
    weight = network().conv2.weight + 4.0 * product  # type: ignore[union-attr]
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(layer(x), conv2d(x, weight, padding=1))
    assert torch.linalg.matrix_rank((weight - layer.frozen).flatten(1)) == 2


def test_trained_adapters_fold_into_the_network_they_came_from() -> None:
    model = network(2).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    frozen = model.conv2.frozen.clone()  # type: ignore[union-attr, operator]
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 16, 16)).square().sum().backward()
        optimizer.step()
    assert torch.equal(model.conv2.frozen, frozen)  # type: ignore[union-attr]
    assert bool(model.conv2.up.abs().sum() > 0)  # type: ignore[union-attr]
    plain = network()
    plain.load_state_dict(fold_adapters(model))
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(plain.eval()(images), model.eval()(images))


def test_strides_padding_and_bias_stay() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 12, (3, 5), stride=2, padding=(1, 2), dilation=1, padding_mode="reflect"),
        nn.Conv2d(12, 12, 3, groups=3),
    )
    x = torch.randn(2, 8, 14, 14)
    before = model(x)
    add_adapters(model, 1)
    assert torch.equal(model(x), before)
    assert type(model[1]) is nn.Conv2d  # groups stay


def test_a_rank_that_saves_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="rank 40"):
        network(40)


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="rank must be at least 1, got 0"):
        network(0)
