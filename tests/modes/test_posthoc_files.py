"""Decomposing files: the same as the state_dicts in them, in the order they were written in."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from mode_toys import Net, assert_one_sentence, history, same_tensors
from safetensors.torch import save_file
from torch import Tensor

from cmd_plugin.errors import InputError, NonFiniteError, StateMismatch
from cmd_plugin.modes import decompose, posthoc
from cmd_plugin.modes.codec import measure_codec
from cmd_plugin.networks import find_checkpoints, read_weights


def save_all(folder: Path, states: list[dict[str, Tensor]], pattern: str) -> list[Path]:
    files = []
    for epoch, state in enumerate(states):
        path = folder / pattern.format(epoch)
        if path.suffix == ".safetensors":
            save_file(state, path)
        elif path.suffix == ".ckpt":
            torch.save({"epoch": epoch, "state_dict": state, "lr_schedulers": []}, path)
        else:
            torch.save(state, path)
        files.append(path)
    return files


@pytest.mark.parametrize("pattern", ["epoch={}.ckpt", "net_{}.pt", "m{}.safetensors"])
@pytest.mark.parametrize("by_folder", [True, False])
def test_files_equal_state_dicts(tmp_path: Path, pattern: str, by_folder: bool) -> None:
    states = history(Net(), 11)
    files = save_all(tmp_path, states, pattern)
    expected = decompose(states, modes=3, samples=60)
    result = decompose(tmp_path if by_folder else files, modes=3, samples=60)
    # safetensors sorts its entries, so the flat order may differ: compare by name.
    for t in (0, 10):
        ours, theirs = result.state_dict_at(t), expected.state_dict_at(t)
        assert ours.keys() == theirs.keys()
        if pattern.endswith(".safetensors"):
            continue
        assert same_tensors(ours, theirs)
    assert list(result.epochs) == list(range(11))


def test_epochs_label_the_snapshots(tmp_path: Path) -> None:
    states = history(Net(), 3)
    files = []
    for epoch, state in zip((4, 9, 30), states, strict=True):
        files.append(tmp_path / f"{epoch}.ckpt")
        torch.save({"epoch": epoch, "state_dict": state}, files[-1])
    result = decompose(files, modes=2, samples=60)
    assert list(result.epochs) == [4, 9, 30]
    assert result.snapshot_of(9) == 1
    torch.save({"epoch": 4, "state_dict": states[1]}, files[1])
    assert list(decompose(files, modes=2, samples=60).epochs) == [0, 1, 2]


def test_one_network_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = save_all(tmp_path, history(Net(), 9), "epoch={}.ckpt")
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watched(path: Path, which: Any) -> dict[str, Tensor]:
        nonlocal most
        most = max(most, sum(reference() is not None for reference in alive))
        tensors = read_weights(path, which)
        alive.append(weakref.ref(tensors["fc.weight"]))
        return tensors

    monkeypatch.setattr(posthoc, "read_weights", watched)
    result = decompose(files, modes=2, samples=60)
    assert most <= 1
    assert len(alive) == 9
    assert sum(reference() is not None for reference in alive) == 0
    assert result.snapshots == 9


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
def test_one_truncated_file_among_many_is_named(tmp_path: Path, suffix: str) -> None:
    files = save_all(tmp_path, history(Net(), 5), f"epoch={{}}{suffix}")
    files[3].write_bytes(files[3].read_bytes()[:-200])
    with pytest.raises(InputError) as caught:
        decompose(tmp_path, modes=2)
    assert_one_sentence(caught.value, str(files[3]))


def test_a_foreign_checkpoint_among_many_is_named(tmp_path: Path) -> None:
    states = history(Net(), 4)
    states[2]["fc.weight"] = torch.zeros(7, 64)
    files = save_all(tmp_path, states, "epoch={}.pt")
    with pytest.raises(StateMismatch) as caught:
        decompose(files, modes=2)
    assert_one_sentence(caught.value, str(files[2]), "fc.weight", "(7, 64)")


def test_a_diverged_checkpoint_among_many_is_named(tmp_path: Path) -> None:
    states = history(Net(), 4)
    states[3]["fc.bias"][2] = float("nan")
    files = save_all(tmp_path, states, "epoch={}.pt")
    with pytest.raises(NonFiniteError) as caught:
        decompose(files, modes=2)
    assert_one_sentence(caught.value, str(files[3]), "1 NaN", "'fc.bias' at position 2")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        decompose(tmp_path, modes=2)
    assert_one_sentence(caught.value, str(tmp_path))


def test_trained_weights_are_decomposed_where_a_callback_shows_others(tmp_path: Path) -> None:
    states = history(Net(), 5)
    files = []
    for epoch, state in enumerate(states):
        files.append(tmp_path / f"epoch={epoch}.ckpt")
        content = {"epoch": epoch, "state_dict": states[0], "current_model_state": state}
        torch.save(content, files[-1])
    expected = decompose(states, modes=3, samples=60)
    result = decompose(files, modes=3, samples=60)
    assert same_tensors(result.state_dict_at(4), expected.state_dict_at(4))


def save_as_transformers_does(folder: Path, states: list[dict[str, Tensor]], shards: bool) -> Path:
    """checkpoint-N folders at every 50th step, with all that a trainer leaves beside weights."""
    for number, state in enumerate(states, 1):
        place = folder / f"checkpoint-{50 * number}"
        place.mkdir()
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            torch.save({"state": torch.ones(2)}, place / name)
        (place / "trainer_state.json").write_text("{}")
        if not shards:
            save_file(state, place / "model.safetensors")
            continue
        places = {}
        for part, names in enumerate((list(state)[:2], list(state)[2:]), 1):
            shard = f"model-{part:05d}-of-00002.safetensors"
            save_file({name: state[name] for name in names}, place / shard)
            places |= dict.fromkeys(names, shard)
        index = {"metadata": {}, "weight_map": places}
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(states[-1], folder / "model.safetensors")  # the final copy
    return folder


@pytest.mark.parametrize("shards", [False, True])
def test_a_run_of_transformers_in_the_shells_order_or_by_its_folder(
    tmp_path: Path, shards: bool
) -> None:
    states = history(Net(), 24)  # up to step 1200: the shell puts 1000 before 150
    run = save_as_transformers_does(tmp_path, states, shards)
    by_shell = sorted(str(path) for path in run.glob("checkpoint-*/model*.safetensors"))
    assert Path(by_shell[0]).parent.name == "checkpoint-100"
    folders = sorted(map(str, run.glob("checkpoint-*")))
    for trajectory in (by_shell, run, folders):
        result = decompose(trajectory, modes=3, samples=60)
        assert list(result.epochs) == [50 * number for number in range(1, 25)]
        names = result.layout.names  # safetensors sorts its entries, and samples follow the order
        expected = decompose([{n: s[n] for n in names} for s in states], modes=3, samples=60)
        assert all(torch.equal(result.reconstruct(t), expected.reconstruct(t)) for t in range(24))
    result.save(tmp_path / "modes.safetensors")
    files = find_checkpoints([run])
    report = measure_codec(files, result, tmp_path / "modes.safetensors")
    stored = sum(path.stat().st_size for path in run.glob("checkpoint-*/*.safetensors"))
    assert report.checkpoint_bytes == stored
