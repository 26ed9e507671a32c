"""Every object that accumulates: its state goes into a file and back, merges, and does not grow."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

import cmd_plugin
from cmd_plugin.clip.metrics import FeatureGaussian, WhitenedLikelihood
from cmd_plugin.clip.statistics import GaussianStatistics
from cmd_plugin.clip.whitening import Whitening
from cmd_plugin.distinction import SplitQuality
from cmd_plugin.errors import StateMismatch
from cmd_plugin.modes import Embedding, Layout, OnlineModes
from cmd_plugin.pointcloud.corruption_error import CorruptionError
from cmd_plugin.pointcloud.corruptions import CORRUPTIONS, LEVELS
from cmd_plugin.pointcloud.diversity import EnsembleDiversity
from cmd_plugin.pointcloud.drop_curves import DropCurve
from cmd_plugin.pointcloud.focus import FocusReference
from cmd_plugin.pointcloud.score_metrics import FalsePositiveRate95, ScoreAUPR, ScoreAUROC

BATCH, VIEWS, CLASSES = 7, ("a", "a", "b"), 4
WEIGHTS, WIDTH = 120, 4


@dataclass(frozen=True)
class Case:
    """One class in one phase of its life.

    Attributes:
        make: Returns a fresh object.
        feed: Takes the step of a number in; equal numbers are equal steps.
        look: Returns what the object says.
        start: Steps after which its state is looked at.
        merge: Takes another object's steps in; None if the class does not merge.
        exact: Whether sums of halves are the sum of the whole bit for bit.
        files: Whether it has ``save`` and ``load``.
    """

    make: Callable[[], Any]
    feed: Callable[[Any, int], object]
    look: Callable[[Any], Any]
    start: int = 3
    merge: Callable[[Any, Any], object] | None = None
    exact: bool = True
    files: bool = False


def noise(number: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number))


def labels(number: int, classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, (BATCH,), generator=torch.Generator().manual_seed(number))


def persistent(metric: Metric) -> Metric:
    metric.persistent(True)  # torchmetrics leaves the states of a metric out of it unless asked
    return metric


def online(**options: Any) -> Callable[[], OnlineModes]:
    given = {"modes": 3, "warmup": 4, "samples": 60, **options}
    return lambda: OnlineModes(Layout.of_vector(WEIGHTS), **given)


def walk(modes: OnlineModes, number: int) -> None:
    weights = noise(0, WEIGHTS) + sum(0.1 * noise(n, WEIGHTS) for n in range(1, number + 2))
    modes.project(weights)
    modes.update(weights)


def seen(modes: OnlineModes) -> Any:
    if not modes.ready:
        return [modes.updates, modes.state_bytes]
    known = modes.decomposition()
    return [
        *(modes.reconstruct(), modes.scale, modes.offset, modes.assignment, modes.embedded),
        *(modes.explained_variance(), modes.saved_percent, modes.volume_bytes),
        *(known.profiles, known.mean, list(known.epochs), known.explained),
    ]


def cells(metric: Metric, number: int) -> None:
    for corruption in (*CORRUPTIONS, "clean"):
        for level in range(1 if corruption == "clean" else LEVELS):
            metric.update(noise(number + level, BATCH, CLASSES), labels(number), corruption, level)


def rows(holder: Any, number: int) -> None:
    x = noise(number, BATCH, WIDTH)
    if number % 5 == 3:
        x[2, 1] = torch.nan
    holder.update(x)


def sums(statistics: GaussianStatistics) -> Any:
    gaussian, central = statistics.compute(), statistics.central()
    norm = torch.tensor(statistics.mean_norm, dtype=torch.float64)
    numbers = [statistics.skipped, statistics.unit_mean, norm]
    return [*gaussian, *central.values(), *numbers]


def reference() -> Whitening:
    return Whitening.fit(noise(0, 100, WIDTH).double(), shrinkage="none")


def outliers(metric: Metric, number: int) -> None:
    metric.update(noise(number, BATCH), torch.arange(BATCH) % 2)


def metric(make: Callable[[], Metric], feed: Callable[[Any, int], object], **about: Any) -> Case:
    def merge(one: Metric, other: Metric) -> None:
        one.merge_state(other)

    return Case(lambda: persistent(make()), feed, lambda m: m.compute(), merge=merge, **about)


def splits(metric: Metric, number: int) -> None:
    answers = labels(number + 1, 2), labels(number + 2, 2)
    branches = noise(number, BATCH, 3, 1, 4, 4)
    metric.update(noise(number + 3, BATCH, 1, 4, 4), branches, labels(number, 2), answers, answers)


CASES: dict[str, Case] = {
    "OnlineModes in warm-up": Case(online(), walk, seen),
    "OnlineModes in warm-up, fp32": Case(online(storage="fp32"), walk, seen),
    "OnlineModes fitted": Case(online(), walk, seen, start=8),
    "OnlineModes, all options": Case(
        online(shrink=True, forgetting=0.9, profile="mean", storage="fp32"), walk, seen, start=8
    ),
    "OnlineModes embedded": Case(
        online(embedding=Embedding(every=2, percent=20)), walk, seen, start=9
    ),
    "FocusReference": Case(
        lambda: FocusReference(64),
        lambda reference, number: reference.update(noise(number, BATCH).sigmoid()),
        lambda reference: [reference.median, reference.spread, reference.clouds],
        merge=FocusReference.merge,
        files=True,
    ),
    "GaussianStatistics": Case(
        lambda: GaussianStatistics(WIDTH),
        rows,
        sums,
        merge=GaussianStatistics.merge,
        exact=False,
        files=True,
    ),
    "GaussianStatistics of unit rows": Case(
        lambda: GaussianStatistics(WIDTH, normalize="l2", about={"model": "a"}),
        rows,
        sums,
        merge=GaussianStatistics.merge,
        exact=False,
        files=True,
    ),
    "FeatureGaussian": metric(lambda: FeatureGaussian(WIDTH), rows, exact=False),
    "WhitenedLikelihood": metric(lambda: WhitenedLikelihood(reference()), rows, exact=False),
    "EnsembleDiversity": metric(
        lambda: EnsembleDiversity(VIEWS),
        lambda m, n: m.update(noise(n, BATCH, len(VIEWS), CLASSES), labels(n)),
        exact=False,
    ),
    "CorruptionError": metric(CorruptionError, cells),
    "DropCurve": metric(
        lambda: DropCurve((0.0, 0.5, 0.9)),
        lambda m, n: m.update(noise(n, 3, BATCH, CLASSES), labels(n)),
        exact=False,
    ),
    "SplitQuality": metric(lambda: SplitQuality(2, 3), splits, exact=False),
    "ScoreAUROC": metric(lambda: ScoreAUROC(thresholds=50), outliers),
    "ScoreAUPR": metric(lambda: ScoreAUPR(thresholds=50), outliers),
    "FalsePositiveRate95": metric(lambda: FalsePositiveRate95(thresholds=50), outliers),
}
EVERY = pytest.mark.parametrize("name", list(CASES))
# The states of a torchmetrics class are torchmetrics' own to check, and it takes what it is given.
OURS = pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if not isinstance(case.make(), Metric)]
)


def fed(case: Case, *numbers: int) -> Any:
    holder = case.make()
    for number in numbers:
        case.feed(holder, number)
    return holder


def same(one: Any, other: Any, *, exact: bool = True) -> bool:
    """Whether two nested values are equal, bit for bit unless told otherwise; NaN equals NaN."""
    if isinstance(one, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.allclose(one, other, rtol=0.0 if exact else 1e-12, atol=0.0, equal_nan=True)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(
            same(v, other[k], exact=exact) for k, v in one.items()
        )
    if isinstance(one, (list, tuple)):
        pairs = zip(one, other, strict=True)
        return len(one) == len(other) and all(same(a, b, exact=exact) for a, b in pairs)
    if isinstance(one, float) and not exact:
        return math.isclose(one, other, rel_tol=1e-12) or (one != one and other != other)
    return one == other or (one != one and other != other)


def size(value: Any) -> int:
    """Bytes of the tensors, and entries of the lists, in a state."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(size, value.values()))
    return 8 * len(value) if isinstance(value, (list, tuple)) else 8


@EVERY
def test_a_state_goes_on_in_a_fresh_object(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    steps = range(case.start)
    whole = fed(case, *steps)
    state = whole.state_dict()
    torch.save(state, tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    assert same(dict(read), dict(state))
    kept = copy.deepcopy(dict(state))
    fresh = case.make()
    fresh.load_state_dict(read)
    if isinstance(fresh, Metric):
        fresh._update_count = whole._update_count  # torchmetrics does not save it, and warns
    assert same(case.look(fresh), case.look(whole))
    for number in range(case.start, case.start + 4):  # the warm-up of modes ends on the way
        case.feed(whole, number)
        case.feed(fresh, number)
        assert same(dict(fresh.state_dict()), dict(whole.state_dict()))
    assert same(case.look(fresh), case.look(whole))
    if not isinstance(fresh, Metric):  # torchmetrics shares tensors with its states, as torch does
        assert same(state, kept)
        assert same(read, kept)


@EVERY
def test_two_halves_merge_to_the_whole(name: str) -> None:
    case = CASES[name]
    if case.merge is None:
        assert not hasattr(case.make(), "merge"), "a class that merges says so in its case"
        return
    one, other = fed(case, 0, 1), fed(case, 2, 3, 4)
    before = copy.deepcopy(dict(other.state_dict()))
    case.merge(one, other)
    assert same(dict(other.state_dict()), before)
    whole = fed(case, 0, 1, 2, 3, 4)
    assert same(dict(one.state_dict()), dict(whole.state_dict()), exact=case.exact)
    assert same(case.look(one), case.look(whole), exact=case.exact)


@EVERY
def test_a_file_holds_all_of_it(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    holder = fed(case, *range(case.start))
    assert case.files == (hasattr(holder, "save") and hasattr(holder, "load"))
    if case.files:
        holder.save(tmp_path / "state.safetensors")
        again = type(holder).load(tmp_path / "state.safetensors")
        assert same(again.state_dict(), holder.state_dict())
        assert same(case.look(again), case.look(holder))


@OURS
@pytest.mark.parametrize("damage", ["missing", "shape", "dtype", "nothing", "kind"])
def test_a_refused_state_changes_nothing(name: str, damage: str) -> None:
    case = CASES[name]
    state = dict(fed(case, *range(case.start)).state_dict())
    table = state
    while inner := [k for k, v in table.items() if isinstance(v, Mapping) and k != "config"]:
        table[inner[0]] = dict(table[inner[0]])
        table = table[inner[0]]
    entry = next(key for key, value in table.items() if isinstance(value, Tensor))
    if damage == "missing":
        del table[entry]
    elif damage == "shape":
        table[entry] = torch.cat([table[entry].reshape(-1)] * 2)
    elif damage == "dtype":
        table[entry] = table[entry].to(torch.complex64)
    elif damage == "nothing":
        table[entry] = None
    else:
        table[entry] = "text"
    holder = fed(case, 20, 21)
    before, says = copy.deepcopy(dict(holder.state_dict())), copy.deepcopy(case.look(holder))
    with pytest.raises(StateMismatch):
        holder.load_state_dict(state)
    assert same(dict(holder.state_dict()), before)
    assert same(case.look(holder), says)


@EVERY
def test_memory_does_not_grow(name: str) -> None:
    case = CASES[name]
    holder = fed(case, *range(max(case.start, 8)))
    early = size(holder.state_dict())
    for number in range(8, 40):
        case.feed(holder, number)
    growth = size(holder.state_dict()) - early
    # Of modes the profiles are kept, M numbers and a label a snapshot, up to 1024 of them.
    assert growth <= (32 * (3 + 1) * 8 if isinstance(holder, OnlineModes) else 0)


def classes() -> Iterator[type]:
    """All classes of the package that accumulate by ``update``."""
    for module in pkgutil.walk_packages(cmd_plugin.__path__, "cmd_plugin."):
        if "._triton" in module.name or module.name.endswith("__main__"):
            continue
        for _, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            own = kind.__module__.startswith("cmd_plugin") and "update" in vars(kind)
            if own and not kind.__name__.startswith("_"):
                yield kind


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_class_that_accumulates_is_here() -> None:
    covered = {type(case.make()) for case in CASES.values()}
    covered.add(MetricCollection)
    inside = {"Tracker"}  # the state of OnlineModes after its fit
    assert {kind.__name__ for kind in {*classes()} - covered} == inside
