"""Recorded launches: what they do is what calling them does."""

from __future__ import annotations

import pytest
import torch

from cmd_plugin.kernels.replay import Replay
from cmd_plugin.modes import OnlineModes


def test_without_a_gpu_every_call_does_the_work() -> None:
    values = torch.zeros(3)

    def work() -> None:
        values.add_(1.0)

    replay = Replay(work, values.device)
    for _ in range(4):
        replay()
    assert values.tolist() == [4.0] * 3


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
def test_on_a_gpu_every_call_does_the_work_once() -> None:
    values = torch.zeros(3, device="cuda")
    calls = []

    def work() -> None:
        calls.append(1)
        values.add_(1.0)

    replay = Replay(work, values.device)
    for _ in range(5):
        replay()
        values.mul_(2.0)
    assert values.tolist() == [62.0] * 3
    assert len(calls) == 2  # once done, once recorded


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("shrink", [False, True])
def test_recorded_updates_have_the_bits_of_called_ones(
    shrink: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> OnlineModes:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 10)).cuda()
        modes = OnlineModes(model, modes=3, warmup=3, shrink=shrink)
        for number in range(12):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))
            modes.update()
            if number == 7:
                modes.explained_variance()  # looks, and the run goes on
        return modes

    recorded = run()
    monkeypatch.setattr(Replay, "__call__", lambda self: self._work())
    called = run()
    assert torch.equal(recorded.reconstruct(), called.reconstruct())
    one, other = recorded.state_dict()["tracker"], called.state_dict()["tracker"]
    for name in ("slope", "mean", "squares", "profiles", "profile_mean", "unit"):
        assert torch.equal(one[name], other[name]), name
    assert one["total_sum"] == other["total_sum"]
