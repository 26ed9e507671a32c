"""ResNet-18 on CIFAR-10, as in the paper: CMD beside averages of the same run's weights.

    python -m benchmarks.cmd_resnet18 --data-root DATA              # a GPU: 5 minutes a seed
    python -m benchmarks.cmd_resnet18 --data-root DATA --quick      # small, on any machine

SGD at a constant rate of .05 with momentum .9, batches of 128, crops and flips, 40 epochs. Every
method watches the same run and is evaluated on the same test images twice: with the statistics of
the test batch (the paper's setting; the images are mixed) and with BatchNorm's statistics
re-estimated for its weights on the same training batches. Rows are appended to
``results/cmd_resnet18_cuda.jsonl`` (``_cpu``) as runs finish; a seed that is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import resnet18

from benchmarks.machine import RESULTS, describe_machine
from benchmarks.small_problems import batches, score
from cmd_plugin.data import load_dataset
from cmd_plugin.modes import OnlineModes
from cmd_plugin.networks import kept_buffers, recalibrated

EMA_PER_STEP = (0.99, 0.999, 0.9995)
EMA_PER_EPOCH = 0.9
BLENDS = (0.25, 0.5, 0.75)
BLENDED = 0.99  # a window of 1 % of a run of 40 epochs is some 150 steps
SWA_SHARE = 0.25
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"cmd M={modes}": {"modes": modes} for modes in (2, 5, 10, 50)},
    "cmd M=10 mean": {"modes": 10, "profile": "mean"},
    "cmd M=10 shrink": {"modes": 10, "shrink": True},
    "cmd M=10 forget .9": {"modes": 10, "forgetting": 0.9},
}
_TEST_BATCH = 500
_RECALIBRATION_BATCHES = 20


def build(width: int) -> nn.Module:
    """Return ResNet-18 with the stem for small images: a 3x3 convolution, no pool."""
    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    if width != 64:  # for a look at the script on a machine without a GPU
        from torchvision.models.resnet import BasicBlock, ResNet

        model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
        model.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    return model


def load(
    root: str | None, device: torch.device, limit: int | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (images [N, 3, 32, 32], labels [N]) for training and testing, both mixed."""
    data = load_dataset("cifar10", data_root=root, train_limit=limit, seed=0)
    parts = []
    for part in (data.train, data.test):
        images, labels = part.__getitems__(range(len(part)))  # type: ignore[attr-defined,arg-type]
        # Files come sorted by class, and a batch of one class has no representative statistics.
        mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        mixed = mixed if limit is None else mixed[:limit]
        parts.append((images[mixed].to(device), labels[mixed].to(device)))
    return parts[0], parts[1]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to four pixels and mirror half of the images, on their device."""
    count, _, height, width = images.shape
    device = images.device
    wide = pad(images, (4, 4, 4, 4))
    draw = torch.randint(0, 9, (2, count, 1), generator=generator, device=device)
    mirrored = torch.randint(0, 2, (count, 1), generator=generator, device=device).bool()
    rows = draw[0] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(count, width)
    columns = draw[1] + torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(count, device=device).view(-1, 1, 1)
    # Indexed [B, H, W] by rows and columns, with the channels behind.
    return wide.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def both_scores(
    model: nn.Module, test: tuple[Tensor, Tensor], training: list[Tensor]
) -> dict[str, tuple[float, float]]:
    """Score a network with the statistics of the test batches, and with re-estimated ones."""
    with kept_buffers(list(model.modules())):
        model.train()
        found = {"batch": score(model, batches(test, _TEST_BATCH))}
    with recalibrated(model, training):
        model.eval()
        found["recalibrated"] = score(model, batches(test, _TEST_BATCH))
    return found


def train_once(
    seed: int, options: argparse.Namespace, device: torch.device, autocast: Any
) -> dict[str, Any]:
    """Train one network with every method watching, and evaluate them all after the last epoch."""
    train, test = load(options.data_root, device, options.limit)
    torch.manual_seed(seed)
    model = build(options.width).to(device)
    run = torch.compile(model) if device.type == "cuda" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def average(decay: float | None) -> AveragedModel:
        function = None if decay is None else get_ema_multi_avg_fn(decay)
        return AveragedModel(model, multi_avg_fn=function)

    averages = {f"ema step {decay}": average(decay) for decay in EMA_PER_STEP}
    per_epoch, swa = average(EMA_PER_EPOCH), average(None)
    observers = {
        name: OnlineModes(model, warmup=options.warmup, seed=seed, buffers="keep", **variant)
        for name, variant in VARIANTS.items()
    }
    order = torch.Generator().manual_seed(seed)
    jitter = torch.Generator(device).manual_seed(seed)
    taken, updates = 0.0, 0.0
    for epoch in range(options.epochs):
        started = time.perf_counter()
        model.train()
        for index in torch.randperm(len(train[1]), generator=order).to(device).split(128):
            images, labels = augment(train[0][index], jitter), train[1][index]
            optimizer.zero_grad(set_to_none=True)
            with autocast():
                loss = cross_entropy(run(images), labels)
            loss.backward()
            optimizer.step()
            for one in averages.values():
                one.update_parameters(model)
        _wait(device)
        taken += time.perf_counter() - started
        per_epoch.update_parameters(model)
        if epoch >= options.epochs * (1 - SWA_SHARE):
            swa.update_parameters(model)
        started = time.perf_counter()
        for observer in observers.values():
            observer.update()
        _wait(device)
        updates += time.perf_counter() - started
        print(f"seed {seed}, epoch {epoch + 1} of {options.epochs}", flush=True)

    training = [images for images, _ in batches(train, 128)][:_RECALIBRATION_BATCHES]
    watched: dict[str, nn.Module] = {"raw": model}
    watched |= {name: one.module for name, one in averages.items()}
    watched |= {f"ema epoch {EMA_PER_EPOCH}": per_epoch.module, "swa": swa.module}
    scores = {name: both_scores(network, test, training) for name, network in watched.items()}
    tail = averages[f"ema step {BLENDED}"].module
    for share in BLENDS:
        with blended(model, tail, share):
            scores[f"blend {share} with ema {BLENDED}"] = both_scores(model, test, training)
    for name, observer in observers.items():
        with observer.swap():
            scores[name] = both_scores(model, test, training)
    return {
        "seed": seed,
        "epochs": options.epochs,
        "warmup": options.warmup,
        "train_images": len(train[1]),
        "test_images": len(test[1]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": {n: {k: v[0] for k, v in s.items()} for n, s in scores.items()},
        "loss": {n: {k: v[1] for k, v in s.items()} for n, s in scores.items()},
        "explained_variance": {n: o.explained_variance() for n, o in observers.items()},
        "seconds_per_epoch": taken / options.epochs,
        "update_seconds_per_epoch_of_all_observers": updates / options.epochs,
    }


def blended(model: nn.Module, other: nn.Module, share: float) -> AbstractContextManager[None]:
    """Show (1 - share) of a model's weights plus share of another's inside the ``with`` block."""
    weights, targets = [*model.parameters()], [*other.parameters()]

    class Shown(nullcontext[None]):
        def __enter__(self) -> None:
            self.kept = [weight.detach().clone() for weight in weights]
            with torch.no_grad():
                torch._foreach_lerp_(weights, targets, share)

        def __exit__(self, *_: object) -> None:
            with torch.no_grad():
                torch._foreach_copy_(weights, self.kept)

    return Shown()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print mean, spread and paired differences to raw, for both kinds of statistics."""
    first = rows[0]
    table = Table(
        title=f"ResNet-18, CIFAR-10, {first['train_images']} images, {first['epochs']} epochs, "
        f"{len(rows)} seed(s): accuracy %, loss"
    )
    table.add_column("weights")
    for kind in ("batch", "recalibrated"):
        table.add_column(f"{kind} statistics", justify="right")
        table.add_column("against raw", justify="right")
    for name in first["accuracy"]:
        cells = []
        for kind in ("batch", "recalibrated"):
            accuracy = [100 * row["accuracy"][name][kind] for row in rows]
            raw = [100 * row["accuracy"]["raw"][kind] for row in rows]
            spread = f" +/- {stdev(accuracy):.2f}" if len(rows) > 1 else ""
            loss = mean(row["loss"][name][kind] for row in rows)
            cells += [f"{mean(accuracy):.2f}{spread}, {loss:.3f}"]
            cells += [f"{mean(a - b for a, b in zip(accuracy, raw, strict=True)):+.2f}"]
        table.add_row(name, *cells)
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    """Run the seeds that are missing from the result file, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", help="folder with CIFAR-10; default $CMD_PLUGIN_DATA")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--limit", type=int, help="images of each part; default all")
    parser.add_argument("--width", type=int, default=64, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small, nothing is written")
    parser.add_argument("--out", type=Path, help="result file")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.epochs, options.warmup = 1, 5, 3
        options.limit, options.width = options.limit or 512, 8
    torch.set_num_threads(options.threads)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast("cuda", torch.bfloat16) if gpu else nullcontext()

    path = options.out or RESULTS / f"cmd_resnet18_{device.type}.jsonl"
    rows = []
    if path.exists() and not options.quick:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    same = {"epochs": options.epochs, "warmup": options.warmup}
    rows = [row for row in rows if same.items() <= row.items()]
    for seed in sorted(set(range(options.seeds)) - {row["seed"] for row in rows}):
        row = {**train_once(seed, options, device, autocast), "machine": describe_machine()}
        rows.append(row)
        if not options.quick:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    show(rows, Console(width=120))


if __name__ == "__main__":
    main()
