"""What embedded training needs: a schedule, and a call after every step of every optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from cmd_plugin.callbacks._arguments import whole
from cmd_plugin.errors import InputError
from cmd_plugin.modes import Embedding

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["StepHooks", "embedding_of"]


class StepHooks:
    """Calls a function after every step of some optimizers, until it is told to stop.

    Attributes:
        handles: One for each optimizer that is watched.
    """

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave the optimizers behind."""
        return {"handles": []}

    def watch(
        self,
        optimizers: Iterable[torch.optim.Optimizer],
        project: str,
        after_step: Callable[..., None],
    ) -> None:
        """Call ``after_step(optimizer, ...)`` from now on, if weights are projected at every step.

        Args:
            optimizers: Those of the run.
            project: When embedded weights are written, as in ``Embedding.project``.
            after_step: What to call.

        Raises:
            InputError: With ``project="tie"`` and an optimizer that moves weights several times in
                a step.
        """
        self.stop()
        if project == "epoch":
            return
        for optimizer in optimizers:
            if project == "tie" and isinstance(optimizer, torch.optim.LBFGS):
                message = (
                    "project='tie' has to write weights between the evaluations that LBFGS makes "
                    "inside one step: use another optimizer, or project='step'."
                )
                raise InputError(message)
            self.handles.append(optimizer.register_step_post_hook(after_step))

    def stop(self) -> None:
        """Leave nothing behind on the optimizers."""
        while self.handles:
            self.handles.pop().remove()


def embedding_of(mode: str, embed_every: int, *schedule: Any) -> Embedding | None:
    """Return the schedule by which weights are embedded; None with ``mode="online"``.

    Args:
        mode: ``"online"`` or ``"embedded"``.
        embed_every: Snapshots between two events.
        schedule: The other settings of :class:`Embedding`, in its order.

    Raises:
        InputError: If one of them is out of range, or nobody follows them.
    """
    embedding = Embedding(whole("embed_every", embed_every, 1), *schedule)
    if mode == "embedded":
        return embedding
    if embedding != Embedding():
        message = (
            "embed_every, embed_percent, relative, project and slots say how weights are "
            "embedded, and mode='online' embeds none: add mode='embedded' or leave them out."
        )
        raise InputError(message)
    return None
