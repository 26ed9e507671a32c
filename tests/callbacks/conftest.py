"""Lightning's chatter, this folder's shared helpers, and one fixture over both distributions."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent


def _load_helper(name: str) -> None:
    # With --import-mode=importlib a folder of tests is not on the path; child processes load the
    # same file, because their scripts lie beside it.
    path = _HERE.parent / "helpers" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_load_helper("callback_toys")
_load_helper("clip_toys")

# Advice about speed and set-up that tiny runs cannot follow. Everything else stays an error.
_CHATTER = (
    r"The '\w+' does not have many workers",
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"Trainer already configured with model summary callbacks",
    r"You defined a `validation_step` but have no `val_dataloader`",
    r"Checkpoint directory .* exists and is not empty",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Silence the advice for the tests of this folder only."""
    for item in items:
        if _HERE in item.path.parents:
            for message in _CHATTER:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{message}"))


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def namespace(request: pytest.FixtureRequest) -> str:
    """Each Lightning distribution, if it is installed."""
    pytest.importorskip(request.param.partition(".")[0])
    return str(request.param)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bit-exact comparisons want one order of summation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
