"""What embedded weights do *while* a client trains: stay on their curves, share their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from cmd_plugin.federated.client import load_codec, load_request
from cmd_plugin.federated.codec import PROJECTIONS, ModeCodec
from cmd_plugin.kernels import FlatView, apply_embedding, fold_gradients
from cmd_plugin.modes.layout import find_weights

__all__ = ["embedded_training"]


@contextmanager
def embedded_training(context: Context, model: nn.Module) -> Iterator[None]:
    """Train inside this block as the server's strategy asks for.

    With ``project="epoch"`` nothing happens. With ``"step"`` embedded weights are put back on their
    curves after every optimizer step; with ``"tie"`` their gradients are first handed to the
    references (the chain rule), so that the step moves the curves. With ``"step"`` and ``pool`` the
    step itself is projected: the references go where a least-squares fit to the references and
    their members puts them, so that the whole training stays among the models the curves can
    express (beyond the paper). Works for every optimizer that steps inside the block on this
    model's parameters, also for one that a Lightning ``Trainer`` makes; no hook is left behind.

    Args:
        context: The client's context, as given to its train function.
        model: The model being trained; its parameters have the names the arrays were made with.

    Raises:
        StateMismatch: If the model has other tensors than the server's.
    """
    codec = load_codec(context)
    number, pool = load_request(context)
    project = PROJECTIONS[number]
    if codec is None or project == "epoch" or not len(codec.plan.members):
        yield
        return
    curves = _Curves(codec, model, pool=pool and project == "step")
    handles = [register_optimizer_step_post_hook(curves.after_step)]
    if project == "tie":
        handles.append(register_optimizer_step_pre_hook(curves.before_step))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Curves:
    """The embedded weights of one model in training."""

    def __init__(self, codec: ModeCodec, model: nn.Module, *, pool: bool) -> None:
        plan, self.layout = codec.plan, codec.packing.layout
        self.tensors = list(find_weights(self.layout, model, "the model").values())
        self.view = FlatView(self.tensors)
        device, dtype = self.view.device, self.view.dtype
        self.references = torch.from_numpy(plan.references)
        self.embedded = torch.from_numpy(plan.embedded).to(device)
        self.mode = torch.zeros(plan.numel, dtype=torch.uint8)
        self.scale = torch.zeros(plan.numel, dtype=dtype)
        self.offset = torch.zeros(plan.numel, dtype=dtype)
        for array, values in (
            (self.mode, plan.mode),
            (self.scale, plan.scale),
            (self.offset, plan.offset),
        ):
            array[torch.from_numpy(plan.members)] = torch.from_numpy(np.array(values)).to(
                array.dtype
            )
        self.mode, self.scale, self.offset = (
            array.to(device) for array in (self.mode, self.scale, self.offset)
        )
        self.normal: tuple[Tensor, Tensor] | None = None
        if pool:
            squares, shift = plan.fold(plan.scale), plan.fold(plan.offset)
            self.normal = (
                torch.from_numpy(1.0 + squares).to(device),
                torch.from_numpy(shift).to(device),
            )

    def _trains(self, optimizer: torch.optim.Optimizer) -> bool:
        mine = {id(tensor) for tensor in self.tensors}
        return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])

    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Hand the gradients of embedded weights to the references."""
        if not self._trains(optimizer):
            return
        sums = self._no_sums()
        for tensor, start, size in zip(
            self.tensors, self.layout.offsets, self.layout.sizes, strict=True
        ):
            if tensor.grad is None:
                continue
            flat = tensor.grad.reshape(-1)  # a copy if the gradient is not contiguous
            sums += self._fold(flat, slice(start, start + size))
            _write_back(flat, tensor)
        starts = torch.tensor(self.layout.offsets)
        owners = torch.searchsorted(starts, self.references, right=True) - 1
        for number, owner in enumerate(owners.tolist()):
            tensor = self.tensors[owner]
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            flat = tensor.grad.reshape(-1)
            flat[int(self.references[number]) - self.layout.offsets[owner]] += sums[number]
            _write_back(flat, tensor)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Put embedded weights back on their curves."""
        if not self._trains(optimizer):
            return
        profile = self.view.gather(self.references)
        if self.normal is not None:
            profile = self._fit(profile, *self.normal)
            self.view.put(self.references, profile)
        apply_embedding(self.view, self.embedded, self.mode, self.scale, self.offset, profile)

    def _fit(self, profile: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        r"""Return the references [M] nearest to where the step put them and their members.

        The normal equation of each mode, :math:`r_m = (r_m + \sum_i a_i (w_i - b_i)) / (1 + \sum_i
        a_i^2)`. Folding zeroes members that are read in place; they are written right after this.
        """
        sums, scratch = self._no_sums(), self.view.scratch()
        for number, start, stop in self.view.blocks():
            sums += self._fold(self.view.read(number, scratch), slice(start, stop))
        return ((profile.double() + sums - shift) / weight).to(profile.dtype)

    def _no_sums(self) -> Tensor:
        return torch.zeros(len(self.references), dtype=torch.float64, device=self.view.device)

    def _fold(self, values: Tensor, at: slice) -> Tensor:
        """Sum scale times value over the members of each mode, [M]; their values become zero."""
        modes = len(self.references)
        return fold_gradients(values, self.embedded[at], self.mode[at], self.scale[at], modes)


def _write_back(flat: Tensor, tensor: Tensor) -> None:
    if tensor.grad is not None and flat.data_ptr() != tensor.grad.data_ptr():
        tensor.grad.copy_(flat.view(tensor.grad.shape))
