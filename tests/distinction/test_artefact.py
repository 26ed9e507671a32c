"""The file of a decomposition, and its classifier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cmd_plugin.distinction import Decomposer, decompose, load_decomposer, save_decomposer
from cmd_plugin.distinction.artefact import read_decomposer_about
from cmd_plugin.errors import InputError, StateMismatch
from tests.helpers.distinction import conv_net, decomposer, images


def test_what_was_saved_decomposes_alike(tmp_path: Path) -> None:
    net = decomposer(low=-2.0)
    save_decomposer(tmp_path / "d.safetensors", net, {"classes": ["a", "b"]})
    again = load_decomposer(tmp_path / "d.safetensors", conv_net())
    one, other = (decompose(each, images()) for each in (net, again))
    for name, value in vars(one).items():
        assert torch.equal(getattr(other, name), value), name
    assert read_decomposer_about(tmp_path / "d.safetensors") == {"classes": ["a", "b"]}
    assert not again.training


def test_another_classifier_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    save_decomposer(path, decomposer())
    other = conv_net()
    with torch.no_grad():
        other[1].running_mean[0] += 1e-6
    with pytest.raises(StateMismatch, match="trained for another classifier"):
        load_decomposer(path, other)
    with pytest.raises(InputError, match="explains one classifier"):
        load_decomposer(path)
    net = decomposer()
    save_decomposer(path, Decomposer(net.generator, net.pixels))
    assert load_decomposer(path).classifier is None
    with pytest.raises(StateMismatch, match="without a classifier"):
        load_decomposer(path, conv_net())


@pytest.mark.parametrize("damage", ["width", "missing", "json", "shape"])
def test_a_damaged_file_is_a_sentence(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "d.safetensors"
    net = decomposer()
    save_decomposer(path, Decomposer(net.generator, net.pixels))
    tensors = load_file(path)
    settings = '{"channels": 1, "classes": 2, "branches": 3, "width": 4, "levels": 2}'
    if damage == "width":
        settings = settings.replace('"width": 4', '"width": 4000')
    elif damage == "json":
        settings = "[1]"
    elif damage == "missing":
        del tensors["generator.stem.weight"]
    else:
        tensors["low"] = torch.zeros(0)
    metadata = {"schema": "cmd-plugin/distinction/1", "settings": settings, "about": "{}"}
    save_file(tensors, path, metadata)
    with pytest.raises(InputError, match="is damaged"):
        load_decomposer(path)
