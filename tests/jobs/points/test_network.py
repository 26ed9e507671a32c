"""`points explain` on a user's own network, in the styles of public ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.jobs.points import explain
from cmd_plugin.jobs.points.network import find_network
from cmd_plugin.jobs.points.options import ExplainOptions
from cmd_plugin.networks.imported import import_network
from tests.helpers.sentences import assert_one_sentence

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=4, first=True, style="plain"):
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 32, 1), nn.Linear(32, classes)
        self.first, self.style = first, style

    def forward(self, x):
        x = self.conv(x if self.first else x.transpose(1, 2)).relu()
        pooled = x.mean(2) if self.style == "mean" else torch.max(x, 2, keepdim=True)[0].squeeze()
        if self.style == "points":
            return x
        scores = self.head(pooled)
        return (scores, pooled) if self.style == "tuple" else scores
"""


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(CODE)
    torch.save(import_network("my_nets:Net").state_dict(), tmp_path / "w.pth")
    np.save(tmp_path / "c.npy", np.random.default_rng(0).normal(size=(90, 3)))
    yield {"clouds": (Path("c.npy"),), "weights": Path("w.pth"), "network": "my_nets:Net"}
    sys.modules.pop("my_nets", None)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("style", ["plain", "tuple"])  # squeezed to [classes] for a single cloud
def test_a_network_of_either_layout_is_explained(
    first: bool, style: str, options: dict[str, Any], tmp_path: Path
) -> None:
    arguments = f'{{"first": {str(first).lower()}, "style": "{style}"}}'
    given = ExplainOptions(**options, network_args=arguments, refocus=True)
    result = explain.run(given, tmp_path / "out")
    cloud = np.load("c.npy").astype(np.float32)
    assert result.metrics["critical_points"] > 1
    assert result.metrics["scores_hold_for"] == "the whole output"
    assert result.data["points"] == 90  # all there are, though 1024 are the default
    network = find_network(given).network
    own = import_network("my_nets:Net", {"first": True})
    own.load_state_dict(torch.load("w.pth"))
    places = torch.from_numpy(cloud)[None]
    torch.testing.assert_close(network(places)[0], own(places.transpose(1, 2)))


def test_a_network_without_a_maximum_has_no_counts(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    given = ExplainOptions(**options, network_args='{"style": "mean"}')
    found = explain.run(given, tmp_path / "out").metrics
    assert (found["entropy"], found["critical_points"]) == (None, None)
    assert [*found["left_out"]] == ["critical++"]
    header = (tmp_path / "out" / "view.csv").read_text().splitlines()[0]
    assert header == "point,x,y,z,fbi"
    with pytest.raises(InputError):
        explain.run(
            ExplainOptions(**options, network_args='{"style": "mean"}', measure="critical++"), None
        )


@pytest.mark.parametrize(
    ("changes", "kind", "why"),
    [
        ({"network_args": "{"}, InputError, "is no JSON"),
        ({"network_args": "[" * 100000}, InputError, "is no JSON"),
        ({"network_args": "[1]"}, InputError, "must be a JSON object"),
        ({"network_args": '{"style": "points"}'}, InputError, "gives no class scores"),
        ({"network_args": '{"classes": 9}'}, StateMismatch, "w.pth"),
        ({"network": "my_nets:Nat"}, InputError, "did you mean Net"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], kind: type[InputError], why: str, options: dict[str, Any]
) -> None:
    with pytest.raises(kind) as caught:
        explain.run(ExplainOptions(**{**options, **changes}), None)
    assert why in str(caught.value)


def test_two_networks_and_idle_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        ExplainOptions(**options, model="pct")
    assert_one_sentence(caught.value, "--network and --model")
    with pytest.raises(InputError) as caught:
        ExplainOptions(**{**options, "network": None}, network_args="{}")
    assert_one_sentence(caught.value, "--network-args")
