"""How close is every kernel to the bandwidth of its device, and how far from plain PyTorch?

    python -m benchmarks.kernels                  # N = 1e7, on one thread and on two; some minutes
    python -m benchmarks.kernels --sizes 100000000 1000000000    # on a GPU
    python -m benchmarks.kernels --quick          # N = 1e6, no torch.compile, nothing is written

The rows are those of ``cmd-plugin bench kernels``, one JSON line each (whole networks are measured
by ``benchmarks.network_costs``). Rows of CPUs go to ``results/kernels_cpu.jsonl``, rows of GPUs to
``results/kernels_cuda.jsonl``; without a CUDA device the script says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS, describe_machine
from cmd_plugin.kernels.bench import KERNELS, measure_kernels


def main(arguments: list[str] | None = None) -> None:
    """Measure, print each row as it is there, and write the result files (not with ``--quick``)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000_000])
    parser.add_argument("--kernel", action="append", choices=KERNELS, default=[])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="1 2 on a CPU")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help="small, nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available() and options.device != "cpu"
    if not gpu:
        print("no CUDA device here: Triton's kernels are not measured, only the CPU's paths.")
    counts = options.threads or ([2] if gpu else [1, 2])
    rows: list[dict[str, Any]] = []

    def take(found: Iterator[dict[str, Any]]) -> None:
        machine = describe_machine()
        for row in found:
            rows.append({**row, **machine})
            print(json.dumps({**row, "threads": machine["threads"]}))

    for size in [1_000_000] if options.quick else options.sizes:
        for threads in counts:
            torch.set_num_threads(threads)
            last = threads == counts[-1]  # torch.compile takes minutes
            compiled = last and not (options.quick or options.no_compile)
            take(measure_kernels(size, options.kernel, device=options.device, compiled=compiled))
    if not options.quick:
        options.out.mkdir(parents=True, exist_ok=True)
        file = options.out / f"kernels_{'cuda' if gpu else 'cpu'}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
