"""The terms of the loss, each a function of its own; images are in [-1, 1], losses are means.

With ``own`` the branches of an image for its class y and ``other`` those for another class y',
mixtures are made that must look real (:func:`adversarial`), be near the image
(:func:`reconstruction`) and be told as y and y' (:func:`class_loss`). Because any mixture must,
the branches that are mixed cannot say which class it is: only the first can.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    kl_div,
    log_softmax,
    softmax,
)

from cmd_plugin.errors import ShapeError

__all__ = [
    "adversarial",
    "blend",
    "class_loss",
    "distillation",
    "distinct_reconstruction",
    "gradient_penalty",
    "other_classes",
    "reconstruction",
    "sparsity",
    "uniformity",
]


def blend(own: Tensor, other: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Mix the agnostic branches of two classes, once with the distinct branch and once without.

    ``a = own_1 + sum_i [s_i own_i + (1 - s_i) other_i]`` and ``b`` the same with the shares
    exchanged and without ``own_1``, for the branches i from 2 on. ``other_1`` is not used.

    Args:
        own: Branches for the image's class, [B, n, C, H, W].
        other: Branches for another class, [B, n, C, H, W].
        shares: [B, n - 1] in [0, 1].

    Returns:
        a and b, each [B, C, H, W].

    Raises:
        ShapeError: If the shapes do not fit.
    """
    if own.shape != other.shape or shares.shape != (own.shape[0], own.shape[1] - 1):
        raise ShapeError(
            f"branches {tuple(own.shape)} and {tuple(other.shape)} do not go with shares "
            f"{tuple(shares.shape)}: give equal shapes [B, n, C, H, W] and [B, n - 1]."
        )
    shares = shares[:, :, None, None, None]
    mine, theirs = own[:, 1:], other[:, 1:]
    with_class = own[:, 0] + (shares * mine + (1.0 - shares) * theirs).sum(dim=1)
    without = ((1.0 - shares) * mine + shares * theirs).sum(dim=1)
    return with_class, without


def other_classes(classes: Tensor, count: int, draws: Tensor) -> Tensor:
    """Return another class for each, uniformly: [B] int64.

    Args:
        classes: [B] int64 in 0..count-1.
        count: Number of classes.
        draws: [B] uniform on [0, 1).
    """
    return (classes + 1 + (draws * (count - 1)).long()) % count


def adversarial(logits: Tensor, classes: Tensor, real: float) -> Tensor:
    """Binary cross entropy of the critic's answer to images, which shall be ``real`` (1 or 0).

    Args:
        logits: [B, 1], or [B, k] of which the head of each image's class answers.
        classes: [B] int64.
        real: What shall be answered.
    """
    answer = _of_class(logits, classes)
    return binary_cross_entropy_with_logits(answer, torch.full_like(answer, real))


def gradient_penalty(critic: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """R1 of Mescheder, Geiger, Nowozin (ICML 2018): ``1/2 E |grad_x D(x)|^2``, in float32.

    Args:
        critic: Maps images to logits [B, heads].
        images: [B, C, H, W].
        classes: [B] int64, whose head counts.
    """
    # Half precision has no room for squared gradients.
    with torch.autocast(images.device.type, enabled=False), torch.enable_grad():
        x = images.detach().float().requires_grad_()
        answer = _of_class(critic(x), classes)
        (gradient,) = torch.autograd.grad(answer.sum(), x, create_graph=True)
        return 0.5 * gradient.square().flatten(1).sum(dim=1).mean()


def _of_class(logits: Tensor, classes: Tensor) -> Tensor:
    """The critic's answer to each image, [B]: its only head, or that of the class."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.gather(1, classes[:, None])[:, 0]


def class_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy (nats) of class logits [B, k] against classes [B]."""
    return cross_entropy(logits.float(), classes)


def uniformity(logits: Tensor) -> Tensor:
    """Cross entropy (nats) against the uniform distribution; at least log k."""
    return -log_softmax(logits.float(), dim=1).mean()


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(logits)) in nats, the mean over images; both [B, k]."""
    student, target = log_softmax(logits.float(), dim=1), softmax(teacher.float(), dim=1)
    return kl_div(student, target, reduction="batchmean")


def reconstruction(made: Tensor, images: Tensor) -> Tensor:
    """Mean squared plus mean absolute error."""
    error = made - images
    return error.square().mean() + error.abs().mean()


def distinct_reconstruction(made: Tensor, images: Tensor, distinct: Tensor) -> Tensor:
    """:func:`reconstruction` where the distinct branch is above its own mean, place by place.

    Args:
        made: [B, C, H, W].
        images: [B, C, H, W].
        distinct: The first branch, [B, C, H, W]; no gradient goes through the choice.
    """
    size = distinct.detach().abs()
    chosen = (size > size.mean(dim=(2, 3), keepdim=True)).to(made.dtype)
    error = chosen * (made - images)
    return (error.square().sum() + error.abs().sum()) / chosen.sum().clamp_min(1.0)


def sparsity(distinct: Tensor) -> Tensor:
    """Mean size of the distinct branch."""
    return distinct.abs().mean()
