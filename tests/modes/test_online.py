"""Online CMD against batch least squares: options, memory, bad input."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mode_toys import (
    assert_one_sentence,
    correlation,
    follow,
    generator,
    least_squares,
    planted,
    same_partition,
    same_state,
    walks,
)
from torch import Tensor

from cmd_plugin.errors import InputError, NonFiniteError, PluginError, ShapeError
from cmd_plugin.kernels import AffineFit, FlatView
from cmd_plugin.modes import Layout, OnlineModes, decompose
from cmd_plugin.modes.choice import ModeChoice
from cmd_plugin.modes.tracker import Tracker

OPTIONS: dict[str, Any] = {"modes": 4, "warmup": 9, "samples": 80, "storage": "fp32"}


def profiles_of(modes: OnlineModes, rows: Tensor) -> Tensor:
    """The trajectories [M, T] that the modes follow, from the rows [T, N] themselves."""
    choice = modes.tracker.choice
    return choice.profile(rows.double().T[choice.members])


# -- equals batch least squares ----------------------------------------------------------------


@pytest.mark.parametrize("updates", [0, 1, 2, 15, 60])
@pytest.mark.parametrize("profile", ["reference", "mean"])
def test_equals_batch_least_squares(updates: int, profile: str) -> None:
    rows = walks(10 + updates, 300)
    modes = follow(rows, profile=profile, **OPTIONS)
    profiles = profiles_of(modes, rows)
    scale, offset = least_squares(rows, profiles, modes.assignment.long())
    torch.testing.assert_close(modes.scale, scale, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(modes.offset, offset, rtol=1e-10, atol=1e-10)
    model = scale * profiles[modes.assignment.long(), -1] + offset
    torch.testing.assert_close(modes.reconstruct(), model, rtol=1e-10, atol=1e-10)
    residual = rows - (scale * profiles[modes.assignment.long()].T + offset)
    share = 1 - float(residual.square().sum() / (rows - rows.mean(dim=0)).square().sum())
    assert modes.explained_variance() == pytest.approx(share, rel=1e-10)


def test_float32_on_weights_as_networks_have_them() -> None:
    """|mean| / std with the quantiles measured on real networks: 2.9, 13 (90 %), 400, 3700."""
    rows = walks(60, 20000)
    rows = (rows - rows.mean(dim=0)) / rows.std(dim=0)
    at = torch.rand(20000, generator=generator(3), dtype=torch.float64)
    quantile, logs = [0.0, 0.5, 0.9, 0.99, 0.999, 1.0], [0.1, 2.9, 13.0, 400.0, 3700.0, 4000.0]
    index = torch.bucketize(at, torch.tensor(quantile[1:-1]))
    low, high = torch.tensor(quantile)[index], torch.tensor(quantile)[index + 1]
    start, end = torch.tensor(logs).log()[index], torch.tensor(logs).log()[index + 1]
    rows = (rows + (start + (at - low) / (high - low) * (end - start)).exp()).float()
    modes = follow(rows, modes=10, warmup=20, samples=500, storage="fp32")
    profiles = profiles_of(modes, rows)
    scale, offset = least_squares(rows, profiles, modes.assignment.long())
    model = scale * profiles[modes.assignment.long(), -1] + offset
    error = (modes.reconstruct().double() - model).abs() / rows.double().std(dim=0)
    assert torch.quantile(error, 0.999) < 1e-3
    assert error.median() < 2e-6


@given(st.integers(0, 10**6))
def test_order_of_later_snapshots_is_irrelevant(seed: int) -> None:
    rows = walks(24, 60, seed)
    order = 10 + torch.randperm(14, generator=generator(seed))
    shuffled = torch.cat([rows[:10], rows[order]])
    one, other = follow(rows, **OPTIONS), follow(shuffled, **OPTIONS)
    assert torch.equal(one.assignment, other.assignment)
    torch.testing.assert_close(one.scale, other.scale, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(one.offset, other.offset, rtol=1e-10, atol=1e-10)


def tracker_of(rows: Tensor, choice: ModeChoice, mode: Tensor) -> Tracker:
    """A tracker fitted by brute force on rows [F, N], with modes and references given."""
    profiles = choice.profile(rows.T[choice.members])
    scale, _ = least_squares(rows, profiles, mode)
    mean = rows.mean(dim=0)
    fit = AffineFit(mode.to(torch.uint8), scale, mean, (rows - mean).square().sum(dim=0))
    return Tracker(choice, fit, profiles, range(len(rows)), shrink=False, forgetting=1.0)


@pytest.mark.parametrize("first", [2, 3, 10, 28, 29])
def test_any_split_into_fit_and_updates(first: int) -> None:
    rows = walks(30, 200)
    references = torch.tensor([3, 50, 111])
    choice = ModeChoice(references, references, torch.arange(3), torch.ones(3).double())
    mode = torch.randint(3, (200,), generator=generator(1))
    mode[references] = torch.arange(3)
    tracker = tracker_of(rows[:first], choice, mode)
    for t in range(first, 30):
        view = FlatView([rows[t]])
        tracker.update(view, view.gather(references), t)
    scale, offset = least_squares(rows, rows.T[references], mode)
    torch.testing.assert_close(tracker.scale(), scale, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(tracker.offset(), offset, rtol=1e-10, atol=1e-10)


@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_a_predicted_snapshot_changes_nothing(seed: int, step: float) -> None:
    rows = walks(13, 60, seed)
    modes = follow(rows, **OPTIONS)
    scale, offset = modes.scale, modes.offset
    values = rows[-1, modes.references] + step
    modes.update(scale * values[modes.assignment.long()] + offset)
    torch.testing.assert_close(modes.scale, scale, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(modes.offset, offset, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("updates", [0, 30])
def test_references_stay_exact(updates: int) -> None:
    rows = (walks(10 + updates, 300) + 50).float()
    modes = follow(rows, **{**OPTIONS, "storage": "delta-bf16"})
    at = modes.references
    assert torch.equal(modes.assignment[at].long(), torch.arange(4))
    assert (modes.scale[at] == 1).all()
    assert not modes.offset[at].any()
    assert torch.equal(modes.reconstruct()[at], rows[-1, at])


def test_planted_modes_online() -> None:
    rows, truth = planted(5, snapshots=40)
    modes = follow(rows.float(), modes=5, warmup=20, storage="fp32")
    assert same_partition(modes.assignment, truth)
    assert (modes.reconstruct().double() - rows[-1]).abs().max() < 2e-6


def test_constants_that_start_to_move_stay_finite() -> None:
    rows = walks(40, 300).float()
    rows[:, ::5] = 0.1
    late = torch.arange(0, 300, 10)
    rows[20:, late] += walks(20, 30, 7).float()
    modes = follow(rows[:20], **OPTIONS)
    still = torch.arange(0, 300, 5)
    assert not modes.scale[still].any()
    assert torch.equal(modes.reconstruct()[still], rows[19, still])
    assert not set(still.tolist()) & set(modes.references.tolist())
    for row in rows[20:]:
        modes.update(row)
        assert torch.isfinite(modes.reconstruct()).all()
    assert (modes.scale[late] != 0).all()
    never = torch.arange(5, 300, 10)
    assert torch.equal(modes.reconstruct()[never], rows[-1, never])


def test_a_run_that_stands_still_is_a_no_op() -> None:
    row = torch.randn(50)
    modes = OnlineModes(Layout.of_vector(50), modes=3, warmup=4)
    for number in range(8):
        if number == 4:
            with pytest.warns(UserWarning, match="only 0 modes .* nothing is modelled"):
                modes.update(row)
        else:
            modes.update(row)
    assert not modes.ready
    assert modes.number_of_modes == 0
    assert modes.updates == 8
    assert modes.state_bytes == 0
    assert math.isnan(modes.explained_variance())


def test_an_interrupting_warning_leaves_a_sound_state() -> None:
    # Warnings are errors in many test suites; the fit must not be half done then.
    rows = walks(8, 60)
    rows[:, 2:] = 1.0
    modes = OnlineModes(Layout.of_vector(60, torch.float64), modes=9, warmup=4)
    for row in rows[:4]:
        modes.update(row)
    with pytest.raises(UserWarning, match="modes were found where 9"):
        modes.update(rows[4])
    assert modes.ready
    assert modes.updates == 5
    for row in rows[5:]:
        modes.update(row)
    assert modes.updates == 8


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("forgetting", [0.999, 0.9, 0.5])
def test_forgetting_equals_weighted_least_squares(forgetting: float) -> None:
    rows = walks(30, 200)
    modes = follow(rows, forgetting=forgetting, **OPTIONS)
    # The ten snapshots of the fit weigh alike; every update discounts all before it.
    age = torch.tensor([20.0] * 10 + list(range(19, -1, -1)), dtype=torch.float64)
    weights = forgetting**age
    profiles = profiles_of(modes, rows)
    scale, offset = least_squares(rows, profiles, modes.assignment.long(), weights)
    torch.testing.assert_close(modes.scale, scale, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(modes.offset, offset, rtol=1e-9, atol=1e-10)
    model = scale * profiles[modes.assignment.long()].T + offset
    mean = (weights[:, None] * rows).sum(dim=0) / weights.sum()
    residual = (weights[:, None] * (rows - model).square()).sum()
    total = (weights[:, None] * (rows - mean).square()).sum()
    assert modes.explained_variance() == pytest.approx(1 - float(residual / total), rel=1e-9)


@pytest.mark.parametrize("forgetting", [1.0, 0.9])
@pytest.mark.parametrize("profile", ["reference", "mean"])
def test_shrinking_multiplies_by_the_squared_correlation(forgetting: float, profile: str) -> None:
    rows = walks(30, 200)
    options = {**OPTIONS, "forgetting": forgetting, "profile": profile}
    plain, shrunk = follow(rows, **options), follow(rows, shrink=True, **options)
    age = torch.tensor([20.0] * 10 + list(range(19, -1, -1)), dtype=torch.float64)
    weights = forgetting**age / (forgetting**age).sum()
    profiles = profiles_of(plain, rows)
    followed = profiles[plain.assignment.long()].T
    x = rows - (weights[:, None] * rows).sum(dim=0)
    y = followed - (weights[:, None] * followed).sum(dim=0)
    covariance = (weights[:, None] * x * y).sum(dim=0)
    variances = (weights[:, None] * x**2).sum(dim=0) * (weights[:, None] * y**2).sum(dim=0)
    share = covariance**2 / variances
    torch.testing.assert_close(shrunk.scale, plain.scale)
    mean = rows[-1] - x[-1]
    model = mean + share * plain.scale * y[-1]
    torch.testing.assert_close(shrunk.reconstruct(), model, rtol=1e-9, atol=1e-9)
    result = shrunk.decomposition()
    torch.testing.assert_close(result.scale, share * plain.scale, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.reconstruct(-1), model, rtol=1e-9, atol=1e-9)
    # Of E = rho^2 V, the part 2 rho^2 - rho^4 is left.
    explained = (weights[:, None] * x**2).sum(dim=0) * share * (2 * share - share**2)
    total = (weights[:, None] * x**2).sum()
    assert shrunk.explained_variance() == pytest.approx(float(explained.sum() / total), rel=1e-9)


def test_mean_profile_freezes_signs_and_sizes_at_the_fit() -> None:
    rows = walks(30, 120)
    modes = follow(rows, profile="mean", **OPTIONS)
    early = follow(rows[:10], profile="mean", **OPTIONS)
    assert torch.equal(modes.tracker.choice.member_weight, early.tracker.choice.member_weight)
    _, history = modes.tracker.history()
    torch.testing.assert_close(history, profiles_of(modes, rows), rtol=1e-12, atol=1e-12)


def test_storages_agree() -> None:
    rows = walks(40, 4000).float()
    exact = follow(rows, modes=10, warmup=20, samples=500, storage="fp32")
    stored = follow(rows, modes=10, warmup=20, samples=500, storage="delta-bf16")
    assert torch.equal(exact.references, stored.references)
    assert (exact.assignment != stored.assignment).double().mean() < 0.01
    rho = correlation(rows[:21], profiles_of(exact, rows[:21]))
    best = rho.gather(0, exact.assignment.long()[None])[0]
    chosen = rho.gather(0, stored.assignment.long()[None])[0]
    assert (best - chosen).max() < 1e-2


def test_forgetting_survives_a_standstill() -> None:
    rows = walks(12, 60).float()
    modes = follow(rows, forgetting=0.5, **OPTIONS)
    for _ in range(1200):  # 0.5^1200 is no float64
        modes.update(rows[-1])
    assert torch.isfinite(modes.reconstruct()).all()
    assert torch.isfinite(modes.scale).all()
    torch.testing.assert_close(modes.reconstruct(), rows[-1])
    for row in walks(12, 60, 9).float():
        modes.update(row)
    assert torch.isfinite(modes.reconstruct()).all()
    assert torch.equal(modes.reconstruct()[modes.references], row[modes.references])


# -- what it knows -------------------------------------------------------------------------------


@pytest.mark.parametrize(("shrink", "size"), [(False, 9), (True, 13)])
@pytest.mark.parametrize(("storage", "width"), [("delta-bf16", 2), ("fp32", 4)])
def test_bytes_of_the_state(shrink: bool, size: int, storage: str, width: int) -> None:
    rows = walks(14, 3000).float()
    options = {**OPTIONS, "storage": storage, "shrink": shrink}
    modes = OnlineModes(Layout.of_vector(3000), **options)
    assert modes.state_bytes == 0
    for number, row in enumerate(rows):
        modes.update(row)
        if number < 9:
            base = 4 if storage == "delta-bf16" else width
            assert modes.state_bytes == 3000 * (9 * width + base) + 10 * modes.samples.numel() * 8
        else:
            assert modes.state_bytes == size * 3000


def test_memory_is_flat_in_the_number_of_updates() -> None:
    modes = OnlineModes(Layout.of_vector(30), modes=2, warmup=4, samples=20)
    noise = torch.randn(2600, 30, generator=generator(0)).cumsum(dim=0)
    sizes = set()
    for number, row in enumerate(noise):
        modes.update(row, label=3 * number)
        if number > 4:
            sizes.add(modes.state_bytes)
            assert len(modes.tracker._profiles) <= 1024
            assert len(modes.tracker._labels) == len(modes.tracker._profiles)
    assert sizes == {270}
    labels, profiles = modes.tracker.history()
    assert len(labels) <= 1025
    assert labels[-1] == 3 * 2599  # the last one always
    assert {later - former for former, later in pairwise(labels[:-1])} == {12}
    kept = torch.tensor(labels) // 3
    assert torch.equal(profiles, noise[kept][:, modes.references].double().T)
    result = modes.decomposition()
    assert result.snapshots == len(labels)
    torch.testing.assert_close(result.reconstruct(-1), modes.reconstruct())


def test_before_the_fit() -> None:
    modes = OnlineModes(Layout.of_vector(30), modes=2, warmup=4)
    for row in walks(4, 30).float():
        modes.update(row)
    assert not modes.ready
    assert modes.number_of_modes == 0
    assert modes.correlation is None
    assert math.isnan(modes.explained_variance())
    for ask in (
        modes.reconstruct,
        modes.decomposition,
        lambda: modes.scale,
        lambda: modes.offset,
        lambda: modes.references,
        lambda: modes.assignment,
    ):
        with pytest.raises(PluginError) as caught:
            ask()
        assert_one_sentence(caught.value, "4 snapshots", "number 5")


def test_correlation_of_the_samples() -> None:
    rows = walks(10, 60)
    modes = follow(rows, **OPTIONS)
    assert modes.correlation is not None
    matrix, labels = modes.correlation
    chosen = rows[:, modes.samples].T
    torch.testing.assert_close(matrix, torch.corrcoef(chosen).abs(), rtol=0, atol=1e-12)
    assert int(labels.max()) + 1 == modes.number_of_modes


def test_reconstruct_into_a_given_vector() -> None:
    modes = follow(walks(12, 60).float(), **OPTIONS)
    out = torch.full((61,), 7.0)
    assert modes.reconstruct(out=out[1:]).data_ptr() == out[1:].data_ptr()
    assert torch.equal(out[1:], modes.reconstruct())
    assert out[0] == 7
    for wrong in (torch.zeros(59), torch.zeros(60, dtype=torch.float64)):
        with pytest.raises(ShapeError) as caught:
            modes.reconstruct(out=wrong)
        assert_one_sentence(caught.value, "out must be")


def test_equals_posthoc_at_the_fit() -> None:
    rows = walks(10, 300)
    online = follow(rows, **OPTIONS).decomposition()
    batch = decompose(rows, modes=4, samples=80)
    assert torch.equal(online.references, batch.references)
    assert torch.equal(online.assignment, batch.assignment)
    torch.testing.assert_close(online.scale, batch.scale)
    torch.testing.assert_close(online.offset, batch.offset)
    assert online.explained_variance() == pytest.approx(batch.explained_variance(), rel=1e-12)


def test_labels_of_the_history() -> None:
    modes = OnlineModes(Layout.of_vector(40), modes=2, warmup=3)
    for label, row in zip([10, 20, 25, 30, 90], walks(5, 40).float(), strict=True):
        modes.update(row, label=label)
    result = modes.decomposition()
    assert list(result.epochs) == [10, 20, 25, 30, 90]
    assert result.snapshot_of(30) == 3


def test_broadcast_sees_the_followed_weights_and_has_the_last_word() -> None:
    rows = walks(12, 60)
    seen: list[Tensor] = []

    def broadcast(values: Tensor) -> Tensor:
        assert values.device.type == "cpu"
        assert values.dtype == torch.float64
        seen.append(values.clone())
        return values

    modes = OnlineModes(Layout.of_vector(60, torch.float64), broadcast=broadcast, **OPTIONS)
    for row in rows:
        modes.update(row)
    assert [len(values) for values in seen] == [modes.samples.numel()] * 10 + [4, 4]
    assert torch.equal(seen[-1], rows[-1, modes.references])


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 3, 9, 11])
def test_non_finite_weights_leave_the_state_as_it_was(value: float, at: int) -> None:
    rows = walks(14, 60).float()
    modes = OnlineModes(Layout.of_vector(60), **OPTIONS)
    for row in rows[:at]:
        modes.update(row)
    before = modes.state_dict()
    broken = rows[at].clone()
    broken[7] = broken[21] = value
    with pytest.raises(NonFiniteError) as caught:
        modes.update(broken)
    assert_one_sentence(caught.value, "2 of 60", f"snapshot {at}", "at position 7")
    assert same_state(modes.state_dict(), before)
    for row in rows[at:]:
        modes.update(row)
    assert same_state(modes.state_dict(), follow(rows, **OPTIONS).state_dict())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("modes", 0),
        ("modes", 257),
        ("modes", True),
        ("modes", 1.5),
        ("warmup", 1),
        ("warmup", 0),
        ("warmup", True),
        ("warmup", 2.0),
        ("samples", 0),
        ("samples", 1.5),
        ("storage", "int8"),
        ("profile", "median"),
        ("buffers", "drop"),
        ("forgetting", 0.0),
        ("forgetting", 1.01),
        ("forgetting", math.nan),
    ],
)
def test_bad_arguments(option: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        OnlineModes(Layout.of_vector(9), **{option: value})
    assert_one_sentence(caught.value, option, repr(value))


@pytest.mark.parametrize(
    "weights", [torch.ones(59), torch.ones(61), torch.ones(60, 1), torch.ones(60).long()]
)
def test_wrong_vectors(weights: Tensor) -> None:
    modes = OnlineModes(Layout.of_vector(60), **OPTIONS)
    with pytest.raises(ShapeError) as caught:
        modes.update(weights)
    assert_one_sentence(caught.value)
    assert modes.updates == 0


def test_nothing_to_read() -> None:
    modes = OnlineModes(Layout.of_vector(60), **OPTIONS)
    with pytest.raises(PluginError) as caught:
        modes.update()
    assert_one_sentence(caught.value, "no model")
