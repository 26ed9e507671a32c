"""What this machine makes of the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from cmd_plugin.errors import InputError
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.options import JobOptions, option
from cmd_plugin.runs.process import own_threads
from cmd_plugin.runs.result import Result, finite

__all__ = ["BenchOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class BenchOptions(JobOptions):
    """Time every kernel against the copy bandwidth of its device, and check its error.

    The kernels are measured on random weights. Each is compared with its specification in plain
    PyTorch (eager, and through torch.compile where there is a compiler) on the same tensors.

    Writes kernels.csv and result.json.

    Examples:
      cmd-plugin bench kernels --size 1000000 --no-compile
    """

    size: int = option(10_000_000, "Number of weights N.", at_least=1000)
    kernel: tuple[str, ...] = option((), "Only this kernel (repeatable); all by default.")
    device: str = option("auto", "auto, cpu or cuda.", choices=("auto", "cpu", "cuda"))
    threads: int | None = option(
        None, "Threads on a CPU; PyTorch's own number by default.", at_least=1
    )
    repeats: int = option(15, "Calls that are timed.", at_least=1)
    compiled: bool = option(True, "Time torch.compile too.", flag="compile", off="no-compile")


@make_job("bench kernels")
def run(job: Job, options: BenchOptions) -> Result:
    """Measure the kernels one after the other.

    Returns:
        Metrics: one row a kernel in ``kernels``, see
        :func:`cmd_plugin.kernels.bench.measure_kernels`; a number that is not finite is None.

    Raises:
        InputError: If a kernel or the device is unknown or not there, or the unfinished run was
            made on another machine or with other versions: their rows are never mixed.
    """
    from cmd_plugin.kernels.bench import choose_kernels, find_device, measure_kernels

    names, device = choose_kernels(options.kernel), find_device(options.device)
    with own_threads(options.threads):
        _require_same_machine(job)

        def measure(name: str) -> Mapping[str, Any]:
            (row,) = measure_kernels(
                options.size,
                [name],
                device=device.type,
                repeats=options.repeats,
                compiled=options.compiled,
            )
            return {k: finite(v) if isinstance(v, float) else v for k, v in row.items()}

        rows = []
        for number, name in enumerate(names):
            job.report(name, number, len(names))
            rows.append(job.stage(name, partial(measure, name)))
        table = job.table("kernels.csv", _COLUMNS)
        table.replace([_cell(row.get(column)) for column in _COLUMNS] for row in rows)
        return job.finish(metrics={"kernels": rows}, data={"weights": "random, float32"})


def _require_same_machine(job: Job) -> None:
    """Raise InputError if the rows that are there were measured under other conditions."""
    from cmd_plugin.machine import describe_machine

    now = {name: value for name, value in describe_machine().items() if name != "date"}
    then = job.stage("machine", lambda: now)
    for name, value in now.items():
        if then.get(name) != value:
            raise InputError(
                f"the unfinished run in {job.out} was measured with {name}={then.get(name)}, now "
                f"it is {value}: their rows cannot be mixed, start again with --overwrite."
            )


def _cell(value: Any) -> Any:
    return "" if value is None else value


def _number(text: str) -> float | None:
    return float(text) if text else None


_COLUMNS: dict[str, Any] = {
    "kernel": str,
    "backend": str,
    "device": str,
    "size": int,
    "bytes_per_weight": float,
    "seconds": _number,
    "seconds_p20": _number,
    "seconds_p80": _number,
    "gbps": _number,
    "copy_gbps": _number,
    "fraction_of_copy": _number,
    "fastest_of_copy": _number,
    "eager_seconds": _number,
    "speedup_vs_eager": _number,
    "compile_seconds": _number,
    "speedup_vs_compile": _number,
    "max_error": _number,
    "note": str,
}
