r"""Low-rank adapters beside frozen random convolutions: fewer weights to train, so fewer to send.

FLoCoRA (Grativol et al., 2024) trains a network from scratch in this way, with quantised adapters;
the form of the adapters is LoRA's (Hu et al., ICLR 2022). Written from the formula: rank, scale and
which layers are adapted are options, not values of the paper.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from cmd_plugin.errors import InputError

__all__ = ["LowRankConv2d", "add_adapters", "fold_adapters"]


class LowRankConv2d(nn.Conv2d):
    r"""A convolution with the weights :math:`W + s\,B A`, of which only A and B are trained.

    W is what the convolution had, and no part of the state: whoever builds the same network from
    the same seed has it. A [r, C k k] starts at random and B [O, r] at zero, so the network starts
    as it would without adapters.

    Args:
        convolution: The one it takes the place of; one group.
        rank: Rank r.
        scale: Factor s.
    """

    frozen: Tensor

    def __init__(self, convolution: nn.Conv2d, rank: int, scale: float) -> None:
        places: Any = {
            name: getattr(convolution, name)
            for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        }
        inputs, outputs = convolution.in_channels, convolution.out_channels
        super().__init__(inputs, outputs, bias=convolution.bias is not None, **places)
        del self.weight
        self.bias, self.scale = convolution.bias, scale
        self.register_buffer("frozen", convolution.weight.detach().clone(), persistent=False)
        self.down = nn.Parameter(self.frozen.new_empty(rank, self.frozen[0].numel()))
        self.up = nn.Parameter(self.frozen.new_zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as nn.Conv2d does

    def merged(self) -> Tensor:
        """Return [O, C, k, k] the weights as they are used."""
        return self.frozen.add((self.up @ self.down).view_as(self.frozen), alpha=self.scale)

    @override
    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(input, self.merged(), self.bias)
        return output


def add_adapters(model: nn.Module, rank: int, scale: float = 16.0) -> int:
    """Put adapters in the place of the convolutions of a network, and freeze their weights.

    Everything else (normalisation, linear layers) is trained as before. The state_dict holds what
    is trained; to share it, all have to build the network from the same seed.

    Args:
        model: The network, changed in place.
        rank: Rank of each adapter; a convolution that it would not make smaller stays as it is.
        scale: What the product of an adapter is multiplied by.

    Returns:
        How many weights the state has less.

    Raises:
        InputError: If the rank is below 1, or no convolution gets an adapter.
    """
    if rank < 1:
        raise InputError(f"rank must be at least 1, got {rank}.")
    saved = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and child.groups == 1:
                weights = child.weight
                less = weights.numel() - rank * (weights[0].numel() + len(weights))
                if less > 0:
                    setattr(parent, name, LowRankConv2d(child, rank, scale))
                    saved += less
    if not saved:
        raise InputError(
            f"no convolution of this network is smaller as an adapter of rank {rank}: lower it."
        )
    return saved


@torch.no_grad()
def fold_adapters(model: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict of the same network without adapters, for weights as they are used."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, LowRankConv2d):
            prefix = f"{name}." if name else ""
            del state[f"{prefix}up"], state[f"{prefix}down"]
            state[f"{prefix}weight"] = module.merged()
    return state
