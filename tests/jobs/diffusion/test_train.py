"""`diffusion train`: what it trains on, what it keeps, and what it says of it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from cmd_plugin.diffusion import MemorizationScore, ProbeSet, TrainedDenoiser, separate_doses
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.diffusion.data import load_planted
from cmd_plugin.jobs.diffusion.options import TrainOptions
from cmd_plugin.jobs.diffusion.train import run

TINY = TrainOptions(
    duplicate="4x2,3x8",
    singles=60,
    held_out=50,
    width=16,
    steps=6,
    batch_size=32,
    looks=2,
    threads=1,
)


def test_planted_images_are_trained_on_as_often_as_said_and_others_held_out() -> None:
    data = load_planted(TINY)
    rows, _ = data.train.__getitems__(list(range(len(data.train))))
    assert len(rows) == 4 * 2 + 3 * 8 + 60
    assert float(rows.min()) == -1.0
    assert float(rows.max()) == 1.0
    flat = rows.flatten(1)
    doses = data.probes.doses
    assert doses is not None
    for image, dose in zip(data.probes.members.flatten(1), doses.tolist(), strict=True):
        assert int((flat - image).abs().amax(1).lt(1e-5).sum()) == dose
    held_out = data.probes.held_out.flatten(1)
    assert len(held_out) == 50
    assert float(torch.cdist(held_out, flat).min()) > 0.05
    assert doses.tolist()[:8] == [2, 2, 2, 2, 8, 8, 8, 1]


def test_without_images_left_the_data_sets_own_are_held_out() -> None:
    data = load_planted(TrainOptions(singles=None))
    assert data.images == 1438
    assert len(data.probes.held_out) == 359


def test_what_it_says_is_what_its_files_say(tmp_path: Path) -> None:
    result = run(TINY, tmp_path / "out")
    out = tmp_path / "out"
    assert set(result.files) == {
        "memorization.csv", "memorization.png", "metrics.csv", "model.safetensors",
        "probes.safetensors", "result.json",
    }  # fmt: skip
    trained = TrainedDenoiser.load(out / "model.safetensors")
    probes = ProbeSet.load(out / "probes.safetensors")
    score = MemorizationScore(trained.model(), TINY.time)
    expected = separate_doses(score(probes.held_out), score(probes.members), probes.each_dose())
    for name, doses in result.metrics["auroc"].items():
        for dose, value in doses.items():
            assert value == pytest.approx(expected[name][int(dose)][0], abs=0.01), name
    with (out / "metrics.csv").open() as stream:
        losses = list(csv.DictReader(stream))
    assert int(losses[-1]["step"]) == result.metrics["steps"] == 6
    assert float(losses[-1]["loss"]) == pytest.approx(result.metrics["loss"])
    with (out / "memorization.csv").open() as stream:
        seen = list(csv.DictReader(stream))
    assert len(seen) == 2 * 6 * 2 * 3  # looks, statistics, times, doses


def test_a_unet_of_diffusers_trains_as_well(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    options = TrainOptions(
        model="unet", width=8, singles=20, held_out=20, steps=1, looks=0, threads=1
    )
    result = run(options, tmp_path / "out")
    assert "auroc" not in result.metrics
    assert TrainedDenoiser.load(tmp_path / "out/model.safetensors").name == "unet"


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="no dose"):
        TrainOptions(duplicate="20")
    with pytest.raises(InputError, match="--time is empty"):
        TrainOptions(time=())
    with pytest.raises(InputError, match="plant fewer"):
        load_planted(TrainOptions(duplicate="2000x2"))
