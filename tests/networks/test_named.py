"""Networks by name."""

from __future__ import annotations

import pytest
import torch

from cmd_plugin.errors import InputError
from cmd_plugin.networks import SmallConvNet, build_model


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 28), (3, 32), (1, 4)])
def test_small_network(channels: int, side: int) -> None:
    model = build_model("cnn", channels, 10, (side, side))
    assert isinstance(model, SmallConvNet)
    assert model.training
    assert model(torch.randn(3, channels, side, side)).shape == (3, 10)
    assert 55_000 < sum(p.numel() for p in model.parameters()) < 60_000


def test_small_network_of_another_width() -> None:
    model = build_model("cnn:8", 1, 10, (8, 8))
    assert isinstance(model, SmallConvNet)
    assert model.conv1.out_channels == 8
    for name in ("cnn:", "cnn:0", "cnn:wide"):
        with pytest.raises(InputError, match="the width of cnn:WIDTH is a number"):
            build_model(name, 1, 10, (8, 8))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("resnet10t", "timm"),
        ("vit_tiny_patch16_224", "timm"),  # built for the images' own size
        ("shufflenet_v2_x0_5", "torchvision"),  # takes three channels by itself
    ],
)
def test_networks_of_other_packages(name: str, module: str) -> None:
    model = build_model(name, 1, 5, (32, 32))
    assert type(model).__module__.startswith(module)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)


def test_the_probe_leaves_no_trace() -> None:
    torch.manual_seed(3)
    model = build_model("cnn", 1, 10, (8, 8))
    torch.manual_seed(3)
    fresh = SmallConvNet(1, 10)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize("name", ["resnet19", "hf-hub:timm/resnet18.a1_in1k", "fcn_resnet50"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(InputError, match=f"unknown model '{name}'"):
        build_model(name, 3, 10, (32, 32))


def test_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(InputError, match=r"did you mean .*resnet18"):
        build_model("resnet19", 3, 10, (32, 32))


@pytest.mark.parametrize(
    ("name", "side"),
    [("cnn", 2), ("vgg11", 8), ("vit_b_16", 20)],
)
def test_images_a_network_cannot_take(name: str, side: int) -> None:
    with pytest.raises(InputError, match=f"{name}.*{side}x{side} images"):
        build_model(name, 3, 10, (side, side))
