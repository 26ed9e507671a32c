"""What can be asked of the modes of a run: everything that changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmd_plugin.errors import PluginError
from cmd_plugin.modes.choice import ModeChoice
from cmd_plugin.modes.decomposition import Decomposition
from cmd_plugin.modes.embedding import Embedder
from cmd_plugin.modes.layout import Layout, clean_name
from cmd_plugin.modes.settings import Settings
from cmd_plugin.modes.tracker import Tracker
from cmd_plugin.modes.warmup import WarmUp

__all__ = ["FittedModes"]


class FittedModes:
    """Read-only side of :class:`cmd_plugin.modes.OnlineModes`, which sets all attributes.

    Attributes:
        settings: The settings that a saved state must share.
        layout: The modelled tensors.
        samples: [K] int64 flat indices of the weights that are clustered.
        updates: Number of snapshots taken.
    """

    settings: Settings
    layout: Layout
    samples: Tensor
    updates: int
    _model: nn.Module | None
    _warmup: WarmUp | None
    _choice: ModeChoice | None
    _tracker: Tracker | None
    _embedder: Embedder | None

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
        scale = self.tracker.scale()
        return scale if self._embedder is None else self._embedder.frozen_scale(scale)

    @property
    def offset(self) -> Tensor:
        """[N] offset b of each weight; a new tensor."""
        offset = self.tracker.offset()
        return offset if self._embedder is None else self._embedder.frozen_offset(offset)

    @property
    def correlation(self) -> tuple[Tensor, Tensor] | None:
        """Absolute correlation [K', K'] of the clustered samples, and their modes [K'].

        None before the fit and after a resume.
        """
        choice = self._choice
        if choice is None or choice.correlation is None or choice.labels is None:
            return None
        return choice.correlation, choice.labels

    @property
    def state_bytes(self) -> int:
        """Bytes held for the weights now: the warm-up store, then 9 a weight.

        Four more to shrink, nine more to embed.
        """
        held = (self._warmup, self._tracker, self._embedder)
        return sum(state.nbytes for state in held if state is not None)

    @property
    def embedded(self) -> Tensor:
        """[N] bool, which weights are embedded; a new tensor."""
        if self._embedder is None:
            return torch.zeros(self.numel, dtype=torch.bool)
        return self._embedder.embedded.clone()

    @property
    def embedded_fraction(self) -> float:
        """Share of the weights that are embedded now, 0 to 1."""
        return 0.0 if self._embedder is None else self._embedder.count / self.numel

    @property
    def saved_percent(self) -> float:
        """What the paper counts as saved, in percent.

        The share of weights that are embedded after each snapshot's event, averaged over all
        snapshots since the start. It counts weights, not computation.
        """
        return 0.0 if self._embedder is None else self._embedder.saved_percent

    @property
    def volume_percent(self) -> float:
        """Share of values that one synchronisation per snapshot has to send, in percent.

        Those of the weights that were free when the way to a snapshot began, averaged over all
        snapshots: embedded weights follow from them. :attr:`saved_percent` counts an event one
        snapshot earlier.
        """
        return 100.0 if self._embedder is None else self._embedder.volume_percent

    @property
    def volume_bytes(self) -> int:
        """Bytes of one synchronisation per snapshot, in one direction.

        The values of :attr:`volume_percent` in the state's dtype, and for each event N bits and
        nine bytes (mode, scale, offset) for every weight it embedded.
        """
        if self._embedder is None:
            return self.updates * self.numel * self.layout.state_dtype.itemsize
        return self._embedder.volume_bytes

    def explained_variance(self) -> float:
        """Return the share of all movement so far the model explains, at most 1; nan if none."""
        if self._tracker is None or not self._tracker.total_sum > 0:
            return float("nan")
        return min(1.0, self._explained() / self._tracker.total_sum)

    def _explained(self) -> float:
        if self._embedder is None:
            return self.tracker.explained(self.layout)
        return self._embedder.explained(self.tracker, self.layout)

    def decomposition(self) -> Decomposition:
        """Return the run so far as a :class:`Decomposition`.

        Of a run of more than 1024 snapshots every second, fourth ... one is in it, and the last.
        """
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
        scale, mean = tracker.scale(shrunk=True), tracker.mean.clone()
        if self._embedder is not None:
            self._embedder.freeze(scale, mean, tracker)
        return Decomposition(
            layout=self.layout,
            samples=self.samples,
            references=tracker.choice.references,
            assignment=tracker.mode.cpu().clone(),
            scale=scale.cpu(),
            mean=mean.cpu(),
            profiles=profiles,
            profile_mean=tracker.profile_mean.clone(),
            total=tracker.total_sum,
            explained=self._explained(),
            epochs=epochs,
            unmodelled=unmodelled,
        )
