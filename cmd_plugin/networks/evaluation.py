"""The one evaluation that all variants of a network go through."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cmd_plugin.errors import InputError
from cmd_plugin.networks.measuring import undisturbed

__all__ = ["Score", "evaluate"]


class Score(NamedTuple):
    """Mean cross entropy (nats) and accuracy (in [0, 1]) over a held-out set."""

    loss: float
    accuracy: float


def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
) -> Score:
    """Loss and accuracy of a network in evaluation mode, which is left exactly as it was.

    Args:
        model: Maps images [B, C, H, W] to class scores [B, classes].
        batches: Images and labels int64 [B].
        device: Where the network is.

    Raises:
        InputError: If there is nothing in the batches.
    """
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    count = 0
    with undisturbed(model):
        for images, labels in batches:
            answers = labels.to(device)
            scores = model(images.to(device))
            loss += cross_entropy(scores, answers, reduction="sum").double()
            correct += (scores.argmax(dim=1) == answers).sum()
            count += len(labels)
    if not count:
        raise InputError("there is nothing to evaluate on: the batches hold no example.")
    return Score(float(loss) / count, int(correct) / count)
