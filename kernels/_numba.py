"""What the compiled CPU paths share: tensors by their addresses, and look-ups by mode.

Needs numba (extra ``fast``). One call walks all tensors of a share of the weights by their
addresses, so a network of many small ones costs no Python per tensor. Values are looked up for a
short span of weights at a time, two modes at once, and arithmetic is a loop of its own, because
only that becomes vector instructions; while a longer look-up ran, the memory would stand idle.

A loop over spans cuts no array and calls no function with one: counting references to it would
cost more than the arithmetic. Places are unsigned (``np.uintp``), or each would be tested for
being negative. Functions get empty arrays for what is not asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic
from torch import Tensor

from cmd_plugin.kernels._threads import in_threads
from cmd_plugin.kernels.flat_view import FlatView

__all__ = [
    "SPAN",
    "array",
    "compiled",
    "exact",
    "in_shares",
    "nothing",
    "numbers",
    "pair_table",
    "two_bytes",
    "vector",
]

SPAN = 128  # weights whose table values are looked up before the arithmetic
_SHARE = 1 << 19  # weights a thread takes at a time

# Sums may be reordered (reassoc) so that they vectorise; nothing else is relaxed: NaN and Inf
# count.
compiled: Any = njit(
    nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"}
)
# Products are rounded before they are added, as PyTorch does: both paths give the same bits.
exact: Any = njit(nogil=True, cache=True, error_model="numpy")

_Numbers = np.ndarray[Any, Any]


def nothing(like: Tensor) -> _Numbers:
    """Return an empty array of the dtype of a tensor, for an argument that is not asked for."""
    return like[:0].numpy()


def array(tensor: Tensor | None, like: Tensor) -> _Numbers:
    """Return a CPU tensor as an array without a copy, an empty one for None."""
    return nothing(like) if tensor is None else tensor.numpy()


def numbers(table: Tensor | None, like: Tensor) -> _Numbers:
    """Return a small table as an array of the dtype of ``like``, an empty one for None."""
    return nothing(like) if table is None else table.to("cpu", like.dtype).numpy()


def pair_table(table: Tensor | None, like: Tensor) -> _Numbers:
    """Return a table [M] as one [256 M] of the values of two neighbouring weights.

    Each is one number of twice the size of the dtype of ``like``, and its place is that of their
    modes: :func:`two_bytes`. None gives an empty table.
    """
    values = numbers(table, like)
    pairs = np.empty((values.size, 256, 2), values.dtype)  # [second mode, first mode, value]
    pairs[:, : values.size, 0] = values  # what lies beyond the M-th first mode is never read
    pairs[:, : values.size, 1] = values[:, None]
    return pairs.view(np.uint64 if values.dtype == np.float32 else np.complex128).reshape(-1)


def in_shares(
    weights: FlatView,
    work: Callable[[_Numbers, _Numbers, int, int], None],
    *,
    backwards: bool = False,
) -> None:
    """Do the work of all pieces of contiguous weights, in threads, a share of them at a time.

    Short shares, taken as threads get free: after an optimizer's step PyTorch's own threads keep a
    processor busy for some milliseconds.

    Args:
        weights: Weights that have addresses.
        work: Is given the address and the flat position of every piece, and from which piece to
            which it has to go. Releases the interpreter lock.
        backwards: Whether to begin with the last share.
    """
    addresses, starts = weights.addresses()
    count = max(1, weights.numel // _SHARE)
    bounds = [0, addresses.size]
    if count > 1:
        bounds = np.searchsorted(starts[:-1], np.linspace(0, weights.numel, count + 1)).tolist()
    shares = list(pairwise(bounds))[:: -1 if backwards else 1]
    in_threads(lambda share: work(addresses, starts, *share), shares, weights.numel)


@intrinsic
def _typed(_: Any, address: Any, like: Any) -> Any:
    """An address as a pointer to values of the dtype of an array."""
    target = types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return target(address, like), generate


@intrinsic
def _two_bytes(_: Any, address: Any) -> Any:
    """The two bytes at an address, which may be odd, as one number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = context.get_value_type(signature.return_type).as_pointer()
        return builder.load(builder.inttoptr(arguments[0], pointer), align=1)

    return types.uint16(address), generate


_pointer: Any = _typed  # the first argument of an intrinsic is the compiler's own
two_bytes: Any = _two_bytes


@compiled
def vector(address, size, like):
    """Return the values at an address as an array of the dtype of ``like``."""
    return carray(_pointer(address, like), size)
