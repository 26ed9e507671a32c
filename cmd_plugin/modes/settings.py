"""The settings of online CMD that a saved state must share with the run that continues it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal, get_args

from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.modes.choice import check_modes, check_profile
from cmd_plugin.modes.layout import Layout
from cmd_plugin.modes.states import SavedState, shown
from cmd_plugin.modes.store import check_storage

__all__ = ["Embedding", "Projection", "Settings", "Slots", "require_same_run"]

Projection = Literal["epoch", "step", "tie", "pool"]
Slots = Literal["leave", "zero"]


@dataclass(frozen=True)
class Embedding:
    """When and how embedded CMD takes weights out of training.

    At every snapshot number t (counted from 0) beyond the warm-up with ``t % every == 0`` the
    weights whose coefficients have drifted least since the last such event are embedded: their
    scale and offset stay as they are from then on, and their value follows their mode's reference.

    Attributes:
        every: L, snapshots between two events.
        percent: P, in (0, 100]: each event chooses ``ceil(P / 100 * all)`` weights.
        relative: Whether P is a percentage of the weights that are still free, instead of all
            weights (the paper's default).
        project: When embedded weights are written: ``"epoch"`` once before each snapshot (the
            authors' code; in between they train like all others), ``"step"`` after each optimizer
            step, or beyond the paper: ``"tie"`` as ``"step"``, and their gradients are handed to
            the references by the chain rule, so that what is trained are the free weights alone;
            ``"pool"`` as ``"step"``, and the references first go where the step has put them and
            the weights that follow them, in the least squares.
        slots: What becomes of an embedded weight's momentum and other optimizer slots when its
            value is written: ``"leave"`` them (the authors' code) or ``"zero"`` them.

    Raises:
        InputError: If one is out of range.
    """

    every: int = 10
    percent: float = 10.0
    relative: bool = False
    project: Projection = "epoch"
    slots: Slots = "leave"

    def __post_init__(self) -> None:
        """Check all of them."""
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise InputError(f"every must be a whole number of at least 1, got {self.every!r}.")
        number = isinstance(self.percent, (int, float)) and not isinstance(self.percent, bool)
        if not number or not isfinite(self.percent) or not 0 < self.percent <= 100:
            raise InputError(f"percent must lie in (0, 100], got {self.percent!r}.")
        if not isinstance(self.relative, bool):
            raise InputError(f"relative must be True or False, got {self.relative!r}.")
        for name, choices in (("project", get_args(Projection)), ("slots", get_args(Slots))):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}."
                )


@dataclass(frozen=True)
class Settings:
    """See :class:`cmd_plugin.modes.OnlineModes` for what each one means.

    Raises:
        InputError: If one is out of range.
    """

    modes: int
    warmup: int
    samples: int
    seed: int
    storage: str
    profile: str
    shrink: bool
    forgetting: float
    embedding: Embedding | None = None

    def __post_init__(self) -> None:
        """Check what the draw of the samples does not check."""
        check_modes(self.modes)
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int) or self.warmup < 2:
            raise InputError(
                f"warmup must be a whole number of at least 2 (3 snapshots are fitted), got "
                f"{self.warmup!r}."
            )
        if not 0.0 < self.forgetting <= 1.0:
            raise InputError(f"forgetting must lie in (0, 1], got {self.forgetting!r}.")
        check_profile(self.profile)
        check_storage(self.storage)
        pooled = self.embedding is not None and self.embedding.project == "pool"
        if pooled and self.profile == "mean":
            raise InputError(
                "project='pool' moves the weight that a mode follows, and with profile='mean' there"
                " is no such weight: use profile='reference'."
            )

    def require_same(self, saved: Mapping[str, Any]) -> None:
        """Raise StateMismatch, naming the first one that differs, unless ``saved`` has the same."""
        for name, value in asdict(self).items():
            if not _same(saved.get(name), value):
                held = " ".join(repr(saved.get(name)).split())[:300]
                raise StateMismatch(
                    f"the saved modes were made with {name}={held}, not {value!r}: use the same "
                    "value to continue."
                )


def require_same_run(state: SavedState, version: int, layout: Layout, settings: Settings) -> None:
    """Raise StateMismatch if a state is of another version, of other weights or settings."""
    held = state.get_or_none("version")
    if type(held) is not int or held != version:
        raise StateMismatch(
            f"the saved modes have version {shown(held)} and this package reads {version}: start "
            "anew or use the package that wrote them."
        )
    layout.require_same(state.layout("layout"), "the saved state")
    held, dtype = state.get("dtype"), str(layout.state_dtype).removeprefix("torch.")
    if not isinstance(held, str) or held != dtype:
        raise StateMismatch(
            f"the saved modes are of {shown(held)} weights, not {dtype}: use the same dtype."
        )
    settings.require_same(state.table("config"))


def _same(saved: object, value: object) -> bool:
    """Whether a value out of a file, which may be anything, is the one expected."""
    if isinstance(value, dict):
        return (
            isinstance(saved, Mapping)
            and saved.keys() == value.keys()
            and all(_same(saved[name], value[name]) for name in value)
        )
    plain = saved is None or isinstance(saved, (bool, int, float, str))
    return plain and isinstance(saved, bool) == isinstance(value, bool) and saved == value
