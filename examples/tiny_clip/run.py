"""Train a small image-text model, watch its geometry, and ask what the papers say of it.

    python examples/tiny_clip/run.py                       # scikit-learn's digits: no download
    python examples/tiny_clip/run.py --data mnist --seeds 0 1 2 --out results_mnist.json

MNIST and CIFAR-10 are found through CMD_PLUGIN_DATA or --data-root.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from measures import measure_geometry, measure_images, measure_rarity
from model import Classifier, TinyClip
from pictures import load_pictures
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cmd_plugin.callbacks import EmbeddingGeometryMonitor
from cmd_plugin.machine import describe_machine

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
BATCH = 256


def run(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train both networks with one seed; return everything measured."""
    train, held_out, captions = load_pictures(
        options.data, options.data_root, options.pairs, options.held_out, seed
    )
    pl.seed_everything(seed, verbose=False)
    model = TinyClip(len(captions.numbers))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    loader = DataLoader(
        TensorDataset(train.images, train.tokens, train.concepts),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )
    seen = DataLoader(TensorDataset(held_out.images, held_out.tokens), batch_size=BATCH)
    began = time.monotonic()
    monitor = EmbeddingGeometryMonitor(pairs=1024, reference_batches=8)
    pl.Trainer(max_epochs=options.epochs, callbacks=[monitor], **QUIET).fit(model, loader, seen)
    trained = time.monotonic() - began

    control = Classifier(len(captions.classes))
    control.image.load_state_dict(
        {name[6:]: value for name, value in start.items() if name.startswith("image.")}
    )
    loader.generator.manual_seed(seed)  # type: ignore[union-attr]
    pl.Trainer(max_epochs=options.epochs, **QUIET).fit(control, loader)

    untrained = TinyClip(len(captions.numbers))
    untrained.load_state_dict(start)
    encoders: dict[str, nn.Module] = {
        "contrastive": model.image,
        "cross entropy": control.image,
        "untrained": untrained.image,
    }
    return {
        "seed": seed,
        "training_seconds": trained,
        "history": model.history,
        "geometry": measure_geometry(model, held_out, captions),
        "images": {
            name: measure_images(encoder, train, held_out) for name, encoder in encoders.items()
        },
        "rarity": {
            "contrastive": measure_rarity(model, held_out, captions),
            "untrained": measure_rarity(untrained, held_out, captions),
        },
    }


def summary(runs: list[Any]) -> Any:
    """Mean over the seeds of every number, and smallest and largest, in the same places."""
    if isinstance(runs[0], dict):
        return {name: summary([r[name] for r in runs]) for name in runs[0] if name != "seed"}
    if isinstance(runs[0], list):
        return [summary([r[place] for r in runs]) for place in range(len(runs[0]))]
    return {"mean": statistics.fmean(runs), "low": min(runs), "high": max(runs)}


def show(name: str, value: Any, depth: int = 0) -> None:
    """Print a summary as an indented list."""
    if isinstance(value, list):
        value = {"first epoch": value[0], "last epoch": value[-1]}
    if isinstance(value, dict) and set(value) == {"mean", "low", "high"}:
        print(
            f"{'  ' * depth}{name}: {value['mean']:.4g}  [{value['low']:.4g}, {value['high']:.4g}]"
        )
        return
    print(f"{'  ' * depth}{name}")
    for inner, entry in value.items():
        show(inner, entry, depth + 1)


def rounded(value: Any) -> Any:
    """Numbers to five digits, so that the file is read rather than scrolled."""
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    """Train, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("digits", "mnist", "cifar10"), default="digits")
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--pairs", type=int, default=10000)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")  # advice for larger runs
    runs = []
    for seed in options.seeds:
        runs.append(run(options, seed))
        print(f"seed {seed}: trained in {runs[-1]['training_seconds']:.0f} s", flush=True)
    found = summary(runs)
    show(f"{options.data}, {len(runs)} seed(s): mean [lowest, highest]", found)
    if options.out is not None:
        kept = ("data", "pairs", "held_out", "epochs", "seeds", "threads")
        result = {
            "options": {name: getattr(options, name) for name in kept},
            "summary": found,
            "runs": runs,
            "machine": describe_machine(),
        }
        options.out.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
