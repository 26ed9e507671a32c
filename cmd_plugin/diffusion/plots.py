"""Pictures of what this room finds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cmd_plugin.runs.figures import GREY, colour, figure_style, legend_below, new_figure
from cmd_plugin.runs.separation import auroc, roc_curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_contact_sheet", "plot_doses", "plot_roc"]


def plot_contact_sheet(
    rows: Sequence[tuple[str, Tensor, Sequence[str]]], title: str = ""
) -> Figure:
    """Draw rows of small images.

    Args:
        rows: (name, images [N, C, H, W] or [N, d] in [-1, 1], a caption for each) of each row.
        title: Above them.
    """
    wide = max(len(images) for _, images, _ in rows)
    with figure_style():
        figure = new_figure(0.4 + 1.1 * max(wide, 3), 0.5 + 1.45 * len(rows))
        grid: Any = figure.subplots(len(rows), wide, squeeze=False)
        for line, (name, images, captions) in zip(grid, rows, strict=True):
            for place, axes in enumerate(line):
                axes.set_axis_off()
                if place < len(images):
                    axes.imshow(_picture(images[place]), cmap="gray", vmin=0.0, vmax=1.0)
                    axes.set_title(captions[place], fontsize=8, fontweight="normal")
            line[0].text(
                -0.15, 0.5, name, rotation=90, ha="right", va="center",
                transform=line[0].transAxes, fontsize=9,
            )  # fmt: skip
        if title:
            figure.suptitle(title)
    return figure


def _picture(image: Tensor) -> Any:
    """[H, W] or [H, W, 3] in [0, 1]; of other shapes what can be shown of them."""
    if image.ndim == 1:
        side = math.isqrt(len(image))
        image = image.reshape(1, side, side) if side * side == len(image) else image[None, None]
    if image.shape[0] not in (1, 3):  # latents
        image = image.mean(0, keepdim=True)
    shown = (image.detach().float().cpu() / 2 + 0.5).clamp(0, 1)
    return shown[0].numpy() if len(shown) == 1 else torch.movedim(shown, 0, 2).numpy()


def plot_doses(history: Sequence[dict[str, Any]], statistic: str, limit: float) -> Figure:
    """Draw how well members of each dose are told from held-out images, over the training.

    Args:
        history: Of a ``MemorizationMonitor``.
        statistic: Which one.
        limit: AUROC from which members count as separate.
    """
    with figure_style():
        figure = new_figure(6.4, 4.4)
        axes = figure.subplots()
        steps = [look["step"] for look in history]
        for number, dose in enumerate(history[-1]["doses"][statistic]):
            values = [look["doses"][statistic][dose][0] for look in history]
            axes.plot(steps, values, marker="o", ms=3, color=colour(number), label=f"x{dose}")
        axes.axhline(limit, color=GREY, lw=0.8, ls=":")
        axes.axhline(0.5, color=GREY, lw=0.8)
        axes.set(xlabel="optimizer step", ylabel=f"AUROC of {statistic} against held-out images")
        axes.set_ylim(0.3, 1.02)
        legend_below(axes)
    return figure


def plot_roc(panels: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> Figure:
    """Draw true against false positive rates, which a limit on a statistic trades.

    Args:
        panels: Title -> statistic -> its values [A] of the group that should score lower and [B] of
            the other.
    """
    with figure_style():
        figure = new_figure(3.6 * len(panels) + 0.4, 4.4)
        for axes, (title, curves) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            axes.plot([0, 1], [0, 1], color=GREY, lw=0.8)
            for number, (name, (low, high)) in enumerate(curves.items()):
                false, true = roc_curve(low, high)
                label = f"{name} {auroc(low, high):.3f}"
                axes.plot(false.numpy(), true.numpy(), color=colour(number), lw=1.4, label=label)
            axes.set_title(title, fontsize=9)
            axes.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
            legend_below(axes, columns=2, fontsize=8)
    return figure
