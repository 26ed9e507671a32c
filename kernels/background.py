"""Load and compile the CPU paths while a training begins, before its first snapshot needs them.

Importing numba takes half a second, and compiling what is in no cache yet some seconds more: a
thread of its own does both. It decides nothing. Which path runs is chosen as ever, and whoever
needs a kernel sooner waits for it at Python's import lock or numba's compiler lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import nn

from cmd_plugin.kernels._dispatch import compiles
from cmd_plugin.kernels.assign_and_fit import effort
from cmd_plugin.kernels.flat_view import FlatView

__all__ = ["load_in_background"]

_ALWAYS = ("update_affine", "snapshot_delta", "reconstruct")
_EMBEDDING = ("coefficient_drift", "select_smallest", "apply_embedding", "fold_gradients")

_Step = tuple[str, torch.dtype]


def load_in_background(
    model: nn.Module | None,
    dtype: torch.dtype,
    numel: int,
    snapshots: int,
    modes: int,
    embedding: bool,
) -> None:
    """Start to load what online CMD will call, if that is the compiled CPU path; return at once.

    Args:
        model: Whose weights they are; None for weights that will come to the CPU.
        dtype: Dtype of the state, float32 or float64.
        numel: Number of weights N.
        snapshots: Number of snapshots that are fitted.
        modes: Number of modes they are fitted to.
        embedding: Whether weights are embedded.
    """
    parameters = () if model is None else model.parameters()
    device = next((p.device for p in parameters), torch.device("cpu"))
    kernels = (_ALWAYS + (_EMBEDDING if embedding else ())) if compiles(device, numel) else ()
    fit = ("assign_and_fit",) if compiles(device, effort(numel, snapshots, modes)) else ()
    _loader.add((name, dtype) for name in kernels + fit)


class _Loader:
    """A thread that takes one step after another, and can be asked to leave between two of them.

    If a process forks in the middle of an import, its child keeps a lock that nobody opens; so the
    thread leaves before a fork, and goes on after it. If an interpreter ends in the middle of a
    compilation, it crashes; so the thread is no daemon, and the end waits for the step it is at.
    """

    def __init__(self, work: Callable[[str, torch.dtype], None]) -> None:
        self._work = work
        self._known: set[_Step] = set()
        self._steps: list[_Step] = []
        self._thread: threading.Thread | None = None
        self._asked_to_leave = False

    def add(self, steps: Iterable[_Step]) -> None:
        """Take these steps too, each of them once in a process."""
        new = [step for step in dict.fromkeys(steps) if step not in self._known]
        self._known.update(new)
        self._steps.extend(new)
        self.go_on()

    def go_on(self) -> None:
        """Start a thread if there are steps to take and none takes them."""
        self._asked_to_leave = False
        if self._steps and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._run, name="cmd-plugin compiler")
            self._thread.start()

    def leave(self) -> None:
        """Return when no step is being taken any more."""
        self._asked_to_leave = True
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        # As soon as the interpreter begins to end, the main thread counts as dead.
        while self._steps and not self._asked_to_leave and threading.main_thread().is_alive():
            with suppress(Exception):  # whoever calls the kernel meets the same error, and raises
                self._work(*self._steps.pop(0))


def _compile(kernel: str, dtype: torch.dtype) -> None:
    """Compile a kernel, or load it from its cache, by calling it with next to nothing."""
    mode, flags = torch.zeros(2, dtype=torch.uint8), torch.zeros(2, dtype=torch.bool)
    a, b, c, d = torch.zeros(4, 2, dtype=dtype).unbind()
    view, table = FlatView([a], dtype=dtype), torch.zeros(1, dtype=torch.float64)
    module: Any = import_module(f"cmd_plugin.kernels.{kernel}._numba")
    if kernel == "update_affine":
        module.sum_of_squares(view)
        module.update_affine(view, mode, b, c, table, 0.5, 1.0, None)
    elif kernel == "snapshot_delta":
        module.snapshot_delta(view, b, torch.zeros(2, dtype=torch.bfloat16))
    elif kernel == "reconstruct":
        module.reconstruct(view, mode, b, c, table, None, None)
    elif kernel == "coefficient_drift":
        module.coefficient_drift(a, b, a, b, c)
    elif kernel == "select_smallest":
        module.select_smallest(a, 1, flags)
    elif kernel == "apply_embedding":
        module.apply_embedding(view, flags, mode, b, c, table)
    elif kernel == "fold_gradients":
        module.fold_gradients(a, flags, mode, b, 1)
    elif kernel == "assign_and_fit":
        rows = torch.zeros(2, 2, dtype=torch.bfloat16 if dtype == torch.float32 else dtype)
        profiles = torch.arange(3, dtype=torch.float64)[None]
        module.assign_and_fit(rows, profiles, b, (mode, a, c, d))


_loader = _Loader(_compile)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_loader.leave, after_in_parent=_loader.go_on)
