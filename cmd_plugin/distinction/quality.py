"""Whether a split is good: exact enough, class evidence really gone, and no trick in it.

Two things go wrong unseen. *Collapse*: nothing is in the distinct branch. *Shortcut*: what is taken
away is a pattern that fools the classifier explained, while a judge, trained independently on the
same task, still sees the class. Both are told apart from success here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from cmd_plugin.distinction.covariance import importance, specialization
from cmd_plugin.distinction.decomposition import Decomposer, decompose
from cmd_plugin.errors import InputError
from cmd_plugin.networks.measuring import undisturbed

__all__ = ["SplitQuality", "SplitReport", "measure_split"]

_SILENT = 1e-4  # share of the image's power: 1 % of its amplitude
_HARDLY = 0.05  # of accuracy
_FOOLED = 0.3
_SETTLED = 0.8  # an accuracy below which a classifier has little to explain


class SplitReport(NamedTuple):
    """What is known about the splits of a set of images with known classes.

    Attributes:
        psnr: Of the branches' sum, in dB, with a peak of white minus black.
        distinct_power: Power of the distinct branch as a share of the images' variance.
        specialization: Of all branches, see :func:`specialization`.
        importance: Of each branch.
        accuracy: Of the classifier on the images, of each class: NaN for a class without any, empty
            without a classifier.
        removed: The same on the images without the distinct part.
        judge_accuracy: Of the judge, on the images; empty without one.
        judge_removed: Of the judge, without the distinct part.
    """

    psnr: float
    distinct_power: float
    specialization: float
    importance: tuple[float, ...]
    accuracy: tuple[float, ...]
    removed: tuple[float, ...]
    judge_accuracy: tuple[float, ...]
    judge_removed: tuple[float, ...]

    @property
    def collapsed(self) -> bool:
        """Whether nothing of account is in the distinct branch."""
        drops = [a - b for a, b in zip(self.accuracy, self.removed, strict=True)]
        known = [drop for drop in drops if math.isfinite(drop)]
        idle = bool(known) and max(known) < _HARDLY
        return self.distinct_power < _SILENT or idle

    @property
    def shortcut(self) -> float:
        """How much more accuracy the classifier loses than the judge, on the worst class."""
        gaps = [
            (a - b) - (c - d)
            for a, b, c, d in zip(
                self.accuracy, self.removed, self.judge_accuracy, self.judge_removed, strict=False
            )
        ]
        return max((gap for gap in gaps if math.isfinite(gap)), default=0.0)

    def warnings(self) -> list[str]:
        """Return what a person has to know before trusting the maps, a sentence each."""
        found = []
        known = [value for value in self.accuracy if math.isfinite(value)]
        if known and sum(known) / len(known) < _SETTLED:
            found.append(
                f"the classifier is right on {sum(known) / len(known):.0%} of these images (mean "
                "over classes): there is little to explain, or they are not prepared as it expects."
            )
        if self.collapsed:
            found.append(
                "the distinct branch has collapsed (power "
                f"{self.distinct_power:.1e} of the images', and the classifier loses at most "
                f"{self._largest_drop():.0%} without it): train longer, or raise the weight of the "
                "class loss."
            )
        if self.shortcut > _FOOLED:
            found.append(
                f"without the distinct part the classifier loses {self.shortcut:.0%} more accuracy "
                "on one class than an independent judge does: the part holds a pattern that fools "
                "the classifier, not evidence; use the objective dxai_distilled, and train longer."
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON types; None in the place of NaN."""
        plain = self._asdict() | {"collapsed": self.collapsed, "shortcut": self.shortcut}
        return {name: _plain(value) for name, value in plain.items()}

    def _largest_drop(self) -> float:
        drops = [a - b for a, b in zip(self.accuracy, self.removed, strict=True)]
        return max((drop for drop in drops if math.isfinite(drop)), default=0.0)


class SplitQuality(Metric):
    """Gathers a :class:`SplitReport` batch by batch; memory does not grow.

    Args:
        classes: Number of classes k.
        branches: Number of branches n.
        width: White minus black, in the images' units.
    """

    full_state_update = False
    asked: Tensor
    judges: Tensor
    count: Tensor
    right: Tensor
    right_removed: Tensor
    judged: Tensor
    judged_removed: Tensor
    error: Tensor
    numbers: Tensor
    total: Tensor
    square: Tensor
    sums: Tensor
    products: Tensor
    _counts = ("count", "right", "right_removed", "judged", "judged_removed")

    def __init__(self, classes: int, branches: int, width: float = 2.0, **options: Any) -> None:
        super().__init__(**options)
        self.width = width
        for name in self._counts:
            self._sum(name, torch.zeros(classes, dtype=torch.int64))
        for name in ("asked", "judges"):
            self._sum(name, torch.zeros((), dtype=torch.int64))
        for name in ("error", "numbers", "total", "square"):
            self._sum(name, torch.zeros((), dtype=torch.float64))
        self._sum("sums", torch.zeros(branches, dtype=torch.float64))
        self._sum("products", torch.zeros(branches, branches, dtype=torch.float64))

    def _sum(self, name: str, start: Tensor) -> None:
        self.add_state(name, start, dist_reduce_fx="sum")

    @override
    def update(
        self,
        images: Tensor,
        branches: Tensor,
        labels: Tensor,
        answers: tuple[Tensor, Tensor] | None = None,
        judged: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Take a batch in.

        Args:
            images: [B, C, H, W].
            branches: [B, n, C, H, W].
            labels: [B] int64.
            answers: The classifier's answers [B] to the images and to the images without the
                distinct part.
            judged: The judge's.
        """
        classes = len(self.count)
        x, parts = images.double(), branches.detach().double()
        self.error += (parts.sum(dim=1) - x).square().sum()
        self.numbers += x.numel()
        self.total += x.sum()
        self.square += x.square().sum()
        rows = parts.transpose(0, 1).flatten(1)
        self.sums += rows.sum(dim=1)
        self.products += rows @ rows.T
        self.count += torch.bincount(labels, minlength=classes)
        self.asked += answers is not None
        self.judges += judged is not None
        names = (("right", "right_removed"), answers), (("judged", "judged_removed"), judged)
        for places, given in names:
            for name, answer in zip(places, given or (), strict=False):
                hit = torch.bincount(labels[answer == labels], minlength=classes)
                setattr(self, name, getattr(self, name) + hit)

    @override
    def compute(self) -> SplitReport:
        """Return the report of all images taken in."""
        mean = self.sums / self.numbers
        covariance = self.products / self.numbers - torch.outer(mean, mean)
        variance = self.square / self.numbers - (self.total / self.numbers).square()
        error = float(self.error / self.numbers)
        shares = {
            name: tuple((getattr(self, name) / self.count).tolist()) for name in self._counts[1:]
        }
        return SplitReport(
            psnr=math.inf if error == 0.0 else 10.0 * math.log10(self.width**2 / error),
            distinct_power=float(covariance[0, 0] / variance.clamp_min(1e-12)),
            specialization=specialization(covariance),
            importance=tuple(importance(covariance).tolist()),
            accuracy=shares["right"] if self.asked else (),
            removed=shares["right_removed"] if self.asked else (),
            judge_accuracy=shares["judged"] if self.judges else (),
            judge_removed=shares["judged_removed"] if self.judges else (),
        )


def measure_split(
    decomposer: Decomposer,
    batches: Iterable[tuple[Tensor, Tensor]],
    judge: nn.Module | None = None,
) -> SplitReport:
    """Decompose images for their own classes and report how good the splits are.

    Args:
        decomposer: A trained one.
        batches: Images [B, C, H, W] as the classifier takes them, and their classes [B].
        judge: Another classifier for the same images, trained independently.

    Raises:
        InputError: If there is nothing in the batches.
    """
    generator = decomposer.generator
    device = generator.stem.weight.device
    width = float((2.0 * decomposer.pixels.half_width).mean())
    quality = SplitQuality(generator.classes, generator.branches, width).to(device)
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        split = decompose(decomposer, images, labels)
        asked = {"answers": decomposer.classifier, "judged": judge}
        answers = {
            name: (_answer(network, images), _answer(network, split.agnostic))
            for name, network in asked.items()
            if network is not None
        }
        quality.update(images, split.branches, labels, **answers)
    if not quality.update_called:
        raise InputError("there is nothing to measure on: the batches hold no image.")
    report: SplitReport = quality.compute()
    return report


def _answer(network: nn.Module, images: Tensor) -> Tensor:
    with undisturbed(network):
        answer: Tensor = network(images).argmax(dim=1)
    return answer


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
