"""What embedded weights do *while* a client trains: stay on their curves, share their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from flwr.app import Context
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from cmd_plugin.federated.client import load_codec, load_request, note_obeyed
from cmd_plugin.federated.codec import PROJECTIONS
from cmd_plugin.kernels import FlatView
from cmd_plugin.modes.layout import find_weights
from cmd_plugin.modes.tied import moved_by

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
    note_obeyed(context)
    if codec is None or codec.plan.tied is None or project == "epoch":
        yield
        return
    layout = codec.packing.layout
    tensors = list(find_weights(layout, model, "the model").values())
    view = FlatView(tensors)
    tied = codec.plan.tied.seen_by(view, layout)

    @torch.no_grad()
    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        tied.tie_gradients(tensors, moved_by([optimizer], layout, tensors))

    @torch.no_grad()
    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        own = moved_by([optimizer], layout, tensors)
        if own is None or any(own):  # some optimizers train other models
            moves = pool and project == "step"
            profile = tied.pool(view, own) if moves else view.gather(tied.choice.references)
            tied.write(view, profile, own)

    handles = [register_optimizer_step_post_hook(after_step)]
    if project == "tie":
        handles.append(register_optimizer_step_pre_hook(before_step))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
