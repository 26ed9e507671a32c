"""A whole run of the callback computes with the kernels, on any path, and with nothing else."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
from callback_toys import SMALL, make_module, make_trainer, toy_loader
from torch import Tensor

from cmd_plugin.callbacks import CMDCallback
from cmd_plugin.kernels import _dispatch, last_backend
from cmd_plugin.modes import OnlineModes

KERNELS = ["assign_and_fit", "snapshot_delta", "swap_in", "swap_out", "update_affine"]

# Where each of them is computed in PyTorch.
PLACES = {
    "assign_and_fit": ("assign_and_fit", "assign_and_fit"),
    "snapshot_delta": ("snapshot_delta", "snapshot_delta"),
    "swap_in": ("swap", "reconstruct"),
    "swap_out": ("swap", "copy"),
    "update_affine": ("update_affine", "update_affine"),
}


@pytest.fixture(autouse=True)
def nothing_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_last", {})


def run(accelerator: str = "cpu", **options: Any) -> Tensor:
    """Train five epochs with validation of raw and modelled weights; return the modelled ones."""
    callback = CMDCallback(**SMALL, **options)
    trainer = make_trainer(callback, accelerator=accelerator)
    trainer.fit(make_module(), toy_loader(), toy_loader(seed=2))
    assert callback.modes is not None
    return callback.modes.reconstruct()


@pytest.mark.interpret
def test_a_run_goes_through_the_public_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter's process: through the Triton kernels, from the callback to the launch."""
    path = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "torch"
    monkeypatch.setenv(_dispatch.VARIABLE, path)
    weights = run()
    assert set(_dispatch._last) >= set(KERNELS)
    assert {last_backend(name) for name in KERNELS} == {path}
    monkeypatch.setenv(_dispatch.VARIABLE, "torch")
    torch.testing.assert_close(weights, run(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_without_a_kernel_nothing_is_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second implementation takes over: a run stops where its kernel does."""

    def broken(*_: Any) -> None:
        raise MemoryError(name)

    monkeypatch.setenv(_dispatch.VARIABLE, "torch")
    folder, function = PLACES[name]
    module = importlib.import_module(f"cmd_plugin.kernels.{folder}._blocked")
    monkeypatch.setattr(module, function, broken)
    with pytest.raises(MemoryError, match=name):
        run()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_goes_through_triton() -> None:
    weights = run("gpu")
    assert {last_backend(name) for name in KERNELS} == {"triton"}
    assert weights.is_cuda
    assert torch.isfinite(weights).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_update_on_a_gpu_waits_for_nothing() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 10)).cuda()
    modes = OnlineModes(model, modes=3, warmup=3)

    def step() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))

    for _ in range(6):
        step()
        modes.update()
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        modes.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(modes.reconstruct().isfinite().all())
