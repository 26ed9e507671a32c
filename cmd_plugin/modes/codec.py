"""A decomposition as a codec for a training history: what it saves, and what it loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cmd_plugin.errors import InputError
from cmd_plugin.kernels import FlatView
from cmd_plugin.modes.decomposition import Decomposition
from cmd_plugin.modes.layout import named_weights
from cmd_plugin.networks.checkpoints import size_on_disk
from cmd_plugin.networks.weights import read_weights

__all__ = ["CodecReport", "LayerReport", "describe_layers", "measure_codec"]


@dataclass(frozen=True)
class CodecReport:
    """Size and error of a decomposition against the checkpoints it stands for.

    Attributes:
        checkpoint_bytes: Size of the checkpoint files on disk, with all else they hold (optimizer
            state and so on).
        weight_bytes: Bytes of the modelled weights in them: T N values in their dtypes.
        modes_bytes: Size of the decomposition's file.
        relative_error: sqrt(sum (w_hat - w)^2 / sum w^2) over all weights and snapshots, measured
            on the files.
    """

    checkpoint_bytes: int
    weight_bytes: int
    modes_bytes: int
    relative_error: float

    @property
    def compression_ratio(self) -> float:
        """Bytes of the weights per byte of the decomposition's file."""
        return self.weight_bytes / self.modes_bytes


def measure_codec(
    files: Sequence[Path],
    decomposition: Decomposition,
    saved: Path,
    progress: Callable[[int, int], None] | None = None,
) -> CodecReport:
    """Read the checkpoints again, one at a time, and compare each with its reconstruction.

    Args:
        files: The T checkpoints, in the order they were decomposed in.
        decomposition: Their decomposition.
        saved: The file :meth:`Decomposition.save` wrote.
        progress: Called with (snapshots compared, T) after each.

    Raises:
        InputError: If the number of files is not T.
    """
    if len(files) != decomposition.snapshots:
        raise InputError(
            f"{len(files)} files cannot be compared with {decomposition.snapshots} snapshots."
        )
    error = norm = 0.0
    weight_bytes = 0
    for t, file in enumerate(files):
        tensors = named_weights(read_weights(file, which="trained"))[0]
        weights = [tensors[name] for name in decomposition.layout.names]
        weight_bytes += sum(w.numel() * w.element_size() for w in weights)
        view = FlatView(weights)
        model = decomposition.reconstruct(t)
        scratch = view.scratch()
        for number, start, stop in view.blocks():
            values = view.read(number, scratch)
            norm += float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
            gap = model[start:stop] - values
            error += float(torch.linalg.vector_norm(gap, dtype=torch.float64)) ** 2
        if progress is not None:
            progress(t + 1, len(files))
    return CodecReport(
        checkpoint_bytes=sum(size_on_disk(file) for file in files),
        weight_bytes=weight_bytes,
        modes_bytes=saved.stat().st_size,
        relative_error=(error / norm) ** 0.5 if norm else 0.0,
    )


@dataclass(frozen=True)
class LayerReport:
    """What the modes make of one tensor.

    Attributes:
        name: Name of the tensor.
        weights: Number of its weights.
        explained_variance: Share of its movement that is explained; nan if it does not move.
        modes_used: Number of modes that hold at least one of its weights.
        main_mode: The mode that holds most of them.
        main_share: Share of its weights in that mode.
    """

    name: str
    weights: int
    explained_variance: float
    modes_used: int
    main_mode: int
    main_share: float


def describe_layers(decomposition: Decomposition) -> list[LayerReport]:
    """Return one report a tensor, in the layout's order."""
    explained = decomposition.explained_variance_by_layer()
    return [
        LayerReport(
            name=name,
            weights=size,
            explained_variance=explained[name],
            modes_used=int((share > 0).sum()),
            main_mode=int(share.argmax()),
            main_share=float(share.max()),
        )
        for name, size, share in zip(
            decomposition.layout.names,
            decomposition.layout.sizes,
            decomposition.mode_share_by_layer(),
            strict=True,
        )
    ]
