"""Tests run on each path their marker names; new memory is full of NaN, between guarded margins.

``TRITON_INTERPRET=1 pytest tests/kernels -m interpret`` runs the same tests on Triton's
interpreter; :mod:`test_other_processes` does that in a process of its own.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


def _load_helpers() -> None:
    # With --import-mode=importlib a test folder is not on the path.
    for name in ("kernel_toys", "races"):
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


_load_helpers()

from kernel_toys import PATHS, Guards  # noqa: E402 it was loaded just now

from cmd_plugin.kernels import _dispatch  # noqa: E402


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on the paths its ``paths`` marker names, of those this process has."""
    marker = metafunc.definition.get_closest_marker("paths")
    if marker is not None:
        marks = {"triton": [pytest.mark.interpret]}
        chosen = [path for path in PATHS if path in marker.args]
        params = [pytest.param(path, marks=marks.get(path, [])) for path in chosen]
        metafunc.parametrize("path", params, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests out that are about paths of another process."""

    def elsewhere(item: pytest.Item) -> bool:
        marker = item.get_closest_marker("paths")
        return marker is not None and not {*marker.args} & {*PATHS}

    left_out = [item for item in items if elsewhere(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The implementation that ``backend="auto"`` takes in this test, wherever it fits."""
    chosen: str | None = getattr(request, "param", None)
    if chosen == "triton":
        monkeypatch.setenv(_dispatch.VARIABLE, "triton")
    elif chosen is not None:
        worth = 0 if chosen == "numba" else 1 << 62
        monkeypatch.setattr(_dispatch, "_WORTH_COMPILING", worth)
    return chosen


@pytest.fixture(autouse=True)
def guards(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Guards | None]:
    """Fill new memory with NaN, so that what a kernel leaves unwritten shows; guard its edges."""
    if request.node.get_closest_marker("compile") is not None:
        yield None  # the compiler traces torch.empty and would trace what stands in for it
        return
    room = Guards()

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.device.type != "cpu" or type(tensor) is not Tensor:
                return tensor
            if tensor.dtype == torch.bool:
                tensor.fill_(True)
            elif tensor.is_floating_point():
                tensor.fill_(float("nan"))
            else:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
            return room.surround(tensor) if tensor.is_contiguous() else tensor

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    yield room
    room.check()
