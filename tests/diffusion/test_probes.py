"""Probes keep their images and doses; planted duplicates come as often as said."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cmd_plugin.diffusion import ProbeSet, parse_doses, plant_duplicates
from cmd_plugin.errors import InputError, NonFiniteError, ShapeError


def test_planted_images_come_as_often_as_said() -> None:
    plan = parse_doses("3x2, 2x8")
    assert plan == {2: 3, 8: 2}
    chosen, doses = plant_duplicates(50, plan, singles=10)
    assert doses.tolist() == [2, 2, 2, 8, 8, *[1] * 10]
    assert len(set(chosen.tolist())) == 15
    again, _ = plant_duplicates(50, plan, singles=10)
    assert torch.equal(chosen, again)
    everything, doses = plant_duplicates(50, plan)
    assert sorted(everything.tolist()) == list(range(50))
    assert int(doses.sum()) == 45 + 6 + 16
    with pytest.raises(InputError, match="plant fewer"):
        plant_duplicates(4, plan)
    with pytest.raises(InputError, match="plant fewer"):
        plant_duplicates(20, plan, singles=16)


@pytest.mark.parametrize("text", ["20", "x4", "20x", "20x1", "0x2x", "2x4,3x4", "ax4", "-1x4"])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_doses(text)


def test_no_plan_plants_nothing() -> None:
    assert parse_doses("") == {}
    chosen, doses = plant_duplicates(5, {})
    assert len(chosen) == 5
    assert doses.tolist() == [1] * 5


def test_probes_come_back_from_their_file(tmp_path: Path) -> None:
    probes = ProbeSet(torch.rand(3, 1, 2, 2), torch.rand(2, 1, 2, 2), torch.tensor([4, 1, 4]))
    probes.save(tmp_path / "probes.safetensors")
    again = ProbeSet.load(tmp_path / "probes.safetensors")
    assert torch.equal(again.members, probes.members)
    assert torch.equal(again.held_out, probes.held_out)
    found = {dose: places.tolist() for dose, places in again.each_dose().items()}
    assert found == {1: [1], 4: [0, 2]}
    plain = ProbeSet(probes.members, probes.held_out)
    assert list(plain.each_dose()) == [1]
    (tmp_path / "probes.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(InputError, match="damaged"):
        ProbeSet.load(tmp_path / "probes.safetensors")


def test_impossible_probes_are_refused() -> None:
    some = torch.rand(3, 4)
    with pytest.raises(InputError, match="got 0 and 3"):
        ProbeSet(some[:0], some)
    with pytest.raises(ShapeError):
        ProbeSet(some, torch.rand(2, 5))
    with pytest.raises(NonFiniteError):
        ProbeSet(some * math.nan, some)
    with pytest.raises(InputError, match="doses"):
        ProbeSet(some, some, torch.tensor([1, 0, 2]))
