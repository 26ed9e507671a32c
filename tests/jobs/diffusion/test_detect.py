"""`diffusion calibrate` and `detect`: p-values, verdicts over deliveries, kinds in folders."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cmd_plugin.cli.show_diffusion import show_calibrate, show_detect
from cmd_plugin.diffusion import (
    ManifoldBiasDetector,
    NoiseSchedule,
    PixelCodec,
    RealReference,
    ScoreModel,
    TrainedDenoiser,
    build_denoiser,
    content_statistics,
    match_histogram,
    match_levels,
    redeliver,
    verdicts,
)
from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.jobs.diffusion import detect as job
from cmd_plugin.jobs.diffusion.detect import calibrate, detect
from cmd_plugin.jobs.diffusion.model import LoadedModel, load_model, read_captions
from cmd_plugin.jobs.diffusion.options import CalibrateOptions, DetectOptions
from cmd_plugin.runs.separation import auroc

SHAPE = (1, 8, 8)
QUICK: dict[str, Any] = {"directions": 4, "threads": 1, "time": 100.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    network = build_denoiser("mlp", SHAPE, 16)
    TrainedDenoiser(network, "mlp", SHAPE, 16, NoiseSchedule.linear(), "noise").save(
        folder / "model.safetensors"
    )
    return folder


def levels(count: int, seed: int, top: float = 1.0) -> Tensor:
    """Grey images of 256 levels, [N, 1, 8, 8] in [0, 1]."""
    drawn = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return (drawn * top * 255).round() / 255


def pictures(folder: Path, images: Tensor, kind: str = "png") -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(
            folder / f"{number:03d}.{kind}"
        )
    return folder


@pytest.fixture(scope="module")
def reference(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference")
    reals = pictures(out / "reals", levels(40, 0))
    result = calibrate(CalibrateOptions(images=(reals,), model=trained, **QUICK), out / "c")
    assert result.metrics["images"] == 40
    assert result.metrics["smallest_p"] == 1 / 41
    show_calibrate(result)
    return out / "c"


def test_verdicts_are_those_of_every_delivery(
    trained: Path, reference: Path, tmp_path: Path
) -> None:
    images = levels(12, 1)
    folder = pictures(tmp_path / "in", images)
    (folder / "zzz.png").write_bytes(b"no picture")
    options = DetectOptions(
        images=(folder,), model=trained, reference=reference, level=0.2, **QUICK
    )
    result = detect(options, tmp_path / "out")
    loaded = load_model(trained)
    detector = ManifoldBiasDetector(loaded.model, t=100, directions=4)
    known = RealReference.load(reference / "reference.safetensors")
    torch.testing.assert_close(
        known.scores["criterion"],
        detector.terms(levels(40, 0) * 2 - 1).criterion.sort().values,
        rtol=1e-5,
        atol=1e-5,
    )
    ways = [images * 2 - 1]
    delivered = [redeliver((image * 255).round().byte()) for image in images]
    ways += [torch.stack([d[w] for d in delivered]).float() / 127.5 - 1 for w in delivered[0]]
    p = torch.stack([known.p_values("criterion", detector.terms(w).criterion) for w in ways], 1)
    assert list(result.metrics["verdicts"].values()) == verdicts(p, 0.2)
    assert sum(result.metrics["counts"].values()) == 12
    with (tmp_path / "out/verdicts.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for row, line in zip(rows, p.tolist(), strict=True):
        assert [float(row[key]) for key in list(row)[2:]] == pytest.approx(line, abs=1e-9)
    assert [line.split()[0] for line in result.metrics["left_out"]] == ["zzz.png"]
    assert result.metrics["warnings"] == []
    assert "separation" not in result.metrics


def test_kinds_in_folders_are_compared_as_they_are_and_matched(
    trained: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, pale = levels(15, 2), levels(10, 3, top=0.6)
    pictures(tmp_path / "in/real", real)
    pictures(tmp_path / "in/pale", pale)
    options = DetectOptions(
        images=(tmp_path / "in",), model=trained, reference=reference, level=0.02, **QUICK
    )
    result = detect(options, tmp_path / "out")
    found = result.metrics["separation"]["pale"]
    detector = ManifoldBiasDetector(load_model(trained).model, t=100, directions=4)
    low = detector.terms(real * 2 - 1).scores()
    raw = detector.terms(pale * 2 - 1).scores()
    rounded, matched = match_levels(pale, real), match_histogram(pale, real)
    groups = {
        "raw": raw | content_statistics(pale * 2 - 1),
        "quantised": detector.terms(rounded * 2 - 1).scores() | content_statistics(rounded * 2 - 1),
        "matched": detector.terms(matched * 2 - 1).scores() | content_statistics(matched * 2 - 1),
    }
    low |= content_statistics(real * 2 - 1)
    assert found.keys() == groups.keys()
    for name, scores in groups.items():
        assert found[name].keys() == scores.keys()
        for statistic, values in scores.items():
            expected = auroc(low[statistic], values)
            assert found[name][statistic]["auroc"] == pytest.approx(expected, abs=0.02)
    assert found["raw"]["total_variation"]["auroc"] < 0.1  # pale, and nothing else
    assert result.metrics["control"].keys() == low.keys()
    assert all(0.0 <= value <= 1.0 for value in result.metrics["control"].values())
    assert (tmp_path / "out/roc.png").is_file()
    assert any("too few" in line for line in result.metrics["warnings"])
    show_detect(result)
    assert "pale above real" in capsys.readouterr().out


def test_other_files_than_the_real_ones_are_warned_about(
    trained: Path, reference: Path, tmp_path: Path
) -> None:
    folder = pictures(tmp_path / "in", levels(3, 4), "bmp")
    options = DetectOptions(images=(folder,), model=trained, reference=reference, **QUICK)
    (line,) = detect(options, tmp_path / "out").metrics["warnings"]
    assert "file formats" in line


def test_a_reference_of_other_settings_is_refused(
    trained: Path, reference: Path, tmp_path: Path
) -> None:
    folder = pictures(tmp_path / "in", levels(3, 4))
    other = {**QUICK, "time": 50.0}
    options = DetectOptions(images=(folder,), model=trained, reference=reference, **other)
    with pytest.raises(StateMismatch, match="calibrate again"):
        detect(options, tmp_path / "out")
    with pytest.raises(InputError, match="too few"):
        calibrate(CalibrateOptions(images=(folder,), model=trained, **QUICK), tmp_path / "c")
    with pytest.raises(InputError, match="--reference is missing"):
        DetectOptions(images=(folder,), model=trained)
    with pytest.raises(InputError, match="--model is missing"):
        CalibrateOptions(images=(folder,))
    with pytest.raises(InputError, match="one folder"):
        CalibrateOptions(images=(folder, folder), model=trained)


def prompted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the jobs find a model whose estimate is its prompt's first number."""
    schedule = NoiseSchedule.linear()

    def predict(y: Tensor, _: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is not None
        return y * condition.reshape(-1, 1, 1, 1)

    def encode(prompts: Sequence[str]) -> Tensor:
        return torch.tensor([[[float(prompt)]] for prompt in prompts])

    one = encode(["1"])
    model = ScoreModel(predict, schedule, SHAPE, unconditional=one, condition=one)
    loaded = LoadedModel(model, PixelCodec(), SHAPE, None, encode)
    monkeypatch.setattr(job, "load_model", lambda *_: loaded)


def test_each_image_is_asked_about_with_its_own_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompted(monkeypatch)
    images = pictures(tmp_path / "in", levels(1, 0).expand(20, -1, -1, -1))
    names = [f"{number:03d}.png" for number in range(20)]
    captions = tmp_path / "captions.csv"
    lines = [f"{name},{1 + number % 2}" for number, name in enumerate(names)]
    captions.write_text("name,caption\n" + "\n".join(lines) + "\n")
    asked = {"images": (images,), "model": tmp_path, "captions": captions, **QUICK}
    calibrate(CalibrateOptions(**asked), tmp_path / "c")
    with (tmp_path / "c/scores.csv").open() as stream:
        gradients = [float(row["gradient"]) for row in csv.DictReader(stream)]
    # The same picture twenty times: of twice the estimate, twice the length.
    assert gradients[1::2] == pytest.approx([2 * value for value in gradients[::2]])
    result = detect(DetectOptions(**asked, reference=tmp_path / "c"), tmp_path / "d")
    assert len(result.metrics["verdicts"]) == 20
    plain = {**asked, "captions": None}
    with pytest.raises(StateMismatch, match="captions given, these with none"):
        detect(DetectOptions(**plain, reference=tmp_path / "c"), tmp_path / "e")


def test_captions_that_do_not_fit_are_refused(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "captions.csv"
    for text, message in (
        ("a.png,one\n", "no caption of 1 images, first b.png"),
        ("a.png,one, two\n", "row 1 .* has 3 columns"),
        (b"\xff\xfe", "cannot be read"),
    ):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(InputError, match=message):
            read_captions(file, ["a.png", "b.png"])
    with pytest.raises(InputError, match="cannot be read"):
        read_captions(tmp_path / "nowhere.csv", [])
    images = pictures(tmp_path / "in", levels(3, 0))
    options = CalibrateOptions(images=(images,), model=trained, captions=file, **QUICK)
    with pytest.raises(InputError, match="takes no prompts"):
        calibrate(options, tmp_path / "c")
