"""A whole comparison: what it measures and writes, and how it goes on after an interruption."""

from __future__ import annotations

import csv
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cmd_plugin.data import load_dataset, make_loader
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.classifier import Classifier
from cmd_plugin.jobs.compare import train
from cmd_plugin.jobs.compare.options import TrainOptions
from cmd_plugin.jobs.compare.train import run
from cmd_plugin.modes import Decomposition
from cmd_plugin.networks import build_model, evaluate
from cmd_plugin.runs.process import quiet_lightning
from cmd_plugin.runs.progress import Progress
from tests.helpers.processes import run_script

OPTIONS = TrainOptions(
    model="cnn:4",
    train_limit=120,
    batch_size=40,
    epochs=6,
    warmup=3,
    modes=3,
    samples=120,
    seeds=2,
    ema_decay=0.7,
)
STEPS = 3  # a seed's steps in an epoch


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that look at numbers need not draw them."""
    monkeypatch.setattr(train, "draw_report", lambda *_: None)
    monkeypatch.setattr(train, "save_figure", lambda *_: None)


def rows(out: Path) -> list[dict[str, str]]:
    """Rows of a finished run, or of one that goes on."""
    place = out if (out / "metrics.csv").exists() else out / "unfinished"
    with (place / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted comparison."""
    out = tmp_path_factory.mktemp("run") / "out"
    run(OPTIONS, out)
    return out


def test_every_file_is_there(finished: Path) -> None:
    summary = json.loads((finished / "result.json").read_text(encoding="utf-8"))["metrics"]
    variants = {"as trained", "raw", "ema", "swa", "cmd"}
    assert set(summary["accuracy"]) == variants == set(summary["loss"])
    assert summary["modes"] == 3
    assert summary["state_bytes_per_parameter"] == 9.0
    assert summary["peak_state_bytes_per_parameter"] > 9.0
    assert 0.0 < summary["explained_variance"] <= 1.0
    assert summary["overhead_percent"] > 0.0
    assert [seed["seed"] for seed in summary["per_seed"]] == [0, 1]
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")
    decomposition = Decomposition.load(finished / "modes.safetensors")
    assert decomposition.numel == summary["parameters"]
    assert list(decomposition.epochs) == list(range(6))
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert names == [f"epoch={epoch:03d}.ckpt" for epoch in range(6)]


def test_rows_start_when_their_variant_does(finished: Path) -> None:
    seen: dict[tuple[str, str], list[int]] = {}
    for row in rows(finished):
        seen.setdefault((row["seed"], row["variant"]), []).append(int(row["epoch"]))
    for seed in ("0", "1"):
        assert seen[seed, "raw"] == seen[seed, "ema"] == list(range(6))
        assert seen[seed, "as trained"] == list(range(6))
        assert seen[seed, "cmd"] == [3, 4, 5]  # fitted after epoch number warmup + 1
        assert seen[seed, "swa"] == [4, 5]  # the last quarter of six epochs


def test_the_table_is_the_last_epoch(finished: Path) -> None:
    summary = json.loads((finished / "result.json").read_text(encoding="utf-8"))["metrics"]
    for variant in ("as trained", "raw", "ema", "swa", "cmd"):
        last = [
            float(row["accuracy"])
            for row in rows(finished)
            if row["epoch"] == "5" and row["variant"] == variant
        ]
        assert summary["accuracy"][variant] == pytest.approx(sum(last) / 2)
        assert summary["accuracy_std"][variant] == pytest.approx(abs(last[0] - last[1]) / 2**0.5)


def test_raw_weights_are_those_of_a_plain_lightning_run(finished: Path) -> None:
    data = load_dataset("digits", train_limit=120)
    torch.manual_seed(0)
    module = Classifier(build_model("cnn:4", 1, 10, (8, 8)), 10, seed=0)
    with quiet_lightning():
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=6,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, make_loader(data.train, 40, shuffle_seed=0))
    saved = torch.load(finished / "checkpoints" / "epoch=005.ckpt", weights_only=True)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, saved["state_dict"][name]), name


def test_the_exported_network_scores_what_the_table_says(finished: Path) -> None:
    model = build_model("cnn:4", 1, 10, (8, 8))
    model.load_state_dict(load_file(finished / "model_cmd.safetensors"), strict=True)
    data = load_dataset("digits", train_limit=120)
    score = evaluate(model, make_loader(data.test, 512))
    expected = next(r for r in rows(finished) if (r["epoch"], r["variant"]) == ("5", "cmd"))
    assert score.loss == float(expected["loss"])
    assert score.accuracy == float(expected["accuracy"])


@pytest.mark.usefixtures("no_picture")
def test_global_state_is_left_alone(tmp_path: Path) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    handler = signal.getsignal(signal.SIGINT)
    told: list[Progress] = []
    options = replace(OPTIONS, seeds=1, epochs=4, threads=1)
    run(options, tmp_path / "out", progress=told.append)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert signal.getsignal(signal.SIGINT) is handler
    done = [p.done for p in told]
    assert done == sorted(done)
    # On a slow machine the last batch of an epoch reports too, so a number can come twice.
    assert sorted({n for n in done if n == int(n)}) == [1, 2, 3, 4]
    assert told[-1].total == 4
    assert all(word in told[-1].note for word in ("raw", "ema", "swa", "cmd"))


def same_results(a: Path, b: Path) -> None:
    """Raw weights, averages (by their scores), CMD state and modelled weights are the same bits."""
    for epoch in range(6):
        name = f"checkpoints/epoch={epoch:03d}.ckpt"
        first, second = (torch.load(out / name, weights_only=True) for out in (a, b))
        for key, value in first["state_dict"].items():
            assert torch.equal(value, second["state_dict"][key]), (name, key)
    for name in ("modes.safetensors", "model_cmd.safetensors"):
        contents = []
        for out in (a, b):
            with safe_open(out / name, framework="pt") as file:
                contents.append((file.metadata(), load_file(out / name)))
        assert contents[0][0] == contents[1][0], name
        assert contents[0][1].keys() == contents[1][1].keys()
        for key, value in contents[0][1].items():
            assert torch.equal(value, contents[1][1][key]), (name, key)
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()


class Stop:
    """Makes a training run end in the middle of a step, counted over all seeds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
        self.left = step
        original = Classifier.training_step

        def training_step(module: Classifier, *args: Any) -> Any:
            if self.left == 0:
                raise error
            self.left -= 1
            return original(module, *args)

        monkeypatch.setattr(Classifier, "training_step", training_step)


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize(
    "step",
    [
        pytest.param(1, id="first epoch"),
        pytest.param(2 * STEPS + 1, id="warm-up"),
        pytest.param(4 * STEPS + 2, id="after the fit"),
        pytest.param(5 * STEPS, id="between epochs"),
        pytest.param(9 * STEPS + 1, id="second seed"),
    ],
)
def test_an_interrupted_run_ends_as_if_it_were_not(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        Stop(patch, step, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(OPTIONS, out)
    assert not (out / "result.json").exists()
    kept = rows(out)
    assert kept == rows(finished)[: len(kept)]
    run(OPTIONS, out, resume=True)
    same_results(finished, out)


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(int(sys.argv[3]))
from cmd_plugin.jobs.classifier import Classifier
from cmd_plugin.jobs.compare.options import TrainOptions
from cmd_plugin.jobs.compare.train import run
step, left = Classifier.training_step, int(sys.argv[2])
def training_step(*args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)
Classifier.training_step = training_step
run(TrainOptions(**eval(sys.argv[4])), sys.argv[1])
"""


@pytest.mark.usefixtures("no_picture")
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("step", [2 * STEPS + 1, 4 * STEPS + 2])
def test_a_killed_run_ends_as_if_it_were_not(finished: Path, tmp_path: Path, step: int) -> None:
    out = tmp_path / "out"
    threads, options = str(torch.get_num_threads()), repr(OPTIONS.as_dict())
    child = run_script(KILLED, str(out), str(step), threads, options)
    assert child.returncode == -signal.SIGKILL, child.stderr
    run(OPTIONS, out, resume=True)
    same_results(finished, out)


@pytest.mark.usefixtures("no_picture")
def test_a_row_cut_short_by_a_kill_is_made_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        Stop(patch, 3 * STEPS + 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(OPTIONS, out)
    # As if the kill had come after a row of epoch 3, in the middle of the next.
    with (out / "unfinished/metrics.csv").open("a", encoding="utf-8") as stream:
        stream.write("0,3,raw,1.0,0.5\r\n0,3,em")
    run(OPTIONS, out, resume=True)
    same_results(finished, out)


@pytest.mark.usefixtures("no_picture")
def test_resuming_a_finished_run_trains_nothing(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Stop(monkeypatch, 0, AssertionError("trained again"))
    before = (finished / "metrics.csv").read_bytes()
    result = run(OPTIONS, finished, resume=True)
    assert (finished / "metrics.csv").read_bytes() == before
    assert result.options["seeds"] == 2


@pytest.mark.usefixtures("no_picture")
def test_which_folders_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(OPTIONS, seeds=1, epochs=4)
    out = tmp_path / "out"
    with pytest.raises(InputError, match="holds no run to resume"):
        run(options, out, resume=True)
    with monkeypatch.context() as patch:
        Stop(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(options, out)
    with pytest.raises(InputError, match="unfinished run: add --resume"):
        run(options, out)
    with pytest.raises(InputError, match=r"started with modes=3, now it is 4"):
        run(replace(options, modes=4), out, resume=True)
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    run(replace(options, modes=2), out, overwrite=True)
    with pytest.raises(InputError, match="a finished run: add --overwrite"):
        run(options, out)
    run(options, out, overwrite=True)
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert len(rows(out)) == 4 + 4 + 4 + 1 + 1


def test_a_damaged_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        Stop(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(OPTIONS, out)
    path = out / "unfinished/state/online/seed0/last.ckpt"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # torch alone would read this and train on
    for damage in (whole[:1000], bytes(flipped), b""):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=r"last\.ckpt is damaged"):
            run(OPTIONS, out, resume=True)
    path.write_bytes(whole)
    table = out / "unfinished/metrics.csv"
    table.write_text(table.read_text().replace("raw,", "raw,1", 1))
    with pytest.raises(InputError, match=r"metrics\.csv is damaged"):
        run(OPTIONS, out, resume=True)


@pytest.mark.parametrize("changes", [{"lr": 1e30}, {"lr": 1e20, "schedule": "step"}])
def test_a_diverged_run_names_seed_and_epoch(tmp_path: Path, changes: dict[str, Any]) -> None:
    options = replace(OPTIONS, **changes)
    with pytest.raises(InputError, match=r"training diverged: .* in epoch 0 of seed 0; lower --lr"):
        run(options, tmp_path / "out")


def test_a_later_seed_that_diverges_leaves_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Classifier.training_step

    def training_step(module: Classifier, *args: Any) -> Any:
        loss = original(module, *args)
        return loss * float("nan") if module.seed == 1 and module.current_epoch == 1 else loss

    monkeypatch.setattr(Classifier, "training_step", training_step)
    out = tmp_path / "out"
    with pytest.raises(InputError, match="the training loss is nan in epoch 1 of seed 1"):
        run(OPTIONS, out)
    assert (out / "unfinished/modes.safetensors").exists()
    assert (out / "unfinished/model_cmd.safetensors").exists()
    assert {(r["seed"], r["epoch"]) for r in rows(out)} >= {("0", "5"), ("1", "0")}


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize(
    "changes",
    [
        {"shrink": True, "forgetting": 0.9, "profile": "mean", "optimizer": "adam"},
        {"buffers": "model", "schedule": "cosine"},
        {"buffers": "keep", "label_noise": 0.3, "optimizer": "adamw", "weight_decay": 0.01},
    ],
)
def test_every_option_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    options = replace(OPTIONS, seeds=1, **changes)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(options, whole)
    with monkeypatch.context() as patch:
        Stop(patch, 4 * STEPS + 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(options, broken)
    run(options, broken, resume=True)
    same_results(whole, broken)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"modes": 0}, "--modes must be from 1 to 256, got 0"),
        ({"modes": 300}, "--modes must be from 1 to 256, got 300"),
        ({"warmup": 1}, "--warmup must be at least 2, got 1"),
        ({"warmup": 6}, r"--epochs must be above --warmup \(6\), got 6"),
        ({"label_noise": 1.0}, "--label-noise must be at least 0 and below 1, got 1.0"),
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"lr": float("inf")}, "--lr must be above 0"),
        ({"optimizer": "lion"}, "--optimizer must be one of sgd, adam, adamw, got lion"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"ema_decay": 1.0}, "--ema-decay must be"),
        ({"forgetting": 0.0}, "--forgetting must be"),
        ({"threads": 0}, "--threads must be at least 1"),
        ({"buffers": "drop"}, "--buffers must be one of model, recalibrate, keep"),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        replace(OPTIONS, **changes)


def test_a_missing_device(tmp_path: Path) -> None:
    if torch.backends.mps.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(InputError, match="no mps device was found"):
        run(replace(OPTIONS, accelerator="mps"), tmp_path)
