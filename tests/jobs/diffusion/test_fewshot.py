"""`diffusion fewshot`: seen and unseen generators, and a detector for later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cmd_plugin.cli.show_diffusion import show_fewshot
from cmd_plugin.diffusion import (
    FewShotDetector,
    NoiseSchedule,
    TrainedDenoiser,
    build_denoiser,
    manifold_features,
    match_histogram,
)
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.diffusion.fewshot import run
from cmd_plugin.jobs.diffusion.model import load_model
from cmd_plugin.jobs.diffusion.options import FewShotOptions
from cmd_plugin.runs.separation import auroc

SHAPE = (1, 8, 8)
QUICK: dict[str, Any] = {
    "directions": 4,
    "threads": 1,
    "time": (100.0, 300.0),
    "per_class": (5, 12, 500),
    "draws": 2,
}


def levels(count: int, seed: int, top: float = 1.0) -> Tensor:
    drawn = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return (drawn * top * 255).round() / 255


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model, real images, pale ones and paler ones."""
    root = tmp_path_factory.mktemp("fewshot")
    torch.manual_seed(0)
    network = build_denoiser("mlp", SHAPE, 16)
    (root / "m").mkdir()
    TrainedDenoiser(network, "mlp", SHAPE, 16, NoiseSchedule.linear(), "noise").save(
        root / "m/model.safetensors"
    )
    for seed, (kind, top) in enumerate((("real", 1.0), ("pale", 0.5), ("paler", 0.3))):
        (root / "in" / kind).mkdir(parents=True)
        for number, image in enumerate(levels(30, seed, top)):
            path = root / "in" / kind / f"{number:03d}.png"
            Image.fromarray((image[0] * 255).round().byte().numpy()).save(path)
    return root


def test_seen_and_unseen_generators_are_told_apart_from_real_images(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = FewShotOptions(images=(place / "in",), model=place / "m", **QUICK)
    result = run(options, tmp_path / "out")
    found = result.metrics
    assert found["images"] == {"paler": 30, "pale": 30, "real": 30}
    assert found["seen"]["500"] is None
    assert found["seen"]["12"]["tests"] == 4
    assert found["unseen"]["12"]["tests"] == 4
    assert found["seen"]["12"]["mean"] > 0.9
    detector = FewShotDetector.load(tmp_path / "out/fewshot.safetensors")
    model = load_model(place / "m").model
    features = [
        manifold_features(model, levels(40, seed, top) * 2 - 1, (100.0, 300.0), directions=4)
        for seed, top in ((10, 1.0), (11, 0.4))
    ]
    low, high = (detector.probability({"manifold": f}) for f in features)
    assert auroc(low, high) > 0.9
    show_fewshot(result)
    assert "unseen generator" in capsys.readouterr().out


def test_matched_images_are_told_by_more_than_contrast_or_not_at_all(
    place: Path, tmp_path: Path
) -> None:
    options = FewShotOptions(images=(place / "in",), model=place / "m", matched=True, **QUICK)
    found = run(options, tmp_path / "out").metrics
    # Independent grey levels hold nothing else.
    assert found["seen"]["12"]["mean"] < 0.75
    features = manifold_features(
        load_model(place / "m").model,
        match_histogram(levels(30, 1, 0.5) * 2 - 1, levels(30, 0) * 2 - 1),
        (100.0, 300.0),
        directions=4,
    )
    text = (tmp_path / "out/features.csv").read_text().splitlines()
    row = next(line for line in text if ",pale/000.png," in line)
    assert [float(cell) for cell in row.split(",")[2:]] == pytest.approx(
        features[0].tolist(), rel=1e-3, abs=1e-4
    )


def test_images_without_kinds_are_refused(place: Path, tmp_path: Path) -> None:
    options = FewShotOptions(images=(place / "in/real",), model=place / "m", **QUICK)
    with pytest.raises(InputError, match="no folder 'real'"):
        run(options, tmp_path / "out")
    with pytest.raises(InputError, match="--model is missing"):
        FewShotOptions(images=(place,))
    with pytest.raises(InputError, match="--per-class"):
        FewShotOptions(images=(place,), model=place, per_class=(3,))
