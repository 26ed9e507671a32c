"""Whitening of features inside any network, one for each layer asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from cmd_plugin.clip.statistics import GaussianStatistics, Normalize
from cmd_plugin.clip.whitening import Whitening
from cmd_plugin.errors import InputError
from cmd_plugin.networks import undisturbed

__all__ = ["fit_layers", "layer_features", "pool_mean", "score_layers"]

Pool = Callable[[Any], Tensor]


def pool_mean(output: Any) -> Tensor:
    """Return [B, d] features of what a layer puts out: the mean over everything but d.

    Args:
        output: [B, d]; [B, tokens, d]; or [B, d, ...] with two axes of places or more.

    Raises:
        InputError: If it is something else.
    """
    if not isinstance(output, Tensor) or output.ndim < 2 or not output.is_floating_point():
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"a layer puts out {what}, no features [B, d]: give a pool that takes it.")
    if output.ndim == 3:
        return output.mean(dim=1)
    return output.flatten(2).mean(dim=2) if output.ndim > 3 else output


def layer_features(
    model: nn.Module, inputs: Tensor, layers: Sequence[str], *, pool: Pool = pool_mean
) -> dict[str, Tensor]:
    """Return what layers of a network make of a batch; the network is left as it was.

    Args:
        model: Called with ``inputs``, in evaluation mode.
        inputs: A batch, on the device of the network.
        layers: Names of modules, of ``model.named_modules()``.
        pool: Turns what a layer puts out into features [B, d].

    Returns:
        [B, d] by name, in the order of ``layers``.

    Raises:
        InputError: If a name is unknown, a layer does not run or more than once, or puts out what
            ``pool`` does not take.
    """
    modules = dict(model.named_modules())
    unknown = [name for name in layers if name not in modules]
    if unknown or not layers:
        known = ", ".join(name for name in modules if name)
        raise InputError(f"layers {unknown} are not among {known}: name some of those.")
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if name in found:
                raise InputError(f"layer {name!r} runs more than once: name one that runs once.")
            found[name] = pool(output)

        return hook

    with undisturbed(model, eager=True) as guard:
        for name in layers:
            guard.hooks.append(modules[name].register_forward_hook(keep(name)))
        model(inputs)
    silent = [name for name in layers if name not in found]
    if silent:
        raise InputError(f"layers {silent} did not run on this batch: name others.")
    return {name: found[name] for name in layers}


def fit_layers(
    model: nn.Module,
    batches: Iterable[Tensor],
    layers: Sequence[str],
    *,
    pool: Pool = pool_mean,
    normalize: Normalize = "raw",
    **options: Any,
) -> dict[str, Whitening]:
    """Fit a whitening to each of several layers of a network; memory does not grow with batches.

    Args:
        model: The network.
        batches: Inputs, one tensor a batch.
        layers: Names of modules.
        pool: Turns what a layer puts out into features [B, d].
        normalize: ``"l2"`` divides each row by its norm first.
        **options: Of :meth:`Whitening.fit`.

    Returns:
        A whitening by layer.

    Raises:
        InputError: As :func:`layer_features`; or if there are too few rows.
    """
    gathered: dict[str, GaussianStatistics] = {}
    for inputs in batches:
        for name, x in layer_features(model, inputs, layers, pool=pool).items():
            if name not in gathered:
                about = {"layer": name}
                gathered[name] = GaussianStatistics(x.shape[1], normalize=normalize, about=about)
            gathered[name].update(x)
    if not gathered:
        raise InputError("there are no batches to fit to.")
    return {name: Whitening.fit(each, **options) for name, each in gathered.items()}


def score_layers(
    model: nn.Module,
    inputs: Tensor,
    whitenings: Mapping[str, Whitening],
    *,
    pool: Pool = pool_mean,
) -> dict[str, Tensor]:
    """Return the squared norm of each row in the whitening of each layer, [B] by name.

    Args:
        model: The network.
        inputs: A batch.
        whitenings: From :func:`fit_layers`.
        pool: As given there.

    Raises:
        InputError: As :func:`layer_features`.
        ShapeError: If a layer has another number of features.
    """
    features = layer_features(model, inputs, list(whitenings), pool=pool)
    return {name: whitenings[name].squared_norm(x) for name, x in features.items()}
