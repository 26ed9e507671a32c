"""Draw the K weights that are clustered, balanced over layers ("U_B" in the authors' code)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmd_plugin.errors import InputError

__all__ = ["draw_distinct", "layer_quotas", "sample_weights"]


def layer_quotas(sizes: Sequence[int], samples: int) -> list[int] | None:
    """Return how many weights each layer gives, or None with too many layers to balance.

    Half of the budget is split evenly over layers, half in proportion to their size, all-or-nothing
    per layer; what is left goes to the smallest quota that has room for all of it. If no layer has,
    fewer than ``samples`` are drawn.

    Args:
        sizes: Number of weights of each layer.
        samples: Budget K.
    """
    layers, numel = len(sizes), sum(sizes)
    if samples / 2 < layers:
        return None
    quotas = []
    for size in sizes:
        base = min(samples // (2 * layers), size)
        extra = int(size * samples // (2 * numel))
        quotas.append(base + (extra if extra <= size - base else 0))
    rest = samples - sum(quotas)
    if rest > 0:
        for layer in sorted(range(layers), key=quotas.__getitem__):
            if sizes[layer] - quotas[layer] >= rest:
                quotas[layer] += rest
                break
    return quotas


def draw_distinct(population: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` distinct numbers from ``range(population)``, [count] int64, in random order.

    Memory is of the order of ``count``, not of the population, unless most of it is drawn.
    """
    if count * 4 > population:
        return torch.randperm(population, generator=generator)[:count]
    drawn = torch.empty(0, dtype=torch.int64)
    while drawn.numel() < count:
        fresh = torch.randint(population, (count + count // 8 + 8,), generator=generator)
        merged = torch.cat([drawn, fresh])
        # Keep the first occurrence of each value, in the order drawn: sorted keys alone would
        # favour small indices.
        values, inverse = torch.unique(merged, return_inverse=True)
        first = torch.full((values.numel(),), merged.numel(), dtype=torch.int64)
        first.scatter_reduce_(0, inverse, torch.arange(merged.numel()), reduce="amin")
        drawn = merged[first.sort().values]
    return drawn[:count]


def sample_weights(sizes: Sequence[int], samples: int, seed: int = 0) -> Tensor:
    """Draw the flat indices of the K weights to cluster, [K'] int64, K' <= K and all distinct.

    With fewer than two samples a layer the draw is uniform over all weights and sorted; else each
    layer gives its :func:`layer_quotas`, uniformly inside the layer. The draw depends on ``seed``
    alone and leaves the global generator untouched.

    Raises:
        InputError: If ``samples`` is not a positive whole number.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise InputError(f"samples must be a whole number of at least 1, got {samples!r}.")
    numel = sum(sizes)
    samples = min(samples, numel)
    generator = torch.Generator().manual_seed(seed)
    quotas = layer_quotas(sizes, samples)
    if quotas is None:
        return draw_distinct(numel, samples, generator).sort().values
    drawn, start = [], 0
    for size, quota in zip(sizes, quotas, strict=True):
        drawn.append(start + draw_distinct(size, quota, generator))
        start += size
    return torch.cat(drawn)
