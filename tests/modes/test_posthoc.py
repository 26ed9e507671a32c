"""decompose() of a whole trajectory: planted modes, invariances, hard cases, and bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from mode_toys import (
    Net,
    assert_one_sentence,
    correlation,
    generator,
    history,
    least_squares,
    planted,
    same_partition,
    walks,
)
from torch import Tensor

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError, StateMismatch
from cmd_plugin.modes import Decomposition, decompose
from cmd_plugin.modes.choice import choose_modes
from cmd_plugin.modes.sampling import sample_weights


def reconstructed(result: Decomposition) -> Tensor:
    return torch.stack([result.reconstruct(t) for t in range(result.snapshots)])


# -- planted modes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", [2, 5, 10])
@pytest.mark.parametrize("seed", range(4))
def test_planted_modes(modes: int, seed: int) -> None:
    weights, truth = planted(modes, seed=seed)
    result = decompose(weights.float(), modes=modes)
    assert result.number_of_modes == modes
    assert same_partition(result.assignment.long(), truth)  # purity 1
    error = (reconstructed(result).double() - weights).abs().max()
    assert error < 2e-6
    assert result.explained_variance() == pytest.approx(1.0, abs=1e-6)
    assert result.explained_variance() <= 1


@pytest.mark.parametrize("modes", [2, 5, 10])
def test_planted_modes_of_unit_variance(modes: int) -> None:
    # Movement of up to 8, of which 2e-6 are four units in the last place.
    weights, truth = planted(modes, stretch=21**0.5, seed=modes)
    result = decompose(weights.float(), modes=modes)
    assert same_partition(result.assignment.long(), truth)
    assert (reconstructed(result).double() - weights.float().double()).abs().max() < 2e-6


@pytest.mark.parametrize("modes", [2, 5, 10])
def test_in_float64(modes: int) -> None:
    weights, truth = planted(modes, stretch=21**0.5)
    result = decompose(weights, modes=modes)
    assert same_partition(result.assignment.long(), truth)
    assert result.scale.dtype == torch.float64
    assert (reconstructed(result) - weights).abs().max() < 1e-12


def test_assignment_is_the_best_fit() -> None:
    weights = walks(21, 500)
    result = decompose(weights, modes=7, samples=200)
    residuals = []
    for profile in result.profiles:
        scale, offset = least_squares(weights, profile[None], torch.zeros(500))
        residuals.append((scale * profile[:, None] + offset - weights).square().sum(dim=0))
    assert torch.equal(result.assignment.long(), torch.stack(residuals).argmin(dim=0))


def test_residual_identities() -> None:
    weights = walks(21, 400)
    result = decompose(weights, modes=6, samples=150)
    residual = weights - reconstructed(result)
    centred = weights - weights.mean(dim=0)
    rho = correlation(weights, result.profiles).gather(0, result.assignment.long()[None])[0]
    total = centred.square().sum(dim=0)
    near = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(residual.square().sum(dim=0), (1 - rho**2) * total, **near)
    assert (residual.square().sum(dim=0) <= total * (1 + 1e-12)).all()  # RMS error <= std
    followed = result.profiles[result.assignment.long()].T
    size = total.sqrt() * followed.norm(dim=0)
    assert ((residual * followed).sum(dim=0).abs() <= 1e-10 * size).all()
    assert (residual.sum(dim=0).abs() <= 1e-10 * total.sqrt()).all()
    explained = 1 - float(residual.square().sum() / total.sum())
    assert result.explained_variance() == pytest.approx(explained, rel=1e-9)


@pytest.mark.parametrize("storage", ["tensor", "fp32", "delta-bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_references_are_exact(storage: str, dtype: torch.dtype) -> None:
    weights = (walks(21, 300) + 100).to(dtype)
    source: Any = weights if storage == "tensor" else [{"w": row} for row in weights]
    options = {} if storage == "tensor" else {"storage": storage}
    result = decompose(source, modes=6, samples=100, **options)
    at = result.references
    assert torch.equal(result.assignment[at].long(), torch.arange(6))
    assert (result.scale[at] == 1).all()
    assert not result.offset[at].any()
    assert torch.equal(reconstructed(result)[:, at], weights[:, at])
    assert set(at.tolist()) <= set(result.samples.tolist())


# -- invariances and hard cases --------------------------------------------------------------------


def test_cancellation() -> None:
    """Movement of size one about a mean of 1000, in float32."""
    weights, truth = planted(10, stretch=21**0.5)
    result = decompose((weights + 1000).float(), modes=10)
    assert same_partition(result.assignment.long(), truth)


@given(st.integers(0, 10**6))
def test_permuting_weights_and_sample_permutes_the_result(seed: int) -> None:
    weights = walks(15, 80, seed)
    order = torch.randperm(80, generator=generator(seed))
    # All weights are sampled, so the sample is permuted with them.
    one = decompose(weights, modes=4, samples=80, seed=seed)
    other = decompose(weights[:, order], modes=4, samples=80, seed=seed + 1)
    assert same_partition(other.assignment, one.assignment[order])
    torch.testing.assert_close(reconstructed(other), reconstructed(one)[:, order])


@given(st.integers(0, 10**6))
def test_permuting_time_changes_nothing(seed: int) -> None:
    weights = walks(15, 80, seed)
    times = torch.randperm(15, generator=generator(seed))
    one = decompose(weights, modes=4, samples=40)
    # Of two samples in a cluster each is as good a reference, and rounding decides.
    rows = weights[:, one.samples].T.double()
    labels = choose_modes(rows, one.samples, 4, "reference", weights.dtype).labels
    assume(labels is not None and int(labels.bincount().min()) > 2)
    other = decompose(weights[times], modes=4, samples=40)
    assert torch.equal(one.references, other.references)
    assert torch.equal(one.assignment, other.assignment)
    torch.testing.assert_close(one.scale, other.scale, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one.offset, other.offset, rtol=1e-9, atol=1e-10)


def test_splitting_into_tensors_changes_the_sample_alone() -> None:
    weights = walks(15, 88)
    whole = decompose(weights, modes=4, samples=88)
    parts = [dict(zip("abcd", row.view(4, 2, 11), strict=True)) for row in weights]
    split = decompose(parts, modes=4, samples=88, storage="fp32")
    assert split.layout.shapes == ((2, 11),) * 4
    assert torch.equal(split.samples.sort().values, whole.samples.sort().values)  # all of them
    assert same_partition(split.assignment, whole.assignment)
    torch.testing.assert_close(reconstructed(split), reconstructed(whole))
    uneven = [{"a": row[:50], "b": row[50], "c": row[51:]} for row in weights]
    result = decompose(uneven, modes=4, samples=20, storage="fp32")
    assert torch.equal(result.samples, sample_weights([50, 1, 37], 20))
    scale, _ = least_squares(weights, result.profiles, result.assignment.long())
    torch.testing.assert_close(result.scale, scale, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_constant_weights(dtype: torch.dtype) -> None:
    weights, truth = planted(3, numel=2000, stretch=21**0.5)
    weights[:, ::7] = torch.randn(286, generator=generator(9)).double()
    weights = weights.to(dtype)
    result = decompose(weights, modes=3, samples=400)
    still = torch.zeros(2000, dtype=torch.bool)
    still[::7] = True
    assert result.number_of_modes == 3  # 15 % constants do not take one
    assert not still[result.references].any()
    assert not result.scale[still].any()
    assert torch.equal(result.offset[still], weights[0, still].to(result.offset.dtype))
    model = reconstructed(result)
    assert torch.equal(model[:, still], weights[:, still].to(model.dtype))
    assert torch.isfinite(model).all()
    assert same_partition(result.assignment[~still].long(), truth[~still])


def test_a_model_that_stands_still() -> None:
    weights = torch.randn(50, generator=generator(0)).expand(5, 50)
    result = decompose(weights, modes=3)
    assert result.number_of_modes == 0
    assert torch.equal(reconstructed(result), weights)
    assert torch.equal(result.offset, weights[0])
    assert not result.scale.any()
    assert math.isnan(result.explained_variance())
    assert all(map(math.isnan, result.explained_variance_by_layer().values()))
    assert torch.equal(result.mode_share_by_layer(), torch.ones(1, 1).double())


def test_samples_that_stand_still_do_not_hide_that_others_move() -> None:
    weights = torch.ones(9, 5000, dtype=torch.float64)
    weights[:, 777] = torch.arange(9.0).double()
    samples = next(s for s in range(99) if 777 not in sample_weights([5000], 20, s))
    result = decompose(weights, modes=2, samples=20, seed=samples)
    assert result.number_of_modes == 0
    assert result.explained_variance() == 0.0
    assert result.total == pytest.approx(60.0)
    assert result.explained_variance_by_layer() == {"weights": 0.0}


@pytest.mark.parametrize("spread", [1e-4, 1e-5, 1e-6])
def test_near_constant_weights(spread: float) -> None:
    weights, truth = planted(10, snapshots=40, stretch=40**0.5 * spread, offset=0.0)
    # Equal sizes: the smallest planted movement would be less than float32 can tell at 1e-6.
    weights = weights / weights.std(dim=0) * spread
    result = decompose((1 + weights).float(), modes=10)
    assert same_partition(result.assignment.long(), truth)


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_delta_bf16_loses_next_to_no_correlation(spread: float) -> None:
    weights = (1 + spread * walks(21, 3000)).float()
    states = [{"w": row} for row in weights]
    exact = decompose(states, modes=10, samples=500, storage="fp32")
    stored = decompose(states, modes=10, samples=500, storage="delta-bf16")
    assert torch.equal(exact.references, stored.references)  # sampled rows are kept exactly
    rho = correlation(weights, exact.profiles)
    best = rho.gather(0, exact.assignment.long()[None])[0]
    chosen = rho.gather(0, stored.assignment.long()[None])[0]
    assert (best - chosen).max() < 1e-2
    assert (exact.assignment != stored.assignment).double().mean() < 0.01
    gap = (reconstructed(exact) - reconstructed(stored)).abs() / weights.std(dim=0)
    assert gap.median() < 1e-2


# -- more modes never hurt -------------------------------------------------------------------------


def test_error_bound() -> None:
    weights = walks(21, 500)
    result = decompose(weights, modes=5, samples=100)
    rho = correlation(weights, result.profiles).gather(0, result.assignment.long()[None])[0]
    spread = weights.std(dim=0, unbiased=False)
    bound = spread * (21 * (1 - rho**2).clamp(min=0)).sqrt()
    assert ((reconstructed(result) - weights).abs().amax(dim=0) <= bound + 1e-9).all()


def test_the_scale_is_the_noise_gain() -> None:
    result = decompose(walks(21, 300), modes=4, samples=100)
    before = result.reconstruct(5)
    result.profiles[2, 5] += 1e-3
    moved = result.reconstruct(5) - before
    expected = torch.where(result.assignment == 2, result.scale * 1e-3, torch.zeros(300).double())
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("modes", "median"), [(2, 0.68), (10, 0.78)])
def test_null_control(modes: int, median: float) -> None:
    """Independent random walks correlate highly too: a high |rho| alone proves nothing."""
    noise = torch.randn(21, 5000, generator=generator(0), dtype=torch.float64).cumsum(dim=0)
    result = decompose(noise, modes=modes, samples=500)
    best = correlation(noise, result.profiles).amax(dim=0).median()
    assert float(best) == pytest.approx(median, abs=0.06)


# -- sources -------------------------------------------------------------------------------------


def test_a_network_from_its_state_dicts() -> None:
    states = history(Net(), 8)
    seen = []
    result = decompose(states, modes=3, samples=60, progress=lambda *counts: seen.append(counts))
    assert seen == [(t, 8) for t in range(1, 9)]
    assert list(result.epochs) == list(range(8))
    assert set(result.layout.names) == set(states[0]) - {"norm.num_batches_tracked"}
    assert set(result.unmodelled) == {"norm.num_batches_tracked"}
    at = result.state_dict_at(-1)
    assert at.keys() == states[-1].keys()
    assert int(at["norm.num_batches_tracked"]) == 8
    Net().load_state_dict(at, strict=True)
    for name, value in at.items():
        assert value.shape == states[-1][name].shape
        assert value.dtype == states[-1][name].dtype


def test_sources_are_left_as_they_are() -> None:
    states = history(Net(), 4)
    kept = [{name: value.clone() for name, value in state.items()} for state in states]
    decompose(states, modes=2, samples=60)
    for state, copy in zip(states, kept, strict=True):
        assert all(torch.equal(state[name], copy[name]) for name in copy)
    weights = walks(9, 50).float()
    before = weights.clone()
    decompose(weights, modes=2, shrink=True)
    assert torch.equal(weights, before)


def test_the_order_of_entries_does_not_matter() -> None:
    states = history(Net(), 5)
    expected = decompose(states, modes=2, samples=60)
    shuffled = [states[0], *(dict(reversed(state.items())) for state in states[1:])]
    assert torch.equal(decompose(shuffled, modes=2, samples=60).scale, expected.scale)


def test_prefixes_of_wrappers_are_stripped() -> None:
    states = history(Net(), 5)
    wrapped = [{f"module._orig_mod.{name}": v for name, v in s.items()} for s in states]
    result = decompose(wrapped, modes=2, samples=60)
    assert torch.equal(result.scale, decompose(states, modes=2, samples=60).scale)
    assert result.state_dict_at(0).keys() == states[0].keys()


def test_no_gradients_no_random_numbers_no_settings() -> None:
    weights = walks(9, 60).float().requires_grad_()
    state = torch.get_rng_state()
    result = decompose(weights, modes=2, profile="mean")
    assert torch.equal(torch.get_rng_state(), state)
    assert not result.reconstruct(0).requires_grad
    torch.set_default_dtype(torch.float64)
    other = decompose(weights, modes=2, profile="mean")
    assert other.scale.dtype == torch.float32
    assert torch.equal(other.scale, result.scale)
    with torch.inference_mode():
        inside = decompose(weights, modes=2, profile="mean")
    inside.reconstruct(0)
    assert torch.equal(inside.scale, result.scale)


def test_shrinking_multiplies_by_the_squared_correlation() -> None:
    weights = walks(21, 300)
    plain = decompose(weights, modes=5, samples=100)
    shrunk = decompose(weights, modes=5, samples=100, shrink=True)
    rho = correlation(weights, plain.profiles).gather(0, plain.assignment.long()[None])[0]
    torch.testing.assert_close(shrunk.scale, plain.scale * rho**2, rtol=1e-9, atol=1e-12)
    assert torch.equal(shrunk.mean, plain.mean)
    residual = (weights - reconstructed(shrunk)).square().sum()
    total = (weights - weights.mean(dim=0)).square().sum()
    assert shrunk.explained_variance() == pytest.approx(1 - float(residual / total), rel=1e-9)


def test_mean_profile_is_fitted_like_any_other() -> None:
    weights = walks(21, 300)
    result = decompose(weights, modes=5, samples=100, profile="mean")
    scale, offset = least_squares(weights, result.profiles, result.assignment.long())
    torch.testing.assert_close(result.scale, scale, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(result.offset, offset, rtol=1e-9, atol=1e-11)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", [0, 257, -1, True, 1.5, "3", None])
def test_bad_number_of_modes(modes: Any) -> None:
    with pytest.raises(InputError) as caught:
        decompose(walks(5, 20), modes=modes)
    assert_one_sentence(caught.value, "1 to 256", repr(modes))


@pytest.mark.parametrize(
    "option", [{"storage": "int8"}, {"buffers": "drop"}, {"profile": "median"}, {"samples": 0}]
)
@pytest.mark.parametrize("as_tensor", [True, False])
def test_unknown_options(option: dict[str, Any], as_tensor: bool) -> None:
    source: Any = walks(5, 20) if as_tensor else [{"w": row} for row in walks(5, 20)]
    with pytest.raises(InputError) as caught:
        decompose(source, modes=2, **option)
    assert_one_sentence(caught.value, next(iter(option)), repr(next(iter(option.values()))))


@pytest.mark.parametrize(
    "trajectory",
    [
        torch.ones(5),
        torch.ones(5, 3, 2),
        torch.ones(5, 0),
        torch.ones(5, 3, dtype=torch.int64),
        torch.ones(5, 3, dtype=torch.complex64),
        torch.ones(5, 3).to(torch.float8_e4m3fn),
    ],
)
def test_wrong_shapes_and_dtypes(trajectory: Tensor) -> None:
    with pytest.raises(ShapeError) as caught:
        decompose(trajectory, modes=1)
    assert_one_sentence(caught.value, "[T, N]")


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_snapshots(count: int) -> None:
    sources: list[Any] = [[{"w": row} for row in walks(5, 20)[:count]]]
    if count:
        sources.append(walks(5, 20)[:count])
    for source in sources:
        with pytest.raises(InputError) as caught:
            decompose(source, modes=1)
        assert_one_sentence(caught.value, "at least 3", f"got {count}")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_counted_and_placed(value: float) -> None:
    weights = walks(6, 40)
    weights[3, 11] = weights[3, 30] = value
    with pytest.raises(NonFiniteError) as caught:
        decompose(weights, modes=2)
    assert_one_sentence(caught.value, "snapshot 3", "2 NaN or infinite", "40", "at position 11")
    states = [{"a": row[:20], "b": row[20:]} for row in weights]
    with pytest.raises(NonFiniteError) as caught:
        decompose(states, modes=2)
    assert_one_sentence(caught.value, "state_dict 3", "2 NaN", "'a' at position 11")


def test_fewer_moving_samples_than_modes() -> None:
    weights = torch.ones(9, 100, dtype=torch.float64)
    weights[:, :3] = walks(9, 3)
    with pytest.raises(InputError) as caught:
        decompose(weights, modes=4, samples=100)
    assert_one_sentence(caught.value, "only 3", "100 sampled", "modes=4")
    assert decompose(weights, modes=3, samples=100).number_of_modes <= 3


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda s: s.pop("fc.bias"), ("fc.bias",)),
        (lambda s: s.update(extra=torch.ones(3)), ("extra",)),
        (lambda s: s.update({"fc.bias": torch.ones(6)}), ("fc.bias", "(6,)", "(5,)")),
    ],
)
def test_another_network_among_the_snapshots(change: Any, parts: tuple[str, ...]) -> None:
    states = history(Net(), 4)
    change(states[2])
    with pytest.raises(StateMismatch) as caught:
        decompose(states, modes=2)
    assert_one_sentence(caught.value, "state_dict 2", *parts)


@pytest.mark.parametrize(
    "source", [None, 7, [torch.ones(3)], ["a", {"w": torch.ones(3)}], np.ones((5, 3)), object()]
)
def test_other_sources(source: Any) -> None:
    with pytest.raises(InputError) as caught:
        decompose(source, modes=1)
    assert_one_sentence(caught.value, "trajectory must be")


def test_patterns_that_leave_nothing() -> None:
    with pytest.raises(InputError) as caught:
        decompose(history(Net(), 3), modes=1, include=["nothing.*"])
    assert_one_sentence(caught.value, "nothing.*")


def test_names_that_become_one() -> None:
    states = [{"w": torch.randn(3), "module.w": torch.randn(3)} for _ in range(3)]
    with pytest.raises(InputError) as caught:
        decompose(states, modes=1)
    assert_one_sentence(caught.value, "'w'")
