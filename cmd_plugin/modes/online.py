"""Online CMD: follow a training run, model its weights, keep nine bytes a weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from cmd_plugin.errors import PluginError, StateMismatch
from cmd_plugin.kernels import FlatView
from cmd_plugin.modes.choice import ModeChoice
from cmd_plugin.modes.embedding import Embedder, check_embedding
from cmd_plugin.modes.exchange import modelled, normalisations
from cmd_plugin.modes.fitted import FittedModes
from cmd_plugin.modes.layout import Layout, check_buffers, find_weights
from cmd_plugin.modes.sampling import sample_weights
from cmd_plugin.modes.settings import Embedding, Settings
from cmd_plugin.modes.source import Source, WeightSource, diverged
from cmd_plugin.modes.tracker import Tracker
from cmd_plugin.modes.warmup import WarmUp
from cmd_plugin.networks.measuring import kept_buffers
from cmd_plugin.networks.recalibration import recalibrated

__all__ = ["OnlineModes"]

_VERSION = 1


class OnlineModes(FittedModes):
    r"""Correlation Mode Decomposition of a training run while it runs.

    The paper's online CMD (Brokman et al., ICLR 2024, section 3.3). Call :meth:`update` once per
    epoch (or every so many steps), after the optimizer's step. The first F = ``warmup`` calls store
    snapshots; call F + 1 stores one more, chooses the modes from all F + 1, fits every weight to
    its mode and frees the store. From then on modes and references stay, and every call updates
    scale and mean of all weights by recursive least squares, in place. The training itself is never
    touched (:meth:`project` aside), and neither are the global random generators.

    **Embedded CMD** (section 3.4) makes more and more weights follow their references for good.
    Call :meth:`project` before :meth:`update`, which runs the schedule::

        modes = OnlineModes(model, embedding=Embedding(every=10, percent=10))
        for epoch in range(epochs):
            train_one_epoch(model)
            modes.project()  # embedded weights := scale * reference + offset
            modes.update()

    With ``Embedding(project="step")`` call :meth:`project` after every step of the optimizer, and
    with ``"tie"`` also :meth:`tie_gradients` before it.

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
            kept from going negative), ``"recalibrate"`` them for the modelled weights in
            :meth:`swap`, or ``"keep"`` those of the raw run.
        include: Shell-style patterns on parameter names; empty means all.
        exclude: Shell-style patterns on parameter names to leave out.
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
        embedding: Embedding | None = None,
        broadcast: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.settings = Settings(
            modes, warmup, samples, seed, storage, profile, shrink, forgetting, embedding
        )
        check_buffers(buffers)
        self.buffers = buffers
        self._model = model_or_layout if isinstance(model_or_layout, nn.Module) else None
        self.layout = (
            model_or_layout
            if isinstance(model_or_layout, Layout)
            else Layout.of_model(model_or_layout, include, exclude, buffers)
        )
        check_embedding(embedding, self.layout)
        self._store_device = store_device
        self._broadcast = broadcast
        self.samples = sample_weights(self.layout.sizes, samples, seed)
        self.updates = 0
        self._warmup: WarmUp | None = None
        self._choice: ModeChoice | None = None
        self._tracker: Tracker | None = None
        self._embedder: Embedder | None = None
        self._source = WeightSource(self.layout, self._model)
        self._swapped = False

    def update(self, source: Source | None = None, label: int | None = None) -> None:
        """Take a snapshot of the weights.

        Args:
            source: Where the weights are: None for the model given at construction, or a model, a
                state_dict, or a flat [N] tensor.
            label: Number of the snapshot in the history, for example the epoch; None counts
                updates.

        Raises:
            NonFiniteError: If a weight is NaN or infinite (or so large that its square is); the
                modes stay as they were, up to rounding.
            StateMismatch: If the source has other tensors than the layout.
            PluginError: If called inside :meth:`swap`, when the model does not hold its own
                weights.
        """
        if self._swapped:
            raise PluginError("update() inside swap() would record modelled weights as raw ones.")
        # State made under inference_mode (Lightning validates in it) could not be changed in place
        # later.
        with torch.inference_mode(False), torch.no_grad():
            view = self._read(source)
            number = self.updates if label is None else label
            if self._tracker is None:
                finite = not view.count_non_finite()
            else:  # in one pass with the update, which takes itself back
                members = self._members(view, self._tracker.choice.members)
                finite = self._tracker.update(view, members, number)
            if not finite:
                raise diverged(view, self.layout, self.updates)
            self.updates += 1
            if self._embedder is not None and self._tracker is not None:
                self._embedder.advance(self._tracker)
            elif self._choice is None:
                self._warm_up(view, number)

    def _warm_up(self, view: FlatView, label: int) -> None:
        if self._warmup is None:
            self._warmup = self._new_warmup(view.device)
        self._warmup.append(view, self._members(view, self.samples), label)
        if self._warmup.complete:
            self._choice, self._tracker = self._warmup.fit(view.device)
            self._warmup = None
            if self.settings.embedding is not None and self._tracker is not None:
                self._embedder = Embedder(self.settings.embedding, self._tracker, self.updates)
            self._warn_if_few(self._choice.modes)

    def _warn_if_few(self, found: int) -> None:
        if found < self.settings.modes:
            warnings.warn(
                f"only {found} modes were found where {self.settings.modes} were asked for: too "
                "few of the sampled weights move differently"
                + ("." if found else "; nothing is modelled."),
                stacklevel=4,
            )

    def _new_warmup(self, device: torch.device | str) -> WarmUp:
        place = device if self._store_device is None else self._store_device
        return WarmUp(self.settings, self.numel, self.samples, self.layout.state_dtype, place)

    def _members(self, view: FlatView, indices: Tensor) -> Tensor:
        values = view.gather(indices)
        return values if self._broadcast is None else self._broadcast(values)

    def _read(self, source: Source | None) -> FlatView:
        view = self._source.view(source)
        if self._tracker is not None:
            self._tracker.to(view.device)
        if self._embedder is not None:
            self._embedder.to(view.device)
        return view

    def project(
        self,
        source: Source | None = None,
        *,
        profile: Tensor | None = None,
        optimizers: Iterable[torch.optim.Optimizer] = (),
    ) -> int:
        """Write the embedded weights, in place, from the references' current values.

        All other weights keep their bits. A modelled variance is kept from going negative.

        Args:
            source: Where the weights are: None for the model given at construction, or a model, a
                state_dict, or a flat [N] tensor.
            profile: [M] values of the modes' profiles to use instead of those in ``source``.
            optimizers: With ``Embedding(slots="zero")``, whose slots of embedded weights to zero.

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
        embedder = self._embedder
        if embedder is None or not embedder.count:
            return 0
        with torch.inference_mode(False), torch.no_grad():
            view = self._read(source)
            choice = self.tracker.choice
            if profile is None:
                profile = choice.profile(self._members(view, choice.members))
            embedder.project(view, self.tracker, profile, self.layout)
            for optimizer in optimizers if embedder.settings.slots == "zero" else ():
                embedder.clear_slots(optimizer, self._source.tensors(), self.layout)
        return embedder.count

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
            tensors: list[Tensor | None] = list(self._source.tensors())
            if optimizer is not None:
                own = {id(p) for group in optimizer.param_groups for p in group["params"]}
                tensors = [tensor if id(tensor) in own else None for tensor in tensors]
            self._embedder.tie(tensors, self.layout, self.tracker)

    def reconstruct(self, out: Tensor | None = None) -> Tensor:
        """Return the modelled weights of the last snapshot.

        They are [N] float32, or float64 for a float64 model.

        Args:
            out: [N] to fill and return.
        """
        with torch.inference_mode(False), torch.no_grad():
            weights = self.tracker.reconstruct(out)
            if self._embedder is not None:
                self._embedder.write(FlatView([weights]), self.tracker)
            for variance in self.layout.variances():
                weights[variance].clamp_(min=0.0)
            return weights

    @contextmanager
    def swap(
        self, model: nn.Module | None = None, *, recalibrate: Iterable[object] | None = None
    ) -> Iterator[bool]:
        """Show the modelled weights inside the ``with`` block.

        On exit the raw ones are back bit for bit, and so are all normalisation statistics, also
        when the body raises. Values change in place: parameters, optimizer state and compiled
        graphs keep their tensors. Costs a copy of the weights.

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
            view = self._read(target)
            tensors = find_weights(self.layout, target, "the model")
        raw = list(tensors.values())
        with kept_buffers(normalisations(target)), modelled(view, raw, tracker):
            self._swapped = True
            try:
                with torch.no_grad():
                    if self._embedder is not None:
                        self._embedder.write(view, tracker)
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

    def modelled_state_dict(
        self, *, recalibrate: Iterable[object] | None = None
    ) -> dict[str, Tensor]:
        """Return a copy of the model's whole state_dict with the modelled weights in it.

        Args:
            recalibrate: Input batches for ``buffers="recalibrate"``.
        """
        if self._model is None:
            raise PluginError("this OnlineModes has no model whose state_dict could be filled in.")
        _ = self.tracker
        with self.swap(recalibrate=recalibrate):
            return {name: t.detach().clone() for name, t in self._model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to continue bit for bit.

        It holds tensors on the CPU, numbers, strings, None, lists and dicts only, so that
        ``torch.load(weights_only=True)`` reads it.
        """
        return {
            "version": _VERSION,
            "config": asdict(self.settings),
            "layout": self.layout.to_json(),
            "dtype": str(self.layout.state_dtype).removeprefix("torch."),
            "samples": self.samples.clone(),
            "updates": self.updates,
            "still": self._choice is not None and self._tracker is None,
            "warmup": None if self._warmup is None else self._warmup.state_dict(),
            "tracker": None if self._tracker is None else self._tracker.state_dict(),
            "embedder": None if self._embedder is None else self._embedder.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            StateMismatch: If the state is of another version, model or configuration; nothing is
                changed then.
        """
        if state.get("version") != _VERSION:
            raise StateMismatch(
                f"the saved modes have version {state.get('version')!r}, and this package reads "
                f"version {_VERSION}: start anew or use the package that wrote them."
            )
        self.layout.require_same(Layout.from_json(state["layout"]), "the saved state")
        dtype = str(self.layout.state_dtype).removeprefix("torch.")
        for key, value in {"dtype": dtype, **asdict(self.settings)}.items():
            saved = state["dtype"] if key == "dtype" else state["config"].get(key)
            if saved != value:
                raise StateMismatch(
                    f"the saved modes were made with {key}={saved!r}, not {value!r}: use the same "
                    "value to continue."
                )
        with torch.inference_mode(False), torch.no_grad():  # later updates are in place
            self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.updates = int(state["updates"])
        self.samples = state["samples"].clone()
        self._warmup = self._tracker = self._choice = self._embedder = None
        if state["still"]:
            none = torch.empty(0, dtype=torch.int64)
            self._choice = ModeChoice(none, none, none, torch.empty(0, dtype=torch.float64))
        if state["warmup"] is not None:
            self._warmup = self._new_warmup("cpu")
            self._warmup.load_state_dict(state["warmup"])
        if state["tracker"] is not None:
            self._tracker = Tracker.from_state(state["tracker"])
            self._choice = self._tracker.choice
        if self.settings.embedding is not None and state.get("embedder") is not None:
            self._embedder = Embedder.from_state(self.settings.embedding, state["embedder"])
