"""A LightningModule as a client: one call a round, and nothing forgotten in between."""

from __future__ import annotations

import inspect
import io
import tempfile
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict

from cmd_plugin.errors import InputError
from cmd_plugin.federated.training import embedded_training
from cmd_plugin.runs.process import quiet_lightning

__all__ = ["fit_round"]

_STATE = "cmd-plugin-lightning"
_STATE_TYPE = "cmd-plugin.lightning.v1"


def fit_round(
    message: Message,
    context: Context,
    module: Any,
    trainer: Any,
    train_dataloaders: Any,
    *,
    epochs: int = 1,
) -> Message:
    """Train a LightningModule for one round, and return the reply.

    Each message may come to a new process with a new ``Trainer``. What Lightning would need to
    resume (optimizers, schedulers, callbacks, loops, but not the weights) is kept in
    ``context.state`` as a checkpoint, and the round is a resumed ``fit`` of so many epochs more
    with the server's weights. A client that lost its state begins with fresh optimizers.

    Works with either Lightning namespace. Give the trainer
    ``enable_checkpointing=False, logger=False, enable_progress_bar=False`` unless its files and
    output are wanted in every round. A :class:`cmd_plugin.callbacks.CMDCallback` in embedded mode
    would embed weights of its own beside the server's: use the strategy instead.

    Args:
        message: The message to train on, with an ArrayRecord of the module's ``state_dict``.
        context: The client's context.
        module: The LightningModule.
        trainer: A trainer that has not trained yet.
        train_dataloaders: What ``trainer.fit`` takes.
        epochs: Epochs in this round.

    Raises:
        InputError: If the message holds not exactly one ArrayRecord.
    """
    records = message.content.array_records
    if len(records) != 1:
        raise InputError(f"expected one ArrayRecord in the message, got {len(records)}.")
    ((key, record),) = records.items()
    weights = record.to_torch_state_dict()
    module.load_state_dict(weights)
    with tempfile.TemporaryDirectory() as folder, quiet_lightning():
        path = Path(folder) / "round.ckpt"
        before = _load(context)
        # Saved after a whole fit, when Lightning has counted the last epoch already.
        done = 0 if before is None else int(before["epoch"])
        if before is not None:
            before["state_dict"] = weights
            torch.save(before, path)
        trainer.fit_loop.max_epochs = done + epochs
        trainer.fit_loop.epoch_loop.max_steps = -1
        options: dict[str, Any] = {}
        if "weights_only" in inspect.signature(trainer.fit).parameters:  # Lightning 2.6 and later
            options["weights_only"] = True
        with embedded_training(context, module):
            resumed = None if before is None else str(path)
            trainer.fit(module, train_dataloaders, ckpt_path=resumed, **options)
        trainer.save_checkpoint(path)
        _save(context, path)
    metrics = {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if torch.as_tensor(value).numel() == 1
    }
    count = _count(train_dataloaders)
    content = RecordDict(
        {
            key: ArrayRecord(module.state_dict()),
            "metrics": MetricRecord({"num-examples": count, **metrics}),
        }
    )
    return Message(content, reply_to=message)


def _count(loaders: Any) -> int:
    """Number of training examples, the client's weight in the average."""
    return len(loaders.dataset)


def _load(context: Context) -> dict[str, Any] | None:
    record = context.state.get(_STATE)
    if not isinstance(record, ArrayRecord) or record["checkpoint"].stype != _STATE_TYPE:
        return None
    state: dict[str, Any] = torch.load(io.BytesIO(record["checkpoint"].data), weights_only=True)
    return state


def _save(context: Context, path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["state_dict"] = {}  # the server's come with the next message
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    context.state[_STATE] = ArrayRecord(
        {"checkpoint": Array(dtype="bytes", shape=(len(data),), stype=_STATE_TYPE, data=data)}
    )
