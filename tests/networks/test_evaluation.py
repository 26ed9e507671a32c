"""One evaluation for all, by hand and without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError
from cmd_plugin.networks import Score, evaluate


def test_evaluation_by_hand_and_neutral() -> None:
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    module[1].eval()  # a mixed state must come back as it was
    images, labels = torch.randn(20, 4), torch.randint(0, 3, (20,))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = torch.get_rng_state()
    score = evaluate(module, [(images[:13], labels[:13]), (images[13:], labels[13:])])
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in module] == [True, False, True]
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items())
    module.eval()
    scores = module(images).detach()
    loss = -scores.log_softmax(1)[torch.arange(20), labels].mean()
    assert isinstance(score, Score)
    assert score.loss == pytest.approx(float(loss), rel=1e-5)
    assert score.accuracy == int((scores.argmax(1) == labels).sum()) / 20


def test_a_network_that_draws_and_counts_is_left_as_it_was() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x + torch.randn_like(x)

    network, batch = Noisy(), (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
    state = torch.get_rng_state()
    first, again = evaluate(network, [batch] * 2), evaluate(network, [batch] * 2)
    assert first == again
    assert float(network.calls) == 0.0
    assert torch.equal(state, torch.get_rng_state())


def test_no_example_is_an_error_in_one_sentence() -> None:
    with pytest.raises(InputError, match="nothing to evaluate on"):
        evaluate(nn.Linear(2, 2), [])
