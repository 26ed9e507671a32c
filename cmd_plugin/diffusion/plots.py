"""Pictures of what this room finds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cmd_plugin.runs.figures import figure_style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_contact_sheet"]


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
