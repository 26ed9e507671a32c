"""Keep float32 products in IEEE float32, whatever the training asked of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["ieee_float32"]


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Compute float32 matrix products in full precision inside the ``with`` block.

    ``torch.set_float32_matmul_precision("high")``, which Lightning recommends at every start,
    allows products in TF32 or bfloat16: ten or seven bits, where correlations near 1 are compared.
    """
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", 0)]
    if all(hasattr(backend, "fp32_precision") for backend in backends):
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
        return
    former = torch.get_float32_matmul_precision()  # older torch has this one setting for all
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(former)
