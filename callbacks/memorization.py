"""What a diffusion model memorises, logged while it trains."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from cmd_plugin.callbacks._arguments import whole
from cmd_plugin.callbacks._lightning import Callback
from cmd_plugin.diffusion.memorization import (
    CONTROLS,
    MemorizationReport,
    MemorizationScore,
    separate,
    separate_doses,
)
from cmd_plugin.diffusion.probes import ProbeSet
from cmd_plugin.diffusion.score_model import ScoreModel
from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.runs.figures import save_figure

__all__ = ["MemorizationMonitor"]

_SHOWN = 8


def _of_module(pl_module: Any) -> ScoreModel:
    """The module's own ``score_model()``."""
    make = getattr(pl_module, "score_model", None)
    if not callable(make):
        raise InputError(
            f"MemorizationMonitor does not know the diffusion model of {type(pl_module).__name__}: "
            "give the module a method score_model() that returns a ScoreModel, or pass "
            "score_model=."
        )
    model: ScoreModel = make()
    return model


class MemorizationMonitor(Callback):
    """Scores fixed images of the training set, and held-out ones, after every so many epochs.

    It never changes the model. It logs, under ``memorization/``, each statistic's AUROC at telling
    members from held-out probes (``p1``, the p-Laplace score, and all controls beside it) at the
    first of the times, per dose as ``p1_x8`` where members come several times; ``gap``, by how much
    the mean p1 of members is above that of held-out images; and ``tau_mem``, the first step at
    which members and held-out images separate above ``limit``, once there is one.

    Args:
        probes: The images, or the file that :meth:`ProbeSet.save` wrote.
        every_n_epochs: How often to look.
        t: Times.
        p: Powers; the first is the one ``gap``, ``tau_mem`` and the pictures are about.
        directions: How many directions, in pairs.
        controls: Which controls.
        limit: AUROC from which members count as separate.
        patience: Stop training once members are separate and the gap has risen so many looks in a
            row; 0 never stops.
        picture_every_n_epochs: Write a picture of the most memorised images so often; 0 writes
            none.
        folder: Where pictures go; by default the trainer's ``default_root_dir``.
        seed: Of directions and random signs; they are the same at every look.
        batch_size: Images per call of the network: this alone bounds the memory.
        score_model: Returns the ScoreModel of a module, the weights that count (those of an EMA,
            say); by default the module's own method ``score_model()``.

    Attributes:
        history: One entry a look: ``epoch``, ``step``, ``gap``, ``auroc`` (statistic -> one number
            a time) and ``doses`` (statistic -> dose -> one number a time).
        tau_mem: Group -> step, of ``"all"`` and of each dose (``"x8"``) that has separated.

    Raises:
        InputError: If an argument is out of range, or the file of probes cannot be read.
    """

    def __init__(
        self,
        probes: ProbeSet | str,
        every_n_epochs: int = 1,
        t: Sequence[float] = (25, 50),
        p: Sequence[float] = (1, 2),
        directions: int = 16,
        controls: Sequence[str] = CONTROLS,
        limit: float = 0.6,
        patience: int = 0,
        picture_every_n_epochs: int = 0,
        folder: str | None = None,
        seed: int = 0,
        batch_size: int = 256,
        score_model: Callable[[Any], ScoreModel] = _of_module,
    ) -> None:
        super().__init__()
        self.probes = ProbeSet.load(probes) if isinstance(probes, str) else probes
        self.every_n_epochs = whole("every_n_epochs", every_n_epochs, 1)
        if not 0.5 <= limit < 1.0:
            raise InputError(f"limit must be at least .5 and below 1, it is {limit!r}.")
        self.t, self.p, self.controls = tuple(t), tuple(p), tuple(controls)
        if not self.t or not self.p:
            raise InputError("give at least one time t and one power p.")
        self.directions = whole("directions", directions, 2)
        self.limit = limit
        self.patience = whole("patience", patience, 0)
        self.picture_every_n_epochs = whole("picture_every_n_epochs", picture_every_n_epochs, 0)
        self.folder = folder
        self.seed = whole("seed", seed, 0)
        self.batch_size = whole("batch_size", batch_size, 1)
        self.score_model = score_model
        self.history: list[dict[str, Any]] = []
        self.tau_mem: dict[str, int] = {}

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure, log, draw; stop if asked to."""
        epoch = trainer.current_epoch
        picture = self.picture_every_n_epochs
        draws = bool(picture) and (epoch + 1) % picture == 0
        looks = (epoch + 1) % self.every_n_epochs == 0
        if not (looks or draws) or trainer.sanity_checking:
            return
        members, held_out = self._reports(pl_module)
        if looks:
            self._note(members, held_out, epoch, trainer.global_step)
            for name, value in self._values().items():
                pl_module.log(f"memorization/{name}", value, sync_dist=True)
            if self.patience and self._has_risen():
                trainer.should_stop = True
        if draws and trainer.is_global_zero:
            self._draw(members, held_out, trainer, epoch)

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was seen, as numbers and text."""
        return {"history": [dict(look) for look in self.history], "tau_mem": dict(self.tau_mem)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            StateMismatch: If it is something else; nothing has changed then.
        """
        history, tau = state_dict.get("history"), state_dict.get("tau_mem")
        if not isinstance(history, list) or not isinstance(tau, dict):
            raise StateMismatch("this is not the state of a MemorizationMonitor.")
        self.history, self.tau_mem = [dict(look) for look in history], dict(tau)

    @property
    def headline(self) -> str:
        """Name of the statistic that ``gap``, ``tau_mem`` and the pictures are about."""
        return f"p{self.p[0]:g}"

    def _reports(self, pl_module: Any) -> tuple[MemorizationReport, MemorizationReport]:
        score = MemorizationScore(
            self.score_model(pl_module),
            self.t,
            self.p,
            directions=self.directions,
            controls=self.controls,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        return score(self.probes.members), score(self.probes.held_out)

    def _note(
        self, members: MemorizationReport, held_out: MemorizationReport, epoch: int, step: int
    ) -> None:
        doses = self.probes.each_dose()
        inside, outside = (r.evidence(self.headline)[:, 0].mean() for r in (members, held_out))
        look: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            "gap": float(inside - outside),
            "auroc": separate(held_out, members)["auroc"],
            "doses": separate_doses(held_out, members, doses),
        }
        self.history.append(look)
        groups = {"all": look["auroc"][self.headline]}
        groups |= {f"x{dose}": value for dose, value in look["doses"][self.headline].items()}
        for group, (first, *_) in groups.items():
            if first > self.limit:
                self.tau_mem.setdefault(group, step)

    def _values(self) -> dict[str, float]:
        look = self.history[-1]
        values = {name: numbers[0] for name, numbers in look["auroc"].items()}
        if len(self.probes.each_dose()) > 1:
            for name, doses in look["doses"].items():
                values |= {f"{name}_x{dose}": numbers[0] for dose, numbers in doses.items()}
        values["gap"] = look["gap"]
        if "all" in self.tau_mem:
            values["tau_mem"] = float(self.tau_mem["all"])
        return values

    def _has_risen(self) -> bool:
        gaps = [look["gap"] for look in self.history[-self.patience - 1 :]]
        rises = sum(later > before for before, later in itertools.pairwise(gaps))
        latest: float = self.history[-1]["auroc"][self.headline][0]
        return rises == self.patience and latest > self.limit

    def _draw(
        self, members: MemorizationReport, held_out: MemorizationReport, trainer: Any, epoch: int
    ) -> None:
        from cmd_plugin.diffusion.plots import plot_contact_sheet

        doses = self.probes.doses
        assert doses is not None
        rows = []
        for name, images, report in (
            ("members", self.probes.members, members),
            ("held out", self.probes.held_out, held_out),
        ):
            values = report.evidence(self.headline)[:, 0]
            top = values.argsort(descending=True, stable=True)[:_SHOWN]
            captions = [
                f"{values[n]:.3f}" + (f" x{doses[n]}" if name == "members" else "")
                for n in top.tolist()
            ]
            rows.append((name, images[top], captions))
        title = f"highest {self.headline} at t = {self.t[0]:g}, epoch {epoch + 1}"
        folder = Path(self.folder or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_figure(plot_contact_sheet(rows, title), folder / f"memorization_epoch={epoch:03d}.png")
