"""What real CLIP embeddings look like to `cmd-plugin clip`: optimism, shrinkage, drift, the gap.

    CMD_PLUGIN_DATA=DATA python -m benchmarks.clip_geometry        # about ten minutes on one core

DATA holds ``clip_embeddings/``: raw ViT-B/16 embeddings of 1000 photos (one an ImageNet class) and
of 159 COCO photos, raw ViT-B/32 embeddings of the class names of LVIS, Objects365 and Open Images,
and 500 pairs of COCO images and captions from ViT-B/16, normalised by who published them. The jobs
run as from the command line. Results: ``results/clip_geometry.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.machine import RESULTS, describe_machine
from cmd_plugin.clip import Whitening, mmd_test
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.clip import align, compare, fit, report, score
from cmd_plugin.jobs.clip.options import (
    AlignOptions,
    CompareOptions,
    FitOptions,
    ReportOptions,
    ScoreOptions,
)

PHOTOS, COCO = "image_b16_photos1000", "image_b16_coco159"
TEXTS = ("text_b32_lvis1203", "text_b32_oid500", "text_b32_o365")
PAIRS = "pairs_b16_coco500_unit"
SHRINKAGES = ("none", "1e-4", "0.01", "0.1", "oas", "ledoit-wolf")
HELD_OUT = 200


class Data:
    """The files, and a folder for what is made of them."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root, self.scratch = root, scratch
        self._made = 0

    def path(self, name: str) -> Path:
        """Where a set of the data lies."""
        return self.root / f"{name}.npy"

    def rows(self, name: str) -> np.ndarray[Any, Any]:
        """A set of the data, float32."""
        found: np.ndarray[Any, Any] = np.load(self.path(name)).astype(np.float32)
        return found

    def save(self, rows: np.ndarray[Any, Any]) -> Path:
        """Write rows to a new file."""
        self._made += 1
        path = self.scratch / f"rows{self._made}.npy"
        np.save(path, rows)
        return path

    def folder(self) -> Path:
        """Return a new folder for a job."""
        self._made += 1
        return self.scratch / f"out{self._made}"


def optimism(data: Data) -> list[dict[str, Any]]:
    """Of 1000 photos, 800 fitted: squared norms inside, left out, held out; by shrinkage."""
    order = np.random.default_rng(0).permutation(1000)
    rows = data.rows(PHOTOS)[order]
    inside, outside = data.save(rows[HELD_OUT:]), rows[:HELD_OUT]
    found = []
    for shrinkage in SHRINKAGES:
        folder = data.folder()
        try:
            metrics = fit.run(FitOptions(input=inside, shrinkage=shrinkage), folder).metrics
        except InputError as error:
            found.append({"shrinkage": shrinkage, "refused": str(error)})
            continue
        whitening = Whitening.load(folder / "whitening.safetensors")
        new = torch.from_numpy(outside).double()
        scored = score.run(ScoreOptions(input=data.save(outside), whitening=folder)).metrics
        found.append(
            {
                "shrinkage": shrinkage,
                "intensity": metrics["intensity"],
                "floored": metrics["floored"],
                "in_sample": metrics["in_sample"],
                "leave_one_out": metrics["leave_one_out"],
                "held_out": float(whitening.squared_norm(new).mean()),
                "held_out_nll_per_dim": -float(whitening.log_density(new).mean()) / whitening.dim,
                "held_out_below_5_percent": scored["below_5_percent"],
            }
        )
    return found


def shapes(data: Data) -> dict[str, Any]:
    """The report's numbers of every raw set, without what is long."""
    found = {}
    for name in (PHOTOS, COCO, *TEXTS):
        modality = name.partition("_")[0]
        options = ReportOptions(input=data.path(name), modality=modality, shown=0)
        found[name] = report.run(options).metrics[modality]
    return found


def drift(data: Data, splits: int) -> dict[str, Any]:
    """Other photos against the 1000, text sets against one another, and splits of one set."""
    sides = [(PHOTOS, COCO), (TEXTS[0], TEXTS[1]), (TEXTS[0], TEXTS[2]), (TEXTS[1], TEXTS[2])]
    found: dict[str, Any] = {"pairs": []}
    for one, other in sides:
        options = CompareOptions(reference=data.path(one), sample=data.path(other))
        metrics = compare.run(options).metrics
        kept = {name: metrics[name] for name in ("p_value", "mmd", "auc", "alarm", "mean_norm")}
        found["pairs"].append({"reference": one, "sample": other, **kept})
    for name in (PHOTOS, TEXTS[0]):
        rows = torch.from_numpy(data.rows(name))
        alarms = 0
        for seed in range(splits):
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
            halves = order.tensor_split(2)
            test = mmd_test(*(rows[half] for half in halves), permutations=199, seed=seed)
            alarms += test.p_value <= 0.05
        found[f"null_{name}"] = {"splits": splits, "alarms": alarms / splits}
    return found


def detection(data: Data) -> list[dict[str, Any]]:
    """AUROC of COCO photos against held-out photos, at three scales of the same features."""
    order = np.random.default_rng(0).permutation(1000)
    rows, other = data.rows(PHOTOS)[order], data.rows(COCO)
    inside, outside = rows[HELD_OUT:], rows[:HELD_OUT]
    labels = np.r_[np.zeros(len(outside)), np.ones(len(other))]
    found = []
    for factor in (1e-3, 1.0, 1e3):
        parts = [torch.from_numpy(np.float32(factor) * x) for x in (inside, outside, other)]
        row: dict[str, Any] = {"factor": factor}
        for normalize in ("raw", "l2"):
            whitening = Whitening.fit(parts[0], normalize=normalize)  # type: ignore[arg-type]
            scores = torch.cat([whitening.squared_norm(x) for x in parts[1:]])
            row[normalize] = float(roc_auc_score(labels, scores))
        row["pytorch_ood"] = _pytorch_ood(parts, labels)
        found.append(row)
    return found


def _pytorch_ood(parts: list[Tensor], labels: np.ndarray[Any, Any]) -> float | None:
    """The same with pytorch-ood's Mahalanobis of one class; None where it is not installed."""
    try:
        from pytorch_ood.detector import Mahalanobis
    except ImportError:
        return None
    detector = Mahalanobis(None)
    detector.fit_features(parts[0], torch.zeros(len(parts[0]), dtype=torch.int64))
    scores = torch.cat([detector.predict_features(x) for x in parts[1:]])
    return float(roc_auc_score(labels, scores))


def search(data: Data) -> dict[str, Any]:
    """The gap of the pairs, and mixed search after alignment, by shrinkage of the whitening."""
    pairs = report.run(ReportOptions(input=data.path(PAIRS), shown=0)).metrics
    found: dict[str, Any] = {"geometry": pairs, "alignment": []}
    for shrinkage in ("oas", "ledoit-wolf", "0.3", "0.5", "0.7", "0.9"):
        retrievals = [
            align.run(AlignOptions(input=data.path(PAIRS), shrinkage=shrinkage, seed=seed)).metrics
            for seed in range(5)
        ]
        rows = [run["retrieval"] for run in retrievals]
        names = ("raw", "centred", "whitened") if shrinkage == "oas" else ("whitened",)
        for name in names:
            found["alignment"].append(
                {
                    "way": name if name != "whitened" else f"whitened, {shrinkage}",
                    **{
                        f"{direction} {kind} R@{k}": float(
                            np.mean([row[name][direction][kind][str(k)] for row in rows])
                        )
                        for direction in ("text_to_image", "image_to_text")
                        for kind in ("mixed", "alone")
                        for k in (1, 10)
                    },
                }
            )
    return found


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table of equal dictionaries."""
    table = Table(title=title, title_justify="left")
    columns = list(max(rows, key=len))
    for name in columns:
        table.add_column(name.replace("_", " "))
    for row in rows:
        cells = (row.get(name, "-") for name in columns)
        table.add_row(*(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))
    Console(width=160).print(table)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--splits", type=int, default=200, help="splits of one set, for false alarms"
    )
    arguments = parser.parse_args()
    root = Path(os.environ.get("CMD_PLUGIN_DATA", "."), "clip_embeddings")
    if not root.is_dir():
        parser.error("CMD_PLUGIN_DATA names no folder with clip_embeddings/")
    torch.set_num_threads(1)
    for known in (".* rows are less than 10", "the features look L2-normalised"):
        warnings.filterwarnings("ignore", known)  # that rows are few is the subject here
    with tempfile.TemporaryDirectory() as scratch:
        data = Data(root, Path(scratch))
        found = {
            "optimism": optimism(data),
            "detection": detection(data),
            "shapes": shapes(data),
            "search": search(data),
            "drift": drift(data, arguments.splits),
        }
    show("800 photos fitted, 200 held out", found["optimism"])
    show("AUROC, COCO photos against held-out photos", found["detection"])
    flat = ("rows", "mean_norm", "radius", "thickness", "offset", "anisotropy", "intensity")
    show(
        "Shapes",
        [{"set": name, **{key: one[key] for key in flat}} for name, one in found["shapes"].items()],
    )
    show("Alignment, five splits", found["search"]["alignment"])
    show(
        "Drift",
        [{k: v for k, v in row.items() if k != "mean_norm"} for row in found["drift"]["pairs"]],
    )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "clip_geometry.json"
    path.write_text(json.dumps({"machine": describe_machine(), **found}, indent=2) + "\n")
    Console().print({k: v for k, v in found["drift"].items() if k != "pairs"})
    Console().print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    main()
