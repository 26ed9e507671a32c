"""The one evaluation that all variants of a network go through."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["Score", "evaluate"]


class Score(NamedTuple):
    """Mean cross entropy (nats) and accuracy (in [0, 1]) over a held-out set."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
) -> Score:
    """Loss and accuracy of a network, which is left in the modes (training or not) it was in.

    Draws nothing from the global random state as long as `batches` does not.

    Args:
        model: Maps images [B, C, H, W] to class scores [B, classes].
        batches: Images and labels int64 [B].
        device: Where the network is.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    count = 0
    try:
        for images, labels in batches:
            answers = labels.to(device)
            scores = model(images.to(device))
            loss += cross_entropy(scores, answers, reduction="sum").double()
            correct += (scores.argmax(dim=1) == answers).sum()
            count += len(labels)
    finally:
        for module, flag in training.items():
            module.training = flag
    return Score(float(loss) / count, int(correct) / count)
