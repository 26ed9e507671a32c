"""How close is every kernel to the bandwidth of its device, and how far from plain PyTorch?

    python -m benchmarks.kernels                  # N = 1e7, two threads; some minutes
    python -m benchmarks.kernels --sizes 100000000 1000000000    # on a GPU
    python -m benchmarks.kernels --quick          # N = 1e6, no torch.compile, nothing is written

The rows are those of ``cmd-plugin bench kernels``, one JSON line each, and two about a whole
network: the online update of ResNet-18's 62 tensors, and its post-hoc decomposition at T = 21.
Rows of CPUs go to ``results/kernels_cpu.jsonl``, rows of GPUs to ``results/kernels_cuda.jsonl``;
without a CUDA device the script says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS, describe_machine
from cmd_plugin.kernels import last_backend
from cmd_plugin.kernels.bench import KERNELS, measure_kernels
from cmd_plugin.modes import OnlineModes, decompose

SNAPSHOTS, MODES = 21, 10


def measure_network(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the rows about ResNet-18 as torchvision builds it."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18().to(device)
    modes = OnlineModes(model, modes=MODES, warmup=2, buffers="keep")
    taken = []
    for step in range(33):
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        modes.update()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if step > 2:  # two snapshots and the fit come first
            taken.append(time.perf_counter() - started)
    yield {
        "kernel": "update of ResNet-18",
        "backend": last_backend("update_affine"),
        "device": device.type,
        "size": modes.numel,
        "tensors": len(modes.layout.names),
        "seconds": statistics.median(taken),
    }

    walk = torch.randn(SNAPSHOTS, modes.numel, device=device)
    for before, row in pairwise(walk):
        row += before
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        found = decompose(walk, modes=MODES)
        taken.append(time.perf_counter() - started)
    yield {
        "kernel": "decomposition of ResNet-18",
        "backend": last_backend("assign_and_fit"),
        "device": device.type,
        "size": modes.numel,
        "snapshots": SNAPSHOTS,
        "modes": found.number_of_modes,
        "seconds": statistics.median(taken),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print each row as it is there, and write the result files (not with ``--quick``)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000_000])
    parser.add_argument("--kernel", action="append", choices=KERNELS, default=[])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small, nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    gpu = torch.cuda.is_available() and options.device != "cpu"
    if not gpu:
        print("no CUDA device here: Triton's kernels are not measured, only the CPU's paths.")
    machine = describe_machine()
    rows: list[dict[str, Any]] = []

    def take(found: Iterator[dict[str, Any]]) -> None:
        for row in found:
            rows.append({**row, **machine})
            print(json.dumps(row))

    for size in [1_000_000] if options.quick else options.sizes:
        compiled = not options.quick
        take(measure_kernels(size, options.kernel, device=options.device, compiled=compiled))
    if not options.kernel:
        take(measure_network(torch.device("cuda" if gpu else "cpu")))
    if not options.quick:
        options.out.mkdir(parents=True, exist_ok=True)
        file = options.out / f"kernels_{'cuda' if gpu else 'cpu'}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
