"""Run any network once and hand out the tensor that enters its global pool.

Nothing of the network is changed, and everything it has is put back: modes of its modules, random
numbers, hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.networks.measuring import undisturbed
from cmd_plugin.pointcloud._pools import Pool, Watch, first_tensor

__all__ = [
    "Forward",
    "as_it_is",
    "channels_first",
    "choose_pool",
    "inner_module",
    "intercept",
    "layer_features",
    "listed",
    "scores_of",
]

Forward = Callable[[nn.Module, Tensor], Any]


def as_it_is(model: nn.Module, points: Tensor) -> Any:
    """Call the network on the points; the default for networks that take [B, N, 3]."""
    return model(points)


def channels_first(model: nn.Module, points: Tensor) -> Any:
    """Call a network that takes [B, C, N] on points [B, N, C]."""
    return model(points.transpose(1, 2))


def inner_module(model: nn.Module) -> nn.Module:
    """The network inside a compiled or data-parallel wrapper: scores stay where they are made."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def scores_of(output: Any) -> Tensor:
    """The class scores in what a network returned: its first tensor.

    Raises:
        InputError: If there is none.
    """
    value = first_tensor(output)
    if value is None and isinstance(output, dict):
        value = next((v for v in output.values() if isinstance(v, Tensor)), None)
    if value is None:
        raise InputError("the network returned no tensor: pass forward= that returns its scores.")
    return value


def intercept(
    model: nn.Module,
    points: Tensor,
    *,
    forward: Forward = as_it_is,
    mask: Tensor | None = None,
    layer: str | nn.Module | None = None,
    pool: int | None = None,
) -> tuple[Any, Watch, Tensor | None]:
    """Run the network once, in evaluation mode and without gradients, and watch it.

    Args:
        model: Any network. It is left exactly as it was: no hook stays, and modes of its modules,
            buffers of normalisations in evaluation mode, and random numbers are as before.
        points: [B, N, C].
        forward: How to call the network on the points.
        mask: [B, N] bool, for forward passes that join the real points of all clouds.
        layer: A module, or its name, whose output is kept as well.
        pool: Position of a pool that is kept although others follow it.

    Returns:
        The network's output, what was seen, and the output of ``layer``.

    Raises:
        InputError: If there is no such layer, or it was not called.
    """
    model = inner_module(model)
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        value = first_tensor(output)
        if value is not None:
            kept[:] = [value.detach()]  # the last call counts

    hooked = None if layer is None else _find(model, layer)
    # A compiled graph calls no torch functions, so the pass is eager. Without copies of buffers,
    # because a small network feels them and those of normalisations stay in evaluation mode.
    surroundings = undisturbed(model, buffers=False, eager=True, device=points.device)
    for clone in (False, True):
        watch = Watch(points, mask, pool, clone=clone)
        with surroundings, watch:
            if hooked is not None:
                surroundings.hooks.append(hooked.register_forward_hook(keep))
            output = forward(model, points)
        if not watch.overwritten:
            break
    if layer is not None and not kept:
        raise InputError(f"layer {layer!r} returned no tensor in this forward pass.")
    return output, watch, kept[0] if kept else None


def _find(model: nn.Module, layer: str | nn.Module) -> nn.Module:
    if isinstance(layer, nn.Module):
        if not any(module is layer for module in model.modules()):
            raise InputError("the layer given is no module of this network.")
        found: nn.Module = layer
        return found
    named: dict[str, nn.Module] = dict(model.named_modules())
    if layer not in named:
        some = ", ".join([name for name in named if name][:8])
        raise InputError(f"the network has no layer {layer!r}: its layers are {some}, ...")
    return named[layer]


def choose_pool(pools: list[Pool], wanted: int | None) -> Pool | None:
    """The global pool: the one of the last group, which must be the only one of its kind there.

    Args:
        pools: All reductions over the points, in their order.
        wanted: Position in ``pools``, to settle an ambiguity.

    Raises:
        InputError: If there are several, or ``wanted`` does not exist.
    """
    if wanted is not None:
        if not 0 <= wanted < len(pools):
            raise InputError(f"pool={wanted}: this network has {listed(pools)}.")
        return pools[wanted]
    if not pools:
        return None
    maxima = [pool for pool in pools if pool.is_max and pool.group == pools[-1].group]
    if not maxima:
        return pools[-1]
    if not all(_same_tensor(pool, maxima[0]) for pool in maxima[1:]):
        raise InputError(
            f"several pools feed the head, choose one by pool=NUMBER: {listed(pools)}."
        )
    return maxima[0]


def _same_tensor(one: Pool, other: Pool) -> bool:
    a, b = one.features, other.features
    return a is not None and b is not None and a.shape == b.shape and a.data_ptr() == b.data_ptr()


def listed(pools: list[Pool]) -> str:
    """All pools with their numbers, for messages."""
    if not pools:
        return "no pool over the points"
    return "; ".join(f"{number}: {pool}" for number, pool in enumerate(pools))


def layer_features(output: Tensor, batch: int, points: int, axis: int | None) -> Tensor:
    """A layer's output as [B, F, M].

    Args:
        output: [B, F, M], [B, M, F], or with axes of size 1 besides.
        batch: Number of clouds.
        points: Number of points N.
        axis: Which axis counts tokens; needed when it is not the only one of size N.

    Raises:
        ShapeError: If that cannot be told.
    """
    if output.shape[0] != batch or output.ndim < 3:
        raise ShapeError(
            f"the layer's output {tuple(output.shape)} does not hold one vector for each point of "
            f"{batch} clouds: name another layer."
        )
    if axis is None:
        fitting = [a for a in range(1, output.ndim) if output.shape[a] == points]
        if len(fitting) != 1:
            raise ShapeError(
                f"the layer's output is {tuple(output.shape)}: say which axis counts the tokens by "
                "token_axis."
            )
        axis = fitting[0]
    axis %= output.ndim
    rest = [a for a in range(1, output.ndim) if a != axis]
    return output.permute(0, *rest, axis).flatten(1, -2)
