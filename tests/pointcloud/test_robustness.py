"""The robustness table: every cell from the right clouds, every row from the right networks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, NonFiniteError, StateMismatch
from cmd_plugin.pointcloud import (
    CORRUPTIONS,
    PointClouds,
    build_network,
    corrupt,
    mean_corruption_error,
    refocus,
    shuffle_points,
    statistical_outliers,
)
from cmd_plugin.pointcloud.defences import (
    _SCHEMA,
    initial_defences,
    repeated_to_size,
    scaled_sizes,
    train_defences,
)
from cmd_plugin.pointcloud.robustness import corrupted_sets, evaluate_corruptions
from cmd_plugin.runs.tensors import read_schema


def data(clouds: int = 12, points: int = 64) -> PointClouds:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(clouds, points, 3, generator=generator)
    drawn /= drawn.norm(dim=2, keepdim=True)
    labels = torch.arange(clouds) % 2
    drawn[labels == 1, :, 2] *= 0.05
    return PointClouds(drawn, labels, ("ball", "disc"))


def flatness(points: Tensor, index: Tensor) -> dict[str, Tensor]:
    """A panel with a known answer: a disc is flat. One row by rule, one that votes."""
    height = points[:, :, 2].std(dim=1)
    logits = torch.stack([height, torch.full_like(height, 0.3)], dim=1)
    members = torch.stack([logits, logits.flip(1), logits * 3], dim=1)
    return {"rule": logits, "vote": members + 0 * index[:, None, None]}


def test_all_36_sets_come_with_their_corruption() -> None:
    clouds = data()
    sets = list(corrupted_sets(clouds, seed=4))
    assert len(sets) == 36
    assert sets[0][:2] == ("clean", 0)
    assert sets[0][2].points is clouds.points
    assert {(name, level) for name, level, _ in sets[1:]} == {
        (name, level) for name in CORRUPTIONS for level in range(5)
    }
    for name, level, made in sets[1:]:
        assert torch.equal(made.points, corrupt(clouds.points, name, level, seed=4))
        assert torch.equal(made.labels, clouds.labels)


def test_the_table_is_the_accuracy_of_every_cell() -> None:
    clouds, seen = data(), []
    report = evaluate_corruptions(
        flatness,
        corrupted_sets(clouds),
        batch_size=5,
        views={"vote": ("a", "b", "c")},
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(number, 36) for number in range(1, 37)]
    for corruption, level, made in corrupted_sets(clouds):
        answer = flatness(made.points, torch.arange(12))
        expected = float((answer["rule"].argmax(1) == clouds.labels).double().mean())
        row = report.accuracy["rule"][corruption]
        assert row[level] == pytest.approx(expected)
    levels = {name: report.accuracy["rule"][name] for name in CORRUPTIONS}
    clean = report.accuracy["rule"]["clean"][0]
    assert report.summaries["rule"] == mean_corruption_error(levels, clean)
    assert report.accuracy["vote"] == report.accuracy["rule"]  # (1 - 1 + 3) / 3 of the rule
    spread = report.diversity["vote"]
    assert set(spread) == {"clean", "all", *CORRUPTIONS}
    assert spread["all"].ensemble_accuracy == pytest.approx(
        (clean + sum(sum(row) for row in levels.values())) / 36
    )
    assert float(spread["clean"].accuracy[1]) == pytest.approx(1 - clean)
    text = json.dumps(report.as_dict(), allow_nan=False)
    assert json.loads(text)["methods"]["rule"]["mce"] == report.summaries["rule"].mce


def test_points_are_shuffled_and_batches_do_not_matter() -> None:
    """A panel that looks at the last point would know which clouds have added ones."""
    clouds = data()
    answers: list[list[Tensor]] = []
    for batch in (12, 5):
        got: list[Tensor] = []

        def panel(points: Tensor, index: Tensor, into: list[Tensor] = got) -> dict[str, Tensor]:
            into.append(points[:, -1])
            assert len(points) == len(index)
            return {"row": torch.zeros(len(points), 2)}

        evaluate_corruptions(panel, corrupted_sets(clouds), batch_size=batch, seed=3)
        answers.append(got)
    assert torch.equal(torch.cat(answers[0]), torch.cat(answers[1]))
    expected = shuffle_points(clouds.points, seed=3)[:, -1]
    assert torch.equal(answers[0][0], expected)
    assert not torch.equal(answers[0][0], clouds.points[:, -1])


def test_bad_tables() -> None:
    clouds = data()
    with pytest.raises(InputError, match="no clouds were seen for every level"):
        evaluate_corruptions(flatness, list(corrupted_sets(clouds))[:-1])
    with pytest.raises(InputError, match="batch_size"):
        evaluate_corruptions(flatness, corrupted_sets(clouds), batch_size=0)

    def uneven() -> Iterator[tuple[str, int, PointClouds]]:
        for number, (name, level, made) in enumerate(corrupted_sets(clouds)):
            yield name, level, made if number else made.select(torch.arange(6))

    with pytest.raises(InputError, match="same clouds"):
        evaluate_corruptions(flatness, uneven())
    with pytest.raises(NonFiniteError, match="row: logits under clean 0"):
        evaluate_corruptions(
            lambda points, _: {"row": torch.full((len(points), 2), torch.nan)},
            corrupted_sets(clouds),
        )


def make() -> nn.Module:
    return build_network("pointnet", 2, 0.06)


def test_rows_are_what_they_are_called() -> None:
    defences = initial_defences(make, 64, seed=0).eval()
    points, index = data().points, torch.arange(12) + 3
    rows = defences(points, index)
    assert {name: tuple(row.shape) for name, row in rows.items()} == {
        "plain": (12, 2),
        "refocused": (12, 2),
        "refocused, trained": (12, 2),
        "SOR": (12, 2),
        "EPiC": (12, 12, 2),
        "EPiC + refocused": (12, 13, 2),
    }
    close = {"atol": 1e-5, "rtol": 1e-5}
    with torch.no_grad():
        assert torch.allclose(rows["plain"], defences.plain(points), **close)
        votes = defences.ensemble.votes(points, index).logits
        assert torch.equal(rows["EPiC"], votes)
        assert torch.equal(rows["EPiC + refocused"][:, :12], votes)
        member = refocus(defences.subset, points, keep=38).output  # 600/1024 of 64
        assert torch.allclose(rows["EPiC + refocused"][:, 12], member, **close)
        adaptive = refocus(defences.plain, points, minimum=20).output
        assert torch.allclose(rows["refocused"], adaptive, **close)
        adaptive = refocus(defences.subset, points, minimum=20).output
        assert torch.allclose(rows["refocused, trained"], adaptive, **close)
        kept = statistical_outliers(points)
        for number in range(12):
            # A max over points does not mind repeats.
            single = defences.plain(points[number][kept[number]][None])[0]
            assert torch.allclose(rows["SOR"][number], single, **close)
    assert defences.views["EPiC"] == defences.ensemble.views
    assert defences.views["EPiC + refocused"][12:] == ("refocused",)


def test_kept_points_are_repeated_in_turn() -> None:
    points = torch.arange(12.0).view(1, 4, 3).expand(3, -1, -1)
    kept = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    result = repeated_to_size(points, kept)[:, :, 0]
    assert result.tolist() == [[0, 6, 0, 6], [0, 3, 6, 9], [0, 3, 6, 9]]


def test_sizes_in_proportion() -> None:
    assert scaled_sizes(1024) == {"patch": 512, "curve": 512, "random": 128}
    assert scaled_sizes(512) == {"patch": 256, "curve": 256, "random": 64}
    assert scaled_sizes(1) == {"patch": 1, "curve": 1, "random": 1}


def test_random_subsets_of_small_clouds_keep_enough_points_to_show_a_shape() -> None:
    assert scaled_sizes(256) == {"patch": 128, "curve": 128, "random": 64}  # an eighth would be 32
    assert scaled_sizes(300)["random"] == 64
    assert scaled_sizes(128)["random"] == 32  # and still a part of the cloud


def test_curves_of_the_ensemble_step_as_far_as_asked() -> None:
    near = train_defences(make, data(), 1, batch_size=6, rounds=1, neighbours=2)
    far = train_defences(make, data(), 1, batch_size=6, rounds=1)
    assert near.ensemble.neighbours == 2
    # Neither draws nor initial weights differ, only where the curves go.
    for name, value in near.state_dict().items():
        curve = name.startswith("ensemble.networks.curve.") and value.is_floating_point()
        assert torch.equal(value, far.state_dict()[name]) != curve, name


def test_training_saving_and_loading(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    state = torch.get_rng_state()
    trained = train_defences(
        make,
        data(),
        4,
        batch_size=6,
        rounds=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == [(number, 20) for number in range(1, 21)]
    assert trained.ensemble.neighbours == 20
    start = initial_defences(make, 64, seed=0)
    for name, before in start.named_parameters():
        assert not torch.equal(trained.get_parameter(name), before), name
    again = train_defences(make, data(), 4, batch_size=6, rounds=1)
    points, index = data().points, torch.arange(12)
    first, second = trained(points, index), again(points, index)
    assert all(torch.equal(first[name], second[name]) for name in first)

    path = tmp_path / "networks.safetensors"
    trained.save(path, {"seed": 0})
    assert start.load(path, {"seed": 0}) == ("plain", "ensemble", "subset")
    loaded = start(points, index)
    assert all(torch.equal(first[name], loaded[name]) for name in first)
    with pytest.raises(StateMismatch, match="was trained under seed=0, asked for is 1"):
        start.load(path, {"seed": 1})
    other = initial_defences(lambda: build_network("pointnet", 2, 0.2), 64, seed=0)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(StateMismatch, match="other networks"):
        other.load(path, {"seed": 0})
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    assert read_schema(path) == "cmd-plugin/defences/1"
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is damaged"):
        start.load(path, {"seed": 0})


def test_networks_that_share_weights_are_kept_and_read_back(tmp_path: Path) -> None:
    def attentive() -> nn.Module:
        return build_network("pct", 2, 0.06)  # its queries and keys are one weight

    kept, read = initial_defences(attentive, 64, seed=0), initial_defences(attentive, 64, seed=1)
    kept.save(tmp_path / "n.safetensors", {}, finished=("plain",))
    assert read.load(tmp_path / "n.safetensors", {}) == ("plain",)
    for name, value in kept.state_dict().items():
        assert torch.equal(read.state_dict()[name], value), name


@pytest.mark.parametrize("settings", [None, "{", "3"])
def test_a_file_without_its_settings_is_refused(settings: str | None, tmp_path: Path) -> None:
    defences = initial_defences(make, 64, seed=0)
    path = tmp_path / "n.safetensors"
    about = {} if settings is None else {"settings": settings}
    _SCHEMA.save(path, defences.state_dict(), about)
    with pytest.raises(InputError, match="is damaged"):
        defences.load(path, {})
