"""What surrounds a forward pass that only measures: afterwards the network is what it was."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

__all__ = ["kept_buffers", "undisturbed"]

# Where a buffer is registered, its name there, the tensor, and a copy of its values.
_Kept = tuple[dict[str, Tensor | None], str, Tensor, Tensor]


class undisturbed:  # noqa: N801 - used like torch.no_grad
    """Use networks inside, and find them exactly as they were afterwards, also after an error.

    Put back bit for bit are the training flag of every module, all buffers (running statistics,
    counters), gradients, the gradient mode, and torch's global random state on the CPU and on the
    networks' devices (CUDA or XPU). Hooks whose handles are appended to ``hooks`` are removed.
    Parameters are not copied, since no forward pass writes them, and buffers registered inside
    stay.

    Asked for little it costs little: of a small network in evaluation mode, with ``buffers=False``,
    tens of microseconds. It can be entered again once it is left.

    Args:
        *models: The networks, none to protect the random state of the CPU alone.
        evaluation: Whether they are in evaluation mode inside; else in the mode they were in.
        gradients: Whether gradients may be taken inside. Then the gradient mode is left alone, and
            parameters have no gradients inside, so that theirs are not added to.
        buffers: Whether buffers come back; not needed where evaluation mode protects all of them.
        random: Whether the random state comes back.
        eager: Whether compiled networks run uncompiled inside: a compiled graph calls no hooks that
            were added later and no torch functions.
        device: Where the networks compute, if known; by default where their tensors are.

    Attributes:
        hooks: Handles of hooks to remove on exit.
    """

    def __init__(
        self,
        *models: nn.Module,
        evaluation: bool = True,
        gradients: bool = False,
        buffers: bool = True,
        random: bool = True,
        eager: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.hooks: list[RemovableHandle] = []
        self._models, self._device = models, device
        self._evaluation, self._gradients, self._buffers = evaluation, gradients, buffers
        self._random, self._eager = random, eager

    # One class in place of nested context managers, so that less Python surrounds the network.
    def __enter__(self) -> Self:
        self._stance: Any = None
        # First, because inside a compiled region this raises. Before the first compilation there is
        # nothing to switch off, and asking would load the compiler.
        if self._eager and "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")
        self._grad_mode = torch.is_grad_enabled()
        self._flags = flags = _training_flags(self._models)
        self._states = self._random_states() if self._random else None
        self._kept_buffers = _copies(flags) if self._buffers else None
        self._kept_gradients: list[tuple[nn.Parameter, Tensor | None]] | None = None
        try:
            if self._gradients:
                self._kept_gradients = [(p, p.grad) for p in _parameters(flags)]
                for parameter, _ in self._kept_gradients:
                    parameter.grad = None
            else:
                torch.set_grad_enabled(False)
            if self._evaluation and True in flags.values():  # setting the flags is slow
                for model in self._models:
                    model.eval()
        except BaseException:  # from a train() of the user's own
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            while self.hooks:
                self.hooks.pop().remove()
            # A train() of the user's own may have more to undo than flags.
            if any(type(module).train is not nn.Module.train for module in self._flags):
                for model in self._models:
                    if self._flags[model] and not model.training:
                        model.train()
        finally:
            for module, training in self._flags.items():
                if module.training != training:
                    module.training = training
            if self._kept_buffers is not None:
                _put_back(self._kept_buffers)
            for parameter, gradient in self._kept_gradients or ():
                parameter.grad = gradient
            torch.set_grad_enabled(self._grad_mode)
            if self._states is not None:
                self._put_back_random(*self._states)
            if self._stance is not None:
                self._stance.__exit__(None, None, None)

    def _random_states(self) -> tuple[Tensor, dict[torch.device, Tensor]]:
        if self._device is None:
            devices = {tensor.device for tensor in _tensors(self._flags)}
        else:
            devices = {self._device}
        return torch.get_rng_state(), {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in devices
            if device.type in ("cuda", "xpu")
        }

    def _put_back_random(self, own: Tensor, others: dict[torch.device, Tensor]) -> None:
        torch.set_rng_state(own)
        for device, state in others.items():
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def kept_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back the values of the modules' own buffers on exit, bit for bit, also after an error.

    A buffer that was replaced by another tensor is the old tensor again. If the network was moved
    or converted meanwhile, the values go where its buffers are then.

    Args:
        modules: Only their own buffers are kept, not those of modules inside.
    """
    kept = _copies(modules)
    try:
        yield
    finally:
        _put_back(kept)


def _training_flags(models: Iterable[nn.Module]) -> dict[nn.Module, bool]:
    # A walk of our own, because modules() makes up the names of all; a small network feels that.
    flags: dict[nn.Module, bool] = {}
    waiting: list[nn.Module | None] = list(models)
    while waiting:
        module = waiting.pop()
        if module is not None and module not in flags:
            flags[module] = module.training
            if module._modules:
                waiting.extend(module._modules.values())
    return flags


def _parameters(modules: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                yield parameter


def _tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    yield from _parameters(modules)
    for module in modules:
        yield from (buffer for buffer in module._buffers.values() if buffer is not None)


def _copies(modules: Iterable[nn.Module]) -> list[_Kept]:
    kept: list[_Kept] = [
        (module._buffers, name, buffer, torch.empty_like(buffer))
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with torch.no_grad():
        _copy_all((copy, buffer) for _, _, buffer, copy in kept)
    return kept


def _copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy (into, from) pairs: on a GPU in one launch for all of a dtype."""
    alike: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for into, values in pairs:
        targets, sources = alike.setdefault((into.device, into.dtype), ([], []))
        targets.append(into.detach())
        sources.append(values.detach())
    for targets, sources in alike.values():
        torch._foreach_copy_(targets, sources)


def _put_back(kept: list[_Kept]) -> None:
    pairs = []
    with torch.no_grad():
        for owner, name, buffer, copy in kept:
            current = owner.get(name)
            if current is not buffer:
                if current is None or (current.device, current.dtype) == (copy.device, copy.dtype):
                    owner[name] = buffer
                else:
                    buffer = current
            pairs.append((buffer, copy))
        _copy_all(pairs)
