"""Training of a decomposition around a frozen classifier, for Lightning's trainers."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from cmd_plugin.distinction.critic import Critic
from cmd_plugin.distinction.decomposition import Decomposer, decompose
from cmd_plugin.distinction.frozen import Bound, FrozenClassifier, PixelRange, hash_weights
from cmd_plugin.distinction.generator import BranchedGenerator
from cmd_plugin.distinction.losses import blend, other_classes
from cmd_plugin.distinction.objectives import (
    LossWeights,
    critic_loss,
    find_objective,
    mixed_loss,
)
from cmd_plugin.distinction.quality import SplitQuality, SplitReport
from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.kernels.counter_random import check_seed, derived_seed

if TYPE_CHECKING:
    _Module = pl.LightningModule
else:
    _Module = object

__all__ = ["DecompositionExplainer", "ExplainerTraining"]

_NOT_SAVED = ("decomposer.classifier.", "judge.")
_STEPS, _HASH = "distinction_steps", "distinction_classifier"
_SETTLED_STEPS = 400  # before, a warning would be about a beginning
_WARMUP = 10.0
_MAPPING_RATE = 0.01
_KIND = 20  # letters by which warnings are told apart: numbers come later


class ExplainerTraining(_Module):
    """Learns to split images into what speaks for a class and the rest; see :func:`decompose`.

    Batches are images [B, C, H, W], as the classifier takes them, and classes [B]. Each step is one
    of the critic and one of the generator, by manual optimisation; an average of the generator's
    weights (EMA) is what is used afterwards: :attr:`decomposer`. Everything random is a function of
    the seed and the number of the step, so a run that goes on from a checkpoint ends with the same
    bits as one that was not stopped. Meant for one device.

    This class holds what is common to modules for the two Lightning distributions, whose trainers
    refuse each other's: :class:`DecompositionExplainer` is for ``pytorch_lightning``, its namesake
    in :mod:`cmd_plugin.distinction.lightning` for ``lightning.pytorch``.

    With a validation loader the quality of the splits is logged after each epoch
    (``split_psnr``, ``split_removed``, ``split_specialization``, ``split_distinct_power``,
    ``split_shortcut``), and a collapsed branch or a shortcut is warned of.

    Args:
        classifier: What is explained; copied, and never changed. None for ``distinction``, which
            tells the classes of the data apart.
        num_classes: Number of classes k.
        in_channels: Channels of the images.
        image_size: Height and width, or one number for both.
        objective: ``dxai_distilled``, ``dxai``, ``distinction`` or ``uniform``, see
            :data:`cmd_plugin.distinction.objectives.OBJECTIVES`.
        weights: Weights of the terms of the loss.
        low: The value that black has in the images; one number, or one a channel. Of images that
            are normalised by ``mean`` and ``std`` it is ``-mean / std``.
        high: The value of white.
        judge: Another classifier for the same images, trained independently, that finds shortcuts.
        branches: Number of branches n.
        width: Channels of a branch at full resolution.
        levels: How often the resolution is halved; by default 2 up to 32 pixels, 3 to 64, then 4.
        noise: Numbers of noise in the code of a class, drawn anew in every step, as the papers do
            (16); explanations take one fixed draw. The mapping learns at a hundredth of ``lr``.
        lr: Learning rate of the generator; that of small images. The papers' 256 pixels take 1e-4
            for both.
        critic_lr: Learning rate of the critic.
        critic_width: Channels of the critic's first layer.
        penalty_every: Take R1 every so many steps, with as many times the weight.
        ema: Largest share that the average keeps of itself in a step.
        seed: In [0, 2^63).

    Raises:
        InputError: If a number is out of range, or a classifier is missing or has no use.
    """

    def __init__(
        self,
        classifier: nn.Module | None,
        num_classes: int,
        in_channels: int,
        image_size: int | tuple[int, int],
        *,
        objective: str = "dxai_distilled",
        weights: LossWeights | None = None,
        low: Bound = -1.0,
        high: Bound = 1.0,
        judge: nn.Module | None = None,
        branches: int = 3,
        width: int = 8,
        levels: int | None = None,
        noise: int = 0,
        lr: float = 1e-3,
        critic_lr: float = 1e-3,
        critic_width: int = 16,
        penalty_every: int = 1,
        ema: float = 0.995,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.objective, self.weights = find_objective(objective), weights or LossWeights()
        if self.objective.needs_classifier and classifier is None:
            raise InputError(
                f"the objective {objective} explains a classifier: give one, or choose distinction."
            )
        for name, rate in (("lr", lr), ("critic_lr", critic_lr)):
            if not 0.0 < rate < float("inf"):
                raise InputError(f"{name} must be above 0, got {rate}.")
        if penalty_every < 1 or not 0.0 <= ema < 1.0:
            raise InputError(
                f"penalty_every must be at least 1, ema in [0, 1): got {penalty_every} and {ema}."
            )
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if levels is None:
            levels = 2 if max(size) <= 32 else 3 if max(size) <= 64 else 4
        self.seed, self.steps = check_seed(seed), 0
        self._warned: set[str] = set()
        self.lr, self.critic_lr, self.penalty_every, self.ema = lr, critic_lr, penalty_every, ema
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed))
            self.generator = BranchedGenerator(
                in_channels, num_classes, branches, width, levels, noise
            )
            heads = self.objective.heads(num_classes)
            self.critic = Critic(in_channels, heads, size, critic_width)
        average = copy.deepcopy(self.generator).requires_grad_(False)
        frozen = None if classifier is None else FrozenClassifier(classifier)
        self.decomposer = Decomposer(average, PixelRange(low, high), frozen)
        self.judge = None if judge is None else FrozenClassifier(judge)
        self._hash = "" if frozen is None else hash_weights(frozen.network)
        white_to_black = float((2.0 * self.decomposer.pixels.half_width).mean())
        self.quality = SplitQuality(num_classes, branches, white_to_black)

    @override
    def forward(self, images: Tensor, target: Any = None) -> Tensor:
        """What speaks for a class of each image, [B, C, H, W]; see :func:`decompose`."""
        return decompose(self.decomposer, images, target).distinct

    @override
    def configure_optimizers(self) -> Any:
        """Adam for the generator and for the critic, without momentum."""
        mapping: list[Tensor] = []
        if self.generator.settings["noise"]:
            mapping = [*self.generator.codes.parameters()]
        known = {id(parameter) for parameter in mapping}
        others = [p for p in self.generator.parameters() if id(p) not in known]
        groups: list[dict[str, Any]] = [{"params": others}]
        if mapping:
            groups.append({"params": mapping, "lr": _MAPPING_RATE * self.lr})
        return [
            torch.optim.Adam(groups, lr=self.lr, betas=(0.0, 0.99)),
            torch.optim.Adam(self.critic.parameters(), lr=self.critic_lr, betas=(0.0, 0.99)),
        ]

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One step of the critic, one of the generator, and one of its average."""
        images, labels = batch
        x = self.decomposer.pixels.to_unit(images)
        shares, others, noises = self._draw(labels)
        features = self.generator.encode(x)
        own, other = (
            self.generator.decode(features, classes, noise)
            for classes, noise in zip((labels, others), noises, strict=True)
        )
        made = torch.cat(blend(own, other, shares))
        by_generator, by_critic = self.optimizers()  # type: ignore[attr-defined]

        skipped = self.steps % self.penalty_every
        penalty = 0.0 if skipped else float(self.penalty_every)
        classify = None if self.decomposer.classifier is None else self._classify
        asked = classify if self.objective.needs_classifier else None
        critic = critic_loss(
            self.objective, self.critic, asked, x, made, labels, others, penalty, self.weights
        )
        by_critic.zero_grad()
        self.manual_backward(critic)
        by_critic.step()

        self.critic.requires_grad_(False)  # its gradients would be computed for nothing
        terms = mixed_loss(
            self.objective, self.critic, asked, x, own[:, 0], made, labels, others, self.weights
        )
        loss = torch.stack([*terms.values()]).sum()
        by_generator.zero_grad()
        self.manual_backward(loss)
        by_generator.step()
        self.critic.requires_grad_(True)

        self._average()
        self.steps += 1
        self.log_dict({f"train_{name}": term.detach() for name, term in terms.items()})
        self.log("train_critic", critic.detach())
        return loss.detach()

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Take the splits of a held-out batch in."""
        images, labels = batch
        split = decompose(self.decomposer, images, labels)
        asked = {"answers": self.decomposer.classifier, "judged": self.judge}
        answers: dict[str, Any] = {
            name: tuple(network(x).argmax(dim=1) for x in (images, split.agnostic))
            for name, network in asked.items()
            if network is not None
        }
        self.quality.update(images, split.branches, labels, **answers)

    @override
    def on_validation_epoch_end(self) -> None:
        """Log the quality of the splits, and warn of what went wrong."""
        report: SplitReport = self.quality.compute()
        self.quality.reset()
        self.log_dict(
            {
                "split_psnr": report.psnr,
                "split_removed": _mean(report.removed),
                "split_specialization": report.specialization,
                "split_distinct_power": report.distinct_power,
                "split_shortcut": report.shortcut,
            }
        )
        self.warn_of(report)

    def warn_of(self, report: SplitReport) -> None:
        """Warn of a collapse, a shortcut or a poor classifier, once training has got going.

        Of each kind once, since it is logged after every epoch.
        """
        if self.steps < _SETTLED_STEPS:
            return
        for sentence in report.warnings():
            kind = sentence[:_KIND]
            if kind not in self._warned:
                self._warned.add(kind)
                warnings.warn(sentence, stacklevel=2)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the user's networks out; note which classifier it was."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            name: tensor for name, tensor in state.items() if not name.startswith(_NOT_SAVED)
        }
        checkpoint[_STEPS], checkpoint[_HASH] = self.steps, self._hash

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the steps over; refuse what was trained for another classifier.

        Raises:
            StateMismatch: If the checkpoint was made with another classifier.
        """
        if checkpoint.get(_HASH) != self._hash:
            raise StateMismatch(
                "the checkpoint belongs to another classifier (its weights have another hash): "
                "give the one it was trained with."
            )
        self.steps = int(checkpoint[_STEPS])
        own = {n: t for n, t in self.state_dict().items() if n.startswith(_NOT_SAVED)}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **own}

    def _classify(self, x: Tensor) -> Tensor:
        return self.decomposer.logits(self.decomposer.pixels.from_unit(x))

    def _draw(self, labels: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Shares of the blend [B, n - 1], another class for each image [B], noise for the two."""
        # On the CPU, so that every device draws the same numbers.
        draw = torch.Generator().manual_seed(derived_seed(self.seed, self.steps))
        shares = torch.rand(len(labels), self.generator.branches - 1, generator=draw)
        draws = torch.rand(len(labels), generator=draw).to(labels.device)
        others = other_classes(labels, self.generator.classes, draws)
        noises: list[Tensor | None] = [None, None]
        if size := self.generator.settings["noise"]:
            both = torch.randn(2, len(labels), size, generator=draw).to(labels.device)
            noises = [*both]
        return shares.to(labels.device), others, noises

    @torch.no_grad()
    def _average(self) -> None:
        kept = min(self.ema, (self.steps + 1.0) / (self.steps + _WARMUP))
        average: list[Tensor] = [*self.decomposer.generator.parameters()]
        trained: list[Tensor] = [*self.generator.parameters()]
        torch._foreach_lerp_(average, trained, 1.0 - kept)


class DecompositionExplainer(ExplainerTraining, pl.LightningModule):
    """Learns to split images into what speaks for a class and the rest, in ``pytorch_lightning``.

    Its arguments are those of :class:`ExplainerTraining`, which says what it does.
    """


def _mean(values: tuple[float, ...]) -> float:
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")
