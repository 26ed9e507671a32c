"""Checkpoint files: what is read, in which order, and what is refused."""

from __future__ import annotations

import pickle
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
from cmd_plugin.modes.checkpoints import (
    find_checkpoints,
    read_checkpoint,
    readable_checkpoints,
)

STATE = {"w": torch.arange(4.0), "n": torch.tensor(3)}


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


# -- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "epoch"),
    [
        (STATE, None),
        ({"epoch": 7, "global_step": 90, "state_dict": STATE, "callbacks": {}}, 7),
        ({"model": STATE, "optimizer": {"state": {}}}, None),
        ({"model_state_dict": STATE, "epoch": 2}, 2),
        ({"state_dict": {f"module._orig_mod.{k}": v for k, v in STATE.items()}}, None),
        # An averaging callback shows other weights; those of the run itself are meant.
        ({"state_dict": {"w": torch.zeros(4)}, "current_model_state": STATE, "epoch": 1}, 1),
        ({"state_dict": STATE, "epoch": "last"}, None),
    ],
)
@pytest.mark.parametrize("new_format", [True, False])
def test_contents(tmp_path: Path, content: Any, epoch: int | None, new_format: bool) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    tensors, found = read_checkpoint(path)
    assert same_tensors(tensors, STATE)
    assert found == epoch


def test_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model-epoch=12.safetensors")
    tensors, epoch = read_checkpoint(tmp_path / "model-epoch=12.safetensors")
    assert same_tensors(tensors, STATE)
    assert epoch == 12


@pytest.mark.parametrize(
    ("name", "epoch"),
    [("epoch=7-step=90.pt", 7), ("epoch_012.pt", 12), ("net.epoch3.pt", 3), ("step=5.pt", None)],
)
def test_epoch_in_the_name(tmp_path: Path, name: str, epoch: int | None) -> None:
    torch.save(STATE, tmp_path / name)
    assert read_checkpoint(tmp_path / name)[1] == epoch


# -- finding -------------------------------------------------------------------------------------


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def test_natural_order(tmp_path: Path) -> None:
    names = ["epoch=9.ckpt", "epoch=10.ckpt", "epoch=100.ckpt", "epoch=11-v2.ckpt"]
    touch(tmp_path, *names, "notes.txt", "metrics.csv")
    found = [path.name for path in find_checkpoints([tmp_path])]
    assert found == ["epoch=9.ckpt", "epoch=10.ckpt", "epoch=11-v2.ckpt", "epoch=100.ckpt"]


def test_names_without_numbers_and_with_odd_digits(tmp_path: Path) -> None:
    touch(tmp_path, "b.pt", "a.pt", "1.pt", "1²2.pt", "①.pt")
    assert len(find_checkpoints([tmp_path])) == 5


def test_last_is_a_copy(tmp_path: Path) -> None:
    touch(tmp_path, "epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt", "last-v1.ckpt")
    assert [f.name for f in find_checkpoints([tmp_path])] == ["epoch=0.ckpt", "epoch=1.ckpt"]


def test_last_alone_is_better_than_nothing(tmp_path: Path) -> None:
    touch(tmp_path, "last.ckpt")
    assert [f.name for f in find_checkpoints([tmp_path])] == ["last.ckpt"]


def test_folder_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    touch(tmp_path / "checkpoints", "epoch=1.ckpt", "epoch=0.ckpt")
    touch(tmp_path, "metrics.csv")
    found = find_checkpoints([str(tmp_path)])
    assert found == [tmp_path / "checkpoints" / f"epoch={n}.ckpt" for n in (0, 1)]


def test_files_keep_their_order(tmp_path: Path) -> None:
    touch(tmp_path, "b.pt", "a.pt")
    files = [tmp_path / "b.pt", tmp_path / "a.pt"]
    assert find_checkpoints(files) == files


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        find_checkpoints([tmp_path])
    assert_one_sentence(caught.value, str(tmp_path), "no checkpoint", ".safetensors")
    with pytest.raises(InputError) as caught:
        find_checkpoints([tmp_path / "gone"])
    assert_one_sentence(caught.value, "gone", "does not exist")


# -- refusing ------------------------------------------------------------------------------------


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def test_foreign_objects_are_refused_and_nothing_runs(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    torch.save({"state_dict": STATE, "hyper": Evil(target)}, tmp_path / "evil.ckpt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(target)))
    torch.save(Net(), tmp_path / "module.pt")
    for name in ("evil.ckpt", "plain.pt", "module.pt"):
        with pytest.raises(InputError) as caught:
            read_checkpoint(tmp_path / name)
        assert_one_sentence(caught.value, name)
    assert not target.exists()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
@pytest.mark.parametrize("new_format", [True, False])
def test_truncated_anywhere(tmp_path: Path, suffix: str, new_format: bool) -> None:
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".safetensors":
        save_file(STATE, whole)
    else:
        torch.save({"state_dict": STATE}, whole, _use_new_zipfile_serialization=new_format)
    content = whole.read_bytes()
    path = tmp_path / f"cut{suffix}"
    for length in {0, 1, 7, 8, 9, *range(10, len(content) - 1, max(1, len(content) // 60))}:
        path.write_bytes(content[:length])
        with pytest.raises(InputError) as caught:
            read_checkpoint(path)
        assert_one_sentence(caught.value, str(path))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("new_format", [True, False])
def test_damaged_bytes_never_end_in_a_traceback(
    tmp_path: Path, suffix: str, new_format: bool
) -> None:
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".safetensors":
        save_file(STATE, whole)
    else:
        torch.save({"state_dict": STATE}, whole, _use_new_zipfile_serialization=new_format)
    content = whole.read_bytes()
    path = tmp_path / f"hurt{suffix}"
    random = torch.Generator().manual_seed(0)
    for _ in range(150):
        at, value = torch.randint(len(content), (2,), generator=random).tolist()
        path.write_bytes(content[:at] + bytes([value % 256]) + content[at + 1 :])
        try:
            read_checkpoint(path)
        except InputError as error:
            assert_one_sentence(error, str(path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b"not a checkpoint",
        b"PK\x03\x04" + bytes(40),
        bytes(100),
        pickle.dumps([1, 2]),
        pickle.dumps({}),
        pickle.dumps({"epoch": 3}),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_other_files(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"other{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_checkpoint(path)
    assert_one_sentence(caught.value, str(path))


@pytest.mark.parametrize(
    "content", [{}, {"epoch": 1}, {"n": torch.tensor(1)}, [torch.ones(2)], torch.ones(3), None, 5]
)
def test_checkpoints_without_weights(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "empty.pt")
    with pytest.raises(InputError) as caught:
        read_checkpoint(tmp_path / "empty.pt")
    assert_one_sentence(caught.value, "empty.pt", "holds no weights")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_checkpoint(tmp_path / "gone.ckpt")
    assert_one_sentence(caught.value, "gone.ckpt", "does not exist")
    for suffix in (".ckpt", ".safetensors"):
        (tmp_path / f"folder{suffix}").mkdir()
        with pytest.raises(InputError) as caught:
            read_checkpoint(tmp_path / f"folder{suffix}")
        assert_one_sentence(caught.value, f"folder{suffix}")


def test_names_that_become_one(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "module.w": torch.zeros(2)}, tmp_path / "both.pt")
    with pytest.raises(InputError) as caught:
        read_checkpoint(tmp_path / "both.pt")
    assert_one_sentence(caught.value, "both.pt", "'w'")


def test_good_and_bad_apart(tmp_path: Path) -> None:
    files = save_all(tmp_path, [STATE] * 3, "epoch={}.pt")
    files[1].write_bytes(files[1].read_bytes()[:-100])
    good, problems = readable_checkpoints(files)
    assert good == [files[0], files[2]]
    assert len(problems) == 1
    assert str(files[1]) in problems[0]


# -- decomposing files ---------------------------------------------------------------------------


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

    def watched(path: Path) -> tuple[dict[str, Tensor], int | None]:
        nonlocal most
        most = max(most, sum(reference() is not None for reference in alive))
        tensors, epoch = read_checkpoint(path)
        alive.append(weakref.ref(tensors["fc.weight"]))
        return tensors, epoch

    monkeypatch.setattr(posthoc, "read_checkpoint", watched)
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
