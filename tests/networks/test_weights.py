"""One reader of weights: every wrapping gives the same tensors, everything else one sentence."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sentences import assert_one_sentence
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cmd_plugin.errors import InputError, PluginError, StateMismatch
from cmd_plugin.networks import load_weights, read_weights
from cmd_plugin.networks.names import by_clean_name, clean_name
from cmd_plugin.networks.weights import read_numbers, save_weights, shards_of

STATE = {"w": torch.arange(4.0), "n": torch.tensor(3)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return [*one] == [*other] and all(torch.equal(one[name], other[name]) for name in one)


class Network(nn.Module):
    """Layers of its own names, a buffer, and a head that is tied to the embedding."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 7)
        self.head.weight = self.embedding.weight


def network(seed: int = 0, width: int = 4) -> Network:
    torch.manual_seed(seed)
    return Network(width)


# -- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"epoch": 7, "global_step": 90, "state_dict": STATE, "callbacks": {}},
        {"model": STATE, "optimizer": {"state": {}}},
        {"model_state_dict": STATE, "epoch": 2},
        {"model": {"state_dict": STATE}},
        {"net": STATE},
        {"state_dict": {f"module._orig_mod.{k}": v for k, v in STATE.items()}},
        {"state_dict": {f"_fsdp_wrapped_module.{k}": v for k, v in STATE.items()}},
        {**STATE, "_extra_state": {"a": 1}, "version": 2},
    ],
)
@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("which", ["shown", "trained"])
def test_every_wrapping_of_torch(
    tmp_path: Path, content: Any, new_format: bool, which: Any
) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    assert same(read_weights(path, which), STATE)


def test_the_choice_between_shown_and_trained_weights_is_one_argument(tmp_path: Path) -> None:
    shown = {"w": torch.zeros(4), "n": torch.tensor(0)}
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": shown, "current_model_state": STATE, "epoch": 1}, path)
    assert same(read_weights(path), shown)
    assert same(read_weights(path, which="trained"), STATE)
    with pytest.raises(InputError) as caught:
        read_weights(path, which="best")  # type: ignore[arg-type]
    assert_one_sentence(caught.value, "'shown' or 'trained'", "'best'")


def test_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    assert read_weights(tmp_path / "model.safetensors").keys() == STATE.keys()


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    """Also tied tensors, views of others, and other types than float32."""
    table = torch.randn(6, 4)
    state = {
        "embedding": table,
        "head": table,
        "turned": table.T,
        "half": torch.randn(3).bfloat16(),
        "count": torch.tensor(7),
    }
    save_weights(tmp_path / "net.safetensors", state)
    found = read_weights(tmp_path / "net.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert all(found[name].dtype == value.dtype for name, value in state.items())
    assert (tmp_path / "net.safetensors").stat().st_mode & 0o044


def test_gradients_are_left_behind_and_shared_tensors_stay_shared(tmp_path: Path) -> None:
    made = network()
    torch.save(dict(made.named_parameters(remove_duplicate=False)), tmp_path / "a.pt")
    state = read_weights(tmp_path / "a.pt")
    assert not any(tensor.requires_grad for tensor in state.values())
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()


def save_in_shards(folder: Path, state: dict[str, Tensor], suffix: str, stem: str) -> Path:
    """What transformers writes: two shards, and an index beside them."""
    folder.mkdir(exist_ok=True)
    names = list(state)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    places = {}
    for number, part in enumerate(parts, 1):
        shard = f"{stem}-{number:05d}-of-00002{suffix}"
        content = {name: state[name].clone() for name in part}
        save = save_file if suffix == ".safetensors" else torch.save
        save(content, folder / shard)
        places |= dict.fromkeys(part, shard)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize(("suffix", "stem"), [(".safetensors", "model"), (".bin", "pytorch_model")])
def test_shards_are_one_checkpoint_by_their_index(tmp_path: Path, suffix: str, stem: str) -> None:
    made = network()
    index = save_in_shards(tmp_path, dict(made.state_dict()), suffix, stem)
    state = read_weights(index)
    assert state.keys() == made.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in made.state_dict().items())
    assert [path.name for path in shards_of(index)] == [
        f"{stem}-0000{n}-of-00002{suffix}" for n in (1, 2)
    ]
    with pytest.raises(InputError) as caught:
        read_weights(shards_of(index)[0])
    assert_one_sentence(caught.value, "one of several files", index.name)
    shards_of(index)[1].unlink()
    with pytest.raises(InputError) as caught:
        read_weights(index)
    assert_one_sentence(caught.value, str(index), "-00002-of-00002", "not there")


@pytest.mark.parametrize(
    "places",
    [
        {},
        [],
        {"w": 1},
        {"w": "../model-00001-of-00002.safetensors"},
        {"w": "model.safetensors.index.json"},
        {"w": ""},
        {"w": None},
    ],
)
def test_an_index_that_is_none(tmp_path: Path, places: Any) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for text in (json.dumps({"weight_map": places}), json.dumps(places), "{", "[" * 10**5, "\x00"):
        index.write_text(text)
        with pytest.raises(InputError) as caught:
            read_weights(index)
        assert_one_sentence(caught.value, str(index))


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    index = save_in_shards(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)}, ".bin", "model")
    content = json.loads(index.read_text())
    content["weight_map"]["c"] = content["weight_map"]["a"]
    index.write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        read_weights(index)
    assert_one_sentence(caught.value, "model-00001-of-00002.bin", "'c'")


# -- what is refused -----------------------------------------------------------------------------


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (self.folder,))


def test_pickles_are_refused_and_nothing_in_them_runs(tmp_path: Path) -> None:
    torch.save({"weights": Evil(str(tmp_path / "made"))}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="no plain weights"):
        read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "made").exists()
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(InputError, match="no plain weights"):
        read_weights(tmp_path / "text.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(InputError, match="holds no weights"):
        read_weights(tmp_path / "empty.pt")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678")
    with pytest.raises(InputError, match="cannot be read"):
        read_weights(tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match="no file"):
        read_weights(tmp_path / "none.pt")


class Touching:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def test_foreign_objects_are_refused_and_nothing_runs(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    torch.save({"state_dict": STATE, "hyper": Touching(target)}, tmp_path / "evil.ckpt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Touching(target)))
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    for name in ("evil.ckpt", "plain.pt", "module.pt"):
        with pytest.raises(InputError) as caught:
            read_weights(tmp_path / name)
        assert_one_sentence(caught.value, name)
    assert not target.exists()


class Odd(Tensor):
    """A tensor that says of itself what it does."""


def unusual() -> dict[str, Callable[[], Tensor]]:
    def quantised() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces another package for them
            return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)

    def nested() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a prototype, says torch
            return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])

    return {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "nested": nested,
        "quantised": quantised,
        "without values": lambda: torch.empty(3, device="meta"),
        "of the type Odd": lambda: torch.ones(2).as_subclass(Odd),
    }


@pytest.mark.parametrize("kind", [*unusual()])
@pytest.mark.parametrize("nested", [False, True])
def test_unusual_tensors_are_named(tmp_path: Path, kind: str, nested: bool) -> None:
    content: Any = {"fine": torch.ones(2), "odd.weight": unusual()[kind]()}
    torch.save({"state_dict": content} if nested else content, tmp_path / "a.pt")
    with torch.serialization.safe_globals([Odd]), pytest.raises(InputError) as caught:
        read_weights(tmp_path / "a.pt")
    assert_one_sentence(caught.value, "a.pt", "'odd.weight'", kind)


def test_a_tensor_that_says_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    small = torch.arange(4.0).expand(3, 4)
    torch.save({"a": small}, tmp_path / "small.pt")
    assert torch.equal(read_weights(tmp_path / "small.pt")["a"], small)
    torch.save({"a": small, "b": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "large.pt")
    with pytest.raises(InputError) as caught:
        read_weights(tmp_path / "large.pt")
    assert_one_sentence(caught.value, "large.pt", "'b' is expanded to 4000000000000 bytes")


def test_the_imaginary_part_of_a_weight_is_not_dropped(tmp_path: Path) -> None:
    network = nn.Linear(3, 2)
    before = network.weight.detach().clone()
    torch.save({"weight": torch.ones(2, 3) + 2j, "bias": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(StateMismatch) as caught:
        load_weights(network, tmp_path / "a.pt")
    assert_one_sentence(caught.value, "a.pt", "weight is complex")
    assert torch.equal(network.weight, before)


def test_a_dictionary_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError) as caught:
        read_weights(tmp_path / "a.pt")
    assert_one_sentence(caught.value, "holds no weights")


def test_names_that_are_numbers_and_names_that_become_one(tmp_path: Path) -> None:
    torch.save({0: torch.ones(2), 1: torch.zeros(2)}, tmp_path / "numbers.pt")
    assert [*read_weights(tmp_path / "numbers.pt")] == ["0", "1"]
    torch.save({"w": torch.ones(2), "module.w": torch.zeros(2)}, tmp_path / "both.pt")
    with pytest.raises(InputError) as caught:
        read_weights(tmp_path / "both.pt")
    assert_one_sentence(caught.value, "both.pt", "'w'")


@pytest.mark.parametrize(
    "content", [{}, {"epoch": 1}, {"n": torch.tensor(1)}, [torch.ones(2)], torch.ones(3), None, 5]
)
def test_checkpoints_without_weights(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "empty.pt")
    with pytest.raises(InputError) as caught:
        read_weights(tmp_path / "empty.pt")
    assert_one_sentence(caught.value, "empty.pt", "holds no weights")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_weights(tmp_path / "gone.ckpt")
    assert_one_sentence(caught.value, "gone.ckpt", "does not exist")
    for suffix in (".ckpt", ".safetensors", ".safetensors.index.json"):
        (tmp_path / f"folder{suffix}").mkdir()
        os.mkfifo(tmp_path / f"fifo{suffix}")
        for name in (f"folder{suffix}", f"fifo{suffix}", "x" * 5000 + suffix, f"\0{suffix}"):
            with pytest.raises(InputError) as caught:
                read_weights(tmp_path / name)
            assert_one_sentence(caught.value, name)


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
        read_weights(path)
    assert_one_sentence(caught.value, str(path))


def save_whole(folder: Path, suffix: str, new_format: bool) -> bytes:
    whole = folder / f"whole{suffix}"
    if suffix == ".safetensors":
        save_file(STATE, whole)
    else:
        content = {"state_dict": STATE, "current_model_state": STATE, "epoch": 3}
        torch.save(content, whole, _use_new_zipfile_serialization=new_format)
    return whole.read_bytes()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
@pytest.mark.parametrize("new_format", [True, False])
def test_truncated_anywhere(tmp_path: Path, suffix: str, new_format: bool) -> None:
    content = save_whole(tmp_path, suffix, new_format)
    path = tmp_path / f"cut{suffix}"
    for length in {0, 1, 7, 8, 9, *range(10, len(content) - 1, max(1, len(content) // 60))}:
        path.write_bytes(content[:length])
        with pytest.raises(InputError) as caught:
            read_weights(path)
        assert_one_sentence(caught.value, str(path))
        assert read_numbers(path, ("epoch",)) in ({}, {"epoch": 3})


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("hits", [1, 8])
def test_damaged_bytes_never_end_in_a_traceback(
    tmp_path: Path, suffix: str, new_format: bool, hits: int
) -> None:
    content = save_whole(tmp_path, suffix, new_format)
    path = tmp_path / f"hurt{suffix}"
    random = torch.Generator().manual_seed(0)
    for number in range(150):
        hurt = bytearray(content)
        for _ in range(hits):
            at, value = torch.randint(len(content), (2,), generator=random).tolist()
            hurt[at] = value % 256
        path.write_bytes(hurt)
        read_numbers(path, ("epoch",))
        try:
            read_weights(path, which="trained" if number % 2 else "shown")
        except InputError as error:
            assert_one_sentence(error, str(path))


def test_damaged_indices_never_end_in_a_traceback(tmp_path: Path) -> None:
    index = save_in_shards(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)}, ".bin", "model")
    content = index.read_bytes()
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        at, value = torch.randint(len(content), (2,), generator=random).tolist()
        index.write_bytes(content[:at] + bytes([value % 256]) + content[at + 1 :])
        try:
            read_weights(index)
        except InputError as error:
            assert_one_sentence(error)


# -- numbers beside the weights ------------------------------------------------------------------


@pytest.mark.parametrize("new_format", [True, False])
def test_numbers_of_a_checkpoint(tmp_path: Path, new_format: bool) -> None:
    content = {"epoch": 7, "global_step": -1, "step": True, "note": "3", "state_dict": STATE}
    path = tmp_path / "a.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    names = ("epoch", "global_step", "step", "note")
    assert read_numbers(path, names) == {"epoch": 7}
    save_file(STATE, tmp_path / "a.safetensors", {"epoch": "12", "step": "-1", "note": "x"})
    assert read_numbers(tmp_path / "a.safetensors", names) == {"epoch": 12}
    torch.save([1], path)
    assert read_numbers(path, names) == {}
    assert read_numbers(tmp_path / "gone.pt", names) == {}


# -- into a network ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["plain", "nested", "wrapped", "legacy", "safe", "lightning", "averaged", "untied", "deep"],
)
def test_weights_load_from_any_usual_wrapping(tmp_path: Path, name: str) -> None:
    made = network()
    made.norm.running_mean.fill_(0.5)
    state = dict(made.state_dict())
    copies = {k: v.clone() for k, v in state.items()}
    path = tmp_path / f"{name}.{'safetensors' if name in ('safe', 'untied') else 'pt'}"
    if name == "plain":
        torch.save(state, path)
    elif name == "nested":
        torch.save({"epoch": 3, "model_state_dict": state}, path)
    elif name == "wrapped":
        torch.save({f"module.{k}": v for k, v in state.items()}, path)
    elif name == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif name == "safe":
        save_file(copies, path)
    elif name == "lightning":
        torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}}, path)
    elif name == "averaged":
        torch.save(AveragedModel(made).state_dict(), path)
    elif name == "untied":  # as transformers does, of tied weights the file holds one
        del copies["head.weight"]
        save_file(copies, path)
    else:
        torch.save({f"lit.model.net.{k}": v for k, v in state.items()}, path)
    other = network(seed=1)
    load_weights(other, path)
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
    assert other.head.weight is other.embedding.weight


def test_a_wrapped_network_is_filled_as_well(tmp_path: Path) -> None:
    made = network()
    torch.save(made.state_dict(), tmp_path / "a.pt")
    other = torch.compile(network(seed=1), backend="eager")
    load_weights(other, tmp_path / "a.pt")
    assert torch.equal(other.head.bias, made.head.bias)


def test_an_averaged_model_takes_its_own_file(tmp_path: Path) -> None:
    average, other = AveragedModel(network()), AveragedModel(network(seed=1))
    average.update_parameters(network(seed=2))
    torch.save(average.state_dict(), tmp_path / "a.pt")
    load_weights(other, tmp_path / "a.pt")
    assert int(other.n_averaged) == 1
    assert torch.equal(other.module.head.bias, average.module.head.bias)


def test_shown_weights_are_loaded_by_default(tmp_path: Path) -> None:
    shown, trained = network(), network(seed=1)
    content = {"state_dict": shown.state_dict(), "current_model_state": trained.state_dict()}
    torch.save(content, tmp_path / "a.ckpt")
    other = network(seed=2)
    load_weights(other, tmp_path / "a.ckpt")
    assert torch.equal(other.head.bias, shown.head.bias)
    load_weights(other, tmp_path / "a.ckpt", which="trained")
    assert torch.equal(other.head.bias, trained.head.bias)


def test_weights_of_another_network_name_the_first_difference(tmp_path: Path) -> None:
    other = network(seed=1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    wrong = {
        "another network": dict(nn.Linear(2, 2).state_dict()),
        "lacks 'embedding.weight' (2 missing, 0 surplus)": {
            k: v for k, v in before.items() if k not in ("embedding.weight", "head.weight")
        },
        "'more' besides": {**before, "more": torch.ones(1)},
        "number of classes and the width": dict(network(width=5).state_dict()),
    }
    for text, state in wrong.items():
        torch.save(state, tmp_path / "a.pt")
        with pytest.raises(StateMismatch) as caught:
            load_weights(other, tmp_path / "a.pt")
        assert_one_sentence(caught.value, "a.pt", text)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("fc.weight", "fc.weight"),
        ("module.fc.weight", "fc.weight"),
        ("_orig_mod.fc.weight", "fc.weight"),
        ("module._orig_mod.fc.weight", "fc.weight"),
        ("_orig_mod.module.fc.weight", "fc.weight"),
        ("net._orig_mod.fc.weight", "net.fc.weight"),  # one compiled part of a model
        ("net._checkpoint_wrapped_module._fsdp_wrapped_module.fc.weight", "net.fc.weight"),
        ("net.module.weight", "net.module.weight"),  # a part that is called so
        ("module", "module"),
    ],
)
def test_names_of_wrappers(raw: str, clean: str) -> None:
    assert clean_name(raw) == clean
    assert clean_name(clean) == clean


def test_one_tensor_under_two_names_is_one() -> None:
    weight = torch.ones(2)
    assert [*by_clean_name([("module.w", weight), ("w", weight), ("text", "x")])] == ["w"]
    with pytest.raises(PluginError, match="two tensors are called 'w'"):
        by_clean_name([("module.w", weight), ("w", weight.clone())])
