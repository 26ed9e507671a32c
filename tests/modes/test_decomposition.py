"""The decomposition as an object and as a file."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mode_toys import (
    Net,
    assert_one_sentence,
    correlation,
    fitted,
    follow,
    generator,
    history,
    same_tensors,
    walks,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cmd_plugin.errors import InputError, PluginError
from cmd_plugin.modes import Decomposition, decompose


@pytest.fixture(scope="module")
def result() -> Decomposition:
    return decompose(history(Net(), 9), modes=3, samples=80)


def tensors_of(one: Decomposition) -> dict[str, Tensor]:
    fields = {
        field.name: getattr(one, field.name)
        for field in dataclasses.fields(one)
        if isinstance(getattr(one, field.name), Tensor)
    }
    return {**fields, **{f"unmodelled/{k}": v for k, v in one.unmodelled.items()}}


def assert_same(one: Decomposition, other: Decomposition) -> None:
    assert same_tensors(tensors_of(one), tensors_of(other))
    assert one.layout == other.layout
    assert list(one.epochs) == list(other.epochs)
    assert (one.total, one.explained) == (other.total, other.explained)
    for t in range(one.snapshots):
        assert torch.equal(one.reconstruct(t), other.reconstruct(t))
        assert same_tensors(one.state_dict_at(t), other.state_dict_at(t))


# -- what it tells -------------------------------------------------------------------------------


def test_shapes_and_dtypes(result: Decomposition) -> None:
    assert (result.number_of_modes, result.snapshots, result.numel) == (3, 9, 382)
    assert result.references.dtype == result.samples.dtype == torch.int64
    assert result.assignment.dtype == torch.uint8
    assert result.profiles.shape == (3, 9)
    assert result.profiles.dtype == result.profile_mean.dtype == torch.float64
    for vector in (result.assignment, result.scale, result.offset, result.mean):
        assert vector.shape == (382,)
    for name in ("scale", "offset", "mean"):
        assert getattr(result, name).dtype == torch.float32
    assert result.reconstruct(0).dtype == torch.float32


def test_offset_is_the_mean_less_what_moves() -> None:
    one = decompose(walks(9, 200), modes=3, samples=80)
    expected = one.mean - one.scale * one.profile_mean[one.assignment.long()]
    torch.testing.assert_close(one.offset, expected, rtol=1e-12, atol=1e-12)
    for t in (0, 4, 8):
        model = one.scale * one.profiles[one.assignment.long(), t] + one.offset
        torch.testing.assert_close(one.reconstruct(t), model, rtol=1e-12, atol=1e-12)


def test_explained_variance_against_brute_force() -> None:
    sizes = {"a": 150, "b": 50, "still": 20}
    rows = walks(15, 220)
    rows[:, 200:] = rows[0, 200:]
    states = [dict(zip(sizes, row.split(list(sizes.values())), strict=True)) for row in rows]
    one = decompose(states, modes=4, samples=100, storage="fp32")
    model = torch.stack([one.reconstruct(t) for t in range(15)])
    lost = (rows - model).square().sum(dim=0)
    total = (rows - rows.mean(dim=0)).square().sum(dim=0)
    assert one.explained_variance() == pytest.approx(1 - float(lost.sum() / total.sum()), rel=1e-9)
    layers = one.explained_variance_by_layer()
    assert list(layers) == list(sizes)
    start = 0
    for name, size in sizes.items():
        part = slice(start, start + size)
        start += size
        if name == "still":
            assert math.isnan(layers[name])
            continue
        share = 1 - float(lost[part].sum() / total[part].sum())
        assert layers[name] == pytest.approx(share, rel=1e-9)
    assert one.total == pytest.approx(float(total.sum()), rel=1e-9)


def test_explained_variance_never_exceeds_one() -> None:
    base = torch.randn(9, 1, generator=generator(0))
    rows = base * torch.linspace(0.1, 3, 50)  # one mode explains everything, but for rounding
    for dtype in (torch.float32, torch.float64):
        one = decompose(rows.to(dtype), modes=1)
        assert 1 - 1e-6 < one.explained_variance() <= 1
        assert max(one.explained_variance_by_layer().values()) <= 1
        assert follow(rows.to(dtype), modes=1, warmup=4).explained_variance() <= 1


def test_mode_share_by_layer(result: Decomposition) -> None:
    share = result.mode_share_by_layer()
    assert share.shape == (9, 3)
    torch.testing.assert_close(share.sum(dim=1), torch.ones(9).double())
    for layer, part in enumerate(result.layout.split(result.assignment).values()):
        for mode in range(3):
            assert share[layer, mode] == pytest.approx(float((part == mode).double().mean()))


def test_snapshots_by_index(result: Decomposition) -> None:
    assert torch.equal(result.reconstruct(-1), result.reconstruct(8))
    assert torch.equal(result.reconstruct(-9), result.reconstruct(0))
    for t in (9, -10, 100):
        with pytest.raises(InputError) as caught:
            result.reconstruct(t)
        assert_one_sentence(caught.value, f"snapshot {t}", "9")


def test_snapshots_by_epoch() -> None:
    one = dataclasses.replace(decompose(walks(4, 60), modes=2), epochs=[2, 5, 6, 40])
    assert [one.snapshot_of(epoch) for epoch in (2, 5, 6, 40)] == [0, 1, 2, 3]
    for epoch in (0, 3, 41, -1):
        with pytest.raises(InputError) as caught:
            one.snapshot_of(epoch)
        assert_one_sentence(caught.value, f"epoch {epoch}", "2 to 40", "4 of them")


def test_modelled_variances_are_not_negative() -> None:
    leader, variance = [0.0, 1.0, 2.0, 3.0, 10.0], [1.0, 0.9, 0.5, 0.1, 0.05]
    states = [
        {"w": torch.tensor([w]), "norm.running_var": torch.tensor([v])}
        for w, v in zip(leader, variance, strict=True)
    ]
    one = decompose(states, modes=1)
    assert one.references.tolist() == [0]
    step = float(one.profiles[0, 4] - one.profile_mean[0])
    assert float(one.scale[1]) * step + float(one.mean[1]) < -0.05  # without the clamp
    assert one.reconstruct(4).tolist() == [10.0, 0.0]
    assert one.state_dict_at(4)["norm.running_var"].tolist() == [0.0]


def test_changing_what_it_returns_does_not_change_it(result: Decomposition) -> None:
    before = result.state_dict_at(3)
    for value in result.state_dict_at(3).values():
        value.zero_()
    result.reconstruct(3).zero_()
    assert same_tensors(result.state_dict_at(3), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_state_dicts_have_the_networks_dtypes(dtype: torch.dtype) -> None:
    states = [
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        for state in history(Net(), 6)
    ]
    one = decompose(states, modes=3, samples=80)
    again = one.state_dict_at(-1)
    assert {v.dtype for v in again.values()} == {dtype, torch.int64}
    Net().to(dtype).load_state_dict(again, strict=True)
    raw = torch.cat([states[-1][name].reshape(-1) for name in one.layout.names])
    at = one.references
    assert torch.equal(one.reconstruct(-1)[at].to(dtype), raw[at])


def test_tied_weights_are_restored_under_all_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 9)
            self.head.weight = self.embedding.weight

    model = Tied()
    states = []
    for seed in range(5):
        with torch.no_grad():
            model.head.weight += torch.randn(9, 4, generator=generator(seed))
            model.head.bias += torch.randn(9, generator=generator(seed + 9))
        state = model.state_dict()
        copied = state["embedding.weight"].clone()
        states.append({**state, "embedding.weight": copied, "head.weight": copied})
        states[-1]["head.bias"] = state["head.bias"].clone()
    one = decompose(states, modes=2)
    assert one.numel == 45
    again = one.state_dict_at(2)
    assert torch.equal(again["head.weight"], again["embedding.weight"])
    Tied().load_state_dict(again, strict=True)


def test_of_an_online_run() -> None:
    net = Net()
    modes = fitted(net, epochs=9)
    one = modes.decomposition()
    assert (one.number_of_modes, one.snapshots, one.numel) == (3, 9, 382)
    torch.testing.assert_close(one.reconstruct(-1), modes.reconstruct(), rtol=0, atol=1e-6)
    torch.testing.assert_close(one.scale, modes.scale)
    torch.testing.assert_close(one.offset, modes.offset)
    assert one.explained_variance() == pytest.approx(modes.explained_variance())
    assert one.state_dict_at(-1).keys() == net.state_dict().keys()
    with pytest.raises(PluginError) as caught:
        one.explained_variance_by_layer()
    assert_one_sentence(caught.value, "online")
    before = one.reconstruct(-1)
    modes.update()  # what was handed out does not follow the run
    assert torch.equal(one.reconstruct(-1), before)
    assert int(one.unmodelled["norm.num_batches_tracked"]) == 9


# -- as a file -----------------------------------------------------------------------------------


def variants() -> dict[str, Any]:
    return {
        "network": lambda: decompose(history(Net(), 9), modes=3, samples=80),
        "double": lambda: decompose(walks(9, 60), modes=3),
        "shrunk": lambda: decompose(walks(9, 60).float(), modes=3, shrink=True),
        "mean": lambda: decompose(walks(9, 60).float(), modes=3, profile="mean"),
        "still": lambda: decompose(torch.ones(4, 30), modes=3),
        "online": lambda: fitted(Net()).decomposition(),
        "excluded": lambda: decompose(history(Net(), 5), modes=2, samples=80, exclude=["fc.*"]),
        "one weight": lambda: decompose(walks(4, 1), modes=1),
    }


@pytest.mark.parametrize("kind", list(variants()))
def test_round_trip(kind: str, tmp_path: Path) -> None:
    one = variants()[kind]()
    one.save(tmp_path / "modes.safetensors")
    again = Decomposition.load(tmp_path / "modes.safetensors")
    assert_same(one, again)
    again.save(str(tmp_path / "twice.safetensors"))
    assert_same(one, Decomposition.load(str(tmp_path / "twice.safetensors")))
    assert math.isclose(
        one.explained_variance(), again.explained_variance(), rel_tol=0
    ) or math.isnan(one.explained_variance())
    assert (
        one.nbytes
        == again.nbytes
        == sum(t.nbytes for t in load_file(tmp_path / "modes.safetensors").values())
    )


def test_the_file_carries_its_schema_and_layout(result: Decomposition, tmp_path: Path) -> None:
    result.save(tmp_path / "modes.safetensors")
    with safe_open(tmp_path / "modes.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["schema"] == "cmd-plugin/modes/1"
    assert "conv.weight" in metadata["layout"]


def rewrite(
    path: Path, *, drop: str = "", metadata: dict[str, str] | None = None, **new: Any
) -> None:
    with safe_open(path, framework="pt") as file:
        known = dict(file.metadata())
    tensors = {name: value for name, value in load_file(path).items() if name != drop}
    save_file({**tensors, **new}, path, {**known, **(metadata or {})})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not safetensors at all"),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: rewrite(path, metadata={"schema": "cmd-plugin/modes/99"}),
        lambda path: rewrite(path, metadata={"layout": "{"}),
        lambda path: rewrite(path, metadata={"layout": "{}"}),
        lambda path: rewrite(path, metadata={"sums": "[1]"}),
        lambda path: rewrite(path, drop="scale"),
        lambda path: rewrite(path, drop="epochs"),
        lambda path: rewrite(path, scale=torch.ones(5)),
        lambda path: rewrite(path, profiles=torch.ones(3, 8)),
        lambda path: rewrite(path, profile_mean=torch.ones(4)),
        lambda path: rewrite(path, assignment=torch.full((382,), 3, dtype=torch.uint8)),
        lambda path: rewrite(path, surprise=torch.ones(5)),
        lambda path: rewrite(path, metadata={"layout": "[" * 100_000}),
        lambda path: rewrite(path, metadata={"sums": "[" * 100_000}),
        lambda path: rewrite(path, metadata={"sums": "[NaN, 1.0]"}),
        lambda path: rewrite(path, metadata={"sums": "[1.0, Infinity]"}),
        lambda path: rewrite(path, **{"unmodelled/fc.weight": torch.ones(5, 64)}),
        lambda path: rewrite(path, references=torch.tensor([0, 1, 382])),
        lambda path: rewrite(path, references=torch.tensor([0, 1, -1])),
        lambda path: rewrite(path, samples=torch.tensor([2**62])),
        lambda path: rewrite(path, scale=torch.full((382,), float("nan"))),
        lambda path: rewrite(path, mean=torch.zeros(382, dtype=torch.float64)),
        lambda path: rewrite(path, epochs=torch.zeros(2, dtype=torch.int64)),
        lambda path: rewrite(path, layer_total=torch.ones(2, dtype=torch.float64)),
        lambda path: save_file({"w": torch.ones(3)}, path),
    ],
)
def test_damaged_files(damage: Any, result: Decomposition, tmp_path: Path) -> None:
    path = tmp_path / "modes.safetensors"
    result.save(path)
    damage(path)
    with pytest.raises(InputError) as caught:
        Decomposition.load(path)
    assert_one_sentence(caught.value, str(path))


def test_precision_of_the_codec() -> None:
    """What a file of a noisy run loses is what the modes do not explain."""
    rows = walks(21, 400).float()
    one = decompose(rows, modes=10, samples=200)
    rho = correlation(rows, one.profiles).gather(0, one.assignment.long()[None])[0]
    lost = (rows - torch.stack([one.reconstruct(t) for t in range(21)])).double()
    total = (rows.double() - rows.double().mean(dim=0)).square().sum(dim=0)
    torch.testing.assert_close(lost.square().sum(dim=0), (1 - rho**2) * total, rtol=1e-4, atol=1e-6)
