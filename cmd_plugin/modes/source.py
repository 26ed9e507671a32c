"""Where online CMD reads the weights: a model, a state_dict or a flat vector, as one flat view."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_

from torch import Tensor, nn

from cmd_plugin.errors import NonFiniteError, PluginError, ShapeError
from cmd_plugin.kernels import FlatView
from cmd_plugin.modes.ahead import Refused
from cmd_plugin.modes.layout import Layout, clean_name, find_weights

__all__ = ["Source", "WeightSource", "diverged", "find_non_finite"]

Source = nn.Module | Mapping[str, Tensor] | Tensor

_Table = dict[str, Tensor | None]
_Children = dict[str, nn.Module | None]


class WeightSource:
    """The weights of a layout, wherever they are now.

    Args:
        layout: What the weights are.
        model: Model to read when no other source is named.
    """

    def __init__(self, layout: Layout, model: nn.Module | None) -> None:
        self.layout = layout
        self.model = model
        self._slots: tuple[list[_Table], list[str]] = [], []
        self._links: tuple[list[_Children], list[str], list[nn.Module | None]] = [], [], []
        self._view: FlatView | None = None

    def view(self, source: Source | None = None) -> FlatView:
        """Return the weights of a source, None for the model, as a flat view in the state's dtype.

        Raises:
            ShapeError: If a flat vector has another length.
            StateMismatch: If a model or state_dict has other tensors than the layout.
            PluginError: If there is no source.
        """
        if source is None:
            source = self.model
        if source is None:
            raise PluginError("this OnlineModes has no model: give update() the weights.")
        if source is self.model:
            return self._of_model(self.model)
        if isinstance(source, Tensor):
            if source.shape != (self.layout.numel,):
                raise ShapeError(
                    f"expected {self.layout.numel} weights, got shape {tuple(source.shape)}."
                )
            return FlatView([source], dtype=self.layout.state_dtype)
        what = "the model given" if isinstance(source, nn.Module) else "the state_dict given"
        tensors = find_weights(self.layout, source, what)
        return FlatView(list(tensors.values()), dtype=self.layout.state_dtype)

    def tensors(self) -> list[Tensor]:
        """Return the model's own tensors in the layout's order: parameters with their gradients.

        Raises:
            PluginError: If there is no model.
        """
        if self.model is None:
            raise PluginError("this OnlineModes has no model whose parameters it could look at.")
        self._of_model(self.model)
        return [tensor for tensor in map(dict.get, *self._slots) if tensor is not None]

    def unmodelled(self) -> dict[str, Tensor]:
        """Return copies of the model's other entries on the CPU, by cleaned name."""
        known = {*self.layout.names, *self.layout.aliases}
        entries = {} if self.model is None else self.model.state_dict()
        return {
            name: tensor.detach().cpu().clone()
            for raw, tensor in entries.items()
            if (name := clean_name(raw)) not in known
        }

    def _of_model(self, model: nn.Module) -> FlatView:
        # Walking the modules costs more than an update of a small model: look only whether every
        # module still is where it was and holds the tensor it held. Moving a model to a device
        # replaces its buffers, and load_state_dict(assign=True) its parameters.
        tables, names, modules = self._links
        in_place = all(map(is_, map(dict.get, tables, names), modules))
        held = map(dict.get, *self._slots) if in_place else ()
        tensors = [tensor for tensor in held if tensor is not None]
        if self._view is None or not self._view.is_current(tensors):
            tensors = list(find_weights(self.layout, model, "the model").values())
            self._view = FlatView(tensors, dtype=self.layout.state_dtype)
            self._remember_places(model)
        return self._view

    def _remember_places(self, model: nn.Module) -> None:
        slots = {
            clean_name(f"{prefix}.{key}" if prefix else key): (table, key)
            for prefix, module in model.named_modules(remove_duplicate=False)
            for table in (module._buffers, module._parameters)
            for key in table
        }
        places = [slots[name] for name in self.layout.names if name in slots]
        self._slots = [table for table, _ in places], [key for _, key in places]
        links = [
            (module._modules, key, child)
            for module in model.modules()
            for key, child in module._modules.items()
        ]
        parents, keys, children = zip(*links, strict=True) if links else ((), (), ())
        self._links = [*parents], [*keys], [*children]


def find_non_finite(view: FlatView) -> Refused:
    """Return how many weights are NaN or infinite, and where the first one is."""
    bad = view.count_non_finite()
    return Refused(bad, view.first_non_finite() if bad else None)


def diverged(refused: Refused, layout: Layout, snapshot: int) -> NonFiniteError:
    """Return the error for a snapshot that online CMD did not take in."""
    if refused.first is None:
        what = f"weights are so large that sums of their squares overflow at snapshot {snapshot}"
    else:
        name, inside = layout.locate(refused.first)
        what = (
            f"{refused.bad} of {layout.numel} weights are NaN or infinite at snapshot {snapshot}, "
            f"the first in {name!r} at position {inside}"
        )
    then = "the modes keep what they knew before"
    if refused.later:
        then += f", and the {refused.later} snapshots taken since are not in them"
    return NonFiniteError(f"{what}: the training diverged; {then}.")
