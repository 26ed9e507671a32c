"""Which implementation of a kernel runs: one rule for all of them, and a record of what it chose.

Every kernel has the same shape. Its public function checks the arguments, asks :func:`choose`, and
calls that implementation. Inside ``torch.compile`` it calls its custom operator
``torch.ops.cmd_plugin.<kernel>`` instead, whose body is the same public function: one opaque node
in the graph. Outside a compiled region the operator's own dispatch (tens of microseconds) would
cost more than the update of a small network, so it is not taken.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

from cmd_plugin.errors import InputError, MissingDependency, require

__all__ = ["VARIABLE", "Backend", "choose", "interpreting", "last_backend"]

Backend = Literal["auto", "torch", "numba", "triton"]

VARIABLE = "CMD_PLUGIN_BACKEND"
_NAMES = ("auto", "torch", "numba", "triton")

# Loading numba takes a second: below this many weights PyTorch has finished long before.
_WORTH_COMPILING = 1 << 16

_last: dict[str, str] = {}


def last_backend(kernel: str | None = None) -> str | None:
    """Return which implementation ran last: ``"torch"``, ``"numba"`` or ``"triton"``.

    Args:
        kernel: Name of a kernel, such as ``"update_affine"``; None means whichever ran last.

    Returns:
        None if it has not run in this process.
    """
    if kernel is None:
        return next(reversed(_last.values()), None)
    return _last.get(kernel)


def choose(
    kernel: str,
    backend: str,
    device: torch.device,
    numel: int,
    *,
    numba: bool | None = None,
    triton: bool = True,
) -> str:
    """Decide which implementation runs, and remember it for :func:`last_backend`.

    ``"auto"`` means the environment variable ``CMD_PLUGIN_BACKEND`` if it is set; otherwise Triton
    on CUDA devices, numba on CPUs for vectors worth it, and PyTorch for the rest. A backend that
    was asked for by name runs or raises: it is never replaced.

    Args:
        kernel: Name of the kernel.
        backend: What the caller asked for.
        device: Where the weights and the state are.
        numel: Number of weights.
        numba: Whether the compiled CPU path can address these arguments; None if the kernel has
            none.
        triton: Whether the Triton path can.

    Raises:
        InputError: If the name is unknown, or that backend cannot address these arguments.
        MissingDependency: If the package it needs is not installed.
    """
    asked = f"backend={backend!r}"
    if backend == "auto" and (backend := os.environ.get(VARIABLE, "auto")) != "auto":
        asked = f"{VARIABLE}={backend}"
    if backend not in _NAMES:
        raise InputError(f"{asked} is not one of {', '.join(_NAMES)}.")
    if backend == "auto":
        backend = _automatic(device, numel, bool(numba), triton)
    elif backend == "numba":
        if numba is None:
            raise InputError(f"{asked}: {kernel} has no compiled CPU path: use 'auto' or 'torch'.")
        if not numba:
            raise InputError(
                f"{asked}: the compiled path of {kernel} needs contiguous CPU tensors in a dtype "
                "it computes in, which these are not: use 'auto'."
            )
        require("numba", "fast")
    elif backend == "triton":
        if not _installed("triton"):
            raise MissingDependency(f"{asked}: run pip install triton (Linux only).")
        if not triton:
            raise InputError(
                f"{asked}: {kernel} cannot address a tensor that is not contiguous and has more "
                "than five dimensions there: use 'auto'."
            )
        if device.type != "cuda" and not interpreting():
            raise InputError(
                f"{asked}: Triton runs on CUDA devices and these tensors are on {device}: use "
                "'auto', or TRITON_INTERPRET=1 to check a kernel on a CPU."
            )
    _last.pop(kernel, None)
    _last[kernel] = backend
    return backend


def interpreting() -> bool:
    """Whether Triton interprets its kernels in Python, on CPU tensors, instead of compiling."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _automatic(device: torch.device, numel: int, numba: bool, triton: bool) -> str:
    if device.type == "cuda":
        return "triton" if triton and _installed("triton") else "torch"
    compiled = numba and numel >= _WORTH_COMPILING and _installed("numba")
    return "numba" if compiled else "torch"


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None
