"""Every way to choose weights of one finished run: averages, extrapolations, CMD and its blends."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import averages
from benchmarks.small_problems import Case
from cmd_plugin.modes import Layout, OnlineModes

__all__ = ["Run", "modelled", "rivals"]

EMA_PER_STEP = (0.9, 0.99, 0.999)
EMA_PER_EPOCH = 0.9
SWA_SHARE = 0.25  # of the epochs, the last ones
LAWA = (3, 6)  # epochs
WINDOWS = (1, 5)  # % of the run's steps: the tail EMA's time constant
SHARES = (0.25, 0.5, 0.75)
POWER_STORED = (0.05, 0.1)  # relative widths of the two averages that are kept up
POWER_WANTED = (0.02, 0.05, 0.1, 0.2)
EXTRAPOLATED = (4, 8)  # k: differences less one

# Options of OnlineModes under test; the paper's method is the one without any.
VARIANTS: dict[str, dict[str, Any]] = {
    "cmd M=2": {"modes": 2},
    "cmd M=5": {"modes": 5},
    "cmd M=10": {"modes": 10},
    "cmd M=50": {"modes": 50},
    "cmd M=10 shrink": {"modes": 10, "shrink": True},
    "cmd M=10 mean": {"modes": 10, "profile": "mean"},
    "cmd M=10 mean shrink": {"modes": 10, "profile": "mean", "shrink": True},
    "cmd M=10 forget .9": {"modes": 10, "forgetting": 0.9},
    "cmd M=10 mean forget .9": {"modes": 10, "profile": "mean", "forgetting": 0.9},
    "cmd M=10 late": {"modes": 10, "late": True},  # a warm-up of half the run
    "cmd M=10 mean late": {"modes": 10, "profile": "mean", "late": True},
}
BLENDED = ("cmd M=10", "cmd M=10 mean", "cmd M=10 forget .9")


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        model: The network with its last weights.
        layout: Where each tensor lies in a row of ``weights``, statistics included.
        weights: [T, N] float32 after each step.
        ends: Indices of the last steps of the epochs.
        seconds: What training alone took.
    """

    model: nn.Module
    layout: Layout
    weights: Tensor
    ends: Tensor
    seconds: float

    @property
    def parameters(self) -> Tensor:
        """[P] int64 places of the parameters in a row of ``weights``; the others are statistics."""
        names = {name for name, _ in self.model.named_parameters()}
        places = self.layout.split(torch.arange(self.layout.numel)).items()
        return torch.cat([place.flatten() for name, place in places if name in names])


def rivals(run: Run) -> Iterator[tuple[str, Tensor]]:
    """Yield the averages and extrapolations of a run's weights, each [N], by name."""
    steps, ends = len(run.weights), run.ends
    rows = {f"ema step {decay}": averages.exponential(steps, decay) for decay in EMA_PER_STEP}
    rows[f"ema epoch {EMA_PER_EPOCH}"] = averages.exponential(steps, EMA_PER_EPOCH, ends)
    rows["swa"] = averages.equal(steps, ends[-int(SWA_SHARE * len(ends)) :])
    rows |= {f"lawa {k}": averages.equal(steps, ends[-k:]) for k in LAWA}
    for percent in WINDOWS:
        tail = averages.exponential(steps, 1 - 100 / (percent * steps))
        for share in (*SHARES, 1.0):
            rows[f"tail ema {percent} %, l={share:g}"] = averages.blend(tail, share)
    # Neither the scale of the statistics nor their movement should decide how to extrapolate.
    parameters = run.parameters
    for k in EXTRAPOLATED:
        last = ends[-(k + 2) :]
        points = run.weights[last][:, parameters]
        found = {
            f"rre k={k}": averages.reduced_rank(points),
            f"mpe k={k}": averages.minimal_polynomial(points),
        }
        for name, coefficients in found.items():
            rows[name] = torch.zeros(steps, dtype=torch.float64).index_put((last,), coefficients)
    yield from zip(rows, torch.stack([*rows.values()]).float() @ run.weights, strict=True)
    yield from _post_hoc(run)


def _post_hoc(run: Run) -> Iterator[tuple[str, Tensor]]:
    """Two power averages are stored after each epoch; any other width comes out of these."""
    steps, times = len(run.weights), (run.ends + 1).tolist()
    stored = [(averages.power_exponent(width), time) for width in POWER_STORED for time in times]
    rows = torch.stack([averages.power(steps, exponent, time) for exponent, time in stored])
    kept = rows.float() @ run.weights
    exponents, moments = torch.tensor(stored, dtype=torch.float64).T
    for width in POWER_WANTED:
        wanted = averages.power_exponent(width)
        found = averages.reconstruct_power(exponents, moments, wanted, float(steps))
        yield f"post-hoc ema {width:g}", (found @ kept.double()).float()


def modelled(
    run: Run, case: Case, seed: int, *, statistics: bool
) -> tuple[dict[str, Tensor], dict[str, OnlineModes]]:
    """Return CMD's weights and their blends with the raw ones by name, and the states.

    Args:
        run: The training.
        case: Its warm-up is CMD's.
        seed: Of the draw of weights that are clustered.
        statistics: Whether BatchNorm's statistics are modelled like weights (the authors' way), or
            take no part and stay the raw run's.
    """
    names = {name for name, _ in run.model.named_parameters()}
    layout = run.layout if statistics else run.layout.select(names)
    places = slice(None) if statistics else run.parameters
    snapshots = run.weights[run.ends][:, places].contiguous()
    found, states = {}, {}
    for name, variant in VARIANTS.items():
        options = dict(variant)
        warmup = case.epochs // 2 if options.pop("late", False) else case.warmup
        state = states[name] = OnlineModes(layout, warmup=warmup, seed=seed, **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="only .* modes were found")
            for row in snapshots:
                state.update(row)
        found[name] = run.weights[-1].clone()
        found[name][places] = state.reconstruct()
    for name in BLENDED:
        for share in SHARES:
            found[f"{name}, l={share:g}"] = run.weights[-1].lerp(found[name], share)
    return found, states
