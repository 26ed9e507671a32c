"""The branched generator: exact sums, branches that share nothing, colour that survives."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu

from cmd_plugin.distinction import BranchedGenerator
from cmd_plugin.errors import InputError, ShapeError
from tests.helpers.distinction import generator, images

LABELS = torch.tensor([0, 1, 1, 0])


def rows_of(tensor: Tensor, branch: int, branches: int) -> Tensor:
    """The part of a grouped layer's parameter that belongs to one branch."""
    return tensor.chunk(branches)[branch]


def one_branch(net: BranchedGenerator, branch: int) -> BranchedGenerator:
    """A U-Net of its own with the weights of one branch: its first is the branch, its second 0."""
    alone = BranchedGenerator(net.channels, net.classes, 2, width=4, levels=net.levels)
    for (name, target), source in zip(alone.named_parameters(), net.parameters(), strict=True):
        if name == "codes.weight":
            target.data.copy_(source.data)
        elif ".style." in name:  # scales of all branches, then shifts of all branches
            kinds = [rows_of(half, branch, net.branches) for half in source.data.chunk(2)]
            halves = target.data.chunk(2)
            for half, kind in zip(halves, kinds, strict=True):
                half.chunk(2)[0].copy_(kind)
        else:
            target.data.chunk(2)[0].copy_(rows_of(source.data, branch, net.branches))
    return alone


def test_the_groups_are_separate_networks() -> None:
    net, x = generator(), images()
    together = net(x, LABELS)
    for branch in range(3):
        alone = one_branch(net, branch)(x, LABELS)[:, 0]
        torch.testing.assert_close(together[:, branch], alone, rtol=1e-5, atol=1e-5)


def test_a_branch_depends_on_its_own_weights_alone() -> None:
    net, x = generator(), images()
    before = net(x, LABELS)
    for branch in range(3):
        other = copy.deepcopy(net)
        for name, parameter in other.named_parameters():
            if name == "codes.weight":
                continue
            parts = parameter.data.chunk(2) if ".style." in name else [parameter.data]
            for part in parts:
                rows_of(part, branch, 3).add_(0.1)
        after = other(x, LABELS)
        for kept in set(range(3)) - {branch}:
            assert torch.equal(after[:, kept], before[:, kept])
        assert not torch.equal(after[:, branch], before[:, branch])


def test_encoding_once_is_encoding_for_each_class() -> None:
    net, x = generator(), images()
    features = net.encode(x)
    for label in (0, 1):
        labels = torch.full((4,), label)
        assert torch.equal(net.decode(features, labels), net(x, labels))


def test_brightness_and_contrast_reach_the_output() -> None:
    net, x = generator(), images()
    one, other = net(x, LABELS), net(0.3 * x + 0.5, LABELS)
    assert ((one - other).norm() / one.norm()).item() > 1e-2


def test_an_untrained_branch_is_small_and_depends_on_the_class() -> None:
    net, x = generator(), images()
    nn.init.normal_(net.codes.weight)
    made = net(x, LABELS)
    assert made.abs().max().item() < 1.0
    assert not torch.equal(made, net(x, 1 - LABELS))


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (5, 16)])
def test_any_size_is_padded_and_cut_again(size: tuple[int, int]) -> None:
    net = BranchedGenerator(3, 4, 2, width=8, levels=2)
    x = torch.rand(2, 3, *size)
    assert net(x, torch.tensor([3, 0])).shape == (2, 2, 3, *size)


def test_the_block_is_the_formula() -> None:
    net = generator()
    block, codes = net.middle, torch.randn(2, 16)
    x = torch.randn(2, block.conv1.in_channels, 2, 2)
    scale, shift = block.style(codes)[:, :, None, None].chunk(2, dim=1)  # type: ignore[misc]
    inner = block.conv1(leaky_relu(block.norm1(x), 0.2))
    inner = block.conv2(leaky_relu((1 + scale) * block.norm2(inner) + shift, 0.2))
    torch.testing.assert_close(block(x, codes), (inner + block.around(x)) / math.sqrt(2))


def test_the_finest_connection_is_at_full_resolution() -> None:
    """A single pixel is seen at a single place of the last block: its features are not blurred."""
    net = generator()
    maps = net.encode(images()).maps
    assert [tuple(m.shape[-2:]) for m in maps] == [(8, 8), (4, 4), (2, 2)]
    assert interpolate(maps[2], scale_factor=4.0).shape[-1] == 8


@pytest.mark.parametrize(
    "wrong", [{"classes": 1}, {"branches": 1}, {"width": 0}, {"levels": 0}, {"channels": 10**9}]
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        BranchedGenerator(**{"channels": 1, "classes": 2, **wrong})


def test_wrong_shapes_are_refused() -> None:
    net = generator()
    with pytest.raises(ShapeError, match=r"\[B, 1, H, W\]"):
        net(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ShapeError, match="one of each image"):
        net(images(), torch.zeros(3, dtype=torch.int64))
