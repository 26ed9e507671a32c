"""What every test starts from and must leave behind."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator

# Before anything imports matplotlib, a model hub or torch; child processes of a test inherit them.
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
# Threads that wait for one another spin: on two cores, two test processes with two threads each
# take many times the processor time of one thread each. A test that needs more asks for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch
from hypothesis import settings

# transformers asks for a package of this name and would find the folder at the top.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

settings.register_profile(
    "ci", derandomize=True, database=None, deadline=None, max_examples=50, print_blob=True
)
settings.register_profile(
    "interpret", derandomize=True, database=None, deadline=None, max_examples=8, print_blob=True
)
settings.register_profile("dev", deadline=None, max_examples=100)
settings.register_profile("deep", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """Let several processes keep the order below: theirs has a file of one long test last."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long, so that several processes end at about the same time."""
    long = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data folder on the developer's machine must not change which data a test sees."""
    monkeypatch.delenv("CMD_PLUGIN_DATA", raising=False)


@pytest.fixture(autouse=True)
def restored_environment() -> Iterator[None]:
    """Undo changes of the environment: Lightning, for one, writes seeds and ranks into it."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def restored_torch() -> Iterator[None]:
    """Start from the same random numbers in any order of tests; undo torch's global settings."""
    threads = torch.get_num_threads()
    dtype = torch.get_default_dtype()
    grad = torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    matmul = torch.get_float32_matmul_precision()
    cudnn = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
    torch.set_float32_matmul_precision(matmul)
    if (
        torch.are_deterministic_algorithms_enabled() != deterministic
    ):  # setting it loads the compiler
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.set_grad_enabled(grad)
    torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    """Close what a test drew; only pyplot keeps figures alive, so nothing is imported for this."""
    yield
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close("all")


@pytest.fixture(autouse=True)
def no_process_group_left() -> Iterator[None]:
    """Fail the test that leaves a process group open, not the next one that wants its own."""
    yield
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("the test left a torch.distributed process group open")
