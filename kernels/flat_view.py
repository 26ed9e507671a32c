"""Many tensors seen as one flat vector, in place and block by block.

The state of a method lives in flat arrays; the weights stay where they are. A :class:`FlatView` is
the bridge: it walks the tensors in order, in blocks small enough to stay in cache, and hands out
views wherever a block lies inside one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.errors import ShapeError
from cmd_plugin.kernels.pointer_table import PointerTable, strides_of

__all__ = ["BLOCK", "FlatView", "Weights", "as_view", "tensors_of"]

# 256 Ki float32 values: large enough that the cost of launching an operation (some microseconds)
# vanishes, small enough that the two or three scratch vectors of a kernel stay in the last-level
# cache.
BLOCK = 1 << 18

_KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_Piece = tuple[Tensor, int, int]
_Place = tuple[Tensor, Tensor, tuple[Tensor, ...]]
_Integers = np.ndarray[Any, Any]


class FlatView:
    """A list of tensors addressed as one vector, in the given order, row-major inside each tensor.

    Args:
        tensors: Floating tensors of any shape (0-dim ones too), all on one device. They are not
            copied; writing goes into them.
        block: Number of values in a block (the last one may be shorter); even.
        dtype: float32 or float64, in which blocks are read; None takes float64 when every tensor is
            float64, otherwise float32.

    Attributes:
        numel: Total number of values N.
        device: Device of all tensors.
        dtype: Dtype blocks are read in.

    Raises:
        ShapeError: If there is no tensor, one is not floating, or the devices differ.
    """

    def __init__(
        self, tensors: Sequence[Tensor], block: int = BLOCK, dtype: torch.dtype | None = None
    ) -> None:
        if not tensors:
            raise ShapeError("a flat view needs at least one tensor, got none.")
        if block < 2 or block % 2:
            raise ShapeError(f"block must be a positive even number of values, got {block!r}.")
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
        if dtype is None:
            double = all(tensor.dtype == torch.float64 for tensor in tensors)
            dtype = torch.float64 if double else torch.float32
        self.dtype = dtype
        self.block = block
        self._packed: FlatView | None = None
        self._places: tuple[Tensor, list[_Place]] | None = None
        self._addresses: tuple[_Integers, _Integers] | None = None
        self._table: PointerTable | None = None
        self._copied: tuple[dict[torch.dtype, int], PointerTable] | None = None  # of empty_like()

    # What follows is made when it is asked for: kernels on a GPU ask for none of it, and at a
    # billion weights it takes many times as long as they do.

    @cached_property
    def _starts(self) -> Tensor:
        """Flat position [T + 1] int64 of each tensor, and N."""
        return torch.tensor([0, *accumulate(tensor.numel() for tensor in self._tensors)])

    @cached_property
    def _pieces(self) -> list[list[_Piece]]:
        """The parts of tensors that each block is made of."""
        found: list[list[_Piece]] = [[] for _ in range(-(-self.numel // self.block))]
        for tensor, start in zip(self._tensors, self._starts.tolist(), strict=False):
            low, end = start, start + tensor.numel()
            while low < end:
                number = low // self.block
                high = min(end, (number + 1) * self.block)
                found[number].append((tensor, low - start, high - start))
                low = high
        return found

    @cached_property
    def _views(self) -> list[list[Tensor] | None]:
        """Those parts as vectors; None for a block of which some would have to be copied."""
        found: list[list[Tensor] | None] = []
        for pieces in self._pieces:
            views = [
                tensor.view(-1)[a:b]
                for tensor, a, b in pieces
                if tensor.is_contiguous() and tensor.dtype == self.dtype
            ]
            found.append(views if len(views) == len(pieces) else None)
        return found

    @cached_property
    def _contiguous(self) -> list[_Piece] | None:
        """All of them with their flat positions; None if some would have to be copied."""
        if any(views is None for views in self._views):
            return None
        start, found = 0, []
        for view in (view for views in self._views for view in views or ()):
            found.append((view, start, start + view.numel()))
            start += view.numel()
        return found

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors themselves, detached: what operators on lists of tensors are given."""
        return self._tensors

    def empty_like(self) -> FlatView:
        """Return a view of new, uninitialised tensors of the same shapes, dtypes and strides.

        Those of one dtype lie behind one another in one piece of memory, each at a place that 16
        divides. (Where strides leave gaps or overlap, a tensor is made contiguous.)
        """
        sizes: dict[torch.dtype, list[int]] = {}
        for tensor in self._tensors:
            sizes.setdefault(tensor.dtype, []).append(_padded(tensor.numel()))
        memory = {
            dtype: torch.empty(sum(room), dtype=dtype, device=self.device)
            for dtype, room in sizes.items()
        }
        parts = {dtype: iter(torch.split(memory[dtype], room)) for dtype, room in sizes.items()}
        made: list[Tensor] = []
        for tensor in self._tensors:
            flat = next(parts[tensor.dtype])
            if tensor.is_contiguous():
                strides = tensor.stride()
            else:
                strides = torch.empty_like(tensor, device="meta").stride()
            made.append(flat.as_strided(tensor.shape, strides))
        view = FlatView(made, self.block, self.dtype)
        if self._table is not None:  # kernels that ask for it will ask for that of the new view
            places = {dtype: flat.data_ptr() for dtype, flat in memory.items()}
            if self._copied is None:
                self._copied = places, view.pointer_table()
            else:
                before, table = self._copied
                view._table = table.moved({d: places[d] - before[d] for d in places})
        return view

    def pointer_table(self, beside: FlatView | None = None) -> PointerTable:
        """Return where every block of weights lies, for kernels that read all of them at once.

        Args:
            beside: Another view of the same shapes: both tables have the same launches then.
        """
        own = strides_of(self._tensors)
        if beside is not None:
            others = strides_of(beside._tensors)
            either = [a or b for a, b in zip(own, others, strict=True)]
            if either != own:
                return PointerTable(self._tensors, either)
        if self._table is None:
            self._table = PointerTable(self._tensors, own)
        return self._table

    def is_current(self, tensors: Sequence[Tensor]) -> bool:
        """Whether this view still addresses these tensors: the same storage in the same order."""
        return list(map(Tensor.data_ptr, tensors)) == self._pointers

    def scratch(self) -> Tensor:
        """Return an uninitialised vector that fits any block: [min(block, N)], ``dtype``."""
        return torch.empty(min(self.block, self.numel), dtype=self.dtype, device=self.device)

    def packed(self) -> FlatView:
        """Return a view of a copy of the values in one vector, if they all fit into one block.

        A network of many small tensors is read several times in an update; copied together once,
        each reading costs one operation instead of one a tensor. The copy is refreshed by every
        call. Larger networks, and single vectors, get this view itself.
        """
        if len(self._views) != 1 or len(self._tensors) == 1:
            return self
        if self._packed is None:
            self._packed = FlatView([self.scratch()], self.block, self.dtype)
        self.read(0, self._packed._tensors[0])
        return self._packed

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """Yield (number, start, stop) of every block."""
        for number in range(len(self._pieces)):
            start = number * self.block
            yield number, start, min(self.numel, start + self.block)

    def read(self, number: int, scratch: Tensor) -> Tensor:
        """Return the values of one block, [n], ``dtype``.

        They are a view of the weights if possible, else a copy in ``scratch``.
        """
        views = self._views[number]
        if views is not None:
            if len(views) == 1:
                return views[0]
            start = number * self.block
            return torch.cat(views, out=scratch[: min(self.block, self.numel - start)])
        at = 0
        for tensor, a, b in self._pieces[number]:
            rows, skip = _rows(tensor, a, b)
            scratch[at : at + b - a].copy_(rows.reshape(-1)[a - skip : b - skip])
            at += b - a
        return scratch[:at]

    @cached_property
    def addressable(self) -> bool:
        """Whether :meth:`pointer_table` can describe all tensors."""
        return all(PointerTable.addressable(tensor) for tensor in self._tensors)

    def pieces(self) -> list[_Piece] | None:
        """Return (values [n], start, stop) of the pieces that blocks are made of, all views.

        They are what compiled loops of the CPU read. None on another device, or if some tensor is
        not contiguous or of another dtype and would have to be copied.
        """
        return self._contiguous if self.device.type == "cpu" else None

    def addresses(self) -> tuple[_Integers, _Integers]:
        """Return (address of each piece [P] uint64, its flat position and N [P + 1] int64).

        Raises:
            ShapeError: If :meth:`pieces` is None.
        """
        if self._contiguous is None:
            raise ShapeError("only contiguous tensors of the view's dtype have addresses.")
        if self._addresses is None:
            self._addresses = (
                np.array([values.data_ptr() for values, _, _ in self._contiguous], np.uint64),
                np.array([start for _, start, _ in self._contiguous] + [self.numel], np.int64),
            )
        return self._addresses

    def write(self, number: int, values: Tensor, where: Tensor | None = None) -> None:
        """Write [n] values into the tensors of a block, in place, rounding to their dtypes.

        Args:
            number: The block.
            values: [n].
            where: [n] bool, which values to write; the others keep their bits. None writes all.
        """
        at = 0
        for tensor, a, b in self._pieces[number]:
            part = values[at : at + b - a]
            mask = None if where is None else where[at : at + b - a]
            if tensor.is_contiguous():
                _write(tensor.view(-1)[a:b], part, mask)
            else:
                rows, skip = _rows(tensor, a, b)
                flat = rows.reshape(-1)  # usually a copy, because the tensor is not contiguous
                _write(flat[a - skip : b - skip], part, mask)
                rows.copy_(flat.view(rows.shape))
            at += b - a

    def gather(self, indices: Tensor) -> Tensor:
        """Return the values at flat positions ``indices`` [K] int64, CPU, as float64 on the CPU."""
        out = torch.empty(indices.numel(), dtype=torch.float64)
        for tensor, chosen, where in self._located(indices):
            values = tensor.index_select(0, where[0]) if len(where) == 1 else tensor[where]
            out.index_copy_(0, chosen, values.to("cpu", torch.float64))
        return out

    def put(self, indices: Tensor, values: Tensor) -> None:
        """Write ``values`` [K] at flat positions ``indices`` [K] int64, CPU, in place."""
        for tensor, chosen, where in self._located(indices):
            tensor[where] = values[chosen].to(self.device, tensor.dtype)

    def addresses_of(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return where weights lie in memory, [K] int64, and in which dtype, [K] int64, on the CPU.

        Args:
            indices: [K] int64 flat positions, CPU.

        Dtypes are numbers: 0 float16, 1 bfloat16, 2 float32, 3 float64.
        """
        addresses, kinds = torch.empty_like(indices), torch.empty_like(indices)
        for tensor, chosen, where in self._locate(indices):
            offset = torch.zeros_like(chosen)
            for position, stride in zip(where, tensor.stride(), strict=True):
                offset += position.cpu() * stride
            addresses[chosen] = tensor.data_ptr() + offset * tensor.element_size()
            kinds[chosen] = _KINDS.index(tensor.dtype)
        return addresses, kinds

    def _located(self, indices: Tensor) -> list[_Place]:
        """Return each tensor that holds some of the positions, which ones [k], and where.

        The last answer is kept: an update asks for the same positions every time.
        """
        if self._places is None or self._places[0] is not indices:
            self._places = (indices, list(self._locate(indices)))
        return self._places[1]

    def _locate(self, indices: Tensor) -> Iterator[_Place]:
        owner = torch.searchsorted(self._starts, indices, right=True) - 1
        for index in sorted(set(owner.tolist())):
            tensor = self._tensors[index]
            chosen = (owner == index).nonzero()[:, 0]
            inside = (indices[chosen] - self._starts[index]).to(self.device)
            if tensor.is_contiguous():
                yield tensor.view(-1), chosen, (inside,)
            else:
                yield tensor, chosen, torch.unravel_index(inside, tensor.shape)

    def sum_of_squares(self) -> float:
        """Return the sum of the squares of all values, in one pass without a temporary of size N.

        Summed in the view's dtype within a block or a tensor, in float64 over them. Not finite if
        a value is not, or if it overflows.
        """
        if self.device.type != "cpu":
            # One launch for all tensors of a precision, and one answer to wait for.
            return _sum_of_squares([t for t in self._tensors if t.numel()])
        scratch = self.scratch()
        total = 0.0
        for number, _, _ in self.blocks():
            for values in self._views[number] or [self.read(number, scratch)]:
                total += torch.dot(values, values).item()
        return total

    def count_non_finite(self) -> int:
        """Return how many values are NaN or infinite, in one pass without a temporary of size N."""
        if self.device.type != "cpu":
            # One launch for all tensors and one answer to wait for. A norm is finite unless a value
            # is not (or it overflows): the exact count is only taken then.
            norms = torch._foreach_norm([t for t in self._tensors if t.numel()])
            if not norms or bool(torch.isfinite(torch.stack([n.double() for n in norms])).all()):
                return 0
        scratch = self.scratch()
        count = 0
        for number, _, _ in self.blocks():
            for values in self._views[number] or [self.read(number, scratch)]:
                if not math.isfinite(values.sum().item()):  # likewise
                    count += int((~torch.isfinite(values)).sum())
        return count

    def first_non_finite(self) -> int | None:
        """Return the flat position of the first NaN or infinite value, None if there is none."""
        scratch = self.scratch()
        for number, start, _ in self.blocks():
            bad = (~torch.isfinite(self.read(number, scratch))).nonzero()
            if len(bad):
                return start + int(bad[0, 0])
        return None


Weights = FlatView | Sequence[Tensor]


def as_view(weights: Weights, dtype: torch.dtype | None = None) -> FlatView:
    """Return the weights a kernel was given as a flat view: itself, or one of its tensors."""
    return weights if isinstance(weights, FlatView) else FlatView(weights, dtype=dtype)


def tensors_of(weights: Weights) -> list[Tensor]:
    """Return the weights a kernel was given as a list of tensors, for its custom operator."""
    if isinstance(weights, FlatView):
        return weights.tensors
    return [tensor.detach() for tensor in weights]


def _sum_of_squares(tensors: Sequence[Tensor]) -> float:
    half, full = [t for t in tensors if t.itemsize < 4], [t for t in tensors if t.itemsize >= 4]
    norms = [*torch._foreach_norm(full)] if full else []
    norms += torch._foreach_norm(half, dtype=torch.float32) if half else []
    return float(torch.stack([norm.double() for norm in norms]).square().sum()) if norms else 0.0


def _padded(numel: int) -> int:
    """Return the next number that 16 divides."""
    return numel + -numel % 16


def _write(target: Tensor, values: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        target.copy_(values)
    else:
        torch.where(mask, values.to(target.dtype), target, out=target)


def _rows(tensor: Tensor, a: int, b: int) -> tuple[Tensor, int]:
    """Return the rows of a tensor that hold its values a..b, and the number of values before."""
    if not tensor.ndim:
        return tensor, 0
    width = tensor.numel() // tensor.shape[0]
    first = a // width
    return tensor[first : -(-b // width)], first * width
