"""Settings of the whole process that a job needs and gives back."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cmd_plugin.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = [
    "ACCELERATORS",
    "check_accelerator",
    "kept_interrupt_handler",
    "own_random_state",
    "own_threads",
    "pick_device",
    "quiet_lightning",
]

_LIGHTNING_LOGGERS = (
    "pytorch_lightning",
    "lightning_fabric",
    "lightning.pytorch",
    "lightning.fabric",
)

# Lightning's advice on the machine, and its own use of old functions: nothing a user could mend.
_LIGHTNING_WARNINGS = (
    r".*does not have many workers",
    r"(GPU|MPS|TPU).* available but not used",
    r".*isinstance\(treespec, LeafSpec\)",
    r"The number of training batches",
    r"You defined a `validation_step` but have no `val_dataloader`",
    r"Found \d+ module\(s\) in eval mode",  # a frozen network shall be
)

ACCELERATORS = ("cpu", "auto", "gpu", "cuda", "mps")


def check_accelerator(name: str) -> None:
    """Refuse a device that is not there.

    Args:
        name: One of :data:`ACCELERATORS`.

    Raises:
        InputError: If it is not.
    """
    import torch

    missing = (name in ("gpu", "cuda") and not torch.cuda.is_available()) or (
        name == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise InputError(f"no {name} device was found: pass --accelerator cpu or auto.")


def pick_device(name: str) -> torch.device:
    """Return the device that an accelerator's name stands for; of ``"auto"`` a GPU if there is one.

    Args:
        name: One of :data:`ACCELERATORS`.

    Raises:
        InputError: If it is not there.
    """
    import torch

    check_accelerator(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda" if name == "gpu" else name)


@contextmanager
def own_random_state() -> Iterator[None]:
    """Give torch's global random state back as it was, on the CPU and on every CUDA device."""
    import torch

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def own_threads(threads: int | None) -> Iterator[None]:
    """Use so many CPU threads inside; None changes nothing."""
    import torch

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads is not None:
            torch.set_num_threads(before)


@contextmanager
def kept_interrupt_handler() -> Iterator[None]:
    """Give the handler of Ctrl-C back: Lightning leaves it switched off after the first one."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, so Lightning does not either
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's notes on the machine out of the way; its errors still show."""
    loggers = [logging.getLogger(name) for name in _LIGHTNING_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in _LIGHTNING_WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
