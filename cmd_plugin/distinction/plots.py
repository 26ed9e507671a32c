"""Pictures of decompositions: image, agnostic, distinct, signed map and branches, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cmd_plugin.distinction.decomposition import Decomposition
from cmd_plugin.distinction.frozen import PixelRange
from cmd_plugin.errors import ShapeError
from cmd_plugin.runs.figures import figure_style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DIVERGING", "plot_decomposition"]

DIVERGING = "RdBu_r"
"""Colour map of signed values: white is nothing, red speaks for the class, blue against it."""

_CELL, _HEAD = 1.5, 0.55


def plot_decomposition(
    images: Tensor,
    split: Decomposition,
    pixels: PixelRange,
    classes: Sequence[str],
    names: Sequence[str] = (),
) -> Figure:
    """Draw one row for each image.

    The distinct part and the branches but the last are shown around mid-grey; all distinct parts
    and all signed maps of a figure have one scale, so that a weak part looks weak.

    Args:
        images: [B, C, H, W].
        split: Their decomposition.
        pixels: What black and white are.
        classes: Name of each class.
        names: Name of each image, for the left margin.

    Raises:
        ShapeError: If images and decomposition are not of the same number.
    """
    if len(images) != len(split.distinct) or (names and len(names) != len(images)):
        raise ShapeError(
            f"{len(images)} images, {len(split.distinct)} decompositions and {len(names)} names do "
            "not go together."
        )
    count, branches = split.branches.shape[:2]
    half = pixels.half_width.cpu()
    signed = (split.distinct.cpu() / half).mean(dim=1)
    largest = max(float(signed.abs().max()), 1e-6)
    strongest = max(float((split.distinct.cpu() / half).abs().max()), 1e-6)
    columns = 4 + branches - 1
    with figure_style():
        figure = new_figure(_CELL * columns + 0.6, (_CELL + _HEAD) * count)
        axes = figure.subplots(count, columns, squeeze=False)
        for row in range(count):
            parts = [_shown(part.cpu(), pixels) for part in (images[row], split.agnostic[row])]
            parts.append(_around_grey(split.distinct[row].cpu() / half / strongest))
            rest = [split.branches[row, i].cpu() / half for i in range(1, branches - 1)]
            parts += [None, *(_around_grey(part) for part in rest)]
            parts.append(_shown(split.branches[row, -1].cpu(), pixels))
            label = classes[int(split.target[row])]
            titles = _titles(split, row, label, branches)
            for place, (axis, part, title) in enumerate(zip(axes[row], parts, titles, strict=True)):
                if part is None:
                    axis.imshow(signed[row].numpy(), cmap=DIVERGING, vmin=-largest, vmax=largest)
                else:
                    axis.imshow(part, cmap="gray", vmin=0.0, vmax=1.0)
                axis.set_title(title, fontsize=7.5, fontweight="normal")
                axis.set_xticks([])
                axis.set_yticks([])
                if place == 0 and names:
                    axis.set_ylabel(str(names[row])[-24:], fontsize=7.5)
    return figure


def _titles(split: Decomposition, row: int, label: str, branches: int) -> list[str]:
    before, after = (
        "" if chance is None else f"\n{label} {100 * float(chance[row]):.0f} %"
        for chance in (split.before, split.after)
    )
    rest = [f"branch {number}" for number in range(2, branches + 1)]
    return [f"image{before}", f"agnostic{after}", f"distinct\nof {label}", "signed map", *rest]


def _shown(part: Tensor, pixels: PixelRange) -> Any:
    """An image in [0, 1] as [H, W] or [H, W, 3]."""
    low, high = pixels.low.cpu(), pixels.high.cpu()
    return _picture((part - low) / (high - low))


def _around_grey(part: Tensor) -> Any:
    return _picture(0.5 + 0.5 * part)


def _picture(part: Tensor) -> Any:
    plain = part.float().clamp(0.0, 1.0)
    return plain[0].numpy() if len(plain) == 1 else plain[:3].permute(1, 2, 0).numpy()
