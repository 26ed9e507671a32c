"""Quantus' metrics of the maps that `cmd-plugin distinction explain` wrote, beside rivals' maps.

    pip install quantus
    cmd-plugin distinction explain photos --model three-eight --masks marked --out maps
    python -m benchmarks.distinction_quantus maps/maps.npz --model three-eight

Quantus is under the GPLv3, so the package neither imports it nor depends on it; this script is not
part of the package. It reads `maps.npz`, whose arrays have the names and shapes Quantus takes, and
asks the classifier of the folder. Pixel flipping (mean over its steps) is better when lower;
sparseness, and with masks rank accuracy, mass accuracy and the pointing game, when higher.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cmd_plugin.jobs.distinction.model import open_model
from cmd_plugin.jobs.distinction.options import RIVAL_NAMES
from cmd_plugin.jobs.distinction.rivals import rival_maps

_STEPS = 16  # of pixel flipping


def build_metrics(quantus: Any, pixels: int, *, marked: bool) -> dict[str, Any]:
    """Quantus' metrics by the name of their column.

    Args:
        quantus: The module.
        pixels: Of an image.
        marked: Whether there are masks.
    """
    quiet: dict[str, Any] = {"disable_warnings": True, "display_progressbar": False}
    step = next(n for n in range(max(1, pixels // _STEPS), 0, -1) if pixels % n == 0)
    metrics = {
        "pixel flipping": quantus.PixelFlipping(
            features_in_step=step, perturb_baseline="mean", return_auc_per_sample=False, **quiet
        ),
        "sparseness": quantus.Sparseness(**quiet),
        "complexity": quantus.Complexity(**quiet),
    }
    if marked:
        metrics |= {
            "rank accuracy": quantus.RelevanceRankAccuracy(**quiet),
            "mass accuracy": quantus.RelevanceMassAccuracy(**quiet),
            "pointing game": quantus.PointingGame(**quiet),
        }
    return metrics


def main(arguments: list[str] | None = None) -> None:
    """Print a row of means for each explanation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("maps", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    import quantus  # type: ignore[import-not-found, unused-ignore]  # see the docstring

    trained = open_model(given.model)
    with np.load(given.maps) as arrays:
        known = {name: arrays[name] for name in arrays.files}
    x, y, s = known["x_batch"], known["y_batch"], known.get("s_batch")
    pixels = trained.decomposer.pixels
    unit = pixels.to_unit(torch.from_numpy(x))
    rivals, left_out = rival_maps(
        trained.classify(trained.classifier), unit, torch.from_numpy(y), RIVAL_NAMES, given.seed
    )
    maps = {"distinction": known["a_batch"]} | {
        name: each.abs().mean(dim=1, keepdim=True).numpy() for name, each in rivals.items()
    }
    metrics = build_metrics(quantus, x.shape[2] * x.shape[3], marked=s is not None)
    table = Table(title=f"Quantus {quantus.__version__}, means over {len(x)} images")
    for column in ("explanation", *metrics):
        table.add_column(column)
    for name, each in maps.items():
        cells = []
        for metric in metrics.values():
            scores = metric(
                model=trained.classifier,
                x_batch=x,
                y_batch=y,
                a_batch=each,
                s_batch=s,
                softmax=True,
                device="cpu",
            )
            cells.append(f"{np.nanmean(np.asarray(scores, dtype=float)):.3f}")
        table.add_row(name, *cells)
    console = Console(width=120, highlight=False, markup=False)
    console.print(table)
    for name, reason in left_out.items():
        console.print(f"left out {name}: {reason}")


if __name__ == "__main__":
    main()
