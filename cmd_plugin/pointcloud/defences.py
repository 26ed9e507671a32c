"""Plain, refocused, without statistical outliers, EPiC, and EPiC with a refocused member.

All five (six with the refocused network that was trained for it) share four or five networks of one
architecture: one pass over a batch answers for all rows of the robustness table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.kernels.counter_random import derived_seed
from cmd_plugin.networks.measuring import undisturbed
from cmd_plugin.pointcloud._interception import class_scores
from cmd_plugin.pointcloud.clouds import PointClouds
from cmd_plugin.pointcloud.epic import EPiC
from cmd_plugin.pointcloud.outliers import statistical_outliers
from cmd_plugin.pointcloud.partials import SIZES
from cmd_plugin.pointcloud.refocusing import (
    importance_order,
    kept_mask,
    refocus,
    run_on,
    uncritical_subset,
)
from cmd_plugin.pointcloud.view_training import EPiCTraining, ViewTraining
from cmd_plugin.runs.tensors import Schema

__all__ = [
    "STAGES",
    "Defences",
    "initial_defences",
    "repeated_to_size",
    "scaled_sizes",
    "train_defences",
]

STAGES = ("plain", "ensemble", "subset")
"""What is trained one after the other; nothing is shared between them."""

_SCHEMA = Schema("defences", 1, "the networks of a robustness run")
_POINTS = 1024  # clouds the published sizes are meant for
_KEPT = 600
_SPREAD = 64  # points that show a shape when spread over all of it
_FEWEST = 20  # points a refocused network gets at least, as many as a graph network's neighbours


def scaled_sizes(points: int) -> dict[str, int]:
    """Return EPiC's sizes of partial clouds for clouds of N points: 512, 512, 128 at 1024.

    In proportion, with one exception, which is ours: a random subset of a small cloud has up to a
    quarter of its points, 64 at most. 32 points spread over a whole shape show too little of it,
    while half of 256 points, side by side, still show a part of it well.

    Args:
        points: N, at least 1.
    """
    sizes: dict[str, int] = {
        view: max(1, round(size * points / _POINTS)) for view, size in SIZES.items()
    }
    sizes["random"] = max(sizes["random"], min(_SPREAD, points // 4))
    return sizes


def repeated_to_size(points: Tensor, kept: Tensor) -> Tensor:
    """Return clouds with only their kept points, repeated in turn up to the old size.

    That is how the published statistical outlier removal keeps clouds of one size.

    Args:
        points: [B, N, 3].
        kept: [B, N] bool; a cloud that keeps nothing stays as it is.

    Returns:
        [B, N, 3].
    """
    kept = kept | ~kept.any(dim=1, keepdim=True)
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)
    place = torch.arange(points.shape[1], device=points.device) % kept.sum(dim=1, keepdim=True)
    return points.gather(1, order.gather(1, place)[:, :, None].expand(-1, -1, points.shape[2]))


class Defences(nn.Module):
    """The networks behind the rows of the robustness table.

    Args:
        plain: Trained on whole clouds; maps [B, N, 3] to [B, C].
        ensemble: Three networks on partial clouds.
        subset: Trained on uncritical subsets; EPiC's thirteenth member.
        points: Number of points N of the clean clouds: the thirteenth member keeps 600/1024 N.
    """

    def __init__(self, plain: nn.Module, ensemble: EPiC, subset: nn.Module, points: int) -> None:
        super().__init__()
        self.plain, self.ensemble, self.subset = plain, ensemble, subset
        self.points = points
        self.kept = max(1, round(_KEPT * points / _POINTS))

    @property
    def views(self) -> dict[str, tuple[str, ...]]:
        """The view of every member of the two rows that vote."""
        members = self.ensemble.views
        return {"EPiC": members, "EPiC + refocused": (*members, "refocused")}

    def forward(self, points: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Return the logits of every row, [B, C] or, for rows that vote, [B, M, C].

        Args:
            points: [B, N', 3].
            index: [B] sample numbers.
        """
        with undisturbed(self):
            focused = refocus(self.plain, points, minimum=_FEWEST)
            trained = refocus(self.subset, points, minimum=_FEWEST)
            # Its scores of the whole clouds are there already: no second pass for them.
            kept = kept_mask(importance_order(trained.importance), self.kept)
            member = run_on(self.subset, points, kept)
            votes = self.ensemble.votes(points, index).logits
            cleaned = repeated_to_size(points, statistical_outliers(points))
            return {
                "plain": class_scores(focused.importance.output, len(points)),
                "refocused": focused.output,
                "refocused, trained": trained.output,
                "SOR": class_scores(self.plain(cleaned), len(points)),
                "EPiC": votes,
                "EPiC + refocused": torch.cat([votes, member[:, None]], dim=1),
            }

    def save(
        self,
        path: str | Path,
        settings: Mapping[str, object],
        finished: Sequence[str] = STAGES,
    ) -> None:
        """Write all weights as safetensors, in one step.

        Args:
            path: The file.
            settings: What they were trained under, JSON-like.
            finished: Which of :data:`STAGES` are trained.

        Raises:
            InputError: If it cannot be written.
        """
        about = {"settings": _text(settings), "finished": ",".join(finished)}
        _SCHEMA.save(path, self.state_dict(), about)

    def load(self, path: str | Path, settings: Mapping[str, object]) -> tuple[str, ...]:
        """Read what :meth:`save` wrote; return which of :data:`STAGES` are trained.

        Raises:
            InputError: If the file is missing, damaged or something else.
            StateMismatch: If it was trained under other settings.
        """
        state, about = _SCHEMA.load(path)
        try:
            then = dict(json.loads(about["settings"]))
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{path} is damaged (its settings): copy or make it again.") from error
        now = json.loads(_text(settings))
        for name in sorted({*then, *now}):
            if then.get(name) != now.get(name):
                raise StateMismatch(
                    f"{path} was trained under {name}={then.get(name)}, asked for is "
                    f"{now.get(name)}: use the same settings, or train anew in another folder."
                )
        own = {name: (tensor.shape, tensor.dtype) for name, tensor in self.state_dict().items()}
        if own != {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}:
            raise StateMismatch(
                f"{path} holds other networks: names, shapes or types of their weights differ."
            )
        self.load_state_dict(state)
        return tuple(stage for stage in STAGES if stage in about.get("finished", "").split(","))


def _text(settings: Mapping[str, object]) -> str:
    return json.dumps(dict(settings), sort_keys=True)


def train_defences(
    make: Callable[[], nn.Module],
    data: PointClouds,
    epochs: int,
    *,
    rounds: int = 2,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    neighbours: int = 20,
    seed: int = 0,
    start: Defences | None = None,
    finished: Sequence[str] = (),
    after_stage: Callable[[str, Defences], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Defences:
    """Train the five networks of the table, each for equally many optimizer steps.

    A recipe for short runs: AdamW with a cosine schedule. (The published one, SGD over 500 epochs,
    is the default of :class:`cmd_plugin.pointcloud.EPiCTraining`.)

    Args:
        make: Makes an untrained network that maps [B, n, 3] to [B, C].
        data: Training clouds.
        epochs: Passes over them, for every network.
        rounds: Optimizer steps per batch, each with another view or augmentation.
        batch_size: Clouds in a batch.
        learning_rate: Of AdamW, at the start.
        weight_decay: Of AdamW.
        neighbours: Nearest neighbours a curve of EPiC may step to, the point itself counted;
            ``start``, where given, has its own number.
        seed: Of initial weights, batches and views.
        start: Networks of an earlier run with the same arguments that was stopped.
        finished: Which of :data:`STAGES` it had finished; they are not trained again, and the
            result is that of a run that was not stopped.
        after_stage: Called with (stage, networks) when one is trained.
        progress: Called with (epochs done, epochs of all networks) after each.

    Raises:
        InputError: If a number is out of range.
        NonFiniteError: If a loss becomes NaN or infinite.
    """
    defences = start or initial_defences(make, data.points.shape[1], seed, neighbours)
    optimizer = partial(_adam, learning_rate=learning_rate, weight_decay=weight_decay)
    seeds = [derived_seed(seed, number, 2) for number in range(3)]
    subset = partial(_uncritical, defences.subset, max(1, defences.points // 4))
    common: Callable[..., dict[str, Any]] = partial(
        dict, rounds=rounds, batch_size=batch_size, optimizer=optimizer
    )
    stages: dict[str, ViewTraining | EPiCTraining] = {
        "plain": ViewTraining(defences.plain, data, epochs, **common(seed=seeds[0])),
        "ensemble": EPiCTraining(defences.ensemble, data, epochs, **common(seed=seeds[1])),
        "subset": ViewTraining(defences.subset, data, epochs, **common(seed=seeds[2], view=subset)),
    }
    done, total = 0, (2 + len(defences.ensemble.networks)) * epochs

    def tell(epoch: int, _: int) -> None:
        if progress is not None:
            progress(done + epoch, total)

    for stage, training in stages.items():
        if stage not in finished:
            training.run(progress=tell)
            if after_stage is not None:
                after_stage(stage, defences)
        done += epochs * (len(defences.ensemble.networks) if stage == "ensemble" else 1)
    return defences.eval()


def initial_defences(
    make: Callable[[], nn.Module], points: int, seed: int, neighbours: int = 20
) -> Defences:
    """Return untrained networks whose weights depend on the seed; global random state is left.

    Args:
        make: Makes an untrained network.
        points: Number of points of the clean clouds.
        seed: Of the weights and of EPiC's samples.
        neighbours: Nearest neighbours a curve may step to, the point itself counted.
    """
    with torch.random.fork_rng(devices=[]):  # networks are made on the CPU
        torch.manual_seed(derived_seed(seed, 0, 1))
        plain = make()
        ensemble = EPiC(make, sizes=scaled_sizes(points), neighbours=neighbours, seed=seed)
        return Defences(plain, ensemble, make(), points)


def _adam(
    parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)


def _uncritical(
    network: nn.Module, fewest: int, points: Tensor, index: Tensor, seed: int
) -> Tensor:
    del index  # one number of points is drawn for the whole batch
    generator = torch.Generator().manual_seed(seed)
    return uncritical_subset(network, points, generator, fewest=fewest)
