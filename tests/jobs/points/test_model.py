"""The file of a trained point network builds the network again, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.jobs.points.model import (
    _SCHEMA,
    PointNetwork,
    is_point_network,
    load_point_network,
    save_point_network,
)
from cmd_plugin.pointcloud import build_network
from cmd_plugin.runs.tensors import Schema, read_schema

ABOUT = {"model": "pct", "width": "0.25", "points": "40", "classes": '["a", "b"]'}


@pytest.mark.parametrize("model", ["pointnet", "pct"])  # pct has a weight under two names
def test_a_network_answers_as_before_it_was_kept(model: str, tmp_path: Path) -> None:
    network = build_network(model, 3, 0.25)
    path = tmp_path / "model.safetensors"
    save_point_network(path, PointNetwork(network, model, 0.25, 40, ("a", "b", "c")))
    assert is_point_network(path)
    assert read_schema(path) == "cmd-plugin/point-network/1"
    found = load_point_network(path)
    assert found[1:] == (model, 0.25, 40, ("a", "b", "c"))
    assert not found.network.training
    points = torch.randn(2, 40, 3)
    with torch.no_grad():
        assert torch.equal(found.network(points), network.eval()(points))


def test_other_files_are_no_networks_of_ours(tmp_path: Path) -> None:
    network = build_network("pointnet", 2, 0.25)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    Schema("network", 1, "a network").save(tmp_path / "w.safetensors", network.state_dict(), {})
    assert not is_point_network(tmp_path / "w.pt")
    assert not is_point_network(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="not a network of `points train`"):
        load_point_network(tmp_path / "w.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is damaged"):
        is_point_network(tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match="there is no file"):
        load_point_network(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "alexnet"},
        {"width": "wide"},
        {"width": "inf"},
        {"width": "-1"},
        {"points": "0"},
        {"points": "1.5"},
        {"classes": "{"},
        {"classes": "3"},
        {"classes": "[]"},
        {"classes": '"ab"'},
        {"classes": '{"a": 1}'},
        {"classes": "[1, 2]"},
        {"points": "99999999999"},
        {"points": "9" * 5000},
        *({name: None} for name in ABOUT),
    ],
)
def test_metadata_that_make_no_network_are_refused(
    changes: dict[str, str | None], tmp_path: Path
) -> None:
    about = {k: v for k, v in {**ABOUT, **changes}.items() if v is not None}
    path = tmp_path / "m.safetensors"
    _SCHEMA.save(path, build_network("pct", 2, 0.25).state_dict(), about)
    with pytest.raises(InputError, match="is damaged"):
        load_point_network(path)


def test_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    about = {**ABOUT, "classes": json.dumps(["a", "b"]), "width": "0.5"}
    _SCHEMA.save(path, build_network("pct", 2, 0.25).state_dict(), about)
    with pytest.raises(StateMismatch):
        load_point_network(path)


@pytest.mark.parametrize(
    "changes",
    [{"width": "1e4"}, {"width": "1e9"}, {"width": "1e300"}, {"classes": json.dumps(["a"] * 9999)}],
)
def test_metadata_that_would_fill_the_memory_are_refused_first(
    changes: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    _SCHEMA.save(path, build_network("pct", 2, 0.25).state_dict(), {**ABOUT, **changes})
    with pytest.raises(StateMismatch, match="too few for pct of width"):
        load_point_network(path)
