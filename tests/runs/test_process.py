"""Settings of the process: devices by name, and what is given back."""

from __future__ import annotations

import pytest
import torch

from cmd_plugin.errors import InputError
from cmd_plugin.runs.process import find_device, own_determinism


def test_devices_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("gpu", "cuda", "auto"):
        assert find_device(name) == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")
    with pytest.raises(InputError, match="no gpu device"):
        find_device("gpu")


def test_deterministic_algorithms_are_taken_on_a_gpu_and_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(
        torch,
        "use_deterministic_algorithms",
        lambda mode, warn_only: asked.append((mode, warn_only)),
    )
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with own_determinism(torch.device("cpu")):
        pass
    assert asked == []
    with pytest.raises(ValueError, match="inside"), own_determinism(torch.device("cuda")):
        raise ValueError("inside")
    assert asked == [(True, True), (False, False)]
