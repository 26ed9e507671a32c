"""Online CMD: follow a training run, model its weights, keep nine bytes a weight."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, NonFiniteError, PluginError, ShapeError, StateMismatch
from cmd_plugin.kernels import FlatView, reconstruct, reconstruct_into
from cmd_plugin.modes.choice import PROFILES, ModeChoice, check_modes, choose_modes
from cmd_plugin.modes.decomposition import Decomposition
from cmd_plugin.modes.exchange import keep_tensors, recalibrated
from cmd_plugin.modes.fit import fit_modes
from cmd_plugin.modes.layout import Layout, clean_name, named_weights
from cmd_plugin.modes.posthoc import rows_of
from cmd_plugin.modes.sampling import sample_weights
from cmd_plugin.modes.store import TrajectoryStore
from cmd_plugin.modes.tracker import Tracker

__all__ = ["OnlineModes"]

_log = logging.getLogger(__name__)
_VERSION = 1

Source = nn.Module | Mapping[str, Tensor] | Tensor


class OnlineModes:
    r"""Correlation Mode Decomposition of a training run while it runs (Brokman et al., ICLR 2024,
    section 3.3).

    Call :meth:`update` once per epoch (or every so many steps), after the optimizer's step. The
    first F = ``warmup`` calls store
    snapshots; call F + 1 stores one more, chooses the modes from all F + 1, fits every weight to
    its mode and frees the store.
    From then on modes and references stay, and every call updates scale and mean of all weights by
    recursive least squares, in place.
    The training itself is never touched, and neither are the global random generators.

    Args:
        model_or_layout: The model whose weights are followed; or a :class:`Layout`, and then
            :meth:`update` is given the weights.
        modes: Largest number of modes M, 1..256.
        warmup: F, at least 2 (correlation over fewer than three snapshots says nothing).
        samples: Number K of weights whose trajectories are clustered.
        seed: Seed of the draw of the samples.
        storage: Warm-up store, ``"delta-bf16"`` (2 F + 4 bytes a weight) or ``"fp32"``.
        store_device: Where the warm-up store lies; None means with the weights.
        buffers: BatchNorm's running statistics: ``"model"`` them (the authors' code; variances are
            kept from going negative),
            ``"recalibrate"`` them for the modelled weights in :meth:`swap`, or ``"keep"`` those of
            the raw run.
        include: Shell-style patterns on parameter names; empty means all.
        exclude: Shell-style patterns on parameter names to leave out.
        profile: What a mode follows: its ``"reference"`` weight (the paper), or the ``"mean"`` of
            its sampled weights.
        shrink: Multiply each weight's scale by its squared correlation with its profile (beyond the
            paper; 4 more bytes a weight).
        forgetting: Factor in (0, 1] by which each update discounts the past; 1 weighs all snapshots alike (the paper).
        broadcast: In distributed training, a function that returns rank 0's version of a small CPU
            tensor on all ranks, so that all choose and
            follow the same modes even where local buffers differ.

    Raises:
        InputError: If an argument is out of range or nothing is left to model.
    """

    def __init__(
        self,
        model_or_layout: nn.Module | Layout,
        modes: int = 10,
        warmup: int = 20,
        samples: int = 1000,
        *,
        seed: int = 0,
        storage: str = "delta-bf16",
        store_device: str | torch.device | None = None,
        buffers: str = "model",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        profile: str = "reference",
        shrink: bool = False,
        forgetting: float = 1.0,
        broadcast: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_modes(modes)
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 2:
            raise InputError(f"warmup must be at least 2 (3 snapshots are fitted), got {warmup!r}.")
        if not 0.0 < forgetting <= 1.0:
            raise InputError(f"forgetting must lie in (0, 1], got {forgetting!r}.")
        if profile not in PROFILES:
            raise InputError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}.")
        self._selection = (tuple(include), tuple(exclude), buffers)
        self._model = model_or_layout if isinstance(model_or_layout, nn.Module) else None
        self.layout = (
            model_or_layout
            if isinstance(model_or_layout, Layout)
            else Layout.of_model(model_or_layout, *self._selection)
        )
        self._config: dict[str, Any] = {
            "modes": modes,
            "warmup": warmup,
            "samples": samples,
            "seed": seed,
            "storage": storage,
            "profile": profile,
            "shrink": shrink,
            "forgetting": forgetting,
        }
        self._store_device = store_device
        self._broadcast = broadcast
        self.samples = sample_weights(self.layout.sizes, samples, seed)
        self.updates = 0
        self._store: TrajectoryStore | None = None
        self._tracker: Tracker | None = None
        self._choice: ModeChoice | None = None
        self._tensors: list[Tensor] = []
        self._view: FlatView | None = None
        self._swapped = False

    # ------------------------------------------------------------------ what it knows

    @property
    def numel(self) -> int:
        """Number of modelled weights N."""
        return self.layout.numel

    @property
    def buffers(self) -> str:
        """The policy for BatchNorm's running statistics."""
        return self._selection[2]

    @property
    def ready(self) -> bool:
        """Whether modes have been fitted, so that there are modelled weights."""
        return self._tracker is not None

    @property
    def tracker(self) -> Tracker:
        """The fitted state; raises PluginError before the fit."""
        if self._tracker is None:
            raise PluginError(
                f"no modes yet: {self.updates} snapshots seen, the fit comes at number "
                f"{self._config['warmup'] + 1}."
            )
        return self._tracker

    @property
    def number_of_modes(self) -> int:
        """Number of modes found; 0 before the fit."""
        return 0 if self._tracker is None else self._tracker.choice.modes

    @property
    def references(self) -> Tensor:
        """[M] int64 flat index of each mode's reference weight."""
        return self.tracker.choice.references

    @property
    def assignment(self) -> Tensor:
        """[N] uint8 mode of each weight."""
        return self.tracker.mode

    @property
    def scale(self) -> Tensor:
        """[N] slope a of each weight against its mode's profile; a new tensor."""
        return self.tracker.scale()

    @property
    def offset(self) -> Tensor:
        """[N] offset b of each weight; a new tensor."""
        return self.tracker.offset()

    @property
    def correlation(self) -> tuple[Tensor, Tensor] | None:
        """|correlation| [K', K'] of the clustered samples and their modes [K']; None before the fit and after a resume."""
        choice = self._choice
        if choice is None or choice.correlation is None or choice.labels is None:
            return None
        return choice.correlation, choice.labels

    @property
    def state_bytes(self) -> int:
        """Bytes held for the weights now: the store during warm-up, 9 a weight after it (13 with ``shrink``)."""
        held = 0 if self._store is None else self._store.nbytes
        return held + (0 if self._tracker is None else self._tracker.nbytes)

    def explained_variance(self) -> float:
        """Return the share of all movement so far that the model explains, at most 1; nan before the fit."""
        if self._tracker is None:
            return float("nan")
        return self._tracker.explained(self.layout) / self._tracker.total_sum

    # ------------------------------------------------------------------ following the run

    def update(self, source: Source | None = None, label: int | None = None) -> None:
        """Take a snapshot of the weights.

        Args:
            source: Where the weights are: None for the model given at construction, or a model, a
                state_dict, or a flat [N] tensor.
            label: Number of the snapshot in the history, for example the epoch; None counts
                updates.

        Raises:
            NonFiniteError: If a weight is NaN or infinite; the state stays as it was.
            StateMismatch: If the source has other tensors than the layout.
            PluginError: If called inside :meth:`swap`, when the model does not hold its own
                weights.
        """
        if self._swapped:
            raise PluginError("update() inside swap() would record modelled weights as raw ones.")
        # State made under inference_mode (Lightning validates in it) could not be changed in place
        # later.
        with torch.inference_mode(False), torch.no_grad():
            view = self._weights(source)
            bad = view.count_non_finite()
            if bad:
                raise NonFiniteError(
                    f"{bad} of {self.numel} weights are NaN or infinite at snapshot {self.updates}: "
                    "the training diverged; the modes keep what they knew before."
                )
            number = self.updates if label is None else label
            if self._tracker is not None:
                self._tracker.update(
                    view, self._members(view, self._tracker.choice.members), number
                )
            elif self._choice is None:
                self._warm_up(view, number)
            self.updates += 1

    def _warm_up(self, view: FlatView, label: int) -> None:
        warmup = self._config["warmup"]
        if self._store is None:
            self._store = self._new_store(view.device, view.dtype)
            self._labels: list[int] = []
        self._store.append(view, self._members(view, self.samples))
        self._labels.append(label)
        if self._store.count > warmup:
            self._fit(self._store)
            self._store = None

    def _fit(self, store: TrajectoryStore) -> None:
        config = self._config
        dtype = store.trajectory.dtype if store.base is None else store.base.dtype
        choice = choose_modes(store.rows, self.samples, config["modes"], config["profile"], dtype)
        self._choice = choice
        if choice.modes < config["modes"]:
            warnings.warn(
                f"only {choice.modes} modes were found where {config['modes']} were asked for: "
                "too few of the sampled weights move differently"
                + ("." if choice.modes else "; nothing is modelled."),
                stacklevel=4,
            )
        if not choice.modes:
            return
        profiles = choice.profile(rows_of(choice.members, self.samples, store.rows))
        fit = fit_modes(store.trajectory, store.base, choice, profiles)
        device = self._view.device if self._view is not None else fit.mode.device
        self._tracker = Tracker(
            choice,
            type(fit)(*(array.to(device) for array in fit)),
            profiles,
            self._labels,
            shrink=config["shrink"],
            forgetting=config["forgetting"],
        )

    def _new_store(self, device: torch.device, dtype: torch.dtype) -> TrajectoryStore:
        return TrajectoryStore(
            self.numel,
            self._config["warmup"] + 1,
            self._config["storage"],
            self.samples,
            dtype,
            self._store_device if self._store_device is not None else device,
        )

    def _members(self, view: FlatView, indices: Tensor) -> Tensor:
        values = view.gather(indices)
        return values if self._broadcast is None else self._broadcast(values)

    def _weights(self, source: Source | None) -> FlatView:
        if source is None:
            if self._model is None:
                raise PluginError("this OnlineModes has no model: give update() the weights.")
            source = self._model
        if isinstance(source, nn.Module) and source is self._model and self._tensors:
            # Walking a model's modules costs more than an update of a small one: look only whether
            # storage moved.
            if self._view is None or not self._view.is_current(self._tensors):
                self._attach(self._tensors)
        elif isinstance(source, Tensor):
            if source.shape != (self.numel,):
                raise ShapeError(f"expected {self.numel} weights, got shape {tuple(source.shape)}.")
            self._attach([source])
        else:
            tensors, _ = named_weights(source, *self._selection)
            missing = [name for name in self.layout.names if name not in tensors]
            if missing:
                raise StateMismatch(f"the weights given lack the tensor {missing[0]!r}.")
            chosen = {name: tensors[name] for name in self.layout.names}
            self.layout.require_same(Layout.of_tensors(chosen), "the model")
            self._attach(list(chosen.values()))
            self._tensors = list(chosen.values()) if source is self._model else []
        if self._view is None:
            raise PluginError("no weights to follow.")
        return self._view

    def _attach(self, tensors: list[Tensor]) -> None:
        self._view = FlatView(tensors)
        if self._tracker is not None:
            self._tracker.to(self._view.device)

    # ------------------------------------------------------------------ using the model

    def reconstruct(self, out: Tensor | None = None) -> Tensor:
        """Return the modelled weights of the last snapshot, [N] float32 (float64 for float64 models)."""
        with torch.inference_mode(False), torch.no_grad():
            tracker = self.tracker
            weights = reconstruct(
                tracker.mode, tracker.slope, tracker.mean, **tracker.evaluation(), out=out
            )
            if tracker.follows_references:
                at = tracker.choice.references.to(weights.device)
                weights[at] = tracker.profile.to(weights.device, weights.dtype)
            for variance in self.layout.variances():
                weights[variance].clamp_(min=0.0)
            return weights

    @contextmanager
    def swap(
        self, model: nn.Module | None = None, *, recalibrate: Iterable[object] | None = None
    ) -> Iterator[bool]:
        """Show the modelled weights inside the ``with`` block; the raw ones return bit for bit, also when the body raises.

        Values change in place: parameters, optimizer state and compiled graphs keep their tensors.
        Costs a copy of the weights.

        Args:
            model: The model to change; None for the one given at construction.
            recalibrate: Input batches for ``buffers="recalibrate"``.

        Yields:
            Whether the weights are modelled ones: False before the fit, when nothing is changed.
        """
        if self._swapped:
            raise PluginError("swap() is already active.")
        if self._tracker is None:
            yield False
            return
        target = self._model if model is None else model
        if target is None:
            raise PluginError("this OnlineModes has no model: give swap() one.")
        tracker = self._tracker
        with torch.inference_mode(False), torch.no_grad():
            view = self._weights(target)
            tensors = named_weights(target, *self._selection)[0]
        with keep_tensors(tensors[name] for name in self.layout.names):
            self._swapped = True
            try:
                with torch.no_grad():
                    reconstruct_into(
                        view, tracker.mode, tracker.slope, tracker.mean, **tracker.evaluation()
                    )
                    if tracker.follows_references:
                        view.put(tracker.choice.references, tracker.profile)
                    for name in self.layout.names:
                        if name.endswith("running_var"):
                            tensors[name].clamp_(min=0.0)
                if self.buffers == "recalibrate":
                    with recalibrated(target, recalibrate):
                        yield True
                else:
                    yield True
            finally:
                self._swapped = False

    def modelled_state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the model's whole state_dict with the modelled weights in it."""
        if self._model is None:
            raise PluginError("this OnlineModes has no model whose state_dict could be filled in.")
        _ = self.tracker
        with self.swap():
            return {name: t.detach().clone() for name, t in self._model.state_dict().items()}

    def decomposition(self) -> Decomposition:
        """Return the run so far as a :class:`Decomposition` (profiles thinned to at most 1024 snapshots)."""
        tracker = self.tracker
        unmodelled: dict[str, Tensor] = {}
        if self._model is not None:
            known = {*self.layout.names, *self.layout.aliases}
            unmodelled = {
                name: t.detach().cpu().clone()
                for raw, t in self._model.state_dict().items()
                if (name := clean_name(raw)) not in known
            }
        epochs, profiles = tracker.history()
        return Decomposition(
            layout=self.layout,
            samples=self.samples,
            references=tracker.choice.references,
            assignment=tracker.mode.cpu().clone(),
            scale=tracker.scale(shrunk=True).cpu(),
            mean=tracker.mean.cpu().clone(),
            profiles=profiles,
            profile_mean=tracker.profile_mean.clone(),
            total=tracker.total_sum,
            explained=tracker.explained(self.layout),
            epochs=epochs,
            unmodelled=unmodelled,
        )

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to continue bit for bit: tensors on the CPU, numbers and strings only."""
        return {
            "version": _VERSION,
            "config": dict(self._config),
            "layout": self.layout.to_json(),
            "updates": self.updates,
            "still": self._choice is not None and self._tracker is None,
            "store": None if self._store is None else self._store.state_dict(),
            "labels": list(self._labels) if self._store is not None else [],
            "dtype": str(self.layout.state_dtype).removeprefix("torch."),
            "tracker": None if self._tracker is None else self._tracker.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            StateMismatch: If the state is of another version, model or configuration; nothing is
                changed then.
        """
        if state.get("version") != _VERSION:
            raise StateMismatch(
                f"the saved modes have version {state.get('version')!r}, this package reads {_VERSION}."
            )
        self.layout.require_same(Layout.from_json(state["layout"]), "the saved state")
        for key, value in self._config.items():
            if state["config"].get(key) != value:
                raise StateMismatch(
                    f"the saved modes were made with {key}={state['config'].get(key)!r}, "
                    f"not {value!r}: use the same value to continue."
                )
        self.updates = int(state["updates"])
        self._store = self._tracker = self._choice = self._view = None
        self._labels = list(state["labels"])
        if state["still"]:
            none = torch.empty(0, dtype=torch.int64)
            self._choice = ModeChoice(none, none, none, torch.empty(0, dtype=torch.float64))
        if state["store"] is not None:
            device = self._store_device if self._store_device is not None else "cpu"
            self._store = self._new_store(torch.device(device), getattr(torch, state["dtype"]))
            self._store.load_state_dict(state["store"])
        if state["tracker"] is not None:
            self._tracker = Tracker.from_state(state["tracker"])
            self._choice = self._tracker.choice
