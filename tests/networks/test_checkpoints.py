"""The checkpoints of a run: which files, in which order, under which numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from sentences import assert_one_sentence

from cmd_plugin.errors import InputError
from cmd_plugin.networks import find_checkpoints
from cmd_plugin.networks.checkpoints import (
    Moment,
    moment_of,
    readable_checkpoints,
    size_on_disk,
    snapshot_labels,
)

STATE = {"w": torch.arange(4.0), "n": torch.tensor(3)}


def touch(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


def found_in(folder: Path, *inputs: str) -> list[str]:
    found = find_checkpoints([folder / name for name in inputs] or [folder])
    return [path.relative_to(folder).as_posix() for path in found]


# -- moments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "epoch", "step"),
    [
        ("epoch=7-step=90.pt", 7, 90),
        ("epoch_012.pt", 12, None),
        ("net.epoch3.pt", 3, None),
        ("Epoch-3.pth", 3, None),
        ("step=5.pt", None, 5),
        ("net_step_005.pt", None, 5),
        ("global_step100.bin", None, 100),
        ("checkpoint-100.pt", None, 100),
        ("iter_20000.pth", None, 20000),
        ("model_0100.pt", None, None),  # of what, only all names together can tell
        ("weights.t7", None, None),
        ("last-v1.ckpt", None, None),
        ("checkpoint-500/model.safetensors", None, 500),
        ("checkpoint-500/model.safetensors.index.json", None, 500),
        ("epoch_3/pytorch_model.bin", 3, None),
        ("checkpoint-500/epoch=2.pt", 2, None),
        ("my checkpoint-500 of May/model.bin", None, None),
        ("epoch=" + "9" * 5000, None, None),
    ],
)
def test_moments_by_name(tmp_path: Path, name: str, epoch: int | None, step: int | None) -> None:
    if len(name) < 255:
        touch(tmp_path, name)
        assert moment_of(tmp_path / name) == Moment(epoch, step)
    else:
        assert moment_of(tmp_path / name).epoch == int("9" * 18)


@pytest.mark.parametrize("new_format", [True, False])
def test_what_the_file_says_counts_more_than_its_name(tmp_path: Path, new_format: bool) -> None:
    path = tmp_path / "epoch=3-step=4.ckpt"
    for content, moment in (
        ({"epoch": 7, "global_step": 90, "state_dict": STATE}, Moment(7, 90)),
        ({"epoch": 7, "state_dict": STATE}, Moment(7, 4)),
        ({"step": 9, "state_dict": STATE}, Moment(3, 9)),
        ({"epoch": "last", "global_step": -3, "state_dict": STATE}, Moment(3, 4)),
        ([1], Moment(3, 4)),
    ):
        torch.save(content, path, _use_new_zipfile_serialization=new_format)
        assert moment_of(path) == moment
    save_file(STATE, tmp_path / "a.safetensors", {"epoch": "12"})
    assert moment_of(tmp_path / "a.safetensors") == Moment(12, None)


# -- finding -------------------------------------------------------------------------------------


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
    touch(tmp_path, "checkpoints/epoch=1.ckpt", "checkpoints/epoch=0.ckpt", "metrics.csv")
    found = find_checkpoints([str(tmp_path)])
    assert found == [tmp_path / "checkpoints" / f"epoch={n}.ckpt" for n in (0, 1)]


def test_a_finished_run_of_train_has_its_checkpoints_in_a_folder(tmp_path: Path) -> None:
    names = [f"checkpoints/epoch={n:03d}.ckpt" for n in range(3)]
    touch(tmp_path, *names, "modes.safetensors", "model_cmd.safetensors", "result.json")
    assert found_in(tmp_path) == names
    for name in names:
        (tmp_path / name).unlink()
    with pytest.raises(InputError) as caught:
        find_checkpoints([tmp_path])
    assert_one_sentence(caught.value, str(tmp_path), "no checkpoint")


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        find_checkpoints([tmp_path])
    assert_one_sentence(caught.value, str(tmp_path), "no checkpoint", ".safetensors")
    for name in ("gone", "x" * 5000):
        with pytest.raises(InputError) as caught:
            find_checkpoints([tmp_path / name])
        assert_one_sentence(caught.value, name)


BESIDE = [
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin"),
    *("optimizer.bin", "scaler.pt", "adapter_model.safetensors", "trainer_state.json"),
    *("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", ".hidden.pt", "tokenizer.json"),
]
SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]


def indexed(folder: Path, *places: str) -> None:
    for place in places:
        touch(folder, *(f"{place}/{shard}" for shard in SHARDS))
        index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
        (folder / place / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("inside", ["", "checkpoints/"])
def test_folders_of_transformers_are_one_checkpoint_each(tmp_path: Path, inside: str) -> None:
    steps = (100, 1000, 1100, 200)
    for step in steps:
        place = f"{inside}checkpoint-{step}"
        touch(tmp_path, *(f"{place}/{name}" for name in BESIDE), f"{place}/global_step{step}/x.pt")
    indexed(tmp_path, *(f"{inside}checkpoint-{step}" for step in steps[:2]))
    touch(tmp_path, f"{inside}checkpoint-1100/pytorch_model.bin")
    touch(tmp_path, *(f"{inside}checkpoint-200/{n}" for n in ("model.safetensors", "other.bin")))
    touch(tmp_path, "model.safetensors", "training_args.bin", f"{inside}checkpoint-1200/README.md")
    expected = [
        f"{inside}checkpoint-{name}"
        for name in (
            "100/model.safetensors.index.json",
            "200/model.safetensors",
            "1000/model.safetensors.index.json",
            "1100/pytorch_model.bin",
        )
    ]
    assert found_in(tmp_path) == expected
    assert found_in(tmp_path, *(f"{inside}checkpoint-{step}" for step in steps)) == expected
    assert snapshot_labels([tmp_path / name for name in expected]) == [100, 200, 1000, 1100]


def test_shards_in_a_folder_are_their_index(tmp_path: Path) -> None:
    indexed(tmp_path, "whole")
    assert found_in(tmp_path, "whole") == ["whole/model.safetensors.index.json"]
    given_by_a_shell = sorted((tmp_path / "whole").iterdir())
    assert found_in(tmp_path, *map(str, given_by_a_shell)) == ["whole/model.safetensors.index.json"]


def test_several_networks_in_each_folder_are_told_apart_by_the_user(tmp_path: Path) -> None:
    names = [f"step_{n}/{who}.pt" for n in (1, 2, 10) for who in ("actor", "critic")]
    touch(tmp_path, *names)
    with pytest.raises(InputError) as caught:
        find_checkpoints([tmp_path])
    assert_one_sentence(caught.value, "actor.pt, critic.pt", "*/actor.pt")
    actors = sorted(name for name in names if "actor" in name)
    assert actors[1] == "step_10/actor.pt"
    assert found_in(tmp_path, *actors) == [f"step_{n}/actor.pt" for n in (1, 2, 10)]


@pytest.mark.parametrize(
    "pattern", ["step={}.pt", "global_step{}.bin", "checkpoint-{}.safetensors"]
)
def test_files_by_step(tmp_path: Path, pattern: str) -> None:
    names = [pattern.format(n) for n in (100, 20, 3)]
    touch(tmp_path, *names, "final.pt", *BESIDE)
    assert found_in(tmp_path) == names[::-1]
    assert snapshot_labels(find_checkpoints([tmp_path])) == [3, 20, 100]


def test_links_to_others_and_copies_without_a_number_are_left_out(tmp_path: Path) -> None:
    files = touch(tmp_path, "epoch=0.ckpt", "epoch=1.ckpt", "best.ckpt")
    (tmp_path / "epoch=9.ckpt").symlink_to(files[1])
    (tmp_path / "best-so-far.ckpt").symlink_to("epoch=1.ckpt")
    assert found_in(tmp_path) == ["epoch=0.ckpt", "epoch=1.ckpt"]


# -- order of files that are given ---------------------------------------------------------------


def test_files_keep_their_order(tmp_path: Path) -> None:
    touch(tmp_path, "b.pt", "a.pt")
    files = [tmp_path / "b.pt", tmp_path / "a.pt"]
    assert find_checkpoints(files) == files


@pytest.mark.parametrize(
    "ordered",
    [
        [f"run/checkpoint-{n}/model.safetensors" for n in (100, 200, 1000, 1100)],
        [f"epoch={n}.ckpt" for n in (0, 9, 10, 11)],
        ["epoch=0-step=9.ckpt", "epoch=0-step=10.ckpt", "epoch=1-step=11.ckpt"],
        ["a-step=9.pt", "c/step=10.pt", "b_step11.pt"],
        [f"model_{n:04d}.pt" for n in (0, 5, 100)],
        [f"resnet18_{n}.pt" for n in (9, 10, 11)],
        [f"run{n}/model.pt" for n in (1, 2, 10)],
        [f"at_{n}_loss_{loss}.pt" for n, loss in ((1, 9), (2, 5), (10, 3))],
    ],
)
def test_scrambled_files_are_put_in_order(tmp_path: Path, ordered: list[str]) -> None:
    touch(tmp_path, *ordered)
    for scrambled in (ordered[::-1], sorted(ordered), ordered[1:] + ordered[:1]):
        assert found_in(tmp_path, *scrambled) == ordered


def test_what_files_say_of_themselves_orders_them(tmp_path: Path) -> None:
    for name, epoch in (("best-0.93.ckpt", 4), ("best-0.95.ckpt", 2), ("a.ckpt", 3)):
        torch.save({"epoch": epoch, "state_dict": STATE}, tmp_path / name)
    expected = ["best-0.95.ckpt", "a.ckpt", "best-0.93.ckpt"]
    assert found_in(tmp_path) == expected
    assert found_in(tmp_path, *sorted(expected)) == expected
    assert snapshot_labels([tmp_path / name for name in expected]) == [2, 3, 4]


def test_a_file_is_given_once(tmp_path: Path) -> None:
    files = touch(tmp_path, "epoch=0.pt", "epoch=1.pt")
    (tmp_path / "link.pt").symlink_to(files[0])
    for inputs in ([files[0], files[0]], [tmp_path, files[1]], [files[0], tmp_path / "link.pt"]):
        with pytest.raises(InputError) as caught:
            find_checkpoints(inputs)
        assert_one_sentence(caught.value, "given twice")


def test_two_runs_are_not_mixed(tmp_path: Path) -> None:
    touch(tmp_path, *(f"seed{seed}/epoch={n}.ckpt" for seed in (0, 1) for n in (0, 1)))
    with pytest.raises(InputError) as caught:
        find_checkpoints([tmp_path / "seed0", tmp_path / "seed1"])
    assert_one_sentence(caught.value, "both of epoch 0", "one run")
    touch(tmp_path, "seed2/epoch=2.ckpt")  # a run that was resumed elsewhere
    assert found_in(tmp_path, "seed2", "seed0")[-1] == "seed2/epoch=2.ckpt"


def test_a_file_without_a_number_keeps_its_place_if_the_others_are_in_order(
    tmp_path: Path,
) -> None:
    names = ["init.pt", "epoch=1.pt", "epoch=2.pt"]
    touch(tmp_path, *names)
    assert found_in(tmp_path, *names) == names
    with pytest.raises(InputError) as caught:
        find_checkpoints([tmp_path / name for name in reversed(names)])
    assert_one_sentence(caught.value, "epoch 1", "epoch 2", "init.pt")


@given(steps=st.lists(st.integers(0, 10**6), min_size=1, max_size=8, unique=True))
def test_any_steps_come_back_sorted(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    files = touch(folder, *(f"checkpoint-{step}/model.safetensors" for step in steps))
    found = find_checkpoints(files)
    assert snapshot_labels(found) == sorted(steps)
    assert find_checkpoints(found) == found == find_checkpoints([folder])


# -- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["epoch=4.pt", "epoch=9.pt", "epoch=30.pt"], [4, 9, 30]),
        (["epoch=0-step=10.pt", "epoch=0-step=20.pt", "epoch=1-step=30.pt"], [10, 20, 30]),
        (["epoch=4.pt", "epoch=4-v1.pt"], [0, 1]),
        (["net_0.pt", "net_10.pt"], [0, 10]),
        (["resnet18_5.pt", "resnet18_7.pt"], [5, 7]),
        (["b.pt", "a.pt"], [0, 1]),
        (["epoch=1.pt", "step=2.pt"], [0, 1]),
        (["1_1.pt", "1_2.pt", "2_1.pt"], [0, 1, 2]),
    ],
)
def test_labels(tmp_path: Path, names: list[str], labels: list[int]) -> None:
    files = touch(tmp_path, *names)
    assert snapshot_labels(files) == labels


def test_numbers_in_names_do_not_stand_in_for_an_epoch_said_twice(tmp_path: Path) -> None:
    for name in ("4.ckpt", "9.ckpt"):
        torch.save({"epoch": 4, "state_dict": STATE}, tmp_path / name)
    assert snapshot_labels([tmp_path / "4.ckpt", tmp_path / "9.ckpt"]) == [0, 1]


# -- reading -------------------------------------------------------------------------------------


def test_good_and_bad_apart(tmp_path: Path) -> None:
    files = []
    for epoch in range(3):
        files.append(tmp_path / f"epoch={epoch}.pt")
        torch.save(STATE, files[-1])
    files[1].write_bytes(files[1].read_bytes()[:-100])
    good, problems = readable_checkpoints(files)
    assert good == [files[0], files[2]]
    assert len(problems) == 1
    assert str(files[1]) in problems[0]


def test_the_size_of_a_checkpoint_is_that_of_its_shards(tmp_path: Path) -> None:
    places: dict[str, Any] = {}
    for name, shard in zip("ab", SHARDS, strict=True):
        save_file({name: torch.ones(5)}, tmp_path / shard)
        places[name] = shard
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert size_on_disk(index) == sum((tmp_path / shard).stat().st_size for shard in SHARDS)
    assert size_on_disk(tmp_path / SHARDS[0]) == (tmp_path / SHARDS[0]).stat().st_size
