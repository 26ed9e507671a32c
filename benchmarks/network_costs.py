"""What does following a whole network cost, beside an EMA of its weights?

    python -m benchmarks.network_costs            # ResNet-18, ResNet-50, ViT-B/16, and 400 small
                                                  # tensors; on a CPU on one thread and on two
    python -m benchmarks.network_costs --quick    # ResNet-18, few repeats, nothing is written

For each network: one online update, one ``torch._foreach_lerp_`` over the same tensors taken in
turn with it, showing the modelled weights and putting the raw ones back, the explained variance,
and the post-hoc decomposition of 21 snapshots. On a GPU also how often an update waits for the
device, counted by torch. Results: ``results/networks_cpu.jsonl`` or ``networks_cuda.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.machine import RESULTS, describe_machine
from cmd_plugin.kernels import last_backend
from cmd_plugin.modes import OnlineModes, decompose

NETWORKS = ("resnet18", "resnet50", "vit_b_16", "400 small tensors")
SNAPSHOTS, MODES = 21, 10
_DECAY = 0.01


def clock(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds a call takes until the device is through with it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def count_waits(work: Callable[[], Any], device: torch.device) -> int | None:
    """Return how often a call waits for the device; None where there is none."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(one.message) for one in said)


def build(name: str) -> nn.Module:
    """Return a network of torchvision with random weights, or parameters alone."""
    import torchvision

    from benchmarks.cmd_speed import small_tensors

    torch.manual_seed(0)
    model: nn.Module
    model = small_tensors() if name == NETWORKS[-1] else getattr(torchvision.models, name)()
    return model


def measure(name: str, device: torch.device, repeats: int, threads: int) -> dict[str, Any]:
    """Measure one network whose weights move a little every step, on so many CPU threads."""
    torch.set_num_threads(threads)
    model = build(name).to(device)
    parameters = [p.detach() for p in model.parameters()]
    average = [p.clone() for p in parameters]
    modes = OnlineModes(model, modes=MODES, warmup=2, buffers="keep")

    def train() -> None:
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter), alpha=0.01)

    for _ in range(4):  # two snapshots, the fit, and one update that is not counted
        train()
        modes.update()
    update, ema = [], []
    for _ in range(repeats):
        train()
        ema.append(clock(lambda: torch._foreach_lerp_(average, parameters, _DECAY), device))
        update.append(clock(modes.update, device))
    train()
    waits = count_waits(modes.update, device)

    def show() -> None:
        with modes.swap():
            pass

    swap = [clock(show, device) for _ in range(repeats)]
    explained = [clock(modes.explained_variance, device) for _ in range(repeats)]
    walk = torch.randn(SNAPSHOTS, modes.numel, device=device)
    for before, row in pairwise(walk):
        row += before
    work = [clock(lambda: decompose(walk, modes=MODES), device) for _ in range(4)][1:]
    return {
        "network": name,
        "device": device.type,
        "threads": threads,
        "backend": last_backend("update_affine"),
        "weights": modes.numel,
        "tensors": len(modes.layout.names),
        "update_seconds": statistics.median(update),
        "foreach_lerp_seconds": statistics.median(ema),
        "ratio": statistics.median(a / b for a, b in zip(update, ema, strict=True)),
        "ratio_of_fastest": min(update) / min(ema),
        "waits_of_an_update": waits,
        "swap_seconds": statistics.median(swap),
        "explained_variance_seconds": statistics.median(explained),
        "decompose_seconds": statistics.median(work),
        "snapshots": SNAPSHOTS,
    }


def show_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table, next to what was asked for."""
    table = Table(title=f"Following a network, {rows[0]['device']}, milliseconds (aim)")
    first = ("network", "tensors", "threads", "update", "EMA")
    for column in (*first, "fastest / fastest (1.5 GPU, 2 CPU)", "waits (0)"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for column in ("swap", "explained variance", f"decompose, T={SNAPSHOTS}"):
        table.add_column(column, justify="right")
    for row in rows:
        seconds = ("swap_seconds", "explained_variance_seconds", "decompose_seconds")
        table.add_row(
            row["network"],
            str(row["tensors"]),
            str(row["threads"]),
            f"{1e3 * row['update_seconds']:.3f}",
            f"{1e3 * row['foreach_lerp_seconds']:.3f}",
            f"{row['ratio_of_fastest']:.2f}",
            "-" if row["waits_of_an_update"] is None else str(row["waits_of_an_update"]),
            *(f"{1e3 * row[name]:.2f}" for name in seconds),
        )
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the result file (not with ``--quick``)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="1 2 on a CPU")
    parser.add_argument("--network", action="append", choices=NETWORKS, default=[])
    parser.add_argument("--quick", action="store_true", help="one network, nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = options.threads or ([2] if device.type == "cuda" else [1, 2])
    names = options.network or NETWORKS[: 1 if options.quick else None]
    repeats = 5 if options.quick else 30
    rows = [measure(name, device, repeats, count) for name in names for count in threads]
    show_rows(rows, Console(width=120))
    if not options.quick:
        machine = describe_machine()
        options.out.mkdir(parents=True, exist_ok=True)
        file = options.out / f"networks_{device.type}.jsonl"
        file.write_text("".join(json.dumps({**machine, **row}) + "\n" for row in rows))


if __name__ == "__main__":
    main()
