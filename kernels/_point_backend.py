"""What the point kernels share: which implementation runs, and what they ask of clouds."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, MissingDependency, NonFiniteError, ShapeError
from cmd_plugin.kernels import _dispatch
from cmd_plugin.kernels._dispatch import VARIABLE, _installed, _last

__all__ = ["choose", "require_clouds"]

_EXTRA = {"fpsample": "points"}


def choose(
    kernel: str,
    backend: str,
    device: torch.device,
    *,
    library: str | None = None,
    triton: bool = True,
) -> str:
    """Decide which implementation runs, and remember it for ``last_backend()``.

    ``"auto"`` means the environment variable ``CMD_PLUGIN_BACKEND`` if it names an implementation
    this kernel has; otherwise Triton on CUDA devices, the library on CPUs where it is installed,
    and PyTorch for the rest. A backend that was asked for by name runs or raises.

    Args:
        kernel: Name of the kernel.
        backend: What the caller asked for.
        device: Where the clouds are.
        library: CPU library that has this primitive, if any.
        triton: Whether the Triton path can address these arguments.

    Raises:
        InputError: If the name is unknown or that backend cannot run on these arguments.
        MissingDependency: If the package it needs is not installed.
    """
    names = ("auto", "torch", "triton") if library is None else ("auto", "torch", "triton", library)
    if backend not in names:
        raise InputError(f"backend={backend!r} of {kernel} is not one of {', '.join(names)}.")
    if backend == "auto" and os.environ.get(VARIABLE) in names:
        backend = os.environ[VARIABLE]
    if backend == "auto":
        backend = _automatic(device, library, triton)
    elif backend == "triton":
        if not _installed("triton"):
            raise MissingDependency("backend='triton': run pip install triton (Linux only).")
        if not triton:
            raise InputError(
                f"backend='triton': these clouds are too large for {kernel}: use auto."
            )
        if device.type != "cuda" and not _dispatch.interpreting():
            raise InputError(
                f"backend='triton' runs on CUDA devices and these clouds are on {device}: use "
                "'auto', or TRITON_INTERPRET=1 to check a kernel on a CPU."
            )
    elif backend == library:
        if not _installed(library):
            extra = _EXTRA.get(library)
            what = library if extra is None else f'"cmd-plugin[{extra}]"'
            raise MissingDependency(f"backend={library!r}: run pip install {what}.")
        if device.type != "cpu":
            raise InputError(f"backend={library!r} runs on CPUs and these clouds are on {device}.")
    _last.pop(kernel, None)
    _last[kernel] = backend
    return backend


def _automatic(device: torch.device, library: str | None, triton: bool) -> str:
    if device.type == "cuda":
        return "triton" if triton and _installed("triton") else "torch"
    usable = library is not None and device.type == "cpu" and _installed(library)
    return library if usable and library is not None else "torch"


def require_clouds(name: str, clouds: Tensor) -> None:
    """Raise unless ``clouds`` are [B, N, C] floating point with N, C >= 1, and finite.

    Raises:
        ShapeError: If shape or dtype do not fit.
        NonFiniteError: If a coordinate is NaN or infinite.
    """
    if clouds.ndim != 3 or not clouds.shape[1] or not clouds.shape[2]:
        raise ShapeError(f"{name} must be [B, N, C], got {tuple(clouds.shape)}.")
    if not clouds.is_floating_point():
        raise ShapeError(f"{name} must be floating point, got {clouds.dtype}.")
    finite = clouds.isfinite()
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise NonFiniteError(f"{name} hold {bad} NaN or infinite coordinates: remove them first.")
