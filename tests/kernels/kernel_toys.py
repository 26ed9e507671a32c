"""What the tests of the kernels share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from cmd_plugin.kernels import flat_view, pointer_table

# Triton interprets kernels only if this was set before their modules were imported.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

PATHS = ("triton",) if INTERPRETING else ("torch", "numba")

# Weights in the largest unit of work of the paths under test: one more needs a second one.
BLOCK = pointer_table.BLOCK if INTERPRETING else flat_view.BLOCK

_ROOT = Path(__file__).parent.parent.parent
_MARGIN = 64
_SENTINEL = 0x5A


class Guards:
    """Memory around new tensors that nobody may write to."""

    def __init__(self) -> None:
        self._rooms: list[tuple[Tensor, int, int]] = []

    def surround(self, tensor: Tensor) -> Tensor:
        """Return a tensor like a CPU one, its bytes between margins."""
        size = tensor.numel() * tensor.element_size()
        room = torch.full((size + 2 * _MARGIN,), _SENTINEL, dtype=torch.uint8)
        self._rooms.append((room, _MARGIN, _MARGIN + size))
        inside = room[_MARGIN : _MARGIN + size].view(tensor.dtype).view(tensor.shape)
        return inside.copy_(tensor) if size else tensor

    def check(self) -> None:
        """Fail if a byte of a margin has changed."""
        for room, low, high in self._rooms:
            assert (room[:low] == _SENTINEL).all(), "written before the beginning of a tensor"
            assert (room[high:] == _SENTINEL).all(), "written beyond the end of a tensor"


def run_python(command: list[str], **variables: str) -> str:
    """Run Python in a process of its own, with these variables; return all that it printed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "CMD_PLUGIN_"))}
    path = os.pathsep.join([str(_ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *command],
        env={**kept, "PYTHONPATH": path, **variables},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    return output
