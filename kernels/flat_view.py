"""Many tensors seen as one flat vector, in place and block by block.

The state of a method lives in flat arrays; the weights stay where they are. A :class:`FlatView` is
the bridge: it walks the tensors
in order, in blocks small enough to stay in cache, and hands out views wherever a block lies inside
one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cmd_plugin.errors import ShapeError

__all__ = ["BLOCK", "FlatView"]

# 256 Ki float32 values: large enough that the cost of launching an operation (some microseconds)
# vanishes,
# small enough that the two or three scratch vectors of a kernel stay in the last-level cache.
BLOCK = 1 << 18

_Piece = tuple[Tensor, int, int]


class FlatView:
    """A list of tensors addressed as one vector of ``numel`` values, in the given order, row-major inside each tensor.

    Args:
        tensors: Floating tensors of any shape (0-dim ones too), all on one device. They are not
            copied; writing goes into them.
        block: Number of values in a block (the last one may be shorter); even.

    Attributes:
        numel: Total number of values N.
        device: Device of all tensors.
        dtype: float64 when every tensor is float64, otherwise float32: the dtype blocks are read
            in.

    Raises:
        ShapeError: If there is no tensor, one is not floating, or the devices differ.
    """

    def __init__(self, tensors: Sequence[Tensor], block: int = BLOCK) -> None:
        if not tensors:
            raise ShapeError("a flat view needs at least one tensor, got none.")
        devices = {tensor.device for tensor in tensors}
        if len(devices) > 1:
            raise ShapeError(f"all weights must be on one device, got {sorted(map(str, devices))}.")
        for tensor in tensors:
            if not tensor.is_floating_point():
                raise ShapeError(f"only floating tensors can be modelled, got {tensor.dtype}.")
        self._tensors = [tensor.detach() for tensor in tensors]
        self._pointers = [tensor.data_ptr() for tensor in tensors]
        self.numel = sum(tensor.numel() for tensor in tensors)
        self.device = self._tensors[0].device
        self.dtype = (
            torch.float64
            if all(tensor.dtype == torch.float64 for tensor in tensors)
            else torch.float32
        )
        self.block = block
        # Contiguous tensors are addressed through one cached flat view each; the others
        # (channels-last weights) are
        # flattened when they are touched, which costs a copy of that tensor.
        self._flat = [t.view(-1) if t.is_contiguous() else None for t in self._tensors]
        self._pieces: list[list[_Piece]] = [[] for _ in range(-(-self.numel // block))]
        self._views: list[list[Tensor] | None] = []
        self._plan()

    def _plan(self) -> None:
        starts: list[int] = [0]
        for tensor in self._tensors:
            starts.append(starts[-1] + tensor.numel())
        self._starts = torch.tensor(starts)
        for index, tensor in enumerate(self._tensors):
            low, end = starts[index], starts[index] + tensor.numel()
            while low < end:
                number = low // self.block
                high = min(end, (number + 1) * self.block)
                self._pieces[number].append((tensor, low - starts[index], high - starts[index]))
                low = high
        flat_of = {id(t): flat for t, flat in zip(self._tensors, self._flat, strict=True)}
        for pieces in self._pieces:
            views = [
                flat[a:b]
                for tensor, a, b in pieces
                if (flat := flat_of[id(tensor)]) is not None and tensor.dtype == self.dtype
            ]
            self._views.append(views if len(views) == len(pieces) else None)

    def is_current(self, tensors: Sequence[Tensor]) -> bool:
        """Whether this view still addresses exactly these tensors (same storage, in the same order)."""
        return len(tensors) == len(self._pointers) and all(
            tensor.data_ptr() == pointer
            for tensor, pointer in zip(tensors, self._pointers, strict=True)
        )

    def scratch(self) -> Tensor:
        """Return an uninitialised vector that fits any block: [min(block, N)], ``dtype``."""
        return torch.empty(min(self.block, self.numel), dtype=self.dtype, device=self.device)

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """Yield (number, start, stop) of every block."""
        for number in range(len(self._pieces)):
            start = number * self.block
            yield number, start, min(self.numel, start + self.block)

    def read(self, number: int, scratch: Tensor) -> Tensor:
        """Return the values of one block, [n], ``dtype``: a view of the weights if possible, else a copy in ``scratch``."""
        views = self._views[number]
        if views is not None:
            if len(views) == 1:
                return views[0]
            out = scratch[: sum(view.numel() for view in views)]
            return torch.cat(views, out=out)
        at = 0
        for tensor, a, b in self._pieces[number]:
            scratch[at : at + b - a].copy_(tensor.reshape(-1)[a:b])
            at += b - a
        return scratch[:at]

    def write(self, number: int, values: Tensor) -> None:
        """Write [n] values into the tensors of one block, in place, rounding to each tensor's dtype."""
        at = 0
        for tensor, a, b in self._pieces[number]:
            part = values[at : at + b - a]
            if tensor.is_contiguous():
                tensor.view(-1)[a:b].copy_(part)
            else:
                flat = tensor.reshape(-1)  # a copy, because the tensor is not contiguous
                flat[a:b].copy_(part)
                tensor.copy_(flat.view(tensor.shape))
            at += b - a

    def gather(self, indices: Tensor) -> Tensor:
        """Return the values at flat positions ``indices`` [K] int64 (CPU) as float64 [K] on the CPU."""
        out = torch.empty(indices.numel(), dtype=torch.float64)
        owner = torch.searchsorted(self._starts, indices, right=True) - 1
        for index in owner.unique().tolist():
            chosen = owner == index
            inside = (indices[chosen] - self._starts[index]).to(self.device)
            flat = self._flat[index]
            values = (self._tensors[index].reshape(-1) if flat is None else flat)[inside]
            out[chosen] = values.double().cpu()
        return out

    def put(self, indices: Tensor, values: Tensor) -> None:
        """Write ``values`` [K] at flat positions ``indices`` [K] int64 (CPU), in place."""
        owner = torch.searchsorted(self._starts, indices, right=True) - 1
        for index in owner.unique().tolist():
            chosen = owner == index
            tensor = self._tensors[index]
            inside = (indices[chosen] - self._starts[index]).to(self.device)
            where = torch.unravel_index(inside, tensor.shape) if tensor.ndim else ()
            tensor[where] = (
                values[chosen]
                .to(self.device, tensor.dtype)
                .reshape(inside.shape if tensor.ndim else ())
            )

    def count_non_finite(self) -> int:
        """Return how many values are NaN or infinite; one streaming pass, no temporary of size N."""
        scratch = self.scratch()
        count = 0
        for number, _, _ in self.blocks():
            values = self.read(number, scratch)
            # The sum is finite unless a value is not (or it overflows): the exact count is only
            # taken then.
            if not torch.isfinite(values.sum()):
                count += int((~torch.isfinite(values)).sum())
        return count
