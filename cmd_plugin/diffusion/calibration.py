"""How a score compares with those of real images: thresholds, and p-values that hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError, StateMismatch
from cmd_plugin.runs.tensors import Schema

__all__ = ["RealReference"]

_SCHEMA = Schema("real-reference", 1, "the scores of real images")


@dataclass(frozen=True)
class RealReference:
    """Scores of N real images that nothing was fitted on.

    Attributes:
        scores: Criterion -> [N] float64, sorted; larger means more like a generated image.
        about: What they were made with, text by name: a detector's settings.

    Raises:
        InputError: If there is no criterion, or no image.
        ShapeError: If criteria are not one number an image, of equally many images.
        NonFiniteError: If a score is NaN or infinite.
    """

    scores: Mapping[str, Tensor]
    about: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check and sort the scores."""
        counts = {tuple(values.shape) for values in self.scores.values()}
        if len(counts) != 1 or len(next(iter(counts))) != 1:
            raise ShapeError("scores must be one number an image, of equally many images.")
        if not next(iter(counts))[0]:
            raise InputError("a reference needs at least one real image.")
        for name, values in self.scores.items():
            bad = int((~values.isfinite()).sum())
            if bad:
                raise NonFiniteError(f"{bad} scores of {name} are NaN or infinite.")
        ordered = {k: v.detach().cpu().double().sort().values for k, v in self.scores.items()}
        object.__setattr__(self, "scores", ordered)
        object.__setattr__(self, "about", dict(self.about))

    def __len__(self) -> int:
        """Number of images."""
        return len(next(iter(self.scores.values())))

    def threshold(self, name: str, k: float = 1.0) -> float:
        """Return the mean of a criterion plus ``k`` standard deviations, the paper's rule.

        Raises:
            InputError: If the criterion is unknown, or there is one image only.
        """
        known = self._known(name)
        if len(known) < 2:
            raise InputError("a standard deviation needs at least two real images.")
        return float(known.mean() + k * known.std())

    def p_values(self, name: str, scores: Tensor) -> Tensor:
        r"""Return the chance that a real image scores at least as high, [B] float64.

        .. math:: p = \frac{1 + \#\{\text{real} \ge x\}}{N + 1}

        Whatever the criterion, a real image has :math:`p \le \alpha` with a chance of at most
        :math:`\alpha` (conformal prediction; Vovk et al., 2005), if it and the reference's images
        come from one source in one kind of file.

        Raises:
            InputError: If the criterion is unknown.
            NonFiniteError: If a score is NaN or infinite.
        """
        known = self._known(name)
        bad = int((~scores.isfinite()).sum())
        if bad:
            raise NonFiniteError(f"{bad} scores of {name} are NaN or infinite.")
        below = torch.searchsorted(known, scores.detach().cpu().double().contiguous())
        return (1.0 + len(known) - below) / (len(known) + 1.0)

    def check(self, about: Mapping[str, str]) -> None:
        """Raise unless scores made with these settings may be compared.

        Raises:
            StateMismatch: If a setting differs.
        """
        for name in sorted({*self.about, *about}):
            if self.about.get(name) != about.get(name):
                raise StateMismatch(
                    f"the real images were scored with {name} {self.about.get(name)}, these with "
                    f"{about.get(name)}: calibrate again."
                )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Raises:
            InputError: If it cannot be written.
        """
        about = {f"about:{name}": value for name, value in self.about.items()}
        _SCHEMA.save(path, dict(self.scores), about)

    @classmethod
    def load(cls, path: str | Path) -> RealReference:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: If the file is missing, damaged or something else.
        """
        tensors, metadata = _SCHEMA.load(path)
        about = {
            name.removeprefix("about:"): value
            for name, value in metadata.items()
            if name.startswith("about:")
        }
        try:
            return cls(tensors, about)
        except InputError as error:
            raise InputError(f"{path} is damaged ({error}): calibrate again.") from error

    def _known(self, name: str) -> Tensor:
        if name not in self.scores:
            raise InputError(f"unknown criterion {name!r}: choose from {', '.join(self.scores)}.")
        return self.scores[name]
