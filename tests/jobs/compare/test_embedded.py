"""The second, embedded training of a comparison."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cmd_plugin.errors import InputError
from cmd_plugin.jobs.classifier import Classifier
from cmd_plugin.jobs.compare import train
from cmd_plugin.jobs.compare.options import TrainOptions
from cmd_plugin.jobs.compare.train import run
from cmd_plugin.modes import Decomposition
from cmd_plugin.runs.progress import Progress

OPTIONS = TrainOptions(
    model="cnn:4",
    train_limit=120,
    batch_size=40,
    epochs=6,
    warmup=2,
    modes=3,
    samples=120,
    seeds=2,
    ema_decay=0.7,
    mode="embedded",
    embed_every=1,
    embed_percent=20.0,
)
# What says how weights are embedded has no effect without it, and is refused.
ONLINE = replace(OPTIONS, mode="online", embed_every=5, embed_percent=10.0)
STEPS = 3  # a training's steps in an epoch


def without_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "draw_report", lambda *_: None)
    monkeypatch.setattr(train, "save_figure", lambda *_: None)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tests that look at numbers need not draw them."""
    if "finished" not in request.fixturenames:
        without_picture(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted comparison."""
    out = tmp_path_factory.mktemp("run") / "out"
    run(OPTIONS, out)
    return out


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def weights(out: Path, epoch: int) -> dict[str, torch.Tensor]:
    path = out / "checkpoints" / f"epoch={epoch:03d}.ckpt"
    return dict(torch.load(path, weights_only=True)["state_dict"])


def test_what_the_result_says(finished: Path) -> None:
    summary = json.loads((finished / "result.json").read_text(encoding="utf-8"))["metrics"]
    embedded = summary["embedded"]
    variants = {"as trained", "raw", "ema", "swa", "cmd", "embedded"}
    assert set(summary["accuracy"]) == variants
    assert summary["accuracy"]["embedded"] == embedded["accuracy"]["raw"]
    assert summary["loss_std"]["embedded"] == embedded["loss_std"]["raw"]
    count, modes = summary["parameters"], summary["modes"]
    event = -(-count // 5) - modes  # at epochs 3, 4 and 5
    assert embedded["embedded_fraction"] == pytest.approx(3 * event / count)
    assert embedded["saved_percent"] == pytest.approx(100 * 6 * event / (6 * count))
    assert embedded["volume_percent"] == pytest.approx(100 - 100 * 3 * event / (6 * count))
    news = 3 * -(-count // 8) + 9 * 3 * event
    assert embedded["volume_bytes"] == 4 * (6 * count - 3 * event) + news
    assert embedded["full_bytes"] == 4 * 6 * count
    assert embedded["state_bytes_per_parameter"] == 18.0
    assert [seed["seed"] for seed in embedded["per_seed"]] == [0, 1]
    assert summary["state_bytes_per_parameter"] == 9.0
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_embedded_training_is_the_same_until_somebody_is_embedded(finished: Path) -> None:
    for epoch in range(6):
        one, other = weights(finished, epoch), weights(finished / "embedded", epoch)
        same = all(torch.equal(one[name], other[name]) for name in one)
        assert same == (epoch <= 3), epoch  # the members of epoch 3 are written after epoch 4
    first = [row for row in rows(finished) if row["variant"] == "raw" and int(row["epoch"]) <= 3]
    second = [row for row in rows(finished / "embedded") if row["variant"] == "raw"]
    assert [row for row in second if int(row["epoch"]) <= 3] == first


def test_the_online_part_does_not_notice(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(ONLINE, out)
    assert (out / "metrics.csv").read_bytes() == (finished / "metrics.csv").read_bytes()
    assert not (out / "embedded").exists()


def test_embedded_weights_of_the_last_epoch_lie_on_their_lines(finished: Path) -> None:
    place = finished / "embedded"
    found = Decomposition.load(place / "modes.safetensors")
    before = Decomposition.load(finished / "modes.safetensors")
    assert torch.equal(found.references, before.references)
    tensors = weights(place, 5)
    flat = torch.cat([tensors[name].reshape(-1) for name in found.layout.names])
    model = found.reconstruct(-1)
    reach = 1 + float(flat.abs().max()) * float(found.scale.abs().max())
    close = (flat - model).abs() <= 8 * 2**-24 * reach
    event = -(-found.numel // 5) - len(found.references)
    assert int(close.sum()) >= 2 * event  # those of epochs 3 and 4 are written


class Stop:
    """Makes a training run end in the middle of a step, counted over all trainings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        self.left = step
        original = Classifier.training_step

        def training_step(module: Classifier, *args: Any) -> Any:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            return original(module, *args)

        monkeypatch.setattr(Classifier, "training_step", training_step)


# Each seed has six epochs online, then six embedded; events after epochs 3, 4 and 5.
@pytest.mark.parametrize(
    "epochs",
    [
        pytest.param(1, id="online"),
        pytest.param(6, id="between the trainings"),
        pytest.param(8, id="embedded, warm-up"),
        pytest.param(10, id="right after an event"),
        pytest.param(23, id="second seed"),
    ],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_an_interrupted_run_ends_as_if_it_were_not(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, steps: int
) -> None:
    without_picture(monkeypatch)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        Stop(patch, epochs * STEPS + steps)
        with pytest.raises(KeyboardInterrupt):
            run(OPTIONS, out)
    assert not (out / "result.json").exists()
    run(OPTIONS, out, resume=True)
    for place in (".", "embedded"):
        one, other = finished / place, out / place
        assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
        for name in ("modes.safetensors", "model_cmd.safetensors"):
            first, second = load_file(one / name), load_file(other / name)
            assert all(torch.equal(first[key], second[key]) for key in first), (place, name)


def test_progress_counts_both_trainings(tmp_path: Path) -> None:
    told: list[Progress] = []
    run(replace(OPTIONS, seeds=1, epochs=4), tmp_path / "out", progress=told.append)
    assert told[-1].total == 8
    assert told[-1].done == 8
    done = [p.done for p in told]
    assert done == sorted(done)
    assert not any("embedded" in p.stage for p in told if p.done < 4)
    assert all("embedded" in p.stage for p in told if p.done > 4)
    assert all(p.stage.startswith("seed 0") for p in told)


@pytest.mark.parametrize("project", ["epoch", "step", "tie"])
def test_every_projection_trains(tmp_path: Path, project: str) -> None:
    options = replace(OPTIONS, seeds=1, embed_project=project, embed_slots="zero")
    result = run(replace(options, embed_relative=True), tmp_path / "out")
    assert result.metrics["embedded"]["embedded_fraction"] > 0.4


def test_a_new_run_leaves_no_embedded_results_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(replace(OPTIONS, seeds=1, epochs=4), out)
    assert (out / "embedded" / "metrics.csv").exists()
    result = run(replace(ONLINE, seeds=1, epochs=4), out, overwrite=True)
    assert "embedded" not in result.metrics
    assert "embedded" not in result.metrics["accuracy"]
    assert not list((out / "embedded").rglob("*.csv"))
    assert not list((out / "embedded").rglob("*.safetensors"))
    assert not list((out / "embedded").rglob("*.json"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mode": "frozen"}, "--mode must be one of online, embedded, got frozen"),
        ({"embed_every": 0}, "--embed-every must be at least 1, got 0"),
        ({"embed_percent": 0.0}, "--embed-percent must be above 0 and at most 100"),
        ({"embed_percent": float("nan")}, "--embed-percent must be above 0 and at most 100"),
        ({"embed_project": "batch"}, "--embed-project must be one of epoch, step, tie"),
        ({"embed_slots": "keep"}, "--embed-slots must be one of leave, zero"),
        ({"embed_project": "tie", "buffers": "model"}, "use --buffers recalibrate or keep"),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        replace(OPTIONS, **changes)
