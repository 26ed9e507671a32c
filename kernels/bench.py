"""Measure every kernel against the copy bandwidth of its device, and against its specification."""

from __future__ import annotations

import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cmd_plugin.errors import InputError
from cmd_plugin.kernels._dispatch import last_backend
from cmd_plugin.kernels.bench_cases import CASES, Case, Problem

__all__ = ["KERNELS", "choose_kernels", "find_device", "measure_kernels"]

KERNELS = tuple(case.name for case in CASES)

_MEASURED = (
    *("backend", "seconds", "seconds_p20", "seconds_p80", "gbps", "copy_gbps"),
    *("fraction_of_copy", "fastest_of_copy", "eager_seconds", "speedup_vs_eager"),
    *("compile_seconds", "speedup_vs_compile", "max_error"),
)

_CHECKED = 1 << 18  # weights of the problem whose errors are measured
_SECONDS = 1.0  # how long a baseline is repeated, at most


def measure_kernels(
    size: int = 10_000_000,
    names: Sequence[str] = (),
    *,
    device: str = "auto",
    repeats: int = 15,
    compiled: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield one row a kernel.

    A row has the median seconds of a call and their 20 and 80 % quantiles; ``gbps``, the bytes that
    have to be moved over the median; ``fraction_of_copy``, that over the bandwidth of the fastest
    ``Tensor.copy_`` between two vectors of N float32, copied in turn with the kernel in the same
    run on the same device; ``fastest_of_copy``, the same of the fastest call, which a busy machine
    disturbs less; ``speedup_vs_eager`` and ``speedup_vs_compile``, the time of the
    specification in float32, as it is and through ``torch.compile``, over the kernel's; and
    ``max_error``, the largest deviation from the specification in float64 relative to the largest
    value, over a problem of at most 2^18 weights. What the memory of the device does not hold is
    None, and ``note`` says so.

    Args:
        size: Number of weights N.
        names: Kernels to measure, of :data:`KERNELS`; none means all.
        device: ``"auto"`` (a CUDA device if there is one), ``"cpu"`` or ``"cuda"``.
        repeats: Calls that are timed.
        compiled: Whether to measure ``torch.compile`` of the specification, where there is a
            compiler. It takes up to a minute a kernel.
        progress: Called with the name of each kernel before it is measured.

    Raises:
        InputError: If an argument is out of range, or there is no CUDA device where one was asked
            for.
    """
    if size < 1000:
        raise InputError(f"size must be at least 1000 weights, got {size}.")
    if repeats < 1:
        raise InputError(f"repeats must be at least 1, got {repeats}.")
    chosen, place = choose_kernels(names), find_device(device)
    for case in CASES:
        if case.name in chosen:
            if progress is not None:
                progress(case.name)
            with torch.no_grad():
                try:
                    yield _measure(case, size, place, repeats, compiled)
                except RuntimeError as error:
                    if not _no_memory(error):
                        raise
                    empty = dict.fromkeys(_MEASURED)
                    about = {"kernel": case.name, "device": place.type, "size": size}
                    moved = {"bytes_per_weight": case.bytes_per_weight}
                    yield {**about, **moved, **empty, "note": "not enough memory for the kernel"}


def choose_kernels(names: Sequence[str] = ()) -> tuple[str, ...]:
    """Return which kernels are measured, in the order they are.

    Args:
        names: Kernels wanted, of :data:`KERNELS`; none means all.

    Raises:
        InputError: If one is unknown.
    """
    unknown = sorted({*names} - {*KERNELS})
    if unknown:
        raise InputError(f"unknown kernel {unknown[0]!r}: choose from {', '.join(KERNELS)}.")
    return tuple(name for name in KERNELS if not names or name in names)


def find_device(name: str) -> torch.device:
    """Return the device to measure on.

    Args:
        name: ``"auto"`` (a CUDA device if there is one), ``"cpu"`` or ``"cuda"``.

    Raises:
        InputError: If it is unknown, or not there.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {name!r}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here: use --device cpu.")
    gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if gpu else "cpu")


def _measure(
    case: Case, size: int, device: torch.device, repeats: int, compiled: bool
) -> dict[str, Any]:
    problem = Problem(size, device)
    run, specification = case.prepare(problem)
    source, target = torch.zeros(2, size, device=device)
    taken: list[float] = []
    copied: list[float] = []
    run("auto")  # compiles
    backend = last_backend(case.name)
    for _ in range(repeats):
        copied.append(_time(lambda: target.copy_(source), device))
        taken.append(_time(lambda: run("auto"), device))
    seconds = statistics.median(taken)
    bandwidth = 8 * size / min(copied)
    moved = case.bytes_per_weight * size / seconds
    eager, without = _in_memory(specification, device, repeats)
    fused, why_not = _through_compiler(specification, device, repeats) if compiled else (None, "")
    why_not = "; ".join(filter(None, (without, why_not)))
    row: dict[str, Any] = {
        "kernel": case.name,
        "backend": backend,
        "device": device.type,
        "size": size,
        "bytes_per_weight": case.bytes_per_weight,
        "seconds": seconds,
        "seconds_p20": _quantile(taken, 0.2),
        "seconds_p80": _quantile(taken, 0.8),
        "gbps": moved / 1e9,
        "copy_gbps": bandwidth / 1e9,
        "fraction_of_copy": moved / bandwidth,
        "fastest_of_copy": moved / bandwidth * seconds / min(taken),
        "eager_seconds": eager,
        "speedup_vs_eager": None if eager is None else eager / seconds,
        "compile_seconds": fused,
        "speedup_vs_compile": None if fused is None else fused / seconds,
        "max_error": _error(case, min(size, _CHECKED), device, backend),
    }
    return {**row, "note": why_not} if why_not else row


def _time(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _baseline(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median seconds of a call after one that is not counted."""
    work()
    taken: list[float] = []
    while len(taken) < repeats and (not taken or sum(taken) < _SECONDS):
        taken.append(_time(work, device))
    return statistics.median(taken)


def _no_memory(error: RuntimeError) -> bool:
    """Whether an allocator gave up: a GPU's has an error of its own, a CPU's a sentence."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)


def _in_memory(
    work: Callable[[], Any], device: torch.device, repeats: int
) -> tuple[float | None, str]:
    """Return the median seconds of a call; or None, and why there are none."""
    try:
        return _baseline(work, device, repeats), ""
    except RuntimeError as error:
        if not _no_memory(error):
            raise
        return None, "not enough memory for the specification"


def _through_compiler(
    work: Callable[[], Any], device: torch.device, repeats: int
) -> tuple[float | None, str]:
    """Return the median seconds through ``torch.compile``; or None, and why there are none."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        return None, "torch.compile needs a C++ compiler, and there is none"
    torch.compiler.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its advice on graphs is about code that is not ours
            return _baseline(torch.compile(work), device, repeats), ""
    except Exception as error:  # whatever a compiler raises: the row says so and has no number
        return None, f"torch.compile failed: {type(error).__name__}"


def _error(case: Case, size: int, device: torch.device, backend: str | None) -> float:
    """Return the largest deviation from the specification in float64, relative to its values."""
    run, _ = case.prepare(Problem(size, device))
    _, specification = case.prepare(Problem(size, device, dtype=torch.float64))
    got, expected = case.comparable(run(backend)), case.comparable(specification())
    return max(map(_deviation, got, expected))


def _deviation(got: Tensor, expected: Tensor) -> float:
    gap = (got.double() - expected.double()).abs().max()
    return float(gap / expected.double().abs().max().clamp(min=1e-300))


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]
