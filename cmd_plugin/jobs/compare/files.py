"""Where one kind of training of a comparison writes.

::

    metrics.csv                   seed,epoch,variant,loss,accuracy: one row per evaluation
    modes.safetensors             the first seed's decomposition
    model_cmd.safetensors         the first seed's network with modelled weights
    checkpoints/epoch=NNN.ckpt    the first seed's weights after each epoch
    embedded/                     the same files of the embedded trainings
    report.png, result.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmd_plugin.networks.weights import save_weights
from cmd_plugin.runs.job import Job
from cmd_plugin.runs.tensors import Schema

__all__ = ["Row", "TrainingFiles"]

_COLUMNS: dict[str, Any] = {
    "seed": int,
    "epoch": int,
    "variant": str,
    "loss": float,
    "accuracy": float,
}
_CORRELATION = Schema("correlation", 1, "a correlation matrix")


class Row(NamedTuple):
    """One evaluation: a line of metrics.csv. Loss in nats, accuracy in [0, 1]."""

    seed: int
    epoch: int
    variant: str
    loss: float
    accuracy: float


class TrainingFiles:
    """The files of the ``online`` or the ``embedded`` trainings.

    Args:
        job: The comparison.
        kind: ``online`` or ``embedded``.
    """

    def __init__(self, job: Job, kind: str) -> None:
        self.kind = kind
        self._folder = job.folder
        self._prefix = "" if kind == "online" else f"{kind}/"
        self._metrics = job.table(f"{self._prefix}metrics.csv", _COLUMNS)

    def path(self, name: str) -> Path:
        """Return where a file of these trainings lies."""
        return self._folder.path(f"{self._prefix}{name}")

    def checkpoint(self, seed: int) -> Path:
        """Return where everything lies that a seed needs to go on after its last epoch."""
        return self._folder.state(f"{self.kind}/seed{seed}/last.ckpt")

    def append(self, rows: list[Row]) -> None:
        """Add the rows of an epoch."""
        self._metrics.append(rows)

    def rows(self) -> list[Row]:
        """Return all rows, in the order they were written."""
        return [Row(*row) for row in self._metrics.rows()]

    def forget_from(self, seed: int, epoch: int) -> None:
        """Drop the rows of a seed from an epoch on, because they are going to be made again."""
        self._metrics.replace([r for r in self.rows() if r.seed != seed or r.epoch < epoch])

    def keep_correlation(self, correlation: tuple[Tensor, Tensor]) -> None:
        """Keep the matrix [K, K] that the modes were made from, and the modes [K], once."""
        path = self._correlation
        if not path.exists():
            matrix, labels = correlation
            # It is drawn, not computed with: half precision is plenty.
            _CORRELATION.save(path, {"correlation": matrix.half(), "labels": labels}, {})

    def correlation(self) -> tuple[Tensor, Tensor] | None:
        """Return what :meth:`keep_correlation` kept, float32 and int64; None if nothing."""
        if not self._correlation.exists():
            return None
        tensors, _ = _CORRELATION.load(self._correlation)
        return tensors["correlation"].to(torch.float32), tensors["labels"]

    @property
    def _correlation(self) -> Path:
        return self._folder.state(f"{self.kind}/correlation.safetensors")

    def keep_network(self, state: Mapping[str, Tensor]) -> None:
        """Write the network with modelled weights, a plain state_dict that any reader takes."""
        save_weights(self.path("model_cmd.safetensors"), state)
