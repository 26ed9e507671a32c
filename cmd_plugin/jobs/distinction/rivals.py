"""Maps of Captum's attributions, for the same images and the same classifier."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, require
from cmd_plugin.networks import undisturbed

__all__ = ["rival_maps"]

_STEPS = 24
_SAMPLES = 25
_AT_ONCE = 512
_WINDOWS = 8  # occlusion's window is an eighth of the image

Attribute = Callable[[Any, nn.Module, Tensor, Tensor], Tensor]


def rival_maps(
    network: nn.Module, images: Tensor, labels: Tensor, names: Sequence[str], seed: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Attribute classes to pixels, by every rival that the network allows.

    Args:
        network: Maps images in [-1, 1] to class logits; left as it was.
        images: [B, C, H, W] in [-1, 1], where 0 is the baseline.
        labels: The class each is explained for, [B] int64.
        names: Which rivals; see :data:`cmd_plugin.jobs.distinction.options.RIVAL_NAMES`.
        seed: Of what is drawn.

    Returns:
        Maps [B, 1 or C, H, W] by name, and why others were left out.

    Raises:
        MissingDependency: If Captum is not installed.
    """
    captum = require("captum.attr", "xai")
    found, left_out = {}, {}
    for name in names:
        with undisturbed(network, gradients=True), _seeded(seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Captum's, about what it does to its inputs
            try:
                maps = _ATTRIBUTIONS[name](captum, network, images, labels)
            except (InputError, RuntimeError, AssertionError, NotImplementedError) as error:
                left_out[name] = " ".join(str(error).split())[:200]  # networks allow what they do
                continue
        found[name] = maps.detach()
    return found, left_out


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Captum draws from NumPy's and torch's global states: set here, and given back."""
    state = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002


def _integrated(captum: Any, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    made = captum.IntegratedGradients(network)
    found: Tensor = made.attribute(
        images, target=labels, n_steps=_STEPS, internal_batch_size=max(_AT_ONCE, len(images))
    )
    return found


def _saliency(captum: Any, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    found: Tensor = captum.Saliency(network).attribute(images, target=labels)
    return found


def _shap(captum: Any, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    made = captum.GradientShap(network)
    parts = [
        made.attribute(
            part, target=chosen, baselines=torch.zeros_like(part[:1]), n_samples=_SAMPLES
        )
        for part, chosen in zip(torch.split(images, 32), torch.split(labels, 32), strict=True)
    ]
    return torch.cat(parts)


def _grad_cam(captum: Any, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    if not layers:
        raise InputError("the network has no convolution to look at.")
    made = captum.LayerGradCam(network, layers[-1])
    coarse = made.attribute(images, target=labels, relu_attributions=True)
    size = tuple(images.shape[-2:])
    found: Tensor = captum.LayerAttribution.interpolate(coarse, size, "bilinear")
    return found


def _occlusion(captum: Any, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    channels, *size = images.shape[1:]
    window = [max(2, side // _WINDOWS) for side in size]
    found: Tensor = captum.Occlusion(network).attribute(
        images,
        target=labels,
        sliding_window_shapes=(channels, *window),
        strides=(channels, *(max(1, side // 2) for side in window)),
        baselines=0.0,
    )
    return found


def _random(captum: Any, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    del captum, network, labels
    return torch.rand(len(images), 1, *images.shape[-2:]).to(images.device)


_ATTRIBUTIONS: dict[str, Attribute] = {
    "integrated_gradients": _integrated,
    "saliency": _saliency,
    "gradient_shap": _shap,
    "grad_cam": _grad_cam,
    "occlusion": _occlusion,
    "random": _random,
}
