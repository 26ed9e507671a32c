"""What a point network looks at, logged while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from cmd_plugin.callbacks._arguments import whole
from cmd_plugin.callbacks._lightning import Callback
from cmd_plugin.errors import InputError
from cmd_plugin.pointcloud import point_importance, uncritical_subset
from cmd_plugin.pointcloud._interception import Forward, as_it_is
from cmd_plugin.pointcloud.focus import focus_alarms
from cmd_plugin.pointcloud.rotation import rotation_consistency
from cmd_plugin.runs.figures import figure_style, new_figure, save_figure

__all__ = ["PointImportanceMonitor"]

_BINS = 32


class PointImportanceMonitor(Callback):
    """Logs the focus of a point network after every so many epochs; never changes the network.

    It looks at the clouds of the first batch of the epoch (at most ``clouds`` of them) and logs,
    under ``importance/``:

    - ``entropy``: mean normalised entropy of the counts; falls when few points dominate,
    - ``critical_share``: share of the points that win at least one channel,
    - ``outlier_alarms``: clouds whose entropy lies more than ``alarm`` median absolute deviations
      from the median of these clouds,
    - ``rotation_consistency``: mean rank correlation between the scores of a cloud and of the same
      cloud turned at random about ``axis``,
    - with a TensorBoard logger also the histogram of the scores.

    With ``uncritical=True`` each training batch is cut down to its least important points, the same
    random number of them for the whole batch (Critical Points++); what is learnt then changes.
    Batches must be lists or dictionaries then, as the default collation makes them.

    Args:
        every_n_epochs: How often to look.
        clouds: How many clouds to look at.
        uncritical: Whether to train on uncritical subsets.
        fewest: Smallest subset.
        alarm: Median absolute deviations from which a cloud counts as an alarm.
        axis: Axis that clouds are turned about, 0 to 2.
        seed: Seed of rotations and subsets; each depends on epoch and batch alone, so that a
            resumed run equals an uninterrupted one.
        picture_every_n_epochs: Write a picture of four clouds so often; 0 writes none.
        folder: Where pictures go; by default the trainer's ``default_root_dir``.
        points_key: Key of the clouds in batches that are dictionaries.
        forward: How to call the module on points [B, N, C]; modules that take [B, C, N] need
            ``cmd_plugin.pointcloud.channels_first``.
        pool: Which pool to look at if several feed the head.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        clouds: int = 16,
        uncritical: bool = False,
        fewest: int = 256,
        alarm: float = 5.0,
        axis: int = 2,
        seed: int = 0,
        picture_every_n_epochs: int = 0,
        folder: str | None = None,
        points_key: str = "points",
        forward: Forward = as_it_is,
        pool: int | None = None,
    ) -> None:
        super().__init__()
        self.every_n_epochs = whole("every_n_epochs", every_n_epochs, 1)
        self.clouds = whole("clouds", clouds, 1)
        self.uncritical = uncritical
        self.fewest = whole("fewest", fewest, 1)
        if not alarm > 0.0:
            raise InputError(f"alarm must be above 0, it is {alarm!r}.")
        self.alarm = alarm
        self.axis = whole("axis", axis, 0, 2)
        self.seed = whole("seed", seed, 0)
        self.picture_every_n_epochs = whole("picture_every_n_epochs", picture_every_n_epochs, 0)
        self.folder = folder
        self.points_key = points_key
        self.forward, self.pool = forward, pool
        self._watched: Tensor | None = None

    @override
    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the first clouds of the epoch; cut the batch down if asked to."""
        points = self._points(batch)
        if batch_idx == 0:
            self._watched = points[: self.clouds].detach().clone()
        if self.uncritical:
            generator = self._generator(trainer.current_epoch, batch_idx)
            subset = uncritical_subset(
                pl_module,
                points,
                generator,
                fewest=self.fewest,
                forward=self.forward,
                pool=self.pool,
            )
            self._replace(batch, subset)

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure, log, draw."""
        epoch = trainer.current_epoch
        points, self._watched = self._watched, None
        if points is None or trainer.sanity_checking:
            return
        if (epoch + 1) % self.every_n_epochs == 0:
            self._measure(trainer, pl_module, points, epoch)
        due = self.picture_every_n_epochs
        if due and (epoch + 1) % due == 0 and trainer.is_global_zero:
            self._draw(trainer, pl_module, points, epoch)

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let the remembered clouds go."""
        self._watched = None

    def _measure(self, trainer: Any, pl_module: Any, points: Tensor, epoch: int) -> None:
        seen = point_importance(
            pl_module, points, "critical++", forward=self.forward, pool=self.pool
        )
        assert seen.entropy is not None and seen.wins is not None  # noqa: PT018 a counting measure
        turned = rotation_consistency(
            pl_module,
            points,
            self._generator(epoch, -1),
            axis=self.axis,
            forward=self.forward,
            pool=self.pool,
            scores=seen.norm,
        )
        values = {
            "entropy": seen.entropy.mean(),
            "critical_share": (seen.wins > 0).double().mean(),
            "outlier_alarms": focus_alarms(seen.entropy, self.alarm).sum(),
            "rotation_consistency": turned.mean(),
        }
        for name, value in values.items():
            pl_module.log(f"importance/{name}", value.float(), sync_dist=True)
        share = seen.norm / seen.norm.amax(dim=1, keepdim=True).clamp_min(1e-9)
        for logger in trainer.loggers:
            add = getattr(getattr(logger, "experiment", None), "add_histogram", None)
            if callable(add) and trainer.is_global_zero:
                add("importance/scores", share.float().cpu(), epoch, bins=_BINS)

    def _draw(self, trainer: Any, pl_module: Any, points: Tensor, epoch: int) -> None:
        from cmd_plugin.pointcloud.plots import plot_cloud  # matplotlib costs half a second

        clouds = points[:4]
        seen = point_importance(pl_module, clouds, forward=self.forward, pool=self.pool)
        shown = seen.display()
        with figure_style():
            figure = new_figure(3.2 * len(clouds), 3.4)
            for number, cloud in enumerate(clouds):
                axes = figure.add_subplot(1, len(clouds), number + 1, projection="3d")
                plot_cloud(cloud, shown[number], axes)
            figure.suptitle(f"importance after epoch {epoch + 1}")
        folder = Path(self.folder or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_figure(figure, folder / f"importance_epoch={epoch:03d}.png")

    def _generator(self, epoch: int, batch: int) -> torch.Generator:
        state = np.random.SeedSequence([self.seed, epoch, batch + 1]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0] >> 1))

    def _points(self, batch: Any) -> Tensor:
        if isinstance(batch, dict) and self.points_key in batch:
            found = batch[self.points_key]
        elif isinstance(batch, (list, tuple)) and batch:
            found = batch[0]
        else:
            found = batch
        if not isinstance(found, Tensor) or found.ndim != 3:
            raise InputError(
                "PointImportanceMonitor found no clouds [B, N, C] first in the batch: pass "
                "points_key= for batches that are dictionaries."
            )
        return found

    def _replace(self, batch: Any, points: Tensor) -> None:
        if isinstance(batch, dict):
            batch[self.points_key] = points
        elif isinstance(batch, list):
            batch[0] = points
        else:
            raise InputError(
                f"uncritical=True needs batches that are lists or dictionaries, not "
                f"{type(batch).__name__}: return a list from the collate function."
            )
