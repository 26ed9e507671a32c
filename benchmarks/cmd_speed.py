"""What does CMD cost? Fit against NumPy, update against an EMA update, memory against the data.

    python -m benchmarks.cmd_speed            # N = 1e6, K = 1000 and 10000; about two minutes
    python -m benchmarks.cmd_speed --quick    # N = 1e5, K = 1000

Every ratio is between two things measured in this run, in turn, on this machine. CPU time is that
of the process, over all threads.
Each part runs in its own process, so that one part's memory is not another's. Results:
``results/cmd_speed.json``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.machine import RESULTS, describe_machine
from cmd_plugin.kernels import assign_and_fit
from cmd_plugin.modes import OnlineModes, decompose

SNAPSHOTS, MODES = 21, 10
_DECAY = 0.01


def random_walks(snapshots: int, numel: int) -> Tensor:
    """Return [T, N] float32 random walks, made in place so that nothing larger was ever held."""
    torch.manual_seed(0)
    walk = torch.empty(snapshots, numel)
    for t in range(snapshots):
        walk[t].normal_()
        if t:
            walk[t] += walk[t - 1]
    return walk


def numpy_transcription(rows: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, ...]:
    """Assign and fit in float64 as the formulas are written: one correlation, one inverse a mode.

    Args:
        rows: [N, T] float32.
        references: [M, T] float64.
    """
    rows = rows.astype(np.float64)
    best, mode = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.uint8)
    for m, reference in enumerate(references):
        centred = rows - rows.mean(axis=1, keepdims=True)
        step = reference - reference.mean()
        norms = np.sqrt((centred**2).sum(axis=1) * (step**2).sum())
        rho = np.abs(np.nan_to_num((centred * step).sum(axis=1) / norms))
        mode[rho > best] = m
        best = np.maximum(rho, best)
    scale, offset = np.empty(len(rows)), np.empty(len(rows))
    for m, reference in enumerate(references):
        design = np.stack([reference, np.ones_like(reference)])
        mine = mode == m
        solution = rows[mine] @ design.T @ np.linalg.pinv(design @ design.T)
        scale[mine], offset[mine] = solution.T
    return mode, scale, offset


def numpy_one_product(rows: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same by what a careful NumPy user would write: centre once, one product for all modes."""
    rows = rows.astype(np.float64)
    mean = rows.mean(axis=1)
    centred = rows - mean[:, None]
    steps = references - references.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(steps, axis=1)
    products = centred @ (steps / norms[:, None]).T
    mode = np.abs(products).argmax(axis=1)
    scale = np.take_along_axis(products, mode[:, None], axis=1)[:, 0] / norms[mode]
    return mode.astype(np.uint8), scale, mean - scale * references.mean(axis=1)[mode]


def clock(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Return the median wall and CPU seconds of a call, after one that is not counted."""
    work()
    wall, cpu = [], []
    for _ in range(repeats):
        started, spent = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - spent)
    return statistics.median(wall), statistics.median(cpu)


def measure_fit(numel: int, threads: int) -> dict[str, Any]:
    """Assignment and fit of N weights: ours and two NumPy versions, and that they agree."""
    torch.set_num_threads(threads)
    walk = random_walks(SNAPSHOTS, numel)
    profiles = walk[:, :MODES].T.double().contiguous()
    rows, references = walk.T.numpy(), profiles.numpy()
    ours_wall, ours_cpu = clock(lambda: assign_and_fit(walk, profiles), 7)
    plain_wall, plain_cpu = clock(lambda: numpy_transcription(rows, references), 3)
    one_wall, one_cpu = clock(lambda: numpy_one_product(rows, references), 3)
    fit = assign_and_fit(walk, profiles)
    mode, scale, _ = numpy_transcription(rows, references)
    return {
        "weights": numel,
        "cpu_seconds": ours_cpu,
        "wall_seconds": ours_wall,
        "numpy_transcription_cpu_seconds": plain_cpu,
        "numpy_transcription_wall_seconds": plain_wall,
        "numpy_one_product_cpu_seconds": one_cpu,
        "numpy_one_product_wall_seconds": one_wall,
        "cpu_ratio_to_transcription": plain_cpu / ours_cpu,
        "cpu_ratio_to_one_product": one_cpu / ours_cpu,
        "modes_that_differ": int((fit.mode.numpy() != mode).sum()),
        "largest_scale_error": float(
            np.abs(fit.scale.numpy() - scale)[fit.mode.numpy() == mode].max()
        ),
    }


def measure_decompose(numel: int, samples: int, threads: int) -> dict[str, Any]:
    """A whole decomposition: seconds, and peak memory in units of the trajectory's bytes."""
    torch.set_num_threads(threads)
    # Imports, compiled code and thread pools are no part of what N weights cost.
    decompose(random_walks(SNAPSHOTS, 100_000), modes=MODES, samples=200)
    walk = random_walks(SNAPSHOTS, numel)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = walk.numel() * walk.element_size()
    started, spent = time.perf_counter(), time.process_time()
    result = decompose(walk, modes=MODES, samples=samples)
    wall, cpu = time.perf_counter() - started, time.process_time() - spent
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "weights": numel,
        "samples": samples,
        "modes": result.number_of_modes,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "trajectory_bytes": size,
        "peak_over_trajectory": (size + peak - before) / size,
    }


def small_tensors() -> nn.ParameterList:
    """Return 400 parameters of some hundred values each."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(32, 1024, (400,), generator=generator).tolist()
    return nn.ParameterList(nn.Parameter(torch.randn(size)) for size in sizes)


def networks(quick: bool) -> dict[str, Callable[[], nn.ParameterList]]:
    """Return the parameter sets an update is timed on."""

    def resnet50() -> nn.ParameterList:
        from torchvision.models import resnet50 as build

        return nn.ParameterList(build().parameters())

    return {"400 small tensors": small_tensors} | ({} if quick else {"ResNet-50": resnet50})


def measure_update(name: str, quick: bool, threads: int) -> dict[str, Any]:
    """One online update and one EMA update (``torch._foreach_lerp_``) of the same parameters."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    parameters = networks(quick)[name]()
    tensors = [p.detach() for p in parameters]
    modes = OnlineModes(parameters, modes=MODES, warmup=2)
    average = [t.clone() for t in tensors]

    def train() -> None:
        for tensor in tensors:
            tensor.add_(torch.randn_like(tensor), alpha=0.01)

    for _ in range(3):
        train()
        modes.update()
    ema, cmd, held = [], [], []
    for _ in range(30):
        train()
        started = time.perf_counter()
        torch._foreach_lerp_(average, tensors, _DECAY)
        ema.append(time.perf_counter() - started)
        started = time.perf_counter()
        modes.update()
        cmd.append(time.perf_counter() - started)
        held.append(modes.state_bytes)
    ratios = [a / b for a, b in zip(cmd, ema, strict=True)]
    return {
        "parameters": modes.numel,
        "tensors": len(tensors),
        "update_seconds": statistics.median(cmd),
        "foreach_lerp_seconds": statistics.median(ema),
        "ratio": statistics.median(ratios),
        "state_bytes_per_parameter": held[-1] / modes.numel,
        "state_grew": held[-1] != held[0],
    }


def _child(queue: Any, name: str, arguments: tuple[Any, ...]) -> None:
    queue.put(globals()[name](*arguments))


def apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run one measurement in a fresh process and return its result."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue, function.__name__, arguments))
    process.start()
    result: dict[str, Any] = queue.get()
    process.join()
    return result


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the ratios, and write the result file (not with ``--quick``)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "cmd_speed.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    numel = 100_000 if options.quick else 1_000_000
    result: dict[str, Any] = {
        "fit": apart(measure_fit, numel, options.threads),
        "decompose": [
            apart(measure_decompose, numel, samples, options.threads)
            for samples in ((1000,) if options.quick else (1000, 10_000))
        ],
        "update": {
            f"{name}, {threads} thread{'s'[: threads - 1]}": apart(
                measure_update, name, options.quick, threads
            )
            for name in networks(options.quick)
            for threads in sorted({1, options.threads})
        },
        "machine": describe_machine(),
    }
    show(result, Console(width=120))
    if not options.quick:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def show(result: dict[str, Any], console: Console) -> None:
    """Print the ratios next to what was asked for."""
    fit = result["fit"]
    table = Table(
        title=f"CMD on {result['machine']['processor']}, {result['machine']['threads']} threads"
    )
    for column in ("measure", "ours", "the other", "ratio", "aim"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for kind, label in (
        ("transcription", "plain NumPy float64"),
        ("one_product", "one-product NumPy"),
    ):
        other = fit[f"numpy_{kind}_cpu_seconds"]
        table.add_row(
            f"assign + fit, N={fit['weights']:,}: CPU s against {label}",
            f"{fit['cpu_seconds']:.3f}",
            f"{other:.3f}",
            f"{other / fit['cpu_seconds']:.1f}x less",
            "20x less" if kind == "transcription" else "",
        )
    for row in result["decompose"]:
        table.add_row(
            f"decompose, N={row['weights']:,}, K={row['samples']:,}: seconds",
            f"{row['wall_seconds']:.2f}",
            "",
            "",
            "60 s" if row["samples"] == 10_000 else "",
        )
        table.add_row(
            f"decompose, N={row['weights']:,}, K={row['samples']:,}: peak bytes / trajectory",
            f"{row['peak_over_trajectory']:.2f}",
            "1",
            "",
            "1.3" if row["samples"] == 1000 else "",
        )
    for name, row in result["update"].items():
        table.add_row(
            f"update, {name} ({row['parameters']:,}): ms against _foreach_lerp_",
            f"{1e3 * row['update_seconds']:.2f}",
            f"{1e3 * row['foreach_lerp_seconds']:.2f}",
            f"{row['ratio']:.2f}x",
            "2x",
        )
        table.add_row(
            f"state, {name}: bytes a parameter",
            f"{row['state_bytes_per_parameter']:.1f}",
            "4",
            "",
            "9",
        )
    console.print(table)


if __name__ == "__main__":
    main()
