"""Whitenings of layers inside a network: their features, and a network that is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cmd_plugin.clip import Whitening, fit_layers, layer_features, score_layers
from cmd_plugin.errors import InputError


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.5)
        self.tokens = nn.Linear(36, 7)
        self.shared = nn.ReLU()
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(35, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.norm(self.first(x)))
        x = self.shared(self.tokens(self.drop(x.flatten(2))))
        return self.head(x.flatten(1))


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def batch(seed: int, rows: int = 40) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_features_are_what_the_layers_put_out_and_nothing_is_disturbed() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    x = batch(0)
    features = layer_features(model, x, ["head", "first", "tokens"])
    assert list(features) == ["head", "first", "tokens"]
    model.eval()
    with torch.no_grad():
        conv = model.first(x)
        inside = torch.relu(model.norm(conv)).flatten(2)
        tokens = model.tokens(inside)
        head = model(x)
    assert torch.allclose(features["first"], conv.mean(dim=(2, 3)), atol=1e-6)
    assert torch.allclose(features["tokens"], tokens.mean(dim=1), atol=1e-6)
    assert torch.equal(features["head"], head)
    model.train()
    layer_features(model, x, ["head"])
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_every_layer_has_its_own_whitening() -> None:
    model = network()
    batches = [batch(seed) for seed in range(4)]
    fitted = fit_layers(model, batches, ["first", "head"], shrinkage="none")
    whole = torch.cat(batches)
    for name, x in layer_features(model, whole, ["first", "head"]).items():
        expected = Whitening.fit(x, shrinkage="none").squared_norm(x)
        assert torch.allclose(fitted[name].squared_norm(x), expected, rtol=1e-4)
        assert torch.allclose(score_layers(model, whole, fitted)[name], expected, rtol=1e-4)
        assert fitted[name].about == {"layer": name}


def test_inputs_unlike_those_of_the_fit_score_higher() -> None:
    model = network()
    fitted = fit_layers(model, [batch(seed) for seed in range(4)], ["first"], normalize="l2")
    usual = score_layers(model, batch(9), fitted)["first"]
    other = score_layers(model, 3 * batch(9).abs() + 1.0, fitted)["first"]
    assert usual.median() < other.median()


def test_a_pool_of_ones_own_takes_what_the_layer_puts_out() -> None:
    model, x = network(), batch(0)
    features = layer_features(model, x, ["first"], pool=lambda out: out.amax(dim=(2, 3)))
    assert torch.allclose(features["first"], model.first(x).amax(dim=(2, 3)))


def test_layers_that_cannot_be_used_are_said() -> None:
    model, x = network(), batch(0, 2)
    for names, says in (
        (["body"], "are not among first, norm"),
        ([], "are not among"),
        (["unused"], "did not run"),
        (["shared"], "more than once"),
    ):
        with pytest.raises(InputError, match=says):
            layer_features(model, x, names)
        assert not any(module._forward_hooks for module in model.modules())
    lstm = nn.LSTM(3, 4)
    with pytest.raises(InputError, match="puts out tuple"):
        layer_features(nn.Sequential(lstm), torch.zeros(2, 1, 3), ["0"])
    with pytest.raises(InputError, match="no batches"):
        fit_layers(model, [], ["first"])
