"""Run any network once and hand out the tensor that enters its global pool.

Nothing of the network is changed, and everything it has is put back: modes of its modules, random
numbers, hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.networks.measuring import undisturbed
from cmd_plugin.pointcloud._pools import Pool, Watch, first_tensor
from cmd_plugin.pointcloud._probes import Kinds, few_places, verdict

__all__ = [
    "Forward",
    "as_it_is",
    "as_points",
    "call_network",
    "channels_first",
    "choose_pool",
    "class_scores",
    "final_pools",
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


def call_network(forward: Forward, model: nn.Module, points: Tensor) -> Any:
    """Call the network as ``forward`` says.

    Raises:
        ShapeError: If ``forward`` is the default, the network fails on [B, N, C], and would not
            on [B, C, N].
    """
    try:
        return forward(model, points)
    except (RuntimeError, ValueError) as error:
        if forward is as_it_is and not isinstance(error, InputError) and _turns(model, points):
            raise ShapeError(
                f"this network takes [B, C, N], and fails on points {tuple(points.shape)} as they "
                "are: pass forward=channels_first (of cmd_plugin.pointcloud) with [B, N, C] points."
            ) from error
        raise


def _turns(model: nn.Module, points: Tensor) -> bool:
    try:
        channels_first(model, points)
    except Exception:  # whatever a network raises, then that is not it
        return False
    return True


def as_points(model: nn.Module, points: Tensor | np.ndarray) -> Tensor:
    """Clouds as a tensor the network can take: of an array, and of float64 for a float32 network.

    Args:
        model: Its first floating parameter says where arrays go, and what float64 becomes.
        points: [B, N, C]; tensors of any other dtype, and on any device, are left as they are.
    """
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if isinstance(points, np.ndarray):
        points = torch.from_numpy(np.ascontiguousarray(points))
        if weight is not None:
            points = points.to(weight.device)
    if points.dtype == torch.float64 and weight is not None:
        points = points.to(weight.dtype)
    return points


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


def class_scores(output: Any, clouds: int) -> Tensor:
    """The scores [B, classes] in what a network returned for B clouds.

    Args:
        output: What it returned; a squeezed [classes] of a single cloud is taken as well.
        clouds: Number of clouds B.

    Raises:
        InputError: If it returned no tensor.
        ShapeError: If there is not one row of scores for each cloud.
    """
    scores = scores_of(output)
    if clouds == 1 and scores.ndim == 1:
        scores = scores.unsqueeze(0)
    if scores.ndim != 2 or len(scores) != clouds:
        raise ShapeError(
            f"for {clouds} clouds the network returned {tuple(scores.shape)}, not one row of class "
            "scores for each: pass forward= that returns [B, classes] (a segmentation network has "
            "no answer for a whole cloud)."
        )
    return scores


def intercept(
    model: nn.Module,
    points: Tensor,
    *,
    forward: Forward = as_it_is,
    mask: Tensor | None = None,
    layer: str | nn.Module | None = None,
    pool: int | None = None,
) -> tuple[Any, Watch, Tensor | None]:
    """Run the network, in evaluation mode and without gradients, and watch it.

    One pass is enough unless sizes coincide, such as those of channels and points: then a second
    pass tells which reductions are none over the points, and a third leaves them out.

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
        ShapeError: If the network takes [B, C, N].
    """
    model = inner_module(model)
    output, watch, hooked = _watched(model, points, forward, mask, layer)
    false = _false_pools(model, points, forward, watch)
    watch.pools = [found for found in watch.pools if found.call not in false]
    wanted = watch.pools[pool : pool + 1] if pool is not None and pool >= 0 else []
    # Features are let go at what follows: a false pool, or a true one where an earlier is wanted.
    if any(p.features is None for p in wanted or (final_pools(watch.pools) if false else ())):
        settled = {found.call: found.doubtful for found in watch.pools}
        keep = wanted[0].call if wanted else None
        output, watch, hooked = _watched(model, points, forward, mask, layer, keep, false)
        for found in watch.pools:
            found.doubtful = settled[found.call]
    return output, watch, hooked


def _watched(
    model: nn.Module,
    points: Tensor,
    forward: Forward,
    mask: Tensor | None,
    layer: str | nn.Module | None,
    keep: int | None = None,
    skip: frozenset[int] = frozenset(),
) -> tuple[Any, Watch, Tensor | None]:
    kept: list[Tensor] = []

    def keep_output(_: nn.Module, __: Any, output: Any) -> None:
        value = first_tensor(output)
        if value is not None:
            kept[:] = [value.detach()]  # the last call counts

    hooked = None if layer is None else _find(model, layer)
    # A compiled graph calls no torch functions, so the pass is eager. Without copies of buffers,
    # because a small network feels them and those of normalisations stay in evaluation mode.
    surroundings = undisturbed(model, buffers=False, eager=True, device=points.device)
    for clone in (False, True):
        watch = Watch(points, mask, keep, skip=skip, clone=clone)
        with surroundings, watch:
            if hooked is not None:
                surroundings.hooks.append(hooked.register_forward_hook(keep_output))
            output = call_network(forward, model, points)
        if not watch.overwritten:
            break
    if layer is not None and not kept:
        raise InputError(f"layer {layer!r} returned no tensor in this forward pass.")
    return output, watch, kept[0] if kept else None


def _false_pools(
    model: nn.Module, points: Tensor, forward: Forward, watch: Watch
) -> frozenset[int]:
    """Call numbers of what was listed because sizes coincide; the others are doubtful no more."""
    samplings = {tokens.shape[1] for tokens in watch.coordinates} - {watch.points}
    for found in watch.pools:
        found.doubtful = found.doubtful or found.shape[1] in samplings
    doubtful = [found for found in watch.pools if found.doubtful]
    if not any(found.doubtful for found in final_pools(watch.pools)):
        # The choice does not hang on them: norms, distances and attention abound.
        return frozenset(found.call for found in doubtful if not found.is_max)
    two = _kinds(model, points, forward, doubtful, 2)
    tied = [found for found in doubtful if len({*two.get(found.call, (0, 1))}) == 1]
    five = _kinds(model, points, forward, tied, 5) if tied else {}
    verdicts = {
        found.call: verdict(two.get(found.call), five.get(found.call)) for found in doubtful
    }
    for found in doubtful:
        found.doubtful = verdicts[found.call] is None
    return frozenset(call for call, is_pool in verdicts.items() if is_pool is False)


def _kinds(
    model: nn.Module, points: Tensor, forward: Forward, pools: list[Pool], places: int
) -> dict[int, tuple[int, int]]:
    kinds = Kinds(pools)
    if forward is as_it_is or forward is channels_first:
        points = points[:2]  # two clouds tell as much; a forward of the user's may need them all
    surroundings = undisturbed(model, buffers=False, eager=True, device=points.device)
    # A network may fail on such clouds. What was seen until then counts, and the rest stays
    # doubtful, which is an error where it matters.
    with suppress(ArithmeticError, LookupError, RuntimeError, ValueError), surroundings, kinds:
        forward(model, few_places(points, places))
    return kinds.seen


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
    final = final_pools(pools)
    if not all(_same_tensor(pool, final[0]) for pool in final[1:]):
        raise InputError(
            f"several pools may feed the head, choose one by pool=NUMBER: {listed(pools)}. The "
            "last one is nearest to the head."
        )
    if final[0].doubtful:
        _, channels, tokens = final[0].shape
        raise InputError(
            f"of a tensor of {channels} by {tokens} it cannot be told which axis holds the points: "
            "pass clouds with another number of points, or the pool to take by pool=NUMBER: "
            f"{listed(pools)}."
        )
    return final[0]


def final_pools(pools: list[Pool]) -> list[Pool]:
    """Those that may be the global one: the maxima of the last group, else its last reduction."""
    maxima = [pool for pool in pools if pool.is_max and pool.group == pools[-1].group]
    return maxima or pools[-1:]


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
