r"""One view of every diffusion model: its estimate of the noise, in the same coordinates.

A network predicts the noise itself, the clean image, a velocity or a score. The identities between
them are exact, with :math:`y = a'x_0 + s'e` the network's own coordinates, :math:`x = y /
\sqrt{a'^2 + s'^2}` ours, and m what the network returns:

============================  ==========================================
prediction                    :math:`\hat e(x, t)`
============================  ==========================================
``epsilon``                   :math:`m`
``sample`` (clean image)      :math:`(y - a' m) / s'`
``v_prediction``              :math:`a\,m + s\,x`
``score`` (of y)              :math:`-s' m`
``flow`` (noise - image)      :math:`(y + a' m) / (a' + s')`
============================  ==========================================

In our coordinates the score is :math:`-\hat e / s`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from cmd_plugin.diffusion.schedules import NoiseSchedule
from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.networks import undisturbed

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["MODES", "PREDICTIONS", "ScoreModel"]

PREDICTIONS = ("epsilon", "sample", "v_prediction", "score", "flow")
MODES = ("conditional", "unconditional", "guided", "gap")

Mode = Literal["conditional", "unconditional", "guided", "gap"]
Predict = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


class ScoreModel:
    """A diffusion model as a function of noised image and time; the model itself stays as it is.

    Args:
        predict: ``predict(y, t, condition)`` returns what the network predicts, of the shape of y.
            It is given noised images y [N, ...] in its own coordinates, times t [N] float64 and
            the condition of each image [N, ...] or None.
        schedule: What times mean.
        shape: Shape of one image as the model sees it, such as (channels, height, width).
        prediction: What the network predicts: one of :data:`PREDICTIONS`.
        networks: The modules ``predict`` runs: they are in evaluation mode meanwhile and exactly
            what they were afterwards.
        device: Where images go; by default where the first network's parameters are.
        dtype: What images are cast to for ``predict``; by default what the first network's
            parameters are, or the images' own.
        condition: [1, ...] or [N, ...] what images are conditioned on unless a call says otherwise.
        unconditional: [1, ...] the condition that says nothing, of the same trailing shape.
        mode: Which estimate: ``"conditional"``; ``"unconditional"``; ``"guided"``, classifier-free
            guidance :math:`u + g(c - u)`; or ``"gap"``, :math:`c - u`, of which only the direction
            has a meaning.
        guidance: The g.

    Raises:
        InputError: If prediction or mode is unknown, or the mode needs a condition that is missing.
    """

    def __init__(
        self,
        predict: Predict,
        schedule: NoiseSchedule,
        shape: Sequence[int],
        prediction: str = "epsilon",
        *,
        networks: Sequence[nn.Module] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        condition: Tensor | None = None,
        unconditional: Tensor | None = None,
        mode: Mode = "conditional",
        guidance: float = 7.5,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise InputError(
                f"unknown prediction type {prediction!r}: choose one of {', '.join(PREDICTIONS)}."
            )
        self.shape = tuple(int(size) for size in shape)
        if not self.shape or min(self.shape) < 1:
            raise ShapeError(f"the shape of an image must be positive sizes, got {self.shape}.")
        first = next((p for network in networks for p in network.parameters()), None)
        self.predict, self.schedule, self.prediction = predict, schedule, prediction
        self.networks = tuple(networks)
        self.device = torch.device(
            device if device is not None else "cpu" if first is None else first.device
        )
        self.dtype = dtype if dtype is not None else None if first is None else first.dtype
        self.condition, self.unconditional = condition, unconditional
        self.mode: Mode = "conditional"
        self.guidance = guidance
        self._set_mode(mode)

    @classmethod
    def from_diffusers(cls, source: Any, scheduler: Any = None, **options: Any) -> ScoreModel:
        """Wrap a diffusers network or pipeline; see :func:`.diffusers_models.wrap_diffusers`."""
        from cmd_plugin.diffusion.diffusers_models import wrap_diffusers

        return wrap_diffusers(source, scheduler, **options)

    @classmethod
    def from_folder(cls, folder: str | Path, **options: Any) -> ScoreModel:
        """Read a local diffusers folder; see :func:`.diffusers_models.read_diffusers`."""
        from cmd_plugin.diffusion.diffusers_models import read_diffusers

        return cls.from_diffusers(read_diffusers(folder), **options)

    @classmethod
    def from_mixture(
        cls, weights: Tensor, means: Tensor, covariances: Tensor, schedule: NoiseSchedule
    ) -> ScoreModel:
        """Return the exact model of a Gaussian mixture; see :func:`.closed_forms.mixture_noise`."""
        from cmd_plugin.diffusion.closed_forms import mixture_noise

        return cls(
            mixture_noise(weights, means, covariances, schedule),
            schedule,
            means.shape[1:],
            device=means.device,
            dtype=means.dtype,
        )

    @classmethod
    def from_data(
        cls,
        data: Tensor,
        schedule: NoiseSchedule,
        weights: Tensor | None = None,
        bandwidth: float = 0.0,
    ) -> ScoreModel:
        """Return what a perfect memoriser learns; see :func:`.closed_forms.data_noise`."""
        from cmd_plugin.diffusion.closed_forms import data_noise

        return cls(
            data_noise(data, schedule, weights, bandwidth),
            schedule,
            data.shape[1:],
            device=data.device,
            dtype=data.dtype,
        )

    @property
    def dimension(self) -> int:
        """Number of scalars in one image."""
        return torch.Size(self.shape).numel()

    @property
    def has_gap(self) -> bool:
        """Whether both a conditional and an unconditional estimate are to be had."""
        return self.unconditional is not None

    def with_mode(self, mode: Mode, guidance: float | None = None) -> Self:
        """Return a view of the same model in another mode.

        Raises:
            InputError: If the mode is unknown or needs a condition that is missing.
        """
        view = copy.copy(self)
        view.guidance = self.guidance if guidance is None else guidance
        view._set_mode(mode)
        return view

    def measuring(self, *, gradients: bool = False) -> undisturbed:
        """Return the context that measurements run in: networks are as before on leaving it."""
        # A network in evaluation mode writes no running statistics, so buffers need no copy.
        return undisturbed(*self.networks, gradients=gradients, buffers=False, device=self.device)

    def noise(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the estimate of the noise.

        Args:
            x: [N, ...] noised images in variance-preserving coordinates, floating point.
            t: [N] times.
            condition: [N, ...] what each image is conditioned on; by default the model's own.

        Returns:
            [N, ...] of the dtype of ``x``, at least float32.

        Raises:
            ShapeError: If the images, or what the network returns, have another shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ShapeError(
                f"the model sees images of shape {self.shape}, got {tuple(x.shape[1:])}: resize or "
                "encode them first."
            )
        if self.mode == "unconditional":
            return self._estimate(x, t, self.unconditional)
        given = self.condition if condition is None else condition
        conditional = self._estimate(x, t, given)
        if self.mode == "conditional":
            return conditional
        unconditional = self._estimate(x, t, self.unconditional)
        gap = conditional - unconditional
        return gap if self.mode == "gap" else unconditional + self.guidance * gap

    def _estimate(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        own_signal, own_noise = self.schedule.levels(t)
        size = (own_signal**2 + own_noise**2).sqrt()
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)

        def factor(value: Tensor) -> Tensor:
            return value.to(wide).reshape(-1, *[1] * len(self.shape))

        y = x if self.schedule.kind == "steps" else x * factor(size)
        if condition is not None:
            condition = condition.to(x.device)
            if len(condition) != len(x):
                if len(condition) != 1:
                    raise ShapeError(
                        f"{len(condition)} conditions for {len(x)} images: give one, or one each."
                    )
                condition = condition.expand(len(x), *condition.shape[1:])
            if condition.is_floating_point() and self.dtype is not None:
                condition = condition.to(self.dtype)
        found = self.predict(y if self.dtype is None else y.to(self.dtype), t, condition)
        if found.shape != x.shape:
            raise ShapeError(
                f"the network returned {tuple(found.shape)} for images {tuple(x.shape)}: it must "
                "return one prediction of the same shape."
            )
        m = found.to(wide)
        if self.prediction == "epsilon":
            return m
        if self.prediction == "sample":
            return (y - factor(own_signal) * m) / factor(own_noise)
        if self.prediction == "v_prediction":
            return factor(own_signal / size) * m + factor(own_noise / size) * x
        if self.prediction == "score":
            return -factor(own_noise) * m
        return (y + factor(own_signal) * m) / factor(own_signal + own_noise)

    def _set_mode(self, mode: Mode) -> None:
        if mode not in MODES:
            raise InputError(f"unknown mode {mode!r}: choose one of {', '.join(MODES)}.")
        if mode != "conditional" and self.unconditional is None:
            raise InputError(
                f"mode {mode!r} needs the unconditional estimate: give the model unconditional=, "
                "the condition that says nothing."
            )
        self.mode = mode
