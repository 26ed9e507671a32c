"""The decompose command: what it prints and writes, and what it says to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cmd_plugin.cli.main import run
from cmd_plugin.cli.show_decompose import show
from cmd_plugin.modes import Decomposition
from cmd_plugin.runs.result import Result

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            run(["decompose", *map(str, arguments)])
        shown = capsys.readouterr()
        return int(end.value.code or 0), shown.out, shown.err

    return call


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve Lightning-like checkpoints of a network that really trains, epochs 0 to 11."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs, targets = torch.randn(64, 6), torch.randint(3, (64,))
    (tmp_path / "checkpoints").mkdir()
    for epoch in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        file = tmp_path / "checkpoints" / f"epoch={epoch}.ckpt"
        torch.save({"epoch": epoch, "state_dict": state}, file)
    return tmp_path


def test_json_has_the_promised_keys_and_true_numbers(command: Run, folder: Path) -> None:
    out = folder / "d"
    code, printed, _ = command(folder / "checkpoints", "--modes", 3, "--out", out, "--json")
    assert code == 0
    whole = json.loads(printed)
    result = whole["metrics"]
    assert result["modes"] == 3
    assert result["snapshots"] == 12
    weights = torch.stack(
        [
            torch.cat(
                [
                    t.reshape(-1)
                    for t in torch.load(
                        folder / "checkpoints" / f"epoch={epoch}.ckpt", weights_only=True
                    )["state_dict"].values()
                    if t.is_floating_point()
                ]
            )
            for epoch in range(12)
        ]
    ).double()
    assert result["parameters"] == weights.shape[1]
    saved = Decomposition.load(out / "modes.safetensors")
    model = torch.stack([saved.reconstruct(t) for t in range(12)]).double()
    error = (model - weights).norm() / weights.norm()
    assert result["relative_error"] == pytest.approx(float(error), rel=1e-4)
    size = (out / "modes.safetensors").stat().st_size
    assert result["compression_ratio"] == pytest.approx(4 * weights.numel() / size)
    movement = (weights - weights.mean(dim=0)).norm() ** 2
    explained = 1 - float((model - weights).norm() ** 2 / movement)
    assert result["explained_variance"] == pytest.approx(explained, abs=1e-3)
    assert json.loads((out / "result.json").read_text()) == whole
    assert (out / "decomposition.png").read_bytes()[:4] == b"\x89PNG"


def test_table_names_every_tensor(command: Run, folder: Path) -> None:
    code, printed, _ = command(folder, "--modes", 2, "--out", folder / "d")
    assert code == 0
    for name in ("model.0.weight", "model.1.running_var", "model.2.bias"):
        assert name in printed
    assert "times smaller" in printed


def layer(name: str, weights: int, explained: float | None) -> dict[str, object]:
    return {
        "name": name,
        "weights": weights,
        "explained_variance": explained,
        "modes_used": 256,
        "main_mode": 254,
        "main_share": 0.987,
    }


def test_every_number_is_whole_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also beside names as long as those of a language model; the names are folded."""
    monkeypatch.setenv("COLUMNS", "80")
    name = "model.decoder.layers.11.self_attn.out_proj.parametrizations.weight.original0"
    metrics = {
        "explained_variance": 0.98765,
        "modes": 256,
        "snapshots": 2000,
        "parameters": 9_876_543_210,
        "compression_ratio": 123.4,
        "relative_error": 1.23e-4,
        "weight_bytes": 79_012_345_680_000,
        "checkpoint_bytes": 237_037_037_040_000,
        "modes_bytes": 88_888_888_890,
        "layers": [layer(name, 9_876_543_210, 0.98765), layer("bias", 3, None)],
    }
    parts = {"options": {}, "machine": {}, "seconds": {}}
    show(Result("decompose", data={"left_out": []}, metrics=metrics, files=(), **parts))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = (line for line in lines if "9,876,543,210" in line and line.startswith(" model."))
    assert row.split()[1:] == ["9,876,543,210", "98.8%", "256", "254", "99%"]
    (row,) = (line for line in lines if line.startswith(" bias"))
    assert row.split()[1:] == ["3", "still", "256", "254", "99%"]
    first = next(n for n, line in enumerate(lines) if line.startswith(" model."))
    folded = "".join(line[: line.find("  ", 1)].strip() for line in lines[first:])
    assert folded.startswith(name)


def test_nothing_moves(command: Run, tmp_path: Path) -> None:
    for epoch in range(3):
        save_file({"weight": torch.ones(40)}, tmp_path / f"epoch={epoch}.safetensors")
    code, printed, _ = command(tmp_path, "--out", tmp_path / "d", "--json")
    assert code == 0
    metrics = json.loads(printed)["metrics"]
    assert metrics["explained_variance"] is None
    assert metrics["layers"][0]["explained_variance"] is None
    code, printed, _ = command(tmp_path, "--out", tmp_path / "d", "--resume")
    assert code == 0
    assert "None of the 40 weights moves over 3 snapshots." in printed
    assert "still" in printed


def test_exported_epoch_loads_into_the_network(command: Run, folder: Path) -> None:
    code, _, _ = command(folder, "--modes", 3, "--out", folder / "d", "--export", 7)
    assert code == 0
    state = load_file(folder / "d" / "epoch=007.safetensors")
    model = network()
    model.load_state_dict({name.removeprefix("model."): t for name, t in state.items()})
    raw = torch.load(folder / "checkpoints" / "epoch=7.ckpt", weights_only=True)["state_dict"]
    gap = (state["model.0.weight"] - raw["model.0.weight"]).norm()
    assert gap < 0.2 * raw["model.0.weight"].norm()
    assert state["model.1.num_batches_tracked"].dtype == torch.int64


def test_export_of_an_unknown_epoch_keeps_what_was_written(command: Run, folder: Path) -> None:
    code, _, error = command(folder, "--modes", 3, "--out", folder / "d", "--export", 99)
    assert code == 2
    assert "epoch 99" in error
    assert "0 to 11" in error
    assert (folder / "d" / "unfinished" / "modes.safetensors").exists()


def spoil_truncated(folder: Path) -> str:
    file = folder / "checkpoints" / "epoch=5.ckpt"
    file.write_bytes(file.read_bytes()[:700])
    return "epoch=5.ckpt"


def spoil_foreign(folder: Path) -> str:
    torch.save({"other.weight": torch.zeros(3, 3)}, folder / "checkpoints" / "epoch=4.ckpt")
    return "epoch=4.ckpt"


def spoil_nan(folder: Path) -> str:
    file = folder / "checkpoints" / "epoch=6.ckpt"
    data = torch.load(file, weights_only=True)
    data["state_dict"]["model.0.weight"][0, :2] = float("nan")
    torch.save(data, file)
    return "2 NaN or infinite"


def spoil_empty(folder: Path) -> str:
    for file in (folder / "checkpoints").iterdir():
        file.unlink()
    return "no checkpoint"


def spoil_two(folder: Path) -> str:
    for file in sorted((folder / "checkpoints").iterdir())[2:]:
        file.unlink()
    return "at least 3 snapshots"


def spoil_still(folder: Path) -> str:
    state = {"weight": torch.zeros(40)}
    for epoch, file in enumerate(sorted((folder / "checkpoints").iterdir())):
        state["weight"][0] = float(epoch)
        save_file(state, file.with_suffix(".safetensors"))
        file.unlink()
    return "only 1 of the 40 sampled weights move"


@pytest.mark.parametrize(
    "spoil",
    [spoil_truncated, spoil_foreign, spoil_nan, spoil_empty, spoil_two, spoil_still],
    ids=lambda f: f.__name__.removeprefix("spoil_"),
)
def test_bad_checkpoints_end_in_one_sentence(
    command: Run, folder: Path, spoil: Callable[[Path], str]
) -> None:
    expected = spoil(folder)
    code, printed, error = command(folder, "--modes", 3, "--out", folder / "d", "--json")
    assert code == 2
    assert expected in error
    assert printed == ""
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_damaged_files_can_be_left_out(command: Run, folder: Path) -> None:
    name = spoil_truncated(folder)
    code, printed, error = command(
        folder, "--modes", 3, "--out", folder / "d", "--json", "--skip-unreadable"
    )
    assert code == 0
    assert name in error
    result = json.loads(printed)
    assert result["metrics"]["epochs"] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    (left_out,) = result["data"]["left_out"]
    assert name in left_out
    assert error == f"warning: left out: {left_out}\n"


@pytest.mark.parametrize("modes", [0, 300, -1])
def test_modes_out_of_range(command: Run, folder: Path, modes: int) -> None:
    code, _, error = command(folder, "--modes", modes, "--out", folder / "d")
    assert code == 2
    assert "from 1 to 256" in error
    assert str(modes) in error


def test_output_folder_that_cannot_be_written(command: Run, folder: Path) -> None:
    (folder / "file").write_text("in the way")
    code, _, error = command(folder, "--out", folder / "file" / "d")
    assert code == 2
    assert "--out" in error


def test_missing_input(command: Run, tmp_path: Path) -> None:
    code, _, error = command(tmp_path / "nowhere", "--out", tmp_path / "d")
    assert code == 2
    assert "does not exist" in error


def test_the_installed_command_prints_json_and_nothing_else(folder: Path) -> None:
    program = [sys.executable, "-c", "from cmd_plugin.cli.main import run; run()"]
    arguments = ["decompose", str(folder), "--modes", "2", "--out", str(folder / "d"), "--json"]
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["metrics"]["modes"] == 2
    assert done.stderr == ""
