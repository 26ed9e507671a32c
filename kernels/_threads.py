"""Share compiled loops, which hold no lock, among PyTorch's number of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["in_threads", "shares"]

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

_ALONE = 1 << 20  # weights below which a second thread is not worth starting
_SHARE = 1 << 18  # weights a thread takes at a time


def shares(numel: int) -> list[slice]:
    """Return the parts of N weights that threads take; they do not depend on how many there are."""
    return [slice(low, min(numel, low + _SHARE)) for low in range(0, numel, _SHARE)]


def in_threads(work: Callable[[_Job], _Result], jobs: Sequence[_Job], numel: int) -> list[_Result]:
    """Return the results of all jobs in the order of the jobs, whoever did them.

    Args:
        work: Does one job; releases the interpreter lock.
        jobs: What to do.
        numel: Number of weights in all jobs together.
    """
    threads = 1 if numel < _ALONE else min(torch.get_num_threads(), len(jobs))
    if threads <= 1:
        return [work(job) for job in jobs]
    results: dict[int, _Result] = {}
    left = iter(range(len(jobs)))

    def take() -> None:
        for number in left:
            results[number] = work(jobs[number])

    # The caller is one of them: starting a thread takes as long as some thousand weights.
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(take) for _ in range(threads - 1)]
        take()
        for other in others:
            other.result()
    return [results[number] for number in range(len(jobs))]
