"""Online CMD: follow a training run, model its weights, keep nine bytes a weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, PluginError
from cmd_plugin.kernels import FlatView
from cmd_plugin.kernels.background import load_in_background
from cmd_plugin.kernels.update_affine import accepts, can_follow
from cmd_plugin.modes.decomposition import Decomposition
from cmd_plugin.modes.embedding import Embedder, check_embedding
from cmd_plugin.modes.exchange import modelled, normalisations
from cmd_plugin.modes.fit import explained_share
from cmd_plugin.modes.layout import Layout, check_buffers, find_weights
from cmd_plugin.modes.sampling import sample_weights
from cmd_plugin.modes.settings import Embedding, Settings, require_same_run
from cmd_plugin.modes.source import Source, WeightSource, diverged, find_non_finite
from cmd_plugin.modes.states import SavedState
from cmd_plugin.modes.tied import Owned, moved_by
from cmd_plugin.modes.tracker import Tracker
from cmd_plugin.modes.warmup import WarmUp
from cmd_plugin.networks.measuring import kept_buffers
from cmd_plugin.networks.recalibration import load_statistics, recalibrated, running_statistics

__all__ = ["OnlineModes"]

_VERSION = 1


class OnlineModes:
    r"""Correlation Mode Decomposition of a training run while it runs.

    The paper's online CMD (Brokman et al., ICLR 2024, section 3.3). Call :meth:`update` once per
    epoch (or every so many steps), after the optimizer's step. The first F = ``warmup`` calls store
    snapshots; call F + 1 stores one more, chooses the modes from all F + 1, fits every weight to
    its mode and frees the store. From then on modes and references stay, and every call updates
    scale and mean of all weights by recursive least squares, in place. The training itself is never
    touched (:meth:`project` aside), and neither are the global random generators.

    On a GPU an update does not wait for the device. Whether it found weights that are not finite,
    the next call says that looks: an update after the answer has arrived, or anything that shows
    weights, numbers or the state. Until then nothing more is taken in.

    **Embedded CMD** (section 3.4) makes more and more weights follow their references for good.
    Call :meth:`project` before :meth:`update`, which runs the schedule::

        modes = OnlineModes(model, embedding=Embedding(every=10, percent=10))
        for epoch in range(epochs):
            train_one_epoch(model)
            modes.project()  # embedded weights := scale * reference + offset
            modes.update()

    With ``Embedding(project="step")`` or ``"pool"`` call :meth:`project` after every step of the
    optimizer, and with ``"tie"`` also :meth:`tie_gradients` before it.

    Args:
        model_or_layout: The model whose weights are followed; or a :class:`Layout`, and then
            :meth:`update` is given the weights.
        modes: Largest number of modes M, 1..256.
        warmup: F, at least 2 (correlation over fewer than three snapshots says nothing).
        samples: Number K of weights whose trajectories are clustered.
        seed: Seed of the draw of the samples.
        storage: Warm-up store, ``"delta-bf16"`` (2 F + 4 bytes a weight) or ``"fp32"``.
        store_device: Where the warm-up store lies; None means with the weights.
        buffers: BatchNorm's running statistics: ``"recalibrate"`` them for the modelled weights,
            from batches that :meth:`swap` is given; ``"model"`` them (the authors' code; variances
            are kept from going negative), which can put a good network at chance; or ``"keep"``
            those of the raw run. Without BatchNorm all three are the same.
        include: Globs (``conv*``) on parameter names; empty means all.
        exclude: Globs (``conv*``) on parameter names to leave out.
        profile: What a mode follows: its ``"reference"`` weight (the paper), or the ``"mean"`` of
            its sampled weights.
        shrink: Multiply each weight's scale by its squared correlation with its profile (beyond the
            paper; 4 more bytes a weight).
        forgetting: Factor in (0, 1] by which each update discounts the past; 1 weighs all snapshots
            alike (the paper).
        embedding: Schedule by which weights are embedded; None embeds none.
        broadcast: In distributed training, a function that returns rank 0's version of a small CPU
            tensor on all ranks, so that all choose and follow the same modes even where local
            buffers differ.

    Attributes:
        settings: The settings that a saved state must share.
        layout: The modelled tensors.
        samples: [K] int64 flat indices of the weights that are clustered.
        updates: Number of snapshots taken.

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
        buffers: str = "recalibrate",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        profile: str = "reference",
        shrink: bool = False,
        forgetting: float = 1.0,
        embedding: Embedding | None = None,
        broadcast: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.settings = Settings(
            modes, warmup, samples, seed, storage, profile, shrink, forgetting, embedding
        )
        check_buffers(buffers)
        self.buffers = buffers
        if isinstance(model_or_layout, Layout):
            self._model, self.layout = None, model_or_layout
        else:
            self._model = model_or_layout
            self.layout = Layout.of_model(model_or_layout, include, exclude, buffers)
        check_embedding(embedding, self.layout)
        self._store_device = store_device
        self._broadcast = broadcast
        self.samples = sample_weights(self.layout.sizes, samples, seed)
        self.updates = 0
        # One follows the other; where no weight moves, neither is left.
        self._warmup: WarmUp | None = WarmUp(self.settings, self.layout, self.samples, store_device)
        self._tracker: Tracker | None = None
        self._embedder: Embedder | None = None  # beside the tracker, if weights are embedded
        self._source = WeightSource(self.layout, self._model)
        self._swapped = False
        work = self.layout.numel, warmup + 1, modes
        load_in_background(self._model, self.layout.state_dtype, *work, embedding is not None)

    # -- a run goes on -----------------------------------------------------------------------------

    def update(self, source: Source | None = None, label: int | None = None) -> None:
        """Take a snapshot of the weights.

        Args:
            source: Where the weights are: None for the model given at construction, or a model, a
                state_dict, or a flat [N] tensor.
            label: Number of the snapshot in the history, say the epoch; None counts updates.

        Raises:
            NonFiniteError: If a weight is NaN or infinite, or sums of their squares could be; the
                modes stay as they were, bit for bit. On a GPU, if those of an earlier call were;
                then this snapshot is not taken in either.
            StateMismatch: If the source has other tensors than the layout.
            PluginError: If called inside :meth:`swap`.
        """
        if self._swapped:
            raise PluginError("update() inside swap() would record modelled weights as raw ones.")
        # State made under inference_mode (Lightning validates in it) would be fixed for good.
        with torch.inference_mode(False), torch.no_grad():
            view = self._read(source)
            tracker = self._tracker
            if tracker is not None and tracker.should_look(view):
                self._look()
            number = self.updates if label is None else label
            if tracker is not None and self._broadcast is None and can_follow(view):
                tracker.follow(view, number)
                self.updates += 1
                if self._embedder is not None or tracker.is_full:
                    self._look()
            else:
                self._take(view, number)
            if self._embedder is not None and tracker is not None:
                self._embedder.advance(tracker)
            if self._warmup is not None:
                self._warmup.append(view, self._values(view, self.samples), number)
                if self._warmup.complete:
                    self._fit(self._warmup, view.device)

    def _take(self, view: FlatView, number: int) -> None:
        """Take a snapshot in, or refuse it, at once."""
        self._look()
        tracker = self._tracker
        if tracker is None:
            taken = accepts(view)
        else:
            taken = tracker.update(view, self._values(view, tracker.choice.members), number)
        if not taken:
            raise diverged(find_non_finite(view), self.layout, self.updates)
        self.updates += 1

    def _look(self) -> None:
        """Wait for what the device is still at; raise if it refused a snapshot."""
        refused = None if self._tracker is None else self._tracker.look()
        if refused is not None:
            self.updates -= refused.later + 1
            raise diverged(refused, self.layout, self.updates)

    def _fit(self, warmup: WarmUp, device: torch.device) -> None:
        choice, self._tracker = warmup.fit(device)
        self._warmup = None
        if self.settings.embedding is not None and self._tracker is not None:
            given = self.settings.embedding, self._tracker, self.layout, self.updates
            self._embedder = Embedder(*given)
        if choice.modes < self.settings.modes:
            warnings.warn(
                f"only {choice.modes} modes were found where {self.settings.modes} were asked for: "
                "too few of the sampled weights move differently"
                + ("." if choice.modes else "; nothing is modelled."),
                stacklevel=3,
            )

    def _values(self, view: FlatView, indices: Tensor) -> Tensor:
        """Return weights that decide something for all: rank 0's in distributed training."""
        values = view.gather(indices)
        return values if self._broadcast is None else self._broadcast(values)

    def _read(self, source: Source | None) -> FlatView:
        view = self._source.view(source)
        if self._tracker is not None:
            self._tracker.to(view.device)
        return view

    # -- embedded weights follow -------------------------------------------------------------------

    def project(
        self,
        source: Source | None = None,
        *,
        profile: Tensor | None = None,
        optimizers: Iterable[torch.optim.Optimizer] = (),
    ) -> int:
        """Write the embedded weights, in place, from the references' current values.

        All other weights keep their bits. A modelled variance is kept from going negative. With
        ``Embedding(project="pool")`` the references move first, to the least-squares fit to where
        they and the weights that follow them are.

        Args:
            source: As for :meth:`update`.
            profile: [M] values of the modes' profiles to use instead of those in ``source``.
            optimizers: Those that have just stepped. Unless ``project="epoch"`` only their
                parameters in the model are written (and statistics of the same modules): others may
                be in use. With ``slots="zero"`` their slots of embedded weights are zeroed.

        Returns:
            Number of weights written; 0 before the first event.

        Raises:
            NonFiniteError: If a reference is NaN or infinite; nothing is written then.
            ShapeError: If ``profile`` is not [M].
            StateMismatch: If the source has other tensors than the layout.
            PluginError: If called inside :meth:`swap`.
        """
        if self._swapped:
            raise PluginError("project() inside swap() would change modelled weights.")
        if self._embedder is None or not self._embedder.tied.count:
            return 0
        tied, settings, optimizers = self._embedder.tied, self._embedder.settings, [*optimizers]
        with torch.inference_mode(False), torch.no_grad():
            view = self._read(source)
            mine = settings.project != "epoch" and (source is None or source is self._model)
            own = self._owned(optimizers if mine else ())
            if profile is None and settings.project == "pool":
                profile = tied.pool(view, own)
            elif profile is None:
                profile = tied.choice.profile(self._values(view, tied.choice.members))
            written = tied.project(view, profile, own)
            for optimizer in optimizers if settings.slots == "zero" else ():
                tied.clear_slots(optimizer, self._source.tensors())
        return written

    def tie_gradients(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        r"""Apply the chain rule to the embedded weights' gradients, for ``project="tie"``.

        Each reference's gradient gets :math:`\sum_i a_i g_i` over the weights embedded in its mode,
        whose own become zero. Call it when gradients are complete (accumulated, reduced over
        processes, unscaled) and before they are clipped.

        Args:
            optimizer: Whose parameters take part: a step of one of several optimizers moves only
                its own. None for all parameters of the model.

        Raises:
            InputError: If a gradient is sparse.
            PluginError: If there is no model.
        """
        if self._embedder is None:
            return
        with torch.no_grad():
            self._read(None)
            own = self._owned([] if optimizer is None else [optimizer])
            self._embedder.tied.tie_gradients(self._source.tensors(), own)

    def _owned(self, optimizers: Sequence[torch.optim.Optimizer]) -> Owned:
        return moved_by(optimizers, self.layout, self._source.tensors()) if optimizers else None

    # -- modelled weights --------------------------------------------------------------------------

    def reconstruct(self, out: Tensor | None = None) -> Tensor:
        """Return the modelled weights of the last snapshot, [N] float32 (float64 if the model is).

        Args:
            out: [N] to fill and return.
        """
        with torch.inference_mode(False), torch.no_grad():
            weights = self.tracker.reconstruct(out)
            for variance in self.layout.variances():
                weights[variance].clamp_(min=0.0)
            return weights

    @contextmanager
    def swap(
        self,
        model: nn.Module | None = None,
        *,
        recalibrate: Iterable[object] | None = None,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> Iterator[bool]:
        """Show the modelled weights inside the ``with`` block.

        On exit the raw ones are back bit for bit, and so are all normalisation statistics, also
        when the body raises. Values change in place: parameters, optimizer state and compiled
        graphs keep their tensors. Costs a copy of the weights.

        Args:
            model: The model to change; None for the one given at construction.
            recalibrate: Input batches for BatchNorm; of a list or tuple the first is the input.
            statistics: Statistics of BatchNorm to show instead, by name, as found once before by
                :func:`cmd_plugin.networks.running_statistics`.

        Yields:
            Whether the weights are modelled ones: False before the fit, when nothing is changed.

        Raises:
            InputError: If BatchNorm is to be recalibrated and there are no batches; before the fit
                too. If ``statistics`` are those of another model (StateMismatch).
        """
        if self._swapped:
            raise PluginError("swap() is already active.")
        target = self._model if model is None else model
        again = self.buffers == "recalibrate" and statistics is None
        if again and recalibrate is None and target is not None and running_statistics(target):
            raise InputError(
                "this network has BatchNorm, whose statistics have to fit the modelled weights: "
                "give swap() recalibrate=batches (some input batches), or make OnlineModes with "
                "buffers='keep' (those of the raw run) or buffers='model' (modelled like weights)."
            )
        self._look()
        tracker = self._tracker
        if tracker is None:
            yield False
            return
        if target is None:
            raise PluginError("this OnlineModes has no model: give swap() one.")
        with torch.inference_mode(False), torch.no_grad():
            view = self._read(target)
            if target is self._model:
                tensors = self._source.tensors()
            else:
                tensors = [*find_weights(self.layout, target, "the model").values()]
        with kept_buffers(normalisations(target)), modelled(view, tensors, tracker):
            self._swapped = True
            try:
                with torch.no_grad():
                    for name, tensor in zip(self.layout.names, tensors, strict=True):
                        if name.endswith("running_var"):
                            tensor.clamp_(min=0.0)
                if statistics is not None:
                    load_statistics(target, statistics)
                with recalibrated(target, recalibrate) if again else nullcontext():
                    yield True
            finally:
                self._swapped = False

    def modelled_state_dict(
        self, *, recalibrate: Iterable[object] | None = None
    ) -> dict[str, Tensor]:
        """Return a copy of the model's state_dict as it is inside :meth:`swap`."""
        if self._model is None:
            raise PluginError("this OnlineModes has no model whose state_dict could be filled in.")
        _ = self.tracker
        with self.swap(recalibrate=recalibrate):
            return {name: t.detach().clone() for name, t in self._model.state_dict().items()}

    def decomposition(self) -> Decomposition:
        """Return the run so far; beyond 1024 snapshots every second, fourth ..., and the last."""
        return self.tracker.decomposition(self.layout, self.samples, self._source.unmodelled())

    # -- what is known -----------------------------------------------------------------------------

    @property
    def numel(self) -> int:
        """Number of modelled weights N."""
        return self.layout.numel

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
                f"{self.settings.warmup + 1}."
            )
        self._look()
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
        """Absolute correlation [K', K'] of the samples, their modes [K']; None when resumed."""
        choice = None if self._tracker is None else self._tracker.choice
        if choice is None or choice.correlation is None or choice.labels is None:
            return None
        return choice.correlation, choice.labels

    @property
    def state_bytes(self) -> int:
        """Bytes held now: the warm-up store, then 9 a weight; 4 more to shrink, 9 to embed."""
        return sum(held.nbytes for held in (self._warmup, self._tracker) if held is not None)

    @property
    def embedded(self) -> Tensor:
        """[N] bool, which weights are embedded; a new tensor."""
        if self._embedder is None:
            return torch.zeros(self.numel, dtype=torch.bool)
        return self._embedder.tied.mask.clone()

    @property
    def embedded_fraction(self) -> float:
        """Share of the weights that are embedded now, 0 to 1."""
        return 0.0 if self._embedder is None else self._embedder.tied.count / self.numel

    @property
    def saved_percent(self) -> float:
        """Share of weights embedded after each snapshot, averaged, in %: the paper's saving."""
        return 0.0 if self._embedder is None else self._embedder.saved_percent

    @property
    def volume_percent(self) -> float:
        """Share of values that one synchronisation per snapshot has to send, averaged, in %."""
        return 100.0 if self._embedder is None else self._embedder.volume_percent

    @property
    def volume_bytes(self) -> int:
        """Bytes of one synchronisation per snapshot, one way, with the news of who was embedded."""
        if self._embedder is None:
            return self.updates * self.numel * self.layout.state_dtype.itemsize
        return self._embedder.volume_bytes

    def explained_variance(self) -> float:
        """Return the share of all movement so far the model explains, at most 1; nan if none."""
        if self._tracker is None:
            return float("nan")
        self._look()
        return explained_share(self._tracker.explained(self.layout), self._tracker.total_sum)

    # -- stop and continue -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to continue bit for bit: ``weights_only=True`` loads it."""
        self._look()
        return {
            "version": _VERSION,
            "config": asdict(self.settings),
            "layout": self.layout.to_json(),
            "dtype": str(self.layout.state_dtype).removeprefix("torch."),
            "samples": self.samples.clone(),
            "updates": self.updates,
            "still": self._warmup is None and self._tracker is None,
            "warmup": None if self._warmup is None else self._warmup.state_dict(),
            "tracker": None if self._tracker is None else self._tracker.state_dict(),
            "embedder": None if self._embedder is None else self._embedder.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            StateMismatch: If the state is of another version, model or configuration, or damaged;
                names the entry; nothing is changed then.
        """
        saved = SavedState(state)
        require_same_run(saved, _VERSION, self.layout, self.settings)
        warmup: WarmUp | None = None
        embedder: Embedder | None = None
        tracker: Tracker | None = None
        with torch.inference_mode(False), torch.no_grad():
            samples = saved.distinct("samples", self.samples.numel(), self.numel)
            updates, first = saved.whole("updates", 0), self.settings.warmup + 1
            still, fitted = saved.flag("still"), saved.part("tracker")
            saved.require(not (still and fitted), "still", "is True, and there are modes")
            done = still or fitted is not None
            saved.require(
                (updates >= first) == done, "updates", f"is {updates}, a fit takes {first}"
            )
            if fitted is not None:
                tracker = Tracker.from_state(fitted, self.layout, self.settings, updates)
            elif not still:
                warmup = WarmUp(self.settings, self.layout, samples, self._store_device)
                warmup.load_state(saved.part("warmup"), updates)
            # States of before embedding existed have no such entry.
            held = saved.part("embedder") if saved.get_or_none("embedder") is not None else None
            embedding = self.settings.embedding
            wanted = tracker is not None and embedding is not None
            saved.require((held is not None) == wanted, "embedder", "does not fit the settings")
            if embedding is not None and held is not None and tracker is not None:
                embedder = Embedder.from_state(embedding, held, tracker, self.layout, first)
            if tracker is not None:
                tracker.require_finite(self.layout, saved)
        # All was made new, and nothing of this object changed so far.
        self._warmup, self._tracker, self._embedder = warmup, tracker, embedder
        self.samples, self.updates = samples, updates
