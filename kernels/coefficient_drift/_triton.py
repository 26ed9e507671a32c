"""Triton path of ``coefficient_drift``: one launch, 16 bytes read and 4 written a weight."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cmd_plugin.kernels._triton import launch_vector, vector_block
from cmd_plugin.kernels.pointer_table import BLOCK as _BLOCK

__all__ = ["coefficient_drift"]


@triton.jit
def _drift(
    scale,
    offset,
    old_scale,
    old_offset,
    out,
    first,
    numel,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, ok = vector_block(first, numel, WHOLE, BLOCK)
    a = tl.load(scale + at, ok, 0.0) - tl.load(old_scale + at, ok, 0.0)
    b = tl.load(offset + at, ok, 0.0) - tl.load(old_offset + at, ok, 0.0)
    square = a * a + b * b
    if out.dtype.element_ty == tl.float32:
        tl.store(out + at, tl.sqrt_rn(square), ok)  # rounded as on a CPU
    else:
        tl.store(out + at, tl.sqrt(square), ok)


def coefficient_drift(
    scale: Tensor, offset: Tensor, old_scale: Tensor, old_offset: Tensor, out: Tensor
) -> None:
    """See :func:`cmd_plugin.kernels.coefficient_drift`; fills ``out``."""
    launch_vector(
        _drift,
        len(scale),
        _BLOCK,
        scale.device,
        scale,
        offset,
        old_scale,
        old_offset,
        out,
        enable_fp_fusion=False,
    )
