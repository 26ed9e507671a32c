"""Splitting images: exact by construction, in one pass, for any way of naming the class."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import softmax

from cmd_plugin.distinction import (
    BranchedGenerator,
    Decomposer,
    PixelRange,
    decompose,
    distinct_of_every_class,
)
from cmd_plugin.distinction.frozen import FrozenClassifier, hash_weights
from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from tests.helpers.distinction import Linear, conv_net, decomposer, images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_parts_are_the_image_to_round_off(dtype: torch.dtype) -> None:
    split = decompose(decomposer(low=-2.5), (100.0 * images()).to(dtype), 1)
    x = (100.0 * images()).to(dtype)
    bound = (1e-2 if dtype == torch.bfloat16 else 1e-6) * x.abs().max()
    assert (split.distinct + split.agnostic - x).abs().max() <= bound
    assert (split.branches.sum(dim=1) + split.residual - x).abs().max() <= 4 * bound
    assert torch.equal(split.distinct, split.branches[:, 0])
    assert {t.dtype for t in (split.distinct, split.agnostic, split.residual)} == {dtype}
    assert split.before is not None
    assert split.before.dtype == dtype


def test_everything_is_in_the_units_of_the_images() -> None:
    """Images normalised by mean and std are split as the plain ones are, times 1 / std."""
    plain = decomposer()
    mean, std = torch.tensor([0.3, 0.5, 0.2]), torch.tensor([0.2, 0.3, 0.1])
    net = plain.generator = BranchedGenerator(3, 2, 3, width=4)
    pixels = PixelRange((-mean / std).tolist(), ((1 - mean) / std).tolist())
    scaled = Decomposer(net, pixels)
    x = images(channels=3)  # in [-1, 1]
    normalised = ((x + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    one = decompose(Decomposer(net, PixelRange()), x, 1)
    other = decompose(scaled, normalised, 1)
    torch.testing.assert_close(
        other.distinct, one.distinct / 2 / std[:, None, None], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        other.reconstruction,
        ((one.reconstruction + 1) / 2 - mean[:, None, None]) / std[:, None, None],
        rtol=1e-4,
        atol=1e-5,
    )


def test_an_empty_distinct_branch_is_exactly_empty() -> None:
    net = decomposer()
    with torch.no_grad():
        net.generator.head.weight[:1].zero_()
        net.generator.head.bias[:1].zero_()  # type: ignore[index]
    split = decompose(net, images())
    assert not split.distinct.any()
    assert torch.equal(split.agnostic, images())
    assert torch.equal(split.before, split.after)  # type: ignore[arg-type]


def test_without_a_target_it_is_what_the_classifier_says() -> None:
    net, x = decomposer(), images(16)
    logits = net.logits(x).detach()
    split = decompose(net, x)
    assert torch.equal(split.target, logits.argmax(dim=1))
    torch.testing.assert_close(split.before, softmax(logits, dim=1).amax(dim=1))
    after = softmax(net.logits(split.agnostic), dim=1).detach()
    torch.testing.assert_close(split.after, after[torch.arange(16), split.target])


def test_a_target_can_be_named_in_any_way() -> None:
    net, x = decomposer(), images()
    ways = (1, [1, 1, 1, 1], torch.tensor([1, 1, 1, 1]), torch.tensor(1), torch.tensor([1]))
    found = [decompose(net, x, way).distinct for way in ways]
    assert all(torch.equal(other, found[0]) for other in found)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_parts_of_a_batch_are_split_alike(size: int) -> None:
    net, x = decomposer(), images()
    whole, parts = (
        decompose(net, x, [0, 1, 1, 0]),
        decompose(net, x, [0, 1, 1, 0], internal_batch_size=size),
    )
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(parts, name), value, rtol=1e-6, atol=1e-6)


def test_sixty_four_images_take_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    net, calls = decomposer(), []
    encode = BranchedGenerator.encode
    monkeypatch.setattr(
        BranchedGenerator, "encode", lambda self, x: calls.append(len(x)) or encode(self, x)
    )
    decompose(net, images(64, size=32))
    assert calls == [64]
    calls.clear()
    found = distinct_of_every_class(net, images(64, size=8))
    assert calls == [64]
    assert found.shape == (64, 2, 1, 8, 8)
    for label in (0, 1):
        wanted = decompose(net, images(64, size=8), label).distinct
        torch.testing.assert_close(found[:, label], wanted, rtol=1e-6, atol=1e-6)


def test_nothing_is_left_changed() -> None:
    net = decomposer()
    net.classifier.network[1].momentum = 0.5  # type: ignore[union-attr, index]
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    net.train()
    split = decompose(net, images())
    assert net.training
    assert not net.classifier.training  # type: ignore[union-attr]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not split.distinct.requires_grad


def test_a_network_with_one_output_is_two_classes() -> None:
    class Sigmoid(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1).sum(dim=1)

    net = FrozenClassifier(Sigmoid())
    x = images()
    torch.testing.assert_close(softmax(net(x), dim=1)[:, 1], x.flatten(1).sum(dim=1).sigmoid())


def test_the_users_network_stays_the_users() -> None:
    own = conv_net().train()
    frozen = FrozenClassifier(own)
    assert own.training
    assert all(parameter.requires_grad for parameter in own.parameters())
    assert not any(module.training for module in frozen.train().modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    frozen(images())
    assert hash_weights(frozen.network) == hash_weights(own)


def test_the_hash_knows_every_bit_and_no_wrapper() -> None:
    own = conv_net()
    known = hash_weights(own)
    assert known == hash_weights(nn.DataParallel(own))
    with torch.no_grad():
        own[1].running_mean[0] += 1e-7
    assert hash_weights(own) != known


def test_what_cannot_be_decomposed_is_refused() -> None:
    net = decomposer()
    with pytest.raises(ShapeError, match=r"\[B, 1, H, W\]"):
        decompose(net, images(channels=3))
    with pytest.raises(ShapeError, match="floating point"):
        decompose(net, torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ShapeError, match="nothing to decompose"):
        decompose(net, images()[:0])
    x = images()
    x[2, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="1 of 4 images"):
        decompose(net, x)
    with pytest.raises(InputError, match="from 0 to 1"):
        decompose(net, images(), 2)
    with pytest.raises(ShapeError, match="one for each of the 4"):
        decompose(net, images(), [0, 1])
    with pytest.raises(InputError, match="give target"):
        decompose(Decomposer(net.generator, PixelRange()), images())
    with pytest.raises(InputError, match="internal_batch_size"):
        decompose(net, images(), internal_batch_size=0)
    with pytest.raises(InputError, match="below"):
        PixelRange(1.0, 0.0)
    with pytest.raises(ShapeError, match=r"class scores \[B, k\]"):
        FrozenClassifier(nn.Identity())(images())


def test_without_a_classifier_nothing_is_said_of_probabilities() -> None:
    net = decomposer()
    split = decompose(Decomposer(net.generator, PixelRange()), images(), 0)
    assert split.before is None
    assert split.after is None


def test_a_linear_classifier_forgets_what_is_taken_away() -> None:
    """The class is a known set of pixels; a distinct part that is just that removes it all."""
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:4, 2:4] = 1.0
    x = 0.1 * images(6)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    x = x * (1 - mask) + mask * labels[:, None, None, None]
    classifier = Linear(mask, bias=-2.0)
    assert torch.equal(classifier(x).argmax(dim=1), labels)
    distinct = mask * labels[:, None, None, None]
    assert not classifier(x - distinct).argmax(dim=1).any()
