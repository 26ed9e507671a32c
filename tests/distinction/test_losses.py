"""The terms of the loss, against what they are by definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import softmax

from cmd_plugin.distinction import losses
from cmd_plugin.distinction.critic import Critic
from cmd_plugin.distinction.objectives import (
    OBJECTIVES,
    LossWeights,
    critic_loss,
    find_objective,
    mixed_loss,
)
from cmd_plugin.errors import InputError, ShapeError
from tests.helpers.distinction import Linear, images


def branches(seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 1, 6, 6, generator=draw, dtype=torch.float64).requires_grad_()


def test_the_mixtures_add_up_whatever_the_shares() -> None:
    own, other = branches(0), branches(1)
    shares = torch.rand(4, 2, dtype=torch.float64)
    a, b = losses.blend(own, other, shares)
    torch.testing.assert_close(a + b, own[:, 0] + (own[:, 1:] + other[:, 1:]).sum(dim=1))


def test_with_all_of_its_own_a_mixture_is_the_image() -> None:
    own, other = branches(0), branches(1)
    a, b = losses.blend(own, other, torch.ones(4, 2, dtype=torch.float64))
    torch.testing.assert_close(a, own.sum(dim=1))
    torch.testing.assert_close(b, other[:, 1:].sum(dim=1))


def test_the_distinct_branch_of_the_other_class_learns_nothing() -> None:
    own, other = branches(0), branches(1)
    a, b = losses.blend(own, other, torch.rand(4, 2, dtype=torch.float64))
    (a.square().sum() + b.square().sum()).backward()
    assert other.grad is not None
    assert own.grad is not None
    assert not other.grad[:, 0].any()
    assert own.grad[:, 0].any()
    with pytest.raises(ShapeError):
        losses.blend(own, other, torch.ones(4, 3))


@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_other_class_is_another_and_each_is_drawn(count: int) -> None:
    classes = torch.arange(count).repeat_interleave(1000)
    others = losses.other_classes(classes, count, torch.rand(len(classes)))
    assert bool((others != classes).all())
    for label in range(count):
        shares = torch.bincount(others[classes == label], minlength=count) / 1000
        wanted = torch.full((count,), 1 / (count - 1))
        wanted[label] = 0.0
        # four standard deviations of a share of 1000 draws
        assert float((shares - wanted).abs().max()) < 4 * math.sqrt(0.25 / 1000)


def test_the_penalty_of_a_linear_critic_is_half_its_squared_weights() -> None:
    critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    weight = critic[1].weight
    classes = torch.tensor([1, 1, 1, 1])
    found = losses.gradient_penalty(critic, images(), classes)
    torch.testing.assert_close(found, 0.5 * weight[1].square().sum())
    found.backward()
    torch.testing.assert_close(weight.grad[1], weight[1].detach())  # d/dw of |w|^2 / 2
    single = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    found = losses.gradient_penalty(single, images(), classes)
    torch.testing.assert_close(found, 0.5 * single[1].weight.square().sum())


def test_the_critic_answers_with_the_head_of_the_class() -> None:
    logits, classes = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([1, 0])
    wanted = (math.log1p(math.exp(2.0)) + math.log1p(math.exp(-0.5))) / 2
    assert losses.adversarial(logits, classes, 1.0).item() == pytest.approx(wanted)
    alone = losses.adversarial(torch.tensor([[0.0], [0.0]]), classes, 0.0)
    assert float(alone) == pytest.approx(math.log(2.0))


def test_divergences_are_their_formulas() -> None:
    one, other = torch.randn(5, 4), torch.randn(5, 4)
    p, q = softmax(other, 1), softmax(one, 1)
    torch.testing.assert_close(
        losses.distillation(one, other), (p * (p / q).log()).sum(dim=1).mean()
    )
    torch.testing.assert_close(losses.uniformity(one), -(q.log() / 4).sum(dim=1).mean())
    assert losses.uniformity(torch.zeros(3, 4)).item() == pytest.approx(math.log(4.0))
    assert losses.distillation(one, one).item() == pytest.approx(0.0, abs=1e-6)


def test_errors_of_reconstruction_are_counted_where_they_shall_be() -> None:
    made, x = images(seed=1), images(seed=2)
    error = (made - x).double()
    assert losses.reconstruction(made, x).item() == pytest.approx(
        float((error**2).mean() + error.abs().mean())
    )
    distinct = torch.zeros_like(x)
    distinct[:, :, 2, 3] = -5.0
    chosen = error[:, :, 2, 3]
    assert losses.distinct_reconstruction(made, x, distinct).item() == pytest.approx(
        float((chosen**2).mean() + chosen.abs().mean())
    )
    assert losses.distinct_reconstruction(made, x, torch.zeros_like(x)).item() == 0.0
    assert losses.sparsity(distinct).item() == pytest.approx(5.0 / 64)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_asks_those_it_names(name: str) -> None:
    """The class loss falls if the networks it listens to agree, and does not hear the others."""
    objective, x = find_objective(name), images()
    classes, others = torch.tensor([1, 1, 1, 1]), torch.zeros(4, dtype=torch.int64)
    critic = Critic(1, objective.heads(2), (8, 8), width=4)
    bright, dark = x + 3.0, x - 3.0
    classifier = Linear(torch.ones(1, 8, 8))
    weights = LossWeights(adversarial=0.0, reconstruction=0.0, distinct_reconstruction=0.0)

    def loss(a: torch.Tensor, b: torch.Tensor) -> float:
        given = classifier if objective.needs_classifier else None
        made = torch.cat([a, b])
        terms = mixed_loss(
            objective, critic, given, x, torch.zeros_like(x), made, classes, others, weights
        )
        return terms["classes"].item()

    if name == "distinction":
        answer = critic(torch.cat([bright, dark]))
        wanted = 4.0 * losses.class_loss(answer, torch.cat([classes, others]))
        assert loss(bright, dark) == pytest.approx(wanted.item())
        return
    assert loss(bright, dark) != loss(dark, bright)
    if name == "uniform":  # of the second mixture it wants that no class is seen
        grey = x - x.mean(dim=(1, 2, 3), keepdim=True)
        assert loss(bright, grey) < loss(bright, dark) < loss(dark, dark)
        assert loss(bright, grey) == pytest.approx(4.0 * 0.5 * math.log(2.0), rel=1e-3)
    else:
        assert loss(bright, dark) < loss(bright, bright) < loss(dark, bright)


def test_the_critic_learns_the_classifier_or_the_labels() -> None:
    x, classes, others = images(), torch.tensor([0, 1, 0, 1]), torch.tensor([1, 0, 1, 0])
    classifier = Linear(torch.ones(1, 8, 8))
    critic = Critic(1, 2, (8, 8), width=4)
    made = torch.cat([x, x]).requires_grad_()
    base = losses.adversarial(critic(x), classes, 1.0) + losses.adversarial(
        critic(made), torch.cat([classes, others]), 0.0
    )
    common = (x, made, classes, others)
    weights = LossWeights()
    found = critic_loss(OBJECTIVES["dxai"], critic, classifier, *common, 0.0, weights)
    torch.testing.assert_close(found, base)
    found = critic_loss(OBJECTIVES["dxai_distilled"], critic, classifier, *common, 0.0, weights)
    torch.testing.assert_close(found, base + losses.distillation(critic(x), classifier(x)))
    found = critic_loss(OBJECTIVES["distinction"], critic, None, *common, 16.0, weights)
    penalty = losses.gradient_penalty(critic, x, classes)
    torch.testing.assert_close(found, base + losses.class_loss(critic(x), classes) + 16.0 * penalty)
    found.backward()
    assert made.grad is None  # the critic's loss trains the critic


def test_wrong_names_and_weights_are_refused() -> None:
    with pytest.raises(InputError, match="choose one of dxai_distilled, dxai"):
        find_objective("gan")
    with pytest.raises(InputError, match="the weight classes"):
        LossWeights(classes=-1.0)


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (28, 28), (16, 9)])
def test_the_critic_takes_any_size(size: tuple[int, int]) -> None:
    assert Critic(3, 5, size, width=4)(torch.zeros(2, 3, *size)).shape == (2, 5)
