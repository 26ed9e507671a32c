"""Codes of classes, with noise and without."""

from __future__ import annotations

from pathlib import Path

import torch

from cmd_plugin.distinction import BranchedGenerator, load_decomposer, save_decomposer
from cmd_plugin.distinction.codes import ClassCodes, NoisyCodes
from cmd_plugin.distinction.decomposition import Decomposer, decompose
from cmd_plugin.distinction.frozen import PixelRange
from tests.helpers.distinction import images

LABELS = torch.tensor([0, 1, 1, 0])


def test_a_code_without_noise_is_a_row_of_the_table() -> None:
    codes = ClassCodes(3, 5)
    assert torch.equal(codes(torch.tensor([2, 0])), codes.weight[[2, 0]])


def test_a_code_of_noise_is_the_layers_of_its_class() -> None:
    codes, noise = NoisyCodes(3, 5, noise=4), torch.randn(2, 4)
    found = codes(torch.tensor([2, 0]), noise)
    hidden = codes.second(codes.first(noise).clamp_min(0.0)).clamp_min(0.0)
    for row, label in enumerate((2, 0)):
        part = slice(5 * label, 5 * label + 5)
        wanted = codes.own.weight[part] @ hidden[row] + codes.own.bias[part]
        torch.testing.assert_close(found[row], wanted)
    usual = codes(torch.tensor([1, 1]))
    assert torch.equal(usual[0], usual[1])
    assert torch.equal(usual, codes(torch.tensor([1, 1]), codes.usual.expand(2, -1)))


def test_noise_changes_branches_and_its_usual_draw_is_kept_in_the_file(tmp_path: Path) -> None:
    net = BranchedGenerator(1, 2, width=4, levels=1, noise=3)
    features = net.encode(images())
    one, other = (net.decode(features, LABELS, torch.full((4, 3), x)) for x in (0.0, 2.0))
    assert not torch.equal(one, other)
    assert torch.equal(net.decode(features, LABELS), net(images(), LABELS))
    decomposer = Decomposer(net, PixelRange())
    save_decomposer(tmp_path / "noisy.safetensors", decomposer)
    read = load_decomposer(tmp_path / "noisy.safetensors")
    found, wanted = (decompose(d, images(), LABELS).branches for d in (read, decomposer))
    assert torch.equal(found, wanted)
