"""A second validation pass inside Lightning's own, that leaves no trace.

Lightning validates the raw weights. To show a second set of weights beside them, the module's own
``validation_step`` is run once more over the same data loaders, with ``self.log`` diverted so that
the metrics can be published under other names. Everything the pass could disturb is put back:
random streams, torchmetrics objects, buffers and plain attributes of the module.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from cmd_plugin.callbacks._recording import LogRecorder, Published
from cmd_plugin.errors import PluginError

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["refuse_data_loader_iterator", "second_pass", "untouched"]

_MISSING = object()

# Exactly these, no subclasses: a container of somebody's own may not survive being refilled.
_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)


def second_pass(trainer: Trainer, pl_module: LightningModule) -> dict[str, Published]:
    """Validate the module as it stands, over the loaders of the validation that just ended.

    Call it from ``on_validation_end``. The module's ``validation_step`` runs through the strategy
    (precision, wrapping and device transfer as usual) between its hooks
    ``on_validation_epoch_start``, ``on_validation_batch_start``, ``on_validation_batch_end`` and
    ``on_validation_epoch_end``; other callbacks are not told.

    Returns:
        The epoch metrics by the names the module gave them, equal on every process.
    """
    standalone = getattr(trainer.state.fn, "value", None) == "validate"
    loop = trainer.validate_loop if standalone else trainer.fit_loop.epoch_loop.val_loop
    combined: Any = loop._combined_loader
    if combined is None:
        return {}
    several = getattr(combined, "_mode", "sequential") == "sequential"
    several = several and len(combined.flattened) > 1
    strategy = trainer.strategy
    takes_index = _takes_batch_index(pl_module.validation_step)
    with ExitStack() as stack:
        stack.enter_context(untouched(pl_module, combined.flattened))
        recorder = stack.enter_context(LogRecorder(pl_module))
        _call_hook(pl_module, recorder, "on_validation_epoch_start")
        for batch, index, loader in combined:
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=loader)
            batch = strategy.batch_to_device(batch, dataloader_idx=loader)
            recorder.on_batch(batch, loader if several else None)
            which = (loader,) if several else ()
            _call_hook(pl_module, recorder, "on_validation_batch_start", batch, index, *which)
            recorder.on_hook("validation_step")
            arguments = (batch, index) if takes_index else (batch,)
            output = strategy.validation_step(*arguments, *which)
            _call_hook(pl_module, recorder, "on_validation_batch_end", output, batch, index, *which)
        recorder.on_batch(None, None)
        _call_hook(pl_module, recorder, "on_validation_epoch_end")
        return recorder.results()


def refuse_data_loader_iterator(pl_module: LightningModule) -> None:
    """Raise PluginError if the module's ``validation_step`` fetches its batches itself."""
    step = getattr(pl_module, "validation_step", None)
    if callable(step) and "dataloader_iter" in inspect.signature(step).parameters:
        message = (
            "evaluate='both' cannot repeat a validation_step(dataloader_iter) that fetches its "
            "own batches: use evaluate='modelled' or 'raw'."
        )
        raise PluginError(message)


def _call_hook(pl_module: LightningModule, recorder: LogRecorder, hook: str, *args: Any) -> None:
    function = getattr(pl_module, hook, None)
    if callable(function):
        recorder.on_hook(hook)
        function(*args)


def _takes_batch_index(step: Callable[..., Any]) -> bool:
    parameters = list(inspect.signature(step).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


@contextmanager
def untouched(pl_module: LightningModule, loaders: Sequence[Any] = ()) -> Iterator[None]:
    """Put back what running the module's code disturbs.

    That is random streams (of the loaders too), torchmetrics objects, buffers and plain attributes.
    """
    with ExitStack() as stack:
        stack.enter_context(_same_random_streams(pl_module.device, loaders))
        stack.enter_context(_same_attributes(pl_module))
        stack.enter_context(_spare_metrics(pl_module))
        yield


@contextmanager
def _same_random_streams(device: torch.device, loaders: Sequence[Any]) -> Iterator[None]:
    """Restore the random streams of Python, NumPy, torch (CPU and this device) and the loaders."""
    generators: dict[int, torch.Generator] = {}
    for loader in loaders:
        sampler, batch_sampler = (getattr(loader, k, None) for k in ("sampler", "batch_sampler"))
        for owner in (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                generators[id(generator)] = generator
    states = [(generator, generator.get_state()) for generator in generators.values()]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's stream
    devices = [device] if device.type in ("cuda", "xpu") else []
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for generator, state in states:
            generator.set_state(state)


@contextmanager
def _same_attributes(pl_module: nn.Module) -> Iterator[None]:
    """Put back buffers, and the plain attributes that validation code writes on modules.

    Lists, dicts, sets and tensors get their contents back, everything else its binding. State kept
    elsewhere (in a helper object, say) is beyond reach.
    """
    inner = set(nn.Module().__dict__) - {"training"}
    buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]
    saved: list[tuple[dict[str, Any], str, Any, Any]] = []
    for module in pl_module.modules():
        if isinstance(module, (Metric, MetricCollection)):
            continue
        for key, value in module.__dict__.items():
            if key in inner or key.startswith(("_trainer", "_fabric", "_jit")):
                continue
            kept: Any = None
            if type(value) in _CONTAINERS:
                kept = copy.copy(value)
            elif isinstance(value, Tensor):
                kept = value.detach().clone()
            saved.append((module.__dict__, key, value, kept))
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
            for attributes, key, value, kept in saved:
                if attributes.get(key, _MISSING) is not value:
                    attributes[key] = value
                if isinstance(value, Tensor):
                    value.copy_(kept)
                elif kept is not None:
                    _refill(value, kept)


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(contents)
    else:
        container.update(contents)


@contextmanager
def _spare_metrics(pl_module: nn.Module) -> Iterator[None]:
    """Let fresh copies of the torchmetrics objects work in place of the module's own.

    Lightning computes and resets the originals after ``on_validation_end``, so they must not see
    the batches of this pass.
    """
    places: list[tuple[nn.Module, str, nn.Module]] = []
    todo = [pl_module]
    while todo:
        parent = todo.pop()
        for name, child in parent._modules.items():
            if isinstance(child, (Metric, MetricCollection)):
                places.append((parent, name, child))
            elif child is not None:
                todo.append(child)
    spares: dict[int, Any] = {}
    for _, _, metric in places:
        if id(metric) not in spares:
            spare = copy.deepcopy(metric)
            spare.reset()  # type: ignore[operator]
            spares[id(metric)] = spare
    try:
        for parent, name, metric in places:
            parent._modules[name] = spares[id(metric)]
        yield
    finally:
        for parent, name, metric in places:
            parent._modules[name] = metric
