"""Whether modelled weights did far worse than raw ones, told from what a validation logged."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cmd_plugin.callbacks._recording import Published

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["higher_is_better", "is_far_worse", "warn_when_far_worse"]

_logger = logging.getLogger("cmd_plugin.callbacks.cmd")  # of the callback the user knows

_LOWER = ("loss", "error", "err", "mae", "mape", "mse", "rmse", "nll", "perplexity", "ppl", "wer")
_HIGHER = (
    *("acc", "accuracy", "auc", "auroc", "f1", "precision", "recall", "ap", "map", "iou", "miou"),
    *("dice", "jaccard", "r2", "psnr", "ssim", "bleu"),
)


def warn_when_far_worse(trainer: Trainer, modelled: Mapping[str, Published], buffers: str) -> bool:
    """Compare what both sets of weights logged, and warn of the first metric that is far worse.

    Args:
        trainer: The trainer, which has the metrics of the raw weights.
        modelled: Metrics of the modelled weights, by the names the module gave them.
        buffers: Where the modelled weights have their running statistics from.

    Returns:
        Whether a metric is far worse.
    """
    for name, metric in modelled.items():
        higher = higher_is_better(name) if metric.higher is None else metric.higher
        if higher is None or name not in trainer.callback_metrics:
            continue
        raw, shown = float(trainer.callback_metrics[name]), float(metric.value)
        if is_far_worse(raw, shown, higher):
            if trainer.is_global_zero:
                _logger.warning(
                    "After epoch %d, %s is %.4g with the modelled weights and %.4g with the raw "
                    "ones: try %s, more modes or a longer warmup, and until then use the raw "
                    "weights with test='raw' and checkpoint_weights='raw'.",
                    trainer.current_epoch,
                    name,
                    shown,
                    raw,
                    "more recalibration_batches"
                    if buffers == "recalibrate"
                    else "buffers='recalibrate'",
                )
            return True
    return False


def is_far_worse(raw: float, modelled: float, higher: bool) -> bool:
    """Whether a metric is far worse with the modelled weights than with the raw ones.

    One of which more is better has to fall by more than 0.1 and by more than 20 %; one of which
    less is better has to more than double. Nothing is said where the raw value is not positive.
    """
    if not math.isfinite(raw) or raw <= 0:
        return False
    if higher:  # in both lines a modelled value of NaN counts as far worse
        return not (modelled >= raw - 0.1 or modelled >= 0.8 * raw)
    return not modelled <= 2 * raw


def higher_is_better(name: str) -> bool | None:
    """Tell from a metric's name whether more of it is better; None if the name does not say.

    Words end at punctuation and at capitals: ``val/top5_acc``, ``valLoss``, ``BinaryF1Score``.
    """
    words = re.split(r"[^0-9A-Za-z]+", name)
    words += re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*", name)
    lower = {word.lower() for word in words}
    if not lower.isdisjoint(_LOWER):  # "f1_loss" is a loss, "top5_error" an error
        return False
    return None if lower.isdisjoint(_HIGHER) else True
