"""What every job does alike: one policy for its folder, one way to stop, one way to go on."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cmd_plugin.cli.commands import COMMANDS
from cmd_plugin.cli.main import run
from cmd_plugin.diffusion import NoiseSchedule, ProbeSet, TrainedDenoiser, build_denoiser
from cmd_plugin.jobs.clip import fit
from cmd_plugin.jobs.clip.options import FitOptions
from cmd_plugin.jobs.diffusion.detect import calibrate
from cmd_plugin.jobs.diffusion.options import CalibrateOptions
from cmd_plugin.jobs.points.model import PointNetwork, save_point_network
from cmd_plugin.pointcloud import build_network
from cmd_plugin.runs.folder import RunFolder
from cmd_plugin.runs.job import Job
from cmd_plugin.runs.result import Result
from tests.helpers.distinction import model_folder
from tests.helpers.jobs import JobCase, published, start

CASES = [
    JobCase(
        "train",
        (
            *("--train-limit", "120", "--batch-size", "40", "--epochs", "4", "--warmup", "2"),
            *("--modes", "3", "--samples", "100", "--seeds", "2", "--threads", "1"),
            *("--model", "cnn:4"),
        ),
        ("--lr", "0.01"),
    ),
    JobCase(
        "decompose",
        ("{inputs}", "--modes", "2", "--samples", "40", "--export", "2"),
        ("--modes", "1"),
    ),
    JobCase(
        "points train",
        (
            *("--points", "48", "--train-clouds", "48", "--test-clouds", "24", "--width", "0.25"),
            *("--epochs", "2", "--batch-size", "12", "--threads", "1"),
        ),
        ("--lr", "0.01"),
    ),
    JobCase(
        "points robustness",
        (
            *("--points", "32", "--train-clouds", "24", "--test-clouds", "12", "--width", "0.06"),
            *("--epochs", "1", "--rounds", "1", "--threads", "1"),
        ),
        ("--lr", "0.01"),
    ),
    JobCase(
        "points explain",
        ("{inputs}/cloud.npy", "--weights", "{inputs}/point/model.safetensors"),
        ("--measure", "entropy"),
    ),
    JobCase(
        "diffusion train",
        (
            *("--duplicate", "4x2,4x8", "--singles", "30", "--held-out", "20", "--width", "16"),
            *("--steps", "6", "--batch-size", "32", "--looks", "2", "--threads", "1"),
        ),
        ("--lr", "0.01"),
    ),
    JobCase(
        "diffusion memorization",
        ("--model", "{inputs}/denoiser", "--directions", "4", "--threads", "1"),
        ("--directions", "6"),
    ),
    JobCase(
        "diffusion calibrate",
        ("{inputs}/images.npy", "--model", "{inputs}/denoiser", "--threads", "1"),
        ("--directions", "6"),
    ),
    JobCase(
        "diffusion detect",
        (
            *("{inputs}/images.npy", "--model", "{inputs}/denoiser", "--threads", "1"),
            *("--reference", "{inputs}/reals"),
        ),
        ("--level", "0.1"),
    ),
    JobCase(
        "diffusion fewshot",
        (
            *("{inputs}/kinds", "--model", "{inputs}/denoiser", "--threads", "1"),
            *("--per-class", "5", "--draws", "1", "--time", "50"),
        ),
        ("--directions", "6"),
    ),
    JobCase(
        "distinction train",
        (
            *("--plant", "cross", "--train-limit", "60", "--image-size", "8", "--model", "cnn:4"),
            *("--judge", "cnn:4", "--classifier-epochs", "1", "--epochs", "2", "--width", "4"),
            *("--branches", "2", "--threads", "1"),
        ),
        ("--lr", "0.01"),
    ),
    JobCase(
        "distinction evaluate",
        (
            *("--model", "{inputs}/split", "--images", "12", "--limit-images", "1"),
            *("--rival", "saliency", "--rival", "random", "--threads", "1"),
        ),
        ("--seed", "1"),
    ),
    JobCase(
        "distinction explain",
        ("{inputs}/pictures", "--model", "{inputs}/split", "--threads", "1"),
        ("--target", "with"),
        varying=("page.html",),
    ),
    JobCase(
        "federated simulate",
        (
            *("--clients", "2", "--rounds", "4", "--warmup", "2", "--train-limit", "80"),
            *("--modes", "3", "--samples", "50", "--test-limit", "50", "--model", "cnn:4"),
        ),
        ("--lr", "0.01"),
    ),
    JobCase("clip fit", ("{inputs}/rows.npy", "--threads", "1"), ("--basis", "zca")),
    JobCase(
        "clip score",
        (
            *("{inputs}/others.npy", "--whitening", "{inputs}/fit1", "--rows", "40"),
            *("--threads", "1"),
        ),
        ("--format", "jsonl"),
    ),
    JobCase(
        "clip report",
        ("{inputs}/pairs.npy", "--group-size", "50", "--shown", "2", "--threads", "1"),
        ("--temperature", "0.1"),
    ),
    JobCase("clip merge", ("{inputs}/fit1", "{inputs}/fit2"), ("--basis", "zca")),
    JobCase(
        "clip compare",
        (
            *("{inputs}/rows.npy", "{inputs}/others.npy", "--permutations", "19"),
            *("--threads", "1"),
        ),
        ("--seed", "1"),
    ),
    JobCase("clip align", ("{inputs}/pairs.npy", "--threads", "1"), ("--seed", "1")),
    JobCase(
        "bench kernels",
        (
            *("--size", "2000", "--kernel", "swap_out", "--kernel", "coefficient_drift"),
            *("--no-compile", "--repeats", "2", "--threads", "1"),
        ),
        ("--size", "3000"),
        varying=("kernels.csv",),
    ),
]
IDS = [case.name for case in CASES]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands read: four checkpoints, a cloud and pictures with networks for them."""
    folder = tmp_path_factory.mktemp("inputs")
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(40, generator=draw)
    for epoch in range(4):
        weights = weights + torch.randn(40, generator=draw)
        save_file({"weight": weights.clone()}, folder / f"epoch={epoch}.safetensors")
    np.save(folder / "cloud.npy", np.random.default_rng(0).normal(size=(200, 3)))
    (folder / "point").mkdir()
    network = PointNetwork(build_network("pointnet", 2, 0.25), "pointnet", 0.25, 48, ("a", "b"))
    save_point_network(folder / "point/model.safetensors", network)
    rows = np.random.default_rng(0).normal(2, 1, size=(600, 6)).astype(np.float32)
    np.save(folder / "rows.npy", rows[:200])
    np.save(folder / "others.npy", rows[200:300])
    np.save(folder / "pairs.npy", np.stack([rows[300:400], rows[300:400] - rows[400:500] / 4]))
    for shard in (1, 2):
        options = FitOptions(input=folder / "rows.npy", shard=f"{shard}/2")
        fit.run(options, folder / f"fit{shard}")
    (folder / "denoiser").mkdir()
    shape, pixels = (1, 8, 8), torch.rand(2, 70, 1, 8, 8, generator=draw) * 2 - 1
    denoiser = build_denoiser("mlp", shape, 16)
    TrainedDenoiser(denoiser, "mlp", shape, 16, NoiseSchedule.linear(), "noise").save(
        folder / "denoiser/model.safetensors"
    )
    ProbeSet(pixels[0], pixels[1]).save(folder / "denoiser/probes.safetensors")
    np.save(folder / "images.npy", pixels[0].numpy() / 2 + 0.5)
    for number, image in enumerate((pixels[0, :24, 0] * 127.5 + 127.5).byte().numpy()):
        kind = folder / "kinds" / ("real", "one")[number % 2]
        kind.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(kind / f"{number}.png")
    reals = CalibrateOptions(images=(folder / "images.npy",), model=folder / "denoiser")
    calibrate(reals, folder / "reals")
    model_folder(folder / "split", plant="cross")
    (folder / "pictures").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(256, size=(8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"pictures/{number}.png")
    return folder


@pytest.fixture(scope="module")
def finished(
    inputs: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[JobCase, Path]:
    """A job that ran undisturbed, in a process of its own; its JSON was pure."""
    case: JobCase = request.param
    out = tmp_path_factory.mktemp("finished") / "out"
    child = start("plain", 0, case.command(inputs, out, "--json"))
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    assert json.loads(child.stdout) == json.loads((out / "result.json").read_text("utf-8"))
    return case, out


def cmd_plugin(*arguments: str) -> int:
    """Run a command in this process; its exit code."""
    torch.set_num_threads(1)
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_every_command_has_a_case() -> None:
    assert [command.name for command in COMMANDS] == IDS


@pytest.mark.parametrize("finished", CASES, ids=IDS, indirect=True)
def test_its_result_says_all(finished: tuple[JobCase, Path]) -> None:
    case, out = finished
    result = Result.load(out / "result.json")
    assert result.job == case.name
    assert result.seconds["total"] > 0
    assert all((out / name).is_file() for name in result.files)
    present = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert present - {".lock"} == set(result.files)
    assert not any(path.stat().st_mode & 0o044 == 0 for path in out.rglob("*.safetensors"))


@pytest.mark.parametrize("finished", CASES, ids=IDS, indirect=True)
def test_a_finished_run_is_given_back_or_refused(
    finished: tuple[JobCase, Path], inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, out = finished
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert cmd_plugin(*case.command(inputs, out)) == 2
    assert "a finished run: add --overwrite" in capsys.readouterr().err
    assert cmd_plugin(*case.command(inputs, out, *case.other, "--resume")) == 2
    assert "resume with the same options" in capsys.readouterr().err
    assert cmd_plugin(*case.command(inputs, out, "--resume", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["job"] == case.name
    assert cmd_plugin(*case.command(inputs, out, "--resume")) == 0
    shown = capsys.readouterr().out
    assert "wrote " in shown
    assert max(map(len, shown.splitlines())) <= 80 + len(str(out))
    other = RunFolder(out)
    other._acquire()
    assert cmd_plugin(*case.command(inputs, out, "--overwrite")) == 2
    other.close()
    assert "another process is writing" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("finished", CASES, ids=IDS, indirect=True)
def test_ctrl_c_leaves_a_run_that_can_go_on(
    finished: tuple[JobCase, Path],
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case, whole = finished

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Job, "report", interrupt)
        assert cmd_plugin(*case.command(inputs, tmp_path / "out")) == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"kept in {tmp_path / 'out/unfinished'}; add --resume to go on" in printed.err
    assert cmd_plugin(*case.command(inputs, tmp_path / "out")) == 2
    assert "an unfinished run: add --resume" in capsys.readouterr().err
    assert cmd_plugin(*case.command(inputs, tmp_path / "out", "--resume", "--quiet")) == 0
    assert published(tmp_path / "out", case) == published(whole, case)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("finished", CASES, ids=IDS, indirect=True)
def test_a_killed_run_goes_on_to_the_same_result(
    finished: tuple[JobCase, Path], inputs: Path, tmp_path: Path
) -> None:
    case, whole = finished
    changes = 10_000 - count_changes(case, inputs, tmp_path / "counted")
    draw = random.Random(case.name)
    for number, step in enumerate(sorted(draw.sample(range(changes), 2))):
        out = tmp_path / f"out{number}"
        if number:  # a finished run that is being replaced, in the second one
            shutil.copytree(whole, out)
        flags = ("--overwrite",) if number else ()
        child = start("killed", step, case.command(inputs, out, *flags))
        assert child.returncode == -signal.SIGKILL, child.stderr
        code = cmd_plugin(*case.command(inputs, out, "--resume", "--quiet"))
        if code == 2:  # killed before there was a run
            assert not (out / "unfinished").exists()
            assert cmd_plugin(*case.command(inputs, out, "--quiet")) == 0
        assert published(out, case) == published(whole, case), step


def count_changes(case: JobCase, inputs: Path, out: Path) -> int:
    """How many changes of the file system are left of 10,000 after an undisturbed run."""
    child = start("killed", 10_000, case.command(inputs, out, "--quiet"))
    assert child.returncode == 0, child.stderr
    return int(child.stderr.rpartition("left ")[2])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_place_that_cannot_be_written_is_a_sentence(
    case: JobCase, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert cmd_plugin(*case.command(inputs, tmp_path / "file")) == 2
    printed = capsys.readouterr()
    assert "cannot be written to" in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_full_disk_is_a_sentence(case: JobCase, inputs: Path, tmp_path: Path) -> None:
    child = start("full", 600, case.command(inputs, tmp_path / "out", "--quiet"))
    assert child.returncode == 2, child.stderr
    assert "cannot be written" in child.stderr
    assert child.stderr.count("\n") == 1
    assert not (tmp_path / "out/result.json").exists()
