"""Compiled code is loaded while a training begins, and nothing else changes."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from cmd_plugin.kernels import _dispatch, background, bench_cases
from cmd_plugin.kernels.background import _Loader, load_in_background
from cmd_plugin.kernels.bench_cases import Problem
from cmd_plugin.modes import Embedding, OnlineModes

F32 = torch.float32
CASES = {case.name: case for case in bench_cases.CASES}
FIRST = {"update_affine", "snapshot_delta", "reconstruct"}
EMBEDDING = {"coefficient_drift", "select_smallest", "apply_embedding", "fold_gradients"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype]]:
    """What is to be loaded, instead of loading it."""
    steps: list[tuple[str, torch.dtype]] = []
    monkeypatch.setattr(background._loader, "add", steps.extend)
    monkeypatch.setattr(_dispatch, "_installed", lambda package: package == "numba")
    monkeypatch.delenv(_dispatch.VARIABLE, raising=False)
    return steps


def test_what_a_run_will_call_is_loaded(asked: list[tuple[str, torch.dtype]]) -> None:
    model = nn.Linear(300, 300)
    OnlineModes(model)
    assert {*asked} == {(name, F32) for name in FIRST}
    asked.clear()
    OnlineModes(model.double(), embedding=Embedding())
    assert {*asked} == {(name, torch.float64) for name in FIRST | EMBEDDING}
    asked.clear()
    load_in_background(None, F32, 10_000_000, snapshots=21, modes=10, embedding=False)
    assert {*asked} == {(name, F32) for name in FIRST | {"assign_and_fit"}}


def test_nothing_is_loaded_that_will_not_run(
    asked: list[tuple[str, torch.dtype]], monkeypatch: pytest.MonkeyPatch
) -> None:
    OnlineModes(nn.Linear(20, 20))  # too small to be worth it
    options = {"snapshots": 21, "modes": 10, "embedding": True}
    elsewhere = nn.Linear(2, 2, device="meta")
    load_in_background(elsewhere, F32, 10_000_000, **options)
    monkeypatch.setenv(_dispatch.VARIABLE, "torch")
    OnlineModes(nn.Linear(300, 300))
    monkeypatch.delenv(_dispatch.VARIABLE)
    monkeypatch.setattr(_dispatch, "_installed", lambda _: False)
    OnlineModes(nn.Linear(300, 300))
    assert not asked


def slow(taken: list[str], begun: threading.Event, go: threading.Event) -> Callable[..., None]:
    def work(name: str, _: torch.dtype) -> None:
        begun.set()
        assert go.wait(10)
        taken.append(name)
        if name == "bad":
            raise ImportError

    return work


def test_a_loader_leaves_between_two_steps_and_goes_on_where_it_was() -> None:
    taken: list[str] = []
    begun, go = threading.Event(), threading.Event()
    loader = _Loader(slow(taken, begun, go))
    loader.add([("bad", F32), ("b", F32), ("bad", F32)])
    assert begun.wait(10)
    assert not taken  # whoever made it does not wait
    loader._asked_to_leave = True
    go.set()
    loader.leave()
    assert taken == ["bad"]  # an error is left to whoever calls the kernel
    loader.add([("b", F32), ("c", F32), ("bad", F32)])
    assert loader._thread is not None
    loader._thread.join()
    assert taken == ["bad", "b", "c"]


def test_a_process_forks_and_ends_while_numba_is_imported_and_compiles() -> None:
    code = """
import os, sys
from torch import nn
from cmd_plugin.kernels import background, last_backend
from cmd_plugin.modes import OnlineModes
OnlineModes(nn.Linear(300, 300))
assert background._loader._thread is not None
child = os.fork()
if not child:
    import numba
    os._exit(5)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
assert last_backend() is None
sys.exit(3)
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.parametrize("kernel", sorted(FIRST | EMBEDDING | {"assign_and_fit"}))
def test_what_was_loaded_is_what_is_called(kernel: str) -> None:
    """No call compiles anything anew: dtypes, contiguity and numbers are those of the steps."""
    module = importlib.import_module(f"cmd_plugin.kernels.{kernel}._numba")
    compiled = [thing for thing in vars(module).values() if hasattr(thing, "signatures")]
    run, _ = CASES[kernel].prepare(Problem(3000, torch.device("cpu")))
    background._compile(kernel, F32)
    known = [{*thing.signatures} for thing in compiled]
    run("numba")
    assert compiled
    assert [{*thing.signatures} for thing in compiled] == known
