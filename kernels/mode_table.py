"""Look-up of a per-mode value for every weight, ``table[mode]``, without N indices."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ModeTable"]

_PAIR = {torch.float32: torch.float64, torch.float64: torch.complex128}


class ModeTable:
    """A table of M values, indexed by bytes.

    On a CPU two neighbouring mode bytes are read as one 16-bit index into a table of value pairs:
    it halves the number of look-ups, which cost more than the arithmetic around them. The table of
    pairs has 256 M entries, of which M^2 are read.

    Args:
        table: One value per mode, [M], M at most 256; float32 or float64.
        block: Largest number of weights in one look-up.
    """

    def __init__(self, table: Tensor, block: int) -> None:
        self.table = table.contiguous()
        self._paired = table.device.type == "cpu"
        if self._paired:
            modes = table.numel()
            pairs = torch.zeros(modes, 256, 2, dtype=table.dtype)  # [high byte, low byte, value]
            pairs[:, :modes, 0] = table
            pairs[:, :, 1] = table[:, None]
            self._pairs = pairs.view(_PAIR[table.dtype]).view(-1)
            self._index = torch.empty(block // 2 + 1, dtype=torch.int32)

    def lookup(self, mode: Tensor, out: Tensor) -> Tensor:
        """Fill ``out`` [n] with ``table[mode]`` for ``mode`` [n] uint8, and return it."""
        count = mode.numel()
        if not (self._paired and _pairs_up(mode) and _pairs_up(out)):
            return torch.index_select(self.table, 0, mode.to(torch.int32), out=out)
        even = count - count % 2
        if even:
            index = self._index[: even // 2]
            index.copy_(mode[:even].view(torch.uint16))
            torch.index_select(self._pairs, 0, index, out=out[:even].view(self._pairs.dtype))
        if count > even:
            out[even] = self.table[int(mode[even])]
        return out


def _pairs_up(vector: Tensor) -> bool:
    """Whether neighbours of a vector can be addressed as one value of twice the size."""
    twice = 2 * vector.element_size()
    aligned = int(vector.storage_offset()) % 2 == 0 and vector.data_ptr() % twice == 0
    return aligned and vector.is_contiguous()
