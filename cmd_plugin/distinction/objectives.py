"""What a decomposition is trained for: four objectives out of the same terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cmd_plugin.distinction import losses
from cmd_plugin.errors import InputError

__all__ = ["OBJECTIVES", "LossWeights", "Objective", "critic_loss", "find_objective", "mixed_loss"]

Classify = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """Who says what class a mixture is.

    Attributes:
        by_classifier: Share of the classifier's word in the generator's class loss.
        by_critic: Share of the critic's word; above 0 its heads are class logits as well.
        uniform: Whether the mixture without the distinct branch shall be no class at all, instead
            of the other class.
    """

    by_classifier: float
    by_critic: float
    uniform: bool = False

    @property
    def needs_classifier(self) -> bool:
        """Whether there must be a classifier to explain."""
        return self.by_classifier > 0.0

    def heads(self, classes: int) -> int:
        """Heads of the critic."""
        return classes if self.by_critic else 1


OBJECTIVES = {
    "dxai_distilled": Objective(0.5, 0.5),
    "dxai": Objective(1.0, 0.0),
    "distinction": Objective(0.0, 1.0),
    "uniform": Objective(1.0, 0.0, uniform=True),
}
"""By name: ``dxai`` as its authors released it, by the classifier alone; ``dxai_distilled``, where
the critic has learnt the classifier's answers to real images and has half a say, so that patterns
which fool the classifier alone do not pay; ``distinction``, the data's own difference between the
classes, without a classifier; ``uniform``, where what is left shall be at chance."""


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms; the defaults are those of the released code.

    Attributes:
        adversarial: Of looking real.
        classes: Of the class loss.
        reconstruction: Of both mixtures being near the image.
        distinct_reconstruction: Of the first one being near it where the distinct branch is.
        gradient_penalty: Of R1.
        sparsity: Of the distinct branch being small.

    Raises:
        InputError: If one is negative or not finite.
    """

    adversarial: float = 1.0
    classes: float = 4.0
    reconstruction: float = 4.0
    distinct_reconstruction: float = 4.0
    gradient_penalty: float = 1.0
    sparsity: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0.0 <= value < float("inf"):
                raise InputError(f"the weight {name} must be at least 0, got {value}.")


def find_objective(name: str) -> Objective:
    """Return an objective by its name.

    Raises:
        InputError: If there is none.
    """
    if name not in OBJECTIVES:
        raise InputError(f"unknown objective {name!r}: choose one of {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[name]


def critic_loss(
    objective: Objective,
    critic: nn.Module,
    classifier: Classify | None,
    images: Tensor,
    made: Tensor,
    classes: Tensor,
    others: Tensor,
    penalty: float,
    weights: LossWeights,
) -> Tensor:
    """Return the critic's loss on images and on the mixtures made of them.

    Args:
        objective: Whether it learns classes.
        critic: The critic.
        classifier: Whose answers it learns, if it does; None learns the labels.
        images: Real ones, [B, C, H, W].
        made: Mixtures a, then b, [2B, C, H, W]; no gradient goes there.
        classes: [B] int64 of the images and of a.
        others: [B] int64 of b.
        penalty: Factor of R1; 0 leaves it out, more than 1 makes up for steps without.
        weights: Weights of the terms.
    """
    real, fake = critic(images), critic(made.detach())
    loss = losses.adversarial(real, classes, 1.0)
    loss = loss + losses.adversarial(fake, torch.cat([classes, others]), 0.0)
    if penalty:
        r1 = losses.gradient_penalty(critic, images, classes)
        loss = loss + weights.gradient_penalty * penalty * r1
    if objective.by_critic and classifier is None:
        loss = loss + losses.class_loss(real, classes)
    elif objective.by_critic and classifier is not None:
        with torch.no_grad():
            teacher = classifier(images)
        loss = loss + losses.distillation(real, teacher)
    return loss


def mixed_loss(
    objective: Objective,
    critic: nn.Module,
    classifier: Classify | None,
    images: Tensor,
    distinct: Tensor,
    made: Tensor,
    classes: Tensor,
    others: Tensor,
    weights: LossWeights,
) -> dict[str, Tensor]:
    """Return the terms of the generator's loss, weighted, by name; their sum is what it minimises.

    Args:
        objective: Who says what class a mixture is.
        critic: The critic, which has k heads if it has a say.
        classifier: The frozen classifier, if it has a say.
        images: [B, C, H, W].
        distinct: The first branch, [B, C, H, W].
        made: Mixtures a, then b, [2B, C, H, W].
        classes: [B] int64 that a shall be told as.
        others: [B] int64 that b shall be told as.
        weights: Weights of the terms.
    """
    targets = torch.cat([classes, others])
    answer = critic(made)
    first = made[: len(images)]
    terms = {
        "adversarial": weights.adversarial * losses.adversarial(answer, targets, 1.0),
        "reconstruction": weights.reconstruction
        * losses.reconstruction(made, torch.cat([images, images])),
        "distinct_reconstruction": weights.distinct_reconstruction
        * losses.distinct_reconstruction(first, images, distinct),
    }
    said = torch.zeros((), device=images.device)
    if objective.by_classifier and classifier is not None:
        logits = classifier(made)
        if objective.uniform:
            one, none = logits.chunk(2)
            told = 0.5 * (losses.class_loss(one, classes) + losses.uniformity(none))
        else:
            told = losses.class_loss(logits, targets)
        said = said + objective.by_classifier * told
    if objective.by_critic:
        said = said + objective.by_critic * losses.class_loss(answer, targets)
    terms["classes"] = weights.classes * said
    if weights.sparsity:
        terms["sparsity"] = weights.sparsity * losses.sparsity(distinct)
    return terms
