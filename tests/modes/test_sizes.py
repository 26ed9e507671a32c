"""Weights of any size are decomposed alike; no number that is none is called a perfect score."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from mode_toys import follow, planted, same_partition, walks

from cmd_plugin.errors import NonFiniteError
from cmd_plugin.modes import Decomposition, decompose
from cmd_plugin.modes.fit import explained_share


def relative_error(result: Decomposition, rows: torch.Tensor) -> float:
    model = torch.stack([result.reconstruct(t) for t in range(result.snapshots)]).double()
    # In units of the largest weight: squares of 1e300 are no float64.
    size = rows.double().abs().max()
    return float(((model - rows.double()) / size).norm() / (rows.double() / size).norm())


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("storage", ["delta-bf16", "fp32", "tensor"])
@pytest.mark.parametrize("exponent", [-100, -60, 60, 100, 120])
def test_a_power_of_two_changes_nothing_else(exponent: int, storage: str, shrink: bool) -> None:
    rows = planted(5, numel=500)[0].float()

    def made(weights: torch.Tensor) -> Decomposition:
        options = {"modes": 5, "samples": 200, "shrink": shrink}
        if storage == "tensor":
            return decompose(weights, **options)  # type: ignore[arg-type]
        states = [{"w": row.clone()} for row in weights]
        return decompose(states, storage=storage, **options)  # type: ignore[arg-type]

    one, other = made(rows), made(rows * 2.0**exponent)
    assert torch.equal(one.references, other.references)
    assert torch.equal(one.assignment, other.assignment)
    assert torch.equal(one.scale, other.scale)
    assert torch.equal(one.profiles, other.profiles * 2.0**-exponent)
    assert torch.equal(one.profile_mean, other.profile_mean * 2.0**-exponent)
    assert torch.equal(one.mean, other.mean * 2.0**-exponent)
    assert one.explained_variance() == other.explained_variance() > 0.9
    assert one.explained_variance_by_layer() == other.explained_variance_by_layer()
    assert one.total == other.total * 2.0 ** (-2 * exponent)
    again = torch.stack([other.reconstruct(t) for t in range(other.snapshots)])
    expected = torch.stack([one.reconstruct(t) for t in range(one.snapshots)])
    assert torch.equal(again * 2.0**-exponent, expected)


@pytest.mark.parametrize("size", [1e-300, 1e-150, 1e-30, 1e30, 1e150])
def test_float64_weights_of_any_size(size: float) -> None:
    rows, truth = planted(5, numel=500)
    result = decompose(rows * size, modes=5)
    assert same_partition(result.assignment.long(), truth)
    assert relative_error(result, rows * size) < 1e-9
    share = result.explained_variance()
    assert share > 1 - 1e-9 or math.isnan(share)  # squares of 1e-300 are no float64


@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e30, 1e37])
def test_weights_at_the_ends_of_float32(size: float, tmp_path: Path) -> None:
    rows, truth = planted(5, numel=500)
    weights = (rows * size).float()
    for result in (decompose(weights, modes=5), decompose([{"w": w} for w in weights], modes=5)):
        assert same_partition(result.assignment.long(), truth)
        assert relative_error(result, weights) < 1e-2
        assert 0.999 < result.explained_variance() <= 1.0
        result.save(tmp_path / "modes.safetensors")
        again = Decomposition.load(tmp_path / "modes.safetensors")
        assert again.explained_variance() == result.explained_variance()


def test_the_trajectory_given_is_left_as_it_is() -> None:
    weights = (walks(6, 50) * 1e30).float()
    before = weights.clone()
    decompose(weights, modes=2)
    assert torch.equal(weights, before)


def test_differences_that_are_infinite_are_refused() -> None:
    far = torch.linspace(-1, 1, 20) * 3.4e38
    states = [{"w": far}, {"w": -far}, {"w": far / 2}]
    with pytest.raises(NonFiniteError, match="storage='fp32'"):
        decompose(states, modes=1)
    assert decompose(states, modes=1, storage="fp32").explained_variance() > 0.99


def test_a_share_that_is_not_a_number_is_not_called_one() -> None:
    inf, nan = math.inf, math.nan
    for explained, total in (
        (nan, 1.0),
        (1.0, nan),
        (inf, inf),
        (nan, nan),
        (1.0, 0.0),
        (0.0, 0.0),
    ):
        assert math.isnan(explained_share(explained, total)), (explained, total)
    assert explained_share(1.1, 1.0) == 1.0
    assert explained_share(0.25, 0.5) == 0.5


@pytest.mark.parametrize("shrink", [False, True])
def test_online_shares_of_small_and_large_weights(shrink: bool) -> None:
    rows = planted(3, numel=300)[0].float()
    shares = [
        follow(rows * 2.0**e, modes=3, warmup=9, samples=100, shrink=shrink).explained_variance()
        for e in (-30, 0, 30, 40)
    ]
    assert shares == pytest.approx([shares[1]] * 4, rel=1e-4)
    assert shares[1] > 0.99
