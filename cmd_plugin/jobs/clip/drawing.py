"""The pictures of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cmd_plugin.data import ReadLimits
from cmd_plugin.data.decode import decode
from cmd_plugin.data.files import ImageFile, Unreadable
from cmd_plugin.jobs.clip.geometry import PairGeometry, SetGeometry
from cmd_plugin.jobs.clip.pictures import find_images
from cmd_plugin.runs.figures import GREY, PALETTE, figure_style, legend_below, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "draw_alpha",
    "draw_images",
    "draw_normality",
    "draw_normalization",
    "draw_norms",
    "draw_separability",
    "draw_spectrum",
    "images_of",
]

_COLOURS = {"image": PALETTE[0], "text": PALETTE[3], "embedding": PALETTE[0]}
_BINS = 60
_GRID = 6  # thumbnails a line
_SIDE = 224  # pixels of a thumbnail
_ALIKE = 1e-3  # variation of norms below which rows were normalised before
_TITLE = 26  # letters of a name


def _panels(count: int, width: float = 5.6, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    figure = new_figure(width * count, height)
    axes = figure.subplots(1, count, squeeze=False)[0]
    return figure, list(axes)


def draw_spectrum(sets: Sequence[SetGeometry]) -> Figure:
    """Draw the eigenvalues of every set, as they are and as they are divided by."""
    with figure_style():
        figure, (axes,) = _panels(1, 8.4)
        for found in sets:
            whitening, colour = found.whitening, _COLOURS[found.name]
            places = np.arange(1, whitening.dim + 1)
            shown = whitening.eigenvalues.clamp_min(float(whitening.eigenvalues[0]) * 1e-12)
            axes.semilogy(places, shown, color=colour, label=f"{found.name}: sample")
            axes.semilogy(
                places[: len(whitening.variances)],
                whitening.variances,
                color=colour,
                linestyle="--",
                label=f"{found.name}: used",
            )
        axes.set(xlabel="direction, by variance", ylabel="variance", title="Spectrum")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def draw_norms(sets: Sequence[SetGeometry]) -> Figure:
    """Draw whitened norms, in the fit and left out, beside the law of a true Gaussian."""
    from scipy.stats import chi

    with figure_style():
        figure, panels = _panels(len(sets), 8.4 if len(sets) == 1 else 5.6)
        for found, axes in zip(sets, panels, strict=True):
            colour = _COLOURS[found.name]
            series: list[tuple[str, Any, Any]] = [
                ("as rows of the fit", found.inside["norm"], "step")
            ]
            if found.outside is not None:
                series.append(("as if left out", found.outside["norm"], "stepfilled"))
            everything = torch.cat([values for _, values, _ in series])
            low = min(float(everything.min()), found.whitening.vectors.shape[1] ** 0.5 - 4)
            high = float(everything.quantile(0.995)) + 1
            highest = 0.0
            for label, values, kind in series:
                heights, _, _ = axes.hist(
                    values.clamp_max(high).numpy(),
                    bins=np.linspace(low, high, _BINS).tolist(),
                    density=True,
                    histtype=kind,
                    color=colour,
                    alpha=0.45 if kind == "stepfilled" else 1.0,
                    label=label,
                )
                highest = max(highest, float(np.max(heights)))
            grid = np.linspace(low, high, 600)
            law = chi.pdf(grid, found.whitening.vectors.shape[1])
            axes.plot(grid, law, color=GREY, label="a true Gaussian (chi)")
            axes.set_ylim(0, 1.4 * highest)  # that law is far narrower, and leaves the picture
            axes.set(xlabel="||y||", ylabel="density", title=f"Whitened norms: {found.name}s")
            legend_below(axes, columns=3)
    return figure


def draw_normality(sets: Sequence[SetGeometry]) -> Figure:
    """Draw Anderson-Darling statistics of whitened features, whole and in groups."""
    with figure_style():
        figure, panels = _panels(len(sets), 8.4 if len(sets) == 1 else 5.6)
        for found, axes in zip(sets, panels, strict=True):
            for number, test in enumerate(found.normality):
                values = test.anderson.sort().values
                share = torch.linspace(0, 100, len(values))
                label = (
                    f"all {test.group_size} rows"
                    if test.groups == 1
                    else (f"mean of {test.groups} groups of {test.group_size}")
                )
                axes.plot(values, share, color=PALETTE[number], label=label)
            axes.axvline(0.752, color=GREY, linestyle="--", label="5 % level (0.752)")
            axes.axvline(0.387, color=GREY, linestyle=":", label="mean of normal data (0.387)")
            axes.set_xlim(0, 2.5)
            axes.set(
                xlabel="Anderson-Darling statistic",
                ylabel="features below (%)",
                title=f"Normality of whitened features: {found.name}s",
            )
            axes.grid(alpha=0.3)
            legend_below(axes, columns=2)
    return figure


def draw_normalization(sets: Sequence[SetGeometry]) -> Figure | None:
    """Draw scores of rows as they are against those of their directions; None if all are alike."""
    shown = [found for found in sets if found.effect and found.effect.norm_variation > _ALIKE]
    if not shown:
        return None
    with figure_style():
        figure, panels = _panels(len(shown), 8.4 if len(shown) == 1 else 5.6)
        for found, axes in zip(shown, panels, strict=True):
            effect = found.effect
            assert effect is not None
            axes.scatter(
                effect.raw, effect.l2, s=6, color=_COLOURS[found.name], alpha=0.5, linewidths=0
            )
            axes.set(
                xlabel="||y||² of raw rows, left out",
                ylabel="||y||² of their directions, left out",
                title=f"{found.name}s: rank correlation {effect.rank_correlation:.3f}",
            )
            axes.grid(alpha=0.3)
    return figure


def draw_separability(pairs: PairGeometry) -> Figure:
    """Draw how far apart the best features keep images and texts."""
    with figure_style():
        figure, (axes,) = _panels(1, 8.4)
        places = range(len(pairs.features))
        values = [min(value, 1e6) for value in pairs.separability]
        bars = axes.bar(places, values, color=PALETTE[0])
        for bar, accuracy in zip(bars, pairs.accuracy, strict=True):
            place = bar.get_x() + bar.get_width() / 2
            axes.annotate(
                f"{100 * accuracy:.0f} %",
                (place, bar.get_height()),
                ha="center",
                va="bottom",
                fontsize=8,
            )
        axes.set_xticks(places, map(str, pairs.features))
        axes.set(
            xlabel="feature, from 0 (above: balanced accuracy of one threshold on it)",
            ylabel="|difference of means| / spread",
            title="What separates images from texts",
        )
        axes.grid(alpha=0.3, axis="y")
    return figure


def draw_alpha(pairs: PairGeometry) -> Figure:
    """Draw loss and divergence over the offset of the modalities."""
    curve = pairs.curve
    with figure_style():
        figure, (left, right) = _panels(2, 5.6)
        left.plot(curve.alphas, curve.loss, marker="o", ms=3, color=PALETTE[0])
        left.axvline(curve.best, color=GREY, linestyle="--", label=f"least at {curve.best:g}")
        left.set(ylabel="NT-Xent (nats)", title=f"Loss at temperature {curve.temperature:g}")
        left.legend(frameon=False)
        right.semilogy(curve.alphas, curve.divergence, marker="o", ms=3, color=PALETTE[3])
        right.set(ylabel=f"KL of conformities ({curve.kl}, nats)", title="Images against texts")
        moved = {"both": "both modalities", "image": "images", "text": "texts"}[curve.shift]
        for axes in (left, right):
            axes.set_xlabel(f"alpha: {moved} moved by -alpha * mean")
            axes.grid(alpha=0.3)
    return figure


def images_of(found: SetGeometry) -> Callable[[int], Any] | None:
    """A function that gives the picture of a row; None if there are none to be found."""
    rows = found.rows
    source = (rows.about or {}).get("source")
    if rows.modality != "image" or rows.names is None or source is None:
        return None
    if not Path(source).exists():
        return None
    files = {file.label: file for file in find_images(Path(source)).files}

    def image(row: int) -> Any:
        file = files.get(rows.name_of(row))
        return None if file is None else _thumbnail(file)

    return image


def _thumbnail(file: ImageFile) -> Any:
    from PIL import Image, ImageOps

    try:
        pixels = decode(file, ReadLimits())
    except Unreadable:
        return None  # it went away or was damaged since it was encoded
    flat = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    picture = Image.fromarray(np.ascontiguousarray(flat)).convert("RGB")
    return np.asarray(ImageOps.pad(picture, (_SIDE, _SIDE), color="white"))


def draw_images(
    found: SetGeometry, image: Callable[[int], Any], rows: Sequence[int], title: str
) -> Figure:
    """Draw the pictures of rows with their names and log-likelihoods."""
    lines = -(-len(rows) // _GRID)
    with figure_style():
        figure = new_figure(1.9 * _GRID, 2.35 * lines + 0.5)
        for axes in figure.subplots(lines, _GRID, squeeze=False).flat:
            axes.axis("off")
        for axes, row in zip(figure.axes, rows, strict=False):
            pixels = image(row)
            if pixels is not None:
                axes.imshow(pixels)
            name = found.rows.name_of(row)
            name = name if len(name) <= _TITLE else f"…{name[1 - _TITLE :]}"
            axes.set_title(f"{name}\n{found.scores[row]:.0f}", fontsize=7, fontweight="normal")
        figure.suptitle(title)
    return figure
