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

__all__ = ["VARIABLE", "Backend", "choose", "compiles", "interpreting", "last_backend"]

Backend = Literal["auto", "torch", "numba", "triton"]

VARIABLE = "CMD_PLUGIN_BACKEND"
_NAMES = ("auto", "torch", "numba", "triton")
_LIBRARIES = {"fpsample": "points", "scipy": None}  # of point kernels, and the extra they come with
_STRIDES = "cannot address a tensor that is not contiguous and has more than five dimensions there"

# Loading numba takes a second: below this many weights PyTorch has finished long before.
_WORTH_COMPILING = 1 << 16

_last: dict[str, str] = {}


def last_backend(kernel: str | None = None) -> str | None:
    """Return which implementation ran last: ``"torch"``, ``"numba"``, ``"triton"`` or a library.

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
    numel: int = 0,
    *,
    numba: bool | None = None,
    library: str | None = None,
    triton: bool = True,
    triton_limit: str = _STRIDES,
) -> str:
    """Decide which implementation runs, and remember it for :func:`last_backend`.

    ``"auto"`` means the environment variable ``CMD_PLUGIN_BACKEND`` if it names an implementation
    that this kernel has; otherwise Triton on CUDA devices, on CPUs numba for vectors worth it or
    the library that has this primitive, and PyTorch for the rest. A backend that was asked for by
    name runs or raises: it is never replaced.

    Args:
        kernel: Name of the kernel.
        backend: What the caller asked for.
        device: Where the tensors are.
        numel: Number of weights; only numba asks, because loading it takes a second. A kernel that
            is called once in a run and not once a snapshot gives less.
        numba: Whether the compiled CPU path can address these arguments; None if the kernel has
            none.
        library: CPU library that has this primitive for these arguments, if any.
        triton: Whether the Triton path can address them.
        triton_limit: Why it cannot, to follow the kernel's name in a sentence.

    Raises:
        InputError: If the name is unknown, or that backend cannot address these arguments.
        MissingDependency: If the package it needs is not installed.
    """
    asked = f"backend={backend!r}"
    names = _NAMES if library is None else (*_NAMES, library)
    if backend == "auto" and (wanted := os.environ.get(VARIABLE, "auto")) != "auto":
        if wanted not in (*_NAMES, *_LIBRARIES):
            known = ", ".join((*_NAMES, *_LIBRARIES))
            raise InputError(f"{VARIABLE}={wanted} is not one of {known}.")
        if wanted in names and (wanted != "numba" or numba is not None):
            backend, asked = wanted, f"{VARIABLE}={wanted}"
    if backend not in names:
        raise InputError(f"{asked} of {kernel} is not one of {', '.join(names)}.")
    if backend == "auto":
        backend = _automatic(device, numel, bool(numba), triton, library)
    elif backend == "numba":
        _require_numba(asked, kernel, numba)
    elif backend == "triton":
        _require_triton(asked, kernel, device, None if triton else triton_limit)
    elif backend == library:
        _require_library(asked, backend, device)
    _last.pop(kernel, None)
    _last[kernel] = backend
    return backend


def compiles(device: torch.device, numel: int) -> bool:
    """Whether ``"auto"`` means the compiled CPU path for contiguous weights in a fitting dtype."""
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted in ("torch", "triton") or device.type != "cpu":
        return False
    return wanted == "numba" or _automatic(device, numel, True, True, None) == "numba"


def _require_numba(asked: str, kernel: str, addressable: bool | None) -> None:
    if addressable is None:
        raise InputError(f"{asked}: {kernel} has no compiled CPU path: use 'auto' or 'torch'.")
    if not addressable:
        raise InputError(
            f"{asked}: the compiled path of {kernel} needs contiguous CPU tensors in a dtype "
            "it computes in, which these are not: use 'auto'."
        )
    require("numba", "fast")


def _require_triton(asked: str, kernel: str, device: torch.device, limit: str | None) -> None:
    if not _installed("triton"):
        raise MissingDependency(f"{asked}: run pip install triton (Linux only).")
    if limit is not None:
        raise InputError(f"{asked}: {kernel} {limit}: use 'auto'.")
    if device.type != "cuda" and not interpreting():
        raise InputError(
            f"{asked}: Triton runs on CUDA devices and these tensors are on {device}: use "
            "'auto', or TRITON_INTERPRET=1 to check a kernel on a CPU."
        )


def _require_library(asked: str, library: str, device: torch.device) -> None:
    if not _installed(library):
        extra = _LIBRARIES[library]
        what = library if extra is None else f'"cmd-plugin[{extra}]"'
        raise MissingDependency(f"{asked}: run pip install {what}.")
    if device.type != "cpu":
        raise InputError(f"{asked}: {library} runs on CPUs and these tensors are on {device}.")


def interpreting() -> bool:
    """Whether Triton interprets its kernels in Python, on CPU tensors, instead of compiling."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _automatic(
    device: torch.device, numel: int, numba: bool, triton: bool, library: str | None
) -> str:
    if device.type == "cuda":
        return "triton" if triton and _installed("triton") else "torch"
    if numba and numel >= _WORTH_COMPILING and _installed("numba"):
        return "numba"
    if library is not None and device.type == "cpu" and _installed(library):
        return library
    return "torch"


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None
