"""Post-hoc CMD: decompose a whole recorded trajectory at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import frexp, isfinite, ldexp
from pathlib import Path

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.kernels import FlatView, reconstruct
from cmd_plugin.kernels.assign_and_fit.reference import UNIT_ROUNDOFF
from cmd_plugin.modes.choice import check_modes, check_profile, choose_modes, moving_rows
from cmd_plugin.modes.decomposition import Decomposition
from cmd_plugin.modes.fit import explained_by_layer, fit_modes, sum_of_squares, total_by_layer
from cmd_plugin.modes.layout import Layout, check_buffers, named_weights
from cmd_plugin.modes.sampling import sample_weights
from cmd_plugin.modes.source import find_non_finite
from cmd_plugin.modes.store import TrajectoryStore, check_storage
from cmd_plugin.networks.checkpoints import find_checkpoints, snapshot_labels
from cmd_plugin.networks.names import by_clean_name
from cmd_plugin.networks.weights import read_weights

__all__ = ["decompose"]

StateDict = Mapping[str, Tensor]

_RANGE = 40  # weights up to 2^40 that move by 2^-40 and more are taken as they are


def decompose(
    trajectory: Tensor | str | Path | Sequence[StateDict] | Sequence[str | Path],
    modes: int = 10,
    samples: int = 1000,
    seed: int = 0,
    *,
    storage: str = "delta-bf16",
    buffers: str = "model",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    profile: str = "reference",
    shrink: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Decomposition:
    """Decompose the history of a network's weights into correlated modes.

    This is the paper's post-hoc CMD (Brokman et al., ICLR 2024, section 3.1).

    Args:
        trajectory: A [T, N] floating tensor of flattened weights over T snapshots; or T
            state_dicts; or T checkpoint files, or the folder of a run (Lightning ``.ckpt``,
            ``.pt``, ``.pth``, ``.bin``, ``.safetensors``, shards by their index; read one at a
            time, in the order of :func:`cmd_plugin.networks.find_checkpoints`). Of two sets of
            weights in a file the trained ones are taken.
        modes: Largest number of modes M, 1..256.
        samples: Number K of weights whose trajectories are clustered.
        seed: Seed of the draw of the samples.
        storage: How snapshots are held while they are read: ``"delta-bf16"`` or ``"fp32"``. A
            tensor is used as it is.
        buffers: ``"model"`` decomposes BatchNorm's running statistics too (as the authors' code
            does), ``"keep"`` leaves them out.
        include: Globs (``conv*``) on tensor names; empty means all.
        exclude: Globs (``conv*``) on tensor names to leave out.
        profile: ``"reference"`` (the paper) or ``"mean"``; see
            :func:`cmd_plugin.modes.choice.choose_modes`.
        shrink: Multiply each weight's scale by its squared correlation with its profile (beyond the
            paper; the paper does not).
        progress: Called with (snapshots read, T) after each.

    Returns:
        The decomposition. When no weight moves it has no mode and every weight is its mean.

    Raises:
        InputError: If there are fewer than 3 snapshots, fewer moving samples than modes, an
            argument is out of range, or a file cannot be read.
        NonFiniteError: If a snapshot holds NaN or infinite values; names the snapshot.
        StateMismatch: If a snapshot has other tensors than the first; names it.
    """
    check_modes(modes)
    check_storage(storage)
    check_buffers(buffers)
    check_profile(profile)
    epochs: list[int] | None = None
    unmodelled: dict[str, Tensor] = {}
    base: Tensor | None = None
    if isinstance(trajectory, Tensor):
        layout = _check_tensor(trajectory)
        chosen = sample_weights(layout.sizes, samples, seed)
        rows = trajectory.detach()[:, chosen.to(trajectory.device)].T.double().cpu()
        data = trajectory.detach()
    else:
        sources = _sources(trajectory)
        store, layout, epochs, unmodelled = _read_all(
            sources, samples, seed, storage, (include, exclude, buffers), progress
        )
        chosen, rows, data, base = store.samples, store.rows, store.trajectory, store.base

    factor = _factor(rows, data, base)
    if factor != 1.0:
        rows, base = rows * factor, None if base is None else base.mul_(factor)
        data = data * factor if isinstance(trajectory, Tensor) else data.mul_(factor)
    dtype = data.dtype if base is None else base.dtype
    # Without the clustering's own matrix, which would sit on top of the fit's peak.
    found = choose_modes(rows.to(data.device), chosen, modes, profile, dtype)
    choice = replace(found, correlation=None)
    if 0 < choice.references.numel() < modes:
        _require_moving(choice.references.numel(), rows, modes, dtype)
    if not choice.modes:
        return _divided(_still(layout, chosen, data, base, epochs, unmodelled), factor)

    profiles = choice.profile(rows_of(choice.members, chosen, rows))
    fit = fit_modes(data, base, choice, profiles)
    squares = sum_of_squares(profiles)
    explained = explained_by_layer(
        layout, fit.mode, fit.scale, squares, fit.total if shrink else None
    )
    total = total_by_layer(layout, fit.total)
    scale = fit.scale
    if shrink:
        # rho^2 scale is the model's movement at a profile one unit from its mean.
        still, unit = torch.zeros_like(scale), torch.ones_like(squares)
        scale = reconstruct(fit.mode, scale, still, unit, total=fit.total, energy=squares)
    result = Decomposition(
        layout=layout,
        samples=chosen,
        references=choice.references,
        assignment=fit.mode,
        scale=scale,
        mean=fit.mean,
        profiles=profiles,
        profile_mean=profiles.mean(dim=1),
        total=float(total.sum()),
        explained=float(explained.sum()),
        layer_total=total,
        layer_explained=explained,
        epochs=epochs if epochs is not None else range(profiles.shape[1]),
        unmodelled=unmodelled,
    )
    return _divided(result, factor)


def rows_of(members: Tensor, samples: Tensor, rows: Tensor) -> Tensor:
    """Return the rows [P, T] of ``members`` [P], some of the ``samples`` [K] of ``rows`` [K, T]."""
    order = samples.argsort()
    return rows[order[torch.searchsorted(samples[order], members)]]


def _check_tensor(trajectory: Tensor) -> Layout:
    if trajectory.ndim != 2 or trajectory.dtype not in UNIT_ROUNDOFF or not trajectory.shape[1]:
        raise ShapeError(
            "trajectory must be a [T, N] tensor (snapshots by weights) of float64, float32, "
            f"float16 or bfloat16, got shape {tuple(trajectory.shape)} of {trajectory.dtype}."
        )
    _require_three(trajectory.shape[0])
    layout = Layout.of_vector(trajectory.shape[1], trajectory.dtype)
    # One look at all of it; snapshot by snapshot only to say where it is not finite.
    finite = all(isfinite(float(end)) for end in trajectory.detach().aminmax())
    for t, snapshot in enumerate(() if finite else trajectory.detach()):
        _require_finite(FlatView([snapshot]), layout, f"snapshot {t} of the trajectory")
    return layout


def _factor(rows: Tensor, data: Tensor, base: Tensor | None) -> float:
    """Return the power of two that brings weights to where a float32 holds their squares.

    1.0 nearly always. Without it weights of 1e30 would be fitted by infinities, and those of 1e-30
    would stand still.

    Raises:
        NonFiniteError: If differences to the first snapshot overflowed.
    """
    arrays = [data] if base is None else [data, base]
    largest = max(abs(float(end)) for array in arrays for end in array.aminmax())
    if not isfinite(largest):
        raise NonFiniteError(
            "two snapshots lie so far apart that their difference is infinite: use storage='fp32', "
            "or decompose the epochs before the training diverged."
        )
    moved = float((rows - rows[:, :1]).abs().max())
    if largest > 2.0**_RANGE:
        return ldexp(1.0, _RANGE - frexp(largest)[1])
    if 0.0 < moved < 2.0**-_RANGE:
        room = 1000 if arrays[-1].dtype == torch.float64 else 100  # the last is the base, if any
        return ldexp(1.0, min(-frexp(moved)[1], room, room - frexp(largest)[1]))
    return 1.0


def _divided(result: Decomposition, factor: float) -> Decomposition:
    """Return the decomposition of weights that had been multiplied by a power of two."""
    if factor == 1.0:
        return result
    once, layers = 1.0 / factor, (result.layer_total, result.layer_explained)
    total, explained = (None if sums is None else sums * once * once for sums in layers)
    return replace(
        result,
        mean=result.mean * once,
        profiles=result.profiles * once,
        profile_mean=result.profile_mean * once,
        total=result.total * once * once,
        explained=result.explained * once * once,
        layer_total=total,
        layer_explained=explained,
    )


def _require_three(count: int) -> None:
    if count < 3:
        raise InputError(
            f"at least 3 snapshots are needed to tell correlated weights apart, got {count}: "
            "record more epochs."
        )


def _require_finite(view: FlatView, layout: Layout, what: str) -> None:
    found = find_non_finite(view)
    if found.first is not None:
        name, inside = layout.locate(found.first)
        raise NonFiniteError(
            f"{what} holds {found.bad} NaN or infinite values among {view.numel}, the first in "
            f"{name!r} at position {inside}: leave it out, or decompose the epochs before the "
            "training diverged."
        )


def _require_moving(found: int, rows: Tensor, modes: int, dtype: torch.dtype) -> None:
    moving = int(moving_rows(rows, dtype).sum())
    if moving < modes:
        raise InputError(
            f"only {moving} of the {rows.shape[0]} sampled weights move over the {rows.shape[1]} "
            f"snapshots, fewer than modes={modes}: ask for at most {found} modes or sample more."
        )


def _sources(
    trajectory: str | Path | Sequence[StateDict] | Sequence[str | Path],
) -> Sequence[StateDict | Path]:
    if isinstance(trajectory, str | Path):
        return find_checkpoints([trajectory])
    if isinstance(trajectory, Sequence):
        if all(isinstance(item, str | Path) for item in trajectory):
            return find_checkpoints(trajectory)  # type: ignore[arg-type]
        if all(isinstance(item, Mapping) for item in trajectory):
            return trajectory  # type: ignore[return-value]
    raise InputError(
        "trajectory must be a [T, N] tensor, or a list of state_dicts or of paths (not a mixture), "
        f"got {type(trajectory).__name__}."
    )


def _read_all(
    sources: Sequence[StateDict | Path],
    samples: int,
    seed: int,
    storage: str,
    selection: tuple[Sequence[str], Sequence[str], str],
    progress: Callable[[int, int], None] | None,
) -> tuple[TrajectoryStore, Layout, list[int], dict[str, Tensor]]:
    """Stream the snapshots into a store: one source is in memory at a time."""
    _require_three(len(sources))
    files = [source for source in sources if isinstance(source, Path)]
    labels = snapshot_labels(files) if files else list(range(len(sources)))
    store: TrajectoryStore | None = None
    layout: Layout | None = None
    unmodelled: dict[str, Tensor] = {}
    for t, source in enumerate(sources):
        state, what = _snapshot(source, t)
        tensors, aliases = named_weights(state, *selection)
        if layout is None or store is None:
            layout = Layout.of_tensors(tensors, aliases)
            chosen = sample_weights(layout.sizes, samples, seed)
            store = TrajectoryStore(layout.numel, len(sources), storage, chosen, layout.state_dtype)
        if tensors.keys() == set(layout.names):  # the order of entries says nothing
            tensors = {name: tensors[name] for name in layout.names}
        layout.require_same(Layout.of_tensors(tensors), what)
        view = FlatView(list(tensors.values()), dtype=layout.state_dtype)
        _require_finite(view, layout, what)
        store.append(view, view.gather(store.samples))
        if t == len(sources) - 1:
            unmodelled = {
                name: value.detach().clone()
                for name, value in state.items()
                if name not in tensors and name not in layout.aliases
            }
        if progress is not None:
            progress(t + 1, len(sources))
    if store is None or layout is None:
        raise InputError("there is nothing to decompose.")
    return store, layout, labels, unmodelled


def _snapshot(source: StateDict | Path, t: int) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a source by cleaned name, and what to call it."""
    if isinstance(source, Path):
        return read_weights(source, which="trained"), str(source)
    return by_clean_name(source.items()), f"state_dict {t}"


def _still(
    layout: Layout,
    samples: Tensor,
    data: Tensor,
    base: Tensor | None,
    epochs: list[int] | None,
    unmodelled: dict[str, Tensor],
) -> Decomposition:
    """Return the decomposition into no modes, every weight its mean, of samples that stand still.

    Weights that were not sampled may move: the sums of squares say by how much.
    """
    count = data.shape[0] + (base is not None)
    first = data[0].to(layout.state_dtype) if base is None else base
    deltas = (row.to(first.dtype) - first if base is None else row for row in data)
    shift, squares = torch.zeros_like(first), torch.zeros_like(first)
    for delta in deltas:
        shift += delta
        squares += delta.to(first.dtype).square()
    shift /= count
    total = total_by_layer(layout, squares.sub_(shift.square().mul_(count)).clamp_(min=0.0))
    empty = torch.empty(0, dtype=torch.float64)
    return Decomposition(
        layout=layout,
        samples=samples,
        references=torch.empty(0, dtype=torch.int64),
        assignment=torch.zeros(layout.numel, dtype=torch.uint8),
        scale=torch.zeros_like(first),
        mean=first + shift,
        profiles=empty.view(0, 1).expand(0, count),
        profile_mean=empty,
        total=float(total.sum()),
        explained=0.0,
        layer_total=total,
        layer_explained=torch.zeros_like(total),
        epochs=epochs if epochs is not None else range(count),
        unmodelled=unmodelled,
    )
