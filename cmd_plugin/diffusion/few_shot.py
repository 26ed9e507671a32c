"""A detector of generated images learned from a handful: experts, and a gate that weighs them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.diffusion.codecs import Codec
from cmd_plugin.diffusion.laplace import p_laplace
from cmd_plugin.diffusion.score_model import ScoreModel
from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.runs.tensors import Schema

__all__ = ["FewShotDetector", "manifold_features", "reconstruction_error"]

GATES = ("logistic", "forest")
_SCHEMA = Schema("few-shot-detector", 1, "a FewShotDetector")


def manifold_features(
    model: ScoreModel,
    seen: Tensor,
    t: tuple[float, ...] = (10, 50, 100, 200, 400),
    *,
    directions: int = 8,
    seed: int = 0,
    condition: Tensor | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Return curvature, gradient, bias, Laplacian and denoising error at each time, [B, 5 T].

    Args:
        model: The model.
        seen: [B, ...] images as it sees them.
        t: The T times.
        directions: How many, in pairs.
        seed: Of the directions.
        condition: [1 or B, ...].
        batch_size: Images per call of the network.

    Raises:
        InputError: As :func:`.laplace.p_laplace`.
    """
    flux = p_laplace(
        model,
        seen,
        t,
        (1, 2),
        directions=directions,
        seed=seed,
        condition=condition,
        batch_size=batch_size,
    )
    parts = [flux.size.mean(2), flux.bias.mean(2), flux.squared_error.mean(2)]
    return torch.cat([*flux.value.unbind(2), *parts], dim=1)


def reconstruction_error(codec: Codec, images: Tensor) -> Tensor:
    """Return what a codec loses of each image, mean squared, [B, 1] float64.

    Args:
        codec: The codec; one of pixels loses nothing.
        images: [B, C, H, W] in [-1, 1].
    """
    back = codec.decode(codec.encode(images)).to(images.device)
    return (back - images).flatten(1).double().square().mean(1, keepdim=True).cpu()


class FewShotDetector:
    """Tells generated images from real ones after 5 to 500 labels of each.

    Each expert is a regularised logistic regression on standardised features of its own: terms of
    :func:`manifold_features`, an embedding, a reconstruction error. Experts score images they were
    not fitted on, and a gate learns from those scores how far to trust each (stacking).

    The paper has a light classifier over the zero-shot criterion and other detectors' scores;
    experts and gate of its own were not published, these are ours. What it learns of one generator
    need not hold for another: report generators it has seen and others apart.

    Args:
        gate: ``"logistic"``, or ``"forest"``, a random forest of 200 trees, which cannot be saved.
        folds: Into how many parts images are cut for the experts' scores; fewer where there are
            fewer labels.
        strength: Inverse of the experts' regularisation.
        seed: Of the parts and the forest.

    Raises:
        InputError: If an option cannot be used.
    """

    def __init__(
        self, gate: str = "logistic", folds: int = 5, strength: float = 0.1, seed: int = 0
    ) -> None:
        if gate not in GATES:
            raise InputError(f"unknown gate {gate!r}: choose one of {', '.join(GATES)}.")
        if folds < 2 or not (math.isfinite(strength) and strength > 0):
            raise InputError(
                f"folds must be at least 2 and strength above 0, got {folds} and {strength}."
            )
        self.gate, self.folds, self.strength, self.seed = gate, folds, strength, seed
        self._experts: dict[str, Tensor] = {}  # rows: mean, scale, coefficients; then the offset
        self._gate: Tensor | None = None
        self._forest: Any = None

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, once fitted."""
        return tuple(self._experts)

    def fit(self, features: Mapping[str, Tensor], generated: Tensor) -> FewShotDetector:
        """Learn from labelled images.

        Args:
            features: Expert -> [B, F] features of its own, any F.
            generated: [B] whether each was generated.

        Returns:
            Itself.

        Raises:
            InputError: If there are fewer than 5 images of a kind, or no expert.
            ShapeError: If features are not [B, F].
            NonFiniteError: If a feature is NaN or infinite.
        """
        from sklearn.model_selection import StratifiedKFold

        labels = generated.detach().cpu().numpy().astype(np.int64)
        tables = _tables(features, len(labels))
        fewest = min(int((labels == kind).sum()) for kind in (0, 1))
        if fewest < 5 or not set(labels.tolist()) <= {0, 1}:
            raise InputError(f"there must be at least 5 images of each kind, got {fewest}.")
        cuts = StratifiedKFold(min(self.folds, fewest), shuffle=True, random_state=self.seed)
        votes = np.zeros((len(labels), len(tables)))
        for known, rest in cuts.split(votes, labels):
            for column, table in enumerate(tables.values()):
                expert = self._line(table[known], labels[known], self.strength)
                votes[rest, column] = _say(expert, table[rest])
        experts = {n: self._line(table, labels, self.strength) for n, table in tables.items()}
        self._forest, self._gate = None, None
        if self.gate == "forest":
            from sklearn.ensemble import RandomForestClassifier

            self._forest = RandomForestClassifier(200, random_state=self.seed).fit(votes, labels)
        else:
            self._gate = torch.from_numpy(self._trust(votes, labels))
        self._experts = {name: torch.from_numpy(expert) for name, expert in experts.items()}
        return self

    def votes(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each expert's own score of each image, [B] float64; above 0 is generated.

        Raises:
            InputError: If it was not fitted, or on other experts or numbers of features.
        """
        if not self._experts:
            raise InputError("the detector was not fitted: call fit first.")
        if features.keys() != self._experts.keys():
            raise InputError(
                f"the experts are {', '.join(self._experts)}, got {', '.join(features)}."
            )
        tables = _tables({name: features[name] for name in self._experts})
        for name, table in tables.items():
            if table.shape[1] != self._experts[name].shape[1] - 1:
                raise ShapeError(
                    f"{name} was fitted on {self._experts[name].shape[1] - 1} features, got "
                    f"{table.shape[1]}."
                )
        return {
            name: torch.from_numpy(_say(self._experts[name].numpy(), table))
            for name, table in tables.items()
        }

    def probability(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return the gate's probability that each image was generated, [B] float64.

        It is one among as many generated as real images as it was fitted on.

        Raises:
            InputError: As :meth:`votes`.
        """
        votes = torch.stack(list(self.votes(features).values()), dim=1).numpy()
        if self._forest is not None:
            return torch.from_numpy(self._forest.predict_proba(votes)[:, 1])
        assert self._gate is not None
        return torch.from_numpy(_say(self._gate.numpy(), votes)).sigmoid()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Raises:
            InputError: If it was not fitted, its gate is a forest, or it cannot be written.
        """
        if self._gate is None:
            reason = "its gate is a forest" if self._forest is not None else "it was not fitted"
            raise InputError(f"the detector cannot be saved: {reason}.")
        order = "\n".join(self._experts)
        tensors = {f"expert{n}": expert for n, expert in enumerate(self._experts.values())}
        _SCHEMA.save(path, {**tensors, "gate": self._gate}, {"experts": order})

    @classmethod
    def load(cls, path: str | Path) -> FewShotDetector:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: If the file is missing, damaged or something else.
        """
        tensors, about = _SCHEMA.load(path)
        names = about.get("experts", "").split("\n")
        wanted = {f"expert{n}" for n in range(len(names))} | {"gate"}
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        sound = (
            tensors.keys() == wanted
            and all(len(s) == 2 and s[0] == 3 and s[1] > 1 for s in shapes.values())
            and shapes["gate"][1] == len(names) + 1
            and all(bool(t.isfinite().all()) for t in tensors.values())
        )
        if not sound:
            raise InputError(f"{path} is damaged: fit the detector again.")
        detector = cls()
        detector._gate = tensors["gate"].double()
        detector._experts = {n: tensors[f"expert{i}"].double() for i, n in enumerate(names)}
        return detector

    def _trust(self, votes: Any, labels: Any) -> Any:
        """A logistic regression on votes that trusts no expert less than not at all.

        An expert that seems to point the wrong way among a few images does so by chance; those are
        left out, the worst first (Breiman's stacking with weights not below 0).
        """
        kept = np.ones(votes.shape[1], dtype=bool)
        while True:
            line = self._line(votes * kept, labels, 1.0)
            worst = int(line[2, :-1].argmin())
            if line[2, worst] >= 0.0 or kept.sum() == 1:
                return line
            kept[worst] = False

    def _line(self, table: Any, labels: Any, strength: float) -> Any:
        """A logistic regression on standardised features: [3, F + 1] of mean, scale, weights."""
        from sklearn.linear_model import LogisticRegression

        mean, scale = table.mean(0), table.std(0)
        # A feature that never changed among these images says nothing, whatever it does later.
        standard = (table - mean) / np.where(scale > 0, scale, np.inf)
        fitted = LogisticRegression(C=strength, class_weight="balanced", max_iter=1000)
        fitted.fit(standard, labels)
        line = np.zeros((3, table.shape[1] + 1))
        line[0, :-1], line[1, :-1] = mean, np.where(scale > 0, scale, 1.0)
        line[2, :-1], line[2, -1] = np.where(scale > 0, fitted.coef_[0], 0.0), fitted.intercept_[0]
        return line


def _say(line: Any, table: Any) -> Any:
    return ((table - line[0, :-1]) / line[1, :-1]) @ line[2, :-1] + line[2, -1]


def _tables(features: Mapping[str, Tensor], count: int | None = None) -> dict[str, Any]:
    if not features:
        raise InputError("there is no expert: give the features of at least one.")
    count = len(next(iter(features.values()))) if count is None else count
    for name, table in features.items():
        if table.ndim != 2 or len(table) != count or not table.shape[1]:
            raise ShapeError(f"features of {name} must be [{count}, F], got {tuple(table.shape)}.")
        bad = int((~table.isfinite()).sum())
        if bad:
            raise NonFiniteError(f"{bad} features of {name} are NaN or infinite.")
    return {name: table.detach().cpu().double().numpy() for name, table in features.items()}
