"""Checkpoints damaged at random: read, or refused with one sentence, and never half loaded."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

from cmd_plugin.networks import load_weights, read_weights
from cmd_plugin.networks.checkpoints import find_checkpoints, moment_of, snapshot_labels
from tests.helpers.damage import refuses_damaged


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def use(path: Path) -> None:
    """What jobs do with a checkpoint: name its moment, read it, put it into a network."""
    moment_of(path)
    snapshot_labels(find_checkpoints([path]))
    for which in ("shown", "trained"):
        for tensor in read_weights(path, which).values():
            tensor.contiguous()
    load_weights(network(), path)


def saved(content: object, *, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def content() -> dict[str, object]:
    state = network().state_dict()
    return {"epoch": 3, "global_step": 70, "state_dict": {f"net.{k}": t for k, t in state.items()}}


@pytest.mark.parametrize("legacy", [False, True])
def test_a_damaged_checkpoint_is_read_or_refused(legacy: bool, tmp_path: Path) -> None:
    whole = saved(content(), legacy=legacy)
    assert refuses_damaged(tmp_path / "epoch_1.pt", whole, use) > 20


def test_a_damaged_pickle_in_a_sound_archive_is_read_or_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(saved(content()))) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in parts if name.endswith("data.pkl"))

    def pack(changed: bytes) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for name, data in parts.items():
                archive.writestr(name, changed if name == pickled else data)
        return stream.getvalue()

    assert refuses_damaged(tmp_path / "a.ckpt", parts[pickled], use, pack) > 20


def test_a_damaged_safetensors_file_is_read_or_refused(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in network().state_dict().items()}
    whole = save(state, {"epoch": "3", "format": "pt"})
    assert refuses_damaged(tmp_path / "a.safetensors", whole, use) > 20


def test_a_damaged_index_is_read_or_refused(tmp_path: Path) -> None:
    state = network().state_dict()
    places = {}
    for number, name in enumerate(state, 1):
        shard = f"model-{number:05}-of-{len(state):05}.safetensors"
        (tmp_path / shard).write_bytes(save({name: state[name].clone()}))
        places[name] = shard
    whole = json.dumps({"metadata": {"total_size": 1}, "weight_map": places}).encode()
    assert refuses_damaged(tmp_path / "model.safetensors.index.json", whole, use) > 20
