"""`diffusion memorization`: probes by dose, a folder with broken files, a set of suspects."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cmd_plugin.cli.show_diffusion import show_memorization
from cmd_plugin.diffusion import (
    MemorizationScore,
    NoiseSchedule,
    PixelCodec,
    ProbeSet,
    ScoreModel,
    TrainedDenoiser,
    build_denoiser,
    separate_doses,
)
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.diffusion import memorization
from cmd_plugin.jobs.diffusion.memorization import run
from cmd_plugin.jobs.diffusion.model import LoadedModel, load_model
from cmd_plugin.jobs.diffusion.options import MemorizationOptions
from cmd_plugin.runs.separation import auroc, chance_band

SHAPE = (1, 8, 8)
QUICK: dict[str, Any] = {"directions": 4, "threads": 1, "time": (50.0, 200.0)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `diffusion train` leaves it, untrained."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    network = build_denoiser("mlp", SHAPE, 16)
    TrainedDenoiser(network, "mlp", SHAPE, 16, NoiseSchedule.linear(), "noise").save(
        folder / "model.safetensors"
    )
    doses = torch.tensor([1] * 60 + [4] * 10)
    probes = ProbeSet(torch.rand(70, *SHAPE) * 2 - 1, torch.rand(80, *SHAPE) * 2 - 1, doses)
    probes.save(folder / "probes.safetensors")
    return folder


def pictures(folder: Path, images: Tensor, kind: str = "png") -> Path:
    """Grey images in [0, 1] as files."""
    folder.mkdir()
    for number, image in enumerate(images):
        levels = (image[0] * 255).round().byte().numpy()
        Image.fromarray(levels).save(folder / f"{number:03d}.{kind}")
    return folder


def test_probes_are_told_by_dose(trained: Path, tmp_path: Path) -> None:
    result = run(MemorizationOptions(model=trained, samples=12, **QUICK), tmp_path / "out")
    loaded = load_model(trained)
    assert loaded.probes is not None
    score = MemorizationScore(loaded.model, (50, 200), directions=4)
    members, held_out = score(loaded.probes.members), score(loaded.probes.held_out)
    expected = separate_doses(held_out, members, loaded.probes.each_dose())
    for name, doses in result.metrics["auroc"].items():
        for dose, value in doses.items():
            assert value == pytest.approx(expected[name][int(dose)][0], abs=5e-3)
            later = result.metrics["auroc_by_time"]["200"][name][dose]
            assert later == pytest.approx(expected[name][int(dose)][1], abs=5e-3)
    assert result.metrics["t"] == [50.0, 200.0]
    assert result.metrics["directions"] == 4
    assert set(result.metrics["pairs"]) == {
        "samples above held_out",
        "members above held_out",
        "members above samples",
    }
    assert result.data["samples"] == 12
    made = score(loaded.sample(12, 0))
    overall = {"held_out": held_out, "samples": made, "members": members}
    for pair, found in result.metrics["pairs"].items():
        high, low = (overall[group] for group in pair.split(" above "))
        band = chance_band(len(low), len(high))
        for name, value in found.items():
            wanted = auroc(low.evidence(name)[:, 0], high.evidence(name)[:, 0])
            assert value == pytest.approx(wanted, abs=5e-3)
            assert (name in result.metrics["alike"][pair]) == (abs(value - 0.5) <= band)
    assert (tmp_path / "out/roc.png").is_file()
    error = float(members.standard_error["p1"][:, 0].mean())
    assert result.metrics["standard_error"]["p1"] == pytest.approx(error, rel=1e-3)
    show_memorization(result)


def test_a_folder_is_scored_and_what_cannot_be_read_is_listed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = torch.rand(5, *SHAPE)
    folder = pictures(tmp_path / "in", images)
    (folder / "100.png").write_bytes(b"no picture")
    colour = np.random.default_rng(0).integers(0, 255, (20, 30, 4), dtype=np.uint8)
    Image.fromarray(colour).save(folder / "101.png")  # larger, in colour, with alpha
    result = run(MemorizationOptions(images=(folder,), model=trained, **QUICK), tmp_path / "out")
    assert result.data["images"] == 6
    (lost,) = result.metrics["left_out"]
    assert lost.startswith("100.png")
    with (tmp_path / "out/scores.csv").open() as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    score = MemorizationScore(load_model(trained).model, (50, 200), directions=4)
    levels = (images * 255).round() / 255
    report = score(levels * 2 - 1)
    for number in range(5):
        for name, values in report.values.items():
            for place, t in enumerate((50, 200)):
                found = float(rows[f"{number:03d}.png"][f"{name}_t{t}"])
                assert found == pytest.approx(float(values[number, place]), rel=1e-3, abs=1e-4)
    top = result.metrics["most_memorised"]
    assert list(top.values()) == sorted(top.values(), reverse=True)
    show_memorization(result)
    assert "left out: 100.png" in capsys.readouterr().out


def exact(monkeypatch: pytest.MonkeyPatch, known: Tensor) -> None:
    """Let the job find a model that knows these images by heart."""
    model = ScoreModel.from_data(known, NoiseSchedule.linear())
    loaded = LoadedModel(model, PixelCodec(), SHAPE, None)
    monkeypatch.setattr(memorization, "load_model", lambda *_: loaded)


def test_suspects_that_were_trained_on_have_a_small_p_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = (torch.rand(60, *SHAPE) * 255).round() / 255
    exact(monkeypatch, images[:30] * 2 - 1)
    options = MemorizationOptions(
        model=tmp_path,
        suspects=pictures(tmp_path / "suspects", images[:30]),
        controls=pictures(tmp_path / "controls", images[30:], "bmp"),
        permutations=199,
        **QUICK,
    )
    result = run(options, tmp_path / "out")
    found = result.metrics
    assert found["p_value"] == 1 / 200
    assert found["auroc"] == 1.0
    assert found["pixel_auroc"] <= 0.6
    assert found["power"] == {"10": 1.0, "30": 1.0, "70": None}
    assert found["file_kinds"] == {"suspects": [".png"], "controls": [".bmp"]}
    show_memorization(result)
    assert "files differ" in capsys.readouterr().out


def test_suspects_of_another_kind_than_the_controls_are_refused(
    trained: Path, tmp_path: Path
) -> None:
    images = torch.rand(60, *SHAPE)
    options = MemorizationOptions(
        model=trained,
        suspects=pictures(tmp_path / "suspects", images[:30] * 0.7),
        controls=pictures(tmp_path / "controls", images[30:]),
        **QUICK,
    )
    with pytest.raises(InputError, match="pixels alone"):
        run(options, tmp_path / "out")


def test_one_image_the_model_cannot_bear_does_not_cost_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.rand(4, *SHAPE) * 0.5
    images[2] = 1.0

    def predict(y: Tensor, *_: object) -> Tensor:
        bright = y.flatten(1).mean(1).reshape(-1, 1, 1, 1) > 0.5
        return torch.where(bright, math.nan, y)

    model = ScoreModel(predict, NoiseSchedule.linear(), SHAPE)
    loaded = LoadedModel(model, PixelCodec(), SHAPE, None)
    monkeypatch.setattr(memorization, "load_model", lambda *_: loaded)
    folder = pictures(tmp_path / "in", images)
    result = run(MemorizationOptions(images=(folder,), model=tmp_path, **QUICK), tmp_path / "out")
    assert result.metrics["left_out"] == ["002.png NaN or infinite values of the model"]
    assert set(result.metrics["most_memorised"]) == {"000.png", "001.png", "003.png"}


def test_a_pipeline_of_diffusers_is_a_model(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    from tests.helpers.tiny_diffusers import unet

    folder = tmp_path / "model"
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(folder)
    images = pictures(tmp_path / "in", torch.rand(3, *SHAPE))
    result = run(MemorizationOptions(images=(images,), model=folder, **QUICK), tmp_path / "out")
    assert len(result.metrics["most_memorised"]) == 3
    with pytest.raises(InputError, match="no probes"):
        run(MemorizationOptions(model=folder, **QUICK), tmp_path / "probes")


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    for options, message in (
        ({}, "--model is missing"),
        ({"suspects": tmp_path}, "go together"),
        ({"suspects": tmp_path, "controls": tmp_path, "images": (tmp_path,)}, "two questions"),
        ({"images": (tmp_path, tmp_path)}, "one folder"),
        ({"time": ()}, "--time is empty"),
        ({"directions": 5}, "odd"),
    ):
        model = {} if message.startswith("--model") else {"model": tmp_path}
        with pytest.raises(InputError, match=message):
            MemorizationOptions(**model, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds no model"):
        load_model(tmp_path)
