"""Which images a model has memorised: the p-Laplace score, and what it has to be compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from cmd_plugin.diffusion.codecs import Codec
from cmd_plugin.diffusion.directions import sphere_directions
from cmd_plugin.diffusion.laplace import batches, check_images, p_laplace
from cmd_plugin.diffusion.references import lid_flipd, vector_jacobian
from cmd_plugin.diffusion.score_model import ScoreModel
from cmd_plugin.errors import InputError, NonFiniteError, StateMismatch
from cmd_plugin.runs.separation import auroc, true_positive_rate

__all__ = [
    "CONTROLS",
    "MemorizationReport",
    "MemorizationScore",
    "separate",
    "separate_doses",
]

CONTROLS = ("mse", "centre_norm", "gap_norm", "sharpness", "flipd")
"""What is reported beside the p-Laplace score, by name:

- ``mse``: denoising error, the mean squared difference of noise put in and noise estimated: the
  loss of the training, and the attack by loss;
- ``centre_norm``: length of the estimate at the centre itself, in units of noise: one call;
- ``gap_norm``: length of the gap between conditional and unconditional estimate there (Wen et al.,
  2024); only of models with both;
- ``sharpness``: the estimate's Jacobian applied to the estimate, at two noised images (Jeon et al.,
  2025, with the backward product, which is the same for a true score); 1 at a point mass. It is
  made for the highest noise of text-to-image models; on small ones at low noise it pointed the
  other way in two of three runs of ours;
- ``flipd``: local intrinsic dimension (Kamkari et al., 2024), trace by random signs.
"""

_SIGNS = {"mse": -1.0, "centre_norm": -1.0, "flipd": -1.0}
"""Statistics that are small where an image is memorised."""


@dataclass(frozen=True)
class MemorizationReport:
    """Statistics of B images at T times.

    Attributes:
        times: The T times.
        values: Statistic -> [B, T] float64; ``"p1"``, ``"p2"``, ... are the p-Laplace scores.
        standard_error: p-Laplace score -> [B, T] float64, over directions.
    """

    times: tuple[float, ...]
    values: dict[str, Tensor]
    standard_error: dict[str, Tensor]

    def __len__(self) -> int:
        """Number of images."""
        return len(next(iter(self.values.values())))

    def evidence(self, name: str) -> Tensor:
        """Return a statistic, [B, T], with its sign turned so that larger means memorised."""
        return _SIGNS.get(name, 1.0) * self.values[name]

    def features(self) -> Tensor:
        """Return all statistics of each image side by side, [B, statistics * T]."""
        return torch.cat([self.evidence(name) for name in self.values], dim=1)

    @classmethod
    def join(cls, parts: Sequence[MemorizationReport]) -> MemorizationReport:
        """Return one report of the images of several.

        Raises:
            InputError: If there is none.
            StateMismatch: If they report different things.
        """
        if not parts:
            raise InputError("there is no report to join: score some images first.")
        first = parts[0]
        for part in parts:
            if part.times != first.times or part.values.keys() != first.values.keys():
                raise StateMismatch("reports of other times or statistics cannot be joined.")
        tables = [
            {name: torch.cat([getattr(p, field.name)[name] for p in parts]) for name in table}
            for field in fields(cls)[1:]
            for table in [getattr(first, field.name)]
        ]
        return cls(first.times, *tables)


class MemorizationScore:
    """Scores images by how memorised they are, with all controls beside the score.

    Where a model has a conditional and an unconditional estimate and is in mode ``"gap"``, the
    p-Laplace score and the sharpness are the gap's, and the other controls the conditional
    estimate's, which costs its calls once more.

    Args:
        model: The model.
        t: Times; 25 to 50 of 1000 steps separate best in what we measured, and where the whole
            training set is learned by heart, duplicates show at 200 to 400.
        p: Powers of the p-Laplace score.
        directions: How many directions, in pairs.
        controls: Which of :data:`CONTROLS`; ``gap_norm`` is left out where there is no gap.
        probes: Random signs of ``flipd``.
        codec: What turns images in [-1, 1] into what the model sees; None if they are that.
        seed: Of directions and signs.
        batch_size: Images per call of the network: this alone bounds the memory.

    Raises:
        InputError: If a time or option cannot be used.
    """

    def __init__(
        self,
        model: ScoreModel,
        t: float | Sequence[float] = (25, 50),
        p: float | Sequence[float] = (1, 2),
        *,
        directions: int = 16,
        controls: Sequence[str] = CONTROLS,
        probes: int = 4,
        codec: Codec | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        self.times = tuple(t) if isinstance(t, Sequence) else (t,)
        self.powers = tuple(p) if isinstance(p, Sequence) else (p,)
        unknown = set(controls) - set(CONTROLS)
        if unknown or isinstance(controls, str):
            raise InputError(
                f"unknown controls {sorted(unknown)}: choose from {', '.join(CONTROLS)}."
            )
        for time in self.times:
            model.schedule.level(time)
        self.controls = tuple(
            name for name in CONTROLS if name in controls and (name != "gap_norm" or model.has_gap)
        )
        self.model, self.codec = model, codec
        self.probes, self.seed, self.batch_size = probes, seed, batch_size
        self.directions = sphere_directions(model.shape, directions, seed=seed)

    def __call__(self, images: Tensor, condition: Tensor | None = None) -> MemorizationReport:
        """Score images.

        Args:
            images: [B, ...] as the model sees them, or [B, C, H, W] in [-1, 1] with a codec.
            condition: [1 or B, ...] what they are conditioned on; by default the model's own.

        Raises:
            ShapeError: If images have another size than the model's.
            InputError: If they are out of a codec's range.
            NonFiniteError: If images, or what the network says of them, are not finite.
        """
        seen = images if self.codec is None else self.codec.encode(images)
        check_images(self.model, seen, condition)
        flux = p_laplace(
            self.model,
            seen,
            self.times,
            self.powers,
            directions=self.directions,
            condition=condition,
            batch_size=self.batch_size,
        )
        names = [f"p{power:g}" for power in self.powers]
        values = dict(zip(names, flux.value.unbind(2), strict=True))
        errors = dict(zip(names, flux.standard_error.unbind(2), strict=True))
        plain = self.model if self.model.mode != "gap" else self.model.with_mode("conditional")
        if "mse" in self.controls:
            if plain is not self.model:
                flux = p_laplace(
                    plain,
                    seen,
                    self.times,
                    1,
                    directions=self.directions,
                    condition=condition,
                    batch_size=self.batch_size,
                )
            values["mse"] = flux.squared_error.mean(2)
        for name, look in (
            ("centre_norm", self._centre_norm),
            ("gap_norm", self._gap_norm),
            ("sharpness", self._sharpness),
        ):
            if name in self.controls:
                model = self.model if name == "sharpness" else plain
                columns = [look(model, seen, time, condition) for time in self.times]
                values[name] = torch.stack(columns, dim=1)
        if "flipd" in self.controls:
            columns = [
                lid_flipd(
                    plain,
                    seen,
                    time,
                    trace="hutchinson",
                    probes=self.probes,
                    seed=self.seed,
                    condition=condition,
                    batch_size=self.batch_size,
                )
                for time in self.times
            ]
            values["flipd"] = torch.stack(columns, dim=1)
        for name, value in values.items():
            bad = int((~value.isfinite()).sum())
            if bad:
                raise NonFiniteError(
                    f"{bad} values of {name} are NaN or infinite: run the network in float32."
                )
        return MemorizationReport(self.times, values, errors)

    def _centre_norm(
        self, model: ScoreModel, seen: Tensor, t: float, condition: Tensor | None
    ) -> Tensor:
        a, _ = model.schedule.level(t)
        found = []
        with model.measuring():
            for x, clock, given in self._rows(model, a * seen.float(), t, condition):
                found.append(_length(model.noise(x, clock, given)))
        return torch.cat(found)

    def _gap_norm(
        self, model: ScoreModel, seen: Tensor, t: float, condition: Tensor | None
    ) -> Tensor:
        return self._centre_norm(model.with_mode("gap"), seen, t, condition)

    def _sharpness(
        self, model: ScoreModel, seen: Tensor, t: float, condition: Tensor | None
    ) -> Tensor:
        a, s = model.schedule.level(t)
        both = []
        for direction in self.directions[:2].float():
            found = []
            noised = a * seen.float() + s * direction.to(seen.device)
            for x, clock, given in self._rows(model, noised, t, condition):
                with model.measuring():
                    e = model.noise(x, clock, given)
                _, product = vector_jacobian(model, x, clock, e, given)
                found.append(s * _length(product))
            both.append(torch.cat(found))
        return torch.stack(both).mean(0)

    def _rows(
        self, model: ScoreModel, x: Tensor, t: float, condition: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        x = x.to(model.device)
        given = condition
        if condition is not None:
            given = condition.to(model.device).expand(len(x), *condition.shape[1:])
        for rows in batches(len(x), self.batch_size, model.device):
            clock = torch.full((len(rows),), float(t), device=model.device, dtype=torch.float64)
            yield x[rows], clock, None if given is None else given[rows]


def _length(e: Tensor) -> Tensor:
    """Length in units of noise, [N] float64 on the CPU."""
    return e.flatten(1).double().square().mean(1).sqrt().cpu()


def separate(
    held_out: MemorizationReport, members: MemorizationReport
) -> dict[str, dict[str, list[float]]]:
    """Return how well each statistic tells members from held-out images, at each time.

    Returns:
        ``"auroc"`` and ``"tpr_at_1_fpr"`` -> statistic -> one number a time. Below .5 a statistic
        points the wrong way; it is not turned round.

    Raises:
        StateMismatch: If the reports are of other times or statistics.
    """
    if held_out.times != members.times or held_out.values.keys() != members.values.keys():
        raise StateMismatch("reports of other times or statistics cannot be compared.")
    measures = {"auroc": auroc, "tpr_at_1_fpr": true_positive_rate}
    return {
        measure: {
            name: [
                compare(low, high)
                for low, high in zip(
                    held_out.evidence(name).T, members.evidence(name).T, strict=True
                )
            ]
            for name in members.values
        }
        for measure, compare in measures.items()
    }


def separate_doses(
    held_out: MemorizationReport, members: MemorizationReport, doses: dict[int, Tensor]
) -> dict[str, dict[int, list[float]]]:
    """Return statistic -> dose -> AUROC against held-out images at each time.

    Args:
        held_out: Of images that were not trained on.
        members: Of images that were.
        doses: Dose -> [k] places of its members, see :meth:`.probes.ProbeSet.each_dose`.

    Raises:
        StateMismatch: If the reports are of other times or statistics.
    """
    found: dict[str, dict[int, list[float]]] = {name: {} for name in members.values}
    for dose, places in doses.items():
        values = {name: value[places] for name, value in members.values.items()}
        part = MemorizationReport(members.times, values, {})
        for name, numbers in separate(held_out, part)["auroc"].items():
            found[name][dose] = numbers
    return found
