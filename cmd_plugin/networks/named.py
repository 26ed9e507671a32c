"""Networks by name: one small network of our own, and everything timm and torchvision offer."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from cmd_plugin.errors import InputError
from cmd_plugin.networks.measuring import undisturbed

__all__ = ["SmallConvNet", "build_model"]

# torchvision networks with a second output during training, which nothing here has a use for.
_WITH_SIDE_OUTPUT = ("googlenet", "inception_v3")


class SmallConvNet(nn.Sequential):
    """Three convolutions with BatchNorm, global average pooling, one linear layer (57k parameters).

    Takes float images [B, channels, H, W] of any size from 4x4 on; meant for 8x8 to 32x32.

    Args:
        channels: Image channels.
        classes: Number of outputs.
        width: Channels of the first convolution; the others have twice as many.
    """

    def __init__(self, channels: int, classes: int, width: int = 32) -> None:
        layers: dict[str, nn.Module] = {}
        widths = (channels, width, 2 * width, 2 * width)
        for number in (1, 2, 3):
            inputs, outputs = widths[number - 1 : number + 1]
            # The bias would be cancelled by the normalisation that follows.
            layers[f"conv{number}"] = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            layers[f"norm{number}"] = nn.BatchNorm2d(outputs)
            layers[f"relu{number}"] = nn.ReLU()
            layers[f"pool{number}"] = nn.MaxPool2d(2) if number < 3 else nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["head"] = nn.Linear(2 * width, classes)
        super().__init__(OrderedDict(layers))


def build_model(name: str, channels: int, classes: int, size: tuple[int, int]) -> nn.Module:
    """Build an untrained network and check that it takes the images; nothing is downloaded.

    Initial weights come from torch's global random state.

    Args:
        name: `cnn` for :class:`SmallConvNet`, `cnn:WIDTH` for another width than 32, else a timm
            name, else a torchvision name.
        channels: Image channels, 1 or 3.
        classes: Number of outputs.
        size: Height and width of the images.

    Raises:
        InputError: If no such network exists, or it does not take images of this size.
    """
    model = _create(name, channels, classes, size)
    problem = _probe(model, channels, classes, size)
    if problem:
        message = (
            f"model {name!r} does not take {size[1]}x{size[0]} images ({problem}): take another "
            "image size (--image-size, for example 32 or 224) or another model."
        )
        raise InputError(message)
    return model


def _create(name: str, channels: int, classes: int, size: tuple[int, int]) -> nn.Module:
    if name == "cnn":
        return SmallConvNet(channels, classes)
    if name.startswith("cnn:"):
        width = name.removeprefix("cnn:")
        if not (width.isdecimal() and int(width)):
            message = f"unknown model {name!r}: the width of cnn:WIDTH is a number, as in cnn:16."
            raise InputError(message)
        return SmallConvNet(channels, classes, int(width))
    import timm  # imported here: slow, and the default network does not need it
    from torchvision import models as vision

    # Names with a prefix ("hf-hub:...") would be fetched from the network; no registered name has
    # one.
    if ":" not in name and timm.is_model(name):
        options: dict[str, Any] = {}
        config = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
        if config is not None and config.fixed_input_size:
            options["img_size"] = size
        try:
            return timm.create_model(
                name, pretrained=False, num_classes=classes, in_chans=channels, **options
            )
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            message = f"timm cannot build {name!r} for {size[1]}x{size[0]} images: {error}."
            raise InputError(message) from error
    names = vision.list_models(module=vision)
    if name in names:
        options = {}
        if name in _WITH_SIDE_OUTPUT:
            options = {"aux_logits": False, "init_weights": True}
        elif name.startswith("vit_"):
            options = {"image_size": size[0]}
        try:
            model: nn.Module = vision.get_model(name, weights=None, num_classes=classes, **options)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            message = f"torchvision cannot build {name!r} for {size[1]}x{size[0]} images: {error}."
            raise InputError(message) from error
        if channels != 3:
            _replace_first_convolution(model, channels)
        return model
    near = difflib.get_close_matches(name, sorted({"cnn", *timm.list_models(), *names}), n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "pass cnn, a timm or a torchvision name."
    raise InputError(f"unknown model {name!r}: {hint}")


def _replace_first_convolution(model: nn.Module, channels: int) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            parent, _, attribute = name.rpartition(".")
            replacement = nn.Conv2d(
                channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                stride=module.stride,  # type: ignore[arg-type]
                padding=module.padding,  # type: ignore[arg-type]
                dilation=module.dilation,  # type: ignore[arg-type]
                bias=module.bias is not None,
                padding_mode=module.padding_mode,
            )
            setattr(model.get_submodule(parent), attribute, replacement)
            return


def _probe(model: nn.Module, channels: int, classes: int, size: tuple[int, int]) -> str:
    """What goes wrong with two blank images; empty if nothing does. Leaves the model as it was."""
    try:
        with undisturbed(model):
            output = model(torch.zeros(2, channels, *size))
    except Exception as error:  # each architecture fails in its own way on images it cannot take
        return " ".join(str(error).split())[:160] or type(error).__name__
    if not isinstance(output, torch.Tensor) or output.shape != (2, classes):
        return "its output is not one number per class"
    return ""
