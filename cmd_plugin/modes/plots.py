"""Pictures of a decomposition.

Each function draws into the axes given, or makes a figure, and returns (figure, axes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.modes.decomposition import Decomposition
from cmd_plugin.runs.figures import PALETTE, SEQUENTIAL, axes_or_new, colour, legend_below

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["plot_correlation", "plot_explained", "plot_mode_share", "plot_profiles"]

_LEGEND = 10  # modes named in a legend
_ROWS = 24  # layers drawn by name


def plot_profiles(
    decomposition: Decomposition, ax: Axes | None = None
) -> tuple[Figure | SubFigure, Axes]:
    """Draw each mode's profile over the snapshots, centred and scaled to unit standard deviation.

    The legend gives the share of all weights in each mode, largest cluster first.
    """
    figure, ax = axes_or_new(ax)
    profiles = decomposition.profiles - decomposition.profiles.mean(dim=1, keepdim=True)
    profiles = profiles / profiles.norm(dim=1, keepdim=True) * decomposition.snapshots**0.5
    counts = torch.bincount(
        decomposition.assignment.long(), minlength=decomposition.number_of_modes
    )
    for mode, profile in enumerate(profiles):
        share = counts[mode] / decomposition.numel
        ax.plot(
            list(decomposition.epochs),
            profile.numpy(),
            color=colour(mode),
            linewidth=1.6,
            linestyle="-" if mode < len(PALETTE) else "--",
            label=f"mode {mode} ({share:.0%})" if mode < _LEGEND else None,
        )
    ax.axhline(0.0, color="0.8", linewidth=0.8, zorder=0)
    ax.locator_params(axis="x", integer=True)
    ax.set(xlabel="epoch", ylabel="standardised value", title="Mode profiles (share of weights)")
    if decomposition.number_of_modes:
        legend_below(ax, fontsize="x-small")
    return figure, ax


def plot_correlation(
    correlation: Tensor, labels: Tensor, ax: Axes | None = None
) -> tuple[Figure | SubFigure, Axes]:
    """Draw |correlation| [K, K] of the sampled weights, sorted by their mode [K]."""
    figure, ax = axes_or_new(ax)
    order = labels.argsort(stable=True)
    picture = correlation[order][:, order]
    image = ax.imshow(picture.numpy(), vmin=0.0, vmax=1.0, cmap=SEQUENTIAL, interpolation="nearest")
    for border in labels.bincount().cumsum(0)[:-1].tolist():
        ax.axhline(border - 0.5, color="white", linewidth=0.8)
        ax.axvline(border - 0.5, color="white", linewidth=0.8)
    figure.colorbar(image, ax=ax, label="|correlation|", shrink=0.85)
    ax.set(
        xlabel="sampled weight, by mode",
        ylabel="sampled weight, by mode",
        title=f"Clustered correlations ({len(labels)} sampled weights)",
    )
    return figure, ax


def _shown(decomposition: Decomposition) -> tuple[list[int], Sequence[str]]:
    """Return the layers to draw, the largest when there are many, in the network's order."""
    sizes = torch.tensor(decomposition.layout.sizes)
    largest = sizes.argsort(descending=True, stable=True)[:_ROWS].sort().values.tolist()
    return largest, [decomposition.layout.names[layer] for layer in largest]


def plot_mode_share(
    decomposition: Decomposition, ax: Axes | None = None
) -> tuple[Figure | SubFigure, Axes]:
    """Draw the share of each layer's weights in each mode, as stacked bars (24 largest layers)."""
    figure, ax = axes_or_new(ax)
    layers, names = _shown(decomposition)
    shares = decomposition.mode_share_by_layer()[layers].numpy()
    left = np.zeros(len(layers))
    for mode in range(shares.shape[1]):
        ax.barh(
            range(len(layers)),
            shares[:, mode],
            left=left,
            color=colour(mode),
            edgecolor="white",
            linewidth=0.3,
            label=f"{mode}" if mode < _LEGEND else None,
        )
        left += shares[:, mode]
    _name_layers(ax, names, len(decomposition.layout.names))
    ax.set(xlim=(0, 1), xlabel="share of weights", title="Modes in each layer")
    legend_below(ax, fontsize="x-small")
    return figure, ax


def plot_explained(
    decomposition: Decomposition, ax: Axes | None = None
) -> tuple[Figure | SubFigure, Axes]:
    """Draw the explained share of each layer's movement (the 24 largest layers)."""
    figure, ax = axes_or_new(ax)
    layers, names = _shown(decomposition)
    explained = decomposition.explained_variance_by_layer()
    shares = np.nan_to_num([explained[name] for name in names])  # NaN: it does not move
    ax.barh(range(len(layers)), shares, color=PALETTE[0])
    ax.axvline(decomposition.explained_variance(), color="0.3", linestyle="--", linewidth=1.0)
    _name_layers(ax, names, len(decomposition.layout.names))
    ax.set(
        xlim=(0, 1),
        xlabel="explained variance (dashed: all weights)",
        title="Movement explained by the modes",
    )
    return figure, ax


def _name_layers(ax: Axes, names: Sequence[str], total: int) -> None:
    # Both ends: layers differ at the front, the tensors of one layer at the back.
    short = [name if len(name) <= 32 else f"{name[:16]}…{name[-15:]}" for name in names]
    ax.set_yticks(range(len(names)), short, fontsize="x-small")
    ax.invert_yaxis()
    if len(names) < total:
        ax.set_ylabel(f"{len(names)} largest of {total} layers")
