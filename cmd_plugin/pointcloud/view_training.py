"""Train a point network on a view of its clouds: whole ones, EPiC's parts, or anybody's.

The recipe is that of the EPiC and Critical Points++ papers by default: SGD with momentum, a cosine
schedule stepped once an epoch, smoothed labels, random scales and shifts. Every random number is a
function of (seed, epoch, round, sample), so a run that was stopped and resumed ends in the same
weights as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cmd_plugin.errors import InputError, NonFiniteError, StateMismatch
from cmd_plugin.kernels.counter_random import CounterRandom, check_seed, derived_seed
from cmd_plugin.pointcloud.clouds import PointClouds
from cmd_plugin.pointcloud.corruptions import shuffle_points
from cmd_plugin.pointcloud.epic import EPiC

__all__ = ["EPiCTraining", "ViewTraining", "augment_clouds"]

Show = Callable[[Tensor, Tensor, int], Tensor]
Optimize = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Progress = Callable[[int, int], None]

_AUGMENT = 0x41554700


def augment_clouds(points: Tensor, *, seed: int, index: Tensor) -> Tensor:
    """Scale every axis by U(2/3, 3/2), shift it by U(-0.2, 0.2), and shuffle the points.

    Args:
        points: [B, N, 3], float32 or float64.
        seed: In [0, 2^63).
        index: [B] sample numbers.

    Returns:
        [B, N, 3]; a cloud's draws depend on (seed, its number).
    """
    random = CounterRandom(seed, index, _AUGMENT)
    factor = 2 / 3 + (3 / 2 - 2 / 3) * random.uniform(3)
    shift = 0.4 * random.uniform(3) - 0.2
    moved = points * factor[:, None].to(points.dtype) + shift[:, None].to(points.dtype)
    return shuffle_points(moved, seed=seed, index=index)


def _published(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.005, momentum=0.9, weight_decay=1e-4)


class ViewTraining:
    """Trains one network; can be stopped after any epoch, saved, and resumed.

    Args:
        network: Maps clouds [B, n, 3] to logits [B, C]; trained in place.
        data: Training clouds.
        epochs: Length of the whole run; the cosine schedule ends there.
        view: Function of (clouds [B, N, 3], sample numbers [B], seed) that returns what the network
            is shown, [B, n, 3]; without one it sees the whole cloud. Called with the network in
            eval mode and without gradients.
        rounds: Optimizer steps per batch, each with a fresh view.
        batch_size: Clouds in a batch; a last batch of one cloud is left out, for BatchNorm's sake.
        optimizer: Makes the optimizer from the parameters; by default SGD, learning rate 0.005,
            momentum 0.9, weight decay 1e-4. The schedule multiplies its learning rates.
        label_smoothing: Share taken from the true class and spread over the wrong ones, in [0, 1).
        augment: Whether to scale, shift and shuffle the clouds first.
        seed: In [0, 2^63).

    Raises:
        InputError: If a number is out of range or there are fewer than two clouds.
    """

    def __init__(
        self,
        network: nn.Module,
        data: PointClouds,
        epochs: int,
        *,
        view: Show | None = None,
        rounds: int = 1,
        batch_size: int = 64,
        optimizer: Optimize = _published,
        label_smoothing: float = 0.2,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        for name, value in (("epochs", epochs), ("rounds", rounds), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")
        if not 0.0 <= label_smoothing < 1.0:
            raise InputError(f"label_smoothing must be in [0, 1), got {label_smoothing}.")
        if len(data) < 2 or batch_size < 2:
            raise InputError("BatchNorm needs batches of at least two clouds to train on.")
        self.network, self.data, self.epochs = network, data, epochs
        self._view, self._rounds, self._batch = view, rounds, batch_size
        self._optimizer = optimizer(network.parameters())
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        # torch spreads its share over all classes; the papers spread it over the wrong ones.
        classes = max(2, len(data.classes))
        self._smoothing = label_smoothing * classes / (classes - 1)
        if self._smoothing >= 1.0:
            raise InputError(
                f"label_smoothing {label_smoothing} leaves nothing of {classes} classes: lower it."
            )
        self._augment, self._seed = augment, check_seed(seed)
        self.losses: list[float] = []

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.losses)

    def run(self, until: int | None = None, progress: Progress | None = None) -> list[float]:
        """Train up to an epoch, by default the last; return the mean loss of every epoch so far.

        Args:
            until: Number of epochs to have done, at most ``epochs``.
            progress: Called with (epochs done, epochs) after each.

        Raises:
            NonFiniteError: If the loss becomes NaN or infinite.
        """
        last = self.epochs if until is None else min(until, self.epochs)
        while self.epoch < last:
            self._run_epoch()
            if progress is not None:
                progress(self.epoch, self.epochs)
        return list(self.losses)

    def _run_epoch(self) -> None:
        epoch = self.epoch
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * 0.5 * (1.0 + math.cos(math.pi * epoch / self.epochs))
        total, count = torch.zeros((), dtype=torch.float64), 0
        device = next(self.network.parameters()).device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # dropout draws from the global generator
            torch.manual_seed(derived_seed(self._seed, epoch))
            for index in self._batches(epoch):
                points = self.data.points[index].to(device)
                labels = self.data.labels[index].to(device)
                for number in range(self._rounds):
                    seed = derived_seed(self._seed, epoch, number + 1)
                    loss = self._step(points, labels, index.to(device), seed)
                    total += loss.detach().double().cpu() * len(index)
                    count += len(index)
        mean = float(total / count)
        if not math.isfinite(mean):
            raise NonFiniteError(
                f"the loss is {mean} in epoch {epoch}: lower the learning rate and start again."
            )
        self.losses.append(mean)

    def _step(self, points: Tensor, labels: Tensor, index: Tensor, seed: int) -> Tensor:
        shown = augment_clouds(points, seed=seed, index=index) if self._augment else points
        if self._view is not None:
            self.network.eval()
            with torch.no_grad():
                shown = self._view(shown, index, seed)
        self.network.train()
        self._optimizer.zero_grad(set_to_none=True)
        logits = self.network(shown)
        loss = cross_entropy(logits, labels, label_smoothing=self._smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.network.eval()
        return loss

    def _batches(self, epoch: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(derived_seed(self._seed, epoch, 0))
        order = torch.randperm(len(self.data), generator=generator)
        for start in range(0, len(order) - 1, self._batch):
            yield order[start : start + self._batch]

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs: weights, optimizer, losses. Tensors, numbers and strings."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "losses": list(self.losses),
            "settings": self._settings(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run from its :meth:`state_dict`.

        Raises:
            StateMismatch: If it belongs to a run with other settings or another network.
        """
        settings = state.get("settings")
        if settings != self._settings():
            raise StateMismatch(
                f"the saved run has settings {settings}, this one {self._settings()}: give the "
                "same ones, or start a new run."
            )
        try:
            self.network.load_state_dict(state["network"])
            self._optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise StateMismatch(f"the saved run is of another network: {error}") from error
        self.losses = list(state["losses"])

    def _settings(self) -> dict[str, Any]:
        return {
            "epochs": self.epochs,
            "rounds": self._rounds,
            "batch_size": self._batch,
            "clouds": len(self.data),
            "smoothing": self._smoothing,
            "augment": self._augment,
            "seed": self._seed,
        }


class EPiCTraining:
    """Trains the networks of an ensemble, each on fresh partial clouds of its view.

    As published: for every batch, ``rounds`` times, new random anchors, one partial cloud of each
    cloud, and one optimizer step of each network. (The networks share nothing, so they are trained
    one after the other.) Extra members are left alone.

    Args:
        ensemble: Trained in place.
        data: Training clouds.
        epochs: Length of the run.
        rounds: Optimizer steps per batch and network; 4 in the paper.
        seed: In [0, 2^63).
        batch_size: See :class:`ViewTraining`, as for the others.
        optimizer: Makes the optimizer of one network.
        label_smoothing: Share spread over the wrong classes.
        augment: Whether to scale, shift and shuffle the clouds first.

    Raises:
        InputError: If a number is out of range or there are fewer than two clouds.
    """

    def __init__(
        self,
        ensemble: EPiC,
        data: PointClouds,
        epochs: int,
        *,
        rounds: int = 4,
        batch_size: int = 64,
        optimizer: Optimize = _published,
        label_smoothing: float = 0.2,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        self.ensemble = ensemble
        self.parts: dict[str, ViewTraining] = {}
        for number, view in enumerate(ensemble.networks):
            network = _Member(ensemble, view)
            self.parts[view] = ViewTraining(
                network,
                data,
                epochs,
                view=network.part,
                rounds=rounds,
                batch_size=batch_size,
                optimizer=optimizer,
                label_smoothing=label_smoothing,
                augment=augment,
                seed=derived_seed(check_seed(seed), number, 0, 1),
            )

    def run(self, until: int | None = None, progress: Progress | None = None) -> list[float]:
        """Train every network up to an epoch, by default the last.

        Args:
            until: Number of epochs to have done.
            progress: Called with (epochs done, epochs), summed over the networks, after each.

        Returns:
            Mean loss of every epoch so far, averaged over the networks.

        Raises:
            NonFiniteError: If a loss becomes NaN or infinite.
        """
        total = sum(part.epochs for part in self.parts.values())

        def tell(_: int, __: int) -> None:
            if progress is not None:
                progress(sum(part.epoch for part in self.parts.values()), total)

        losses = [part.run(until, tell) for part in self.parts.values()]
        return [math.fsum(epoch) / len(epoch) for epoch in zip(*losses, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs, by view."""
        return {view: part.state_dict() for view, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run from its :meth:`state_dict`.

        Raises:
            StateMismatch: If it belongs to a run with other settings or another ensemble.
        """
        if set(state) != set(self.parts):
            raise StateMismatch(f"the saved run trains {[*state]}, this one {[*self.parts]}.")
        for view, part in self.parts.items():
            part.load_state_dict(state[view])


class _Member(nn.Module):
    """One network of an ensemble, and the part of a cloud it is shown in training."""

    def __init__(self, ensemble: EPiC, view: str) -> None:
        super().__init__()
        self.network = ensemble.networks[view]
        self._ensemble = (ensemble,)  # in a tuple: not a submodule of its own member
        self._view: Any = view

    def forward(self, clouds: Tensor) -> Tensor:
        return self._ensemble[0].classify(self._view, clouds)

    def part(self, points: Tensor, index: Tensor, seed: int) -> Tensor:
        parts = self._ensemble[0].parts(
            points, self._view, index=index, random_anchors=True, seed=seed, anchors=1
        )
        return parts[:, 0]
