"""The plan: what grows, what is refused, and the same bits on every side."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmd_plugin.federated.frame import FrameError, NeedResync
from cmd_plugin.federated.plan import Plan

N = 203
REFERENCES = np.array([7, 50, 199])


def grown(events: int = 3, *, half: bool = False, seed: int = 0) -> Plan:
    """A plan of so many events of 40 members each."""
    plan, generator = Plan(N), np.random.default_rng(seed)
    for _ in range(events):
        candidates = np.setdiff1d(plan.free, REFERENCES)
        members = np.sort(generator.choice(candidates, 40, replace=False))
        mode = generator.integers(0, 3, 40).astype(np.uint8)
        plan.embed(
            members,
            mode,
            generator.standard_normal(40),
            generator.standard_normal(40),
            REFERENCES,
            half=half,
        )
    return plan


@pytest.mark.parametrize("half", [False, True])
def test_expand_is_the_affine_model(half: bool) -> None:
    plan = grown(half=half)
    flat = np.random.default_rng(1).standard_normal(N).astype(np.float32)
    expected = flat.copy()
    for i, m, a, b in zip(plan.members, plan.mode, plan.scale, plan.offset, strict=True):
        expected[i] = np.float32(float(a) * float(flat[REFERENCES[m]]) + float(b))
    assert np.array_equal(plan.expand(flat), expected)
    assert np.array_equal(plan.expand(flat.copy()), flat)  # idempotent
    assert np.array_equal(np.flatnonzero(plan.embedded), plan.members)
    assert len(plan.members) == 120
    assert plan.fraction == 120 / N
    # Coefficients are what is sent, not what was asked for.
    kind = np.float16 if half else np.float32
    assert np.array_equal(plan.scale.astype(kind).astype(np.float64), plan.scale)


@pytest.mark.parametrize("known", [0, 1, 2, 3])
def test_a_follower_catches_up_from_any_earlier_plan(known: int) -> None:
    plan = grown()
    follower = Plan(N) if known == 0 else grown(known)
    increments = plan.since(follower.identity)
    assert increments is not None
    follower.extend(follower.identity, increments, plan.identity)
    assert follower.identity == plan.identity
    for name in ("members", "mode", "scale", "offset", "references", "embedded"):
        assert np.array_equal(getattr(follower, name), getattr(plan, name)), name
    follower.extend(123, b"nonsense", plan.identity)  # there already: nothing to do


def test_size_of_an_increment() -> None:
    plan = grown(2)
    head = 8 + 1 + 2 + 8  # length, then width, references, members
    first = head + 3 * 8 + -(-N // 8) + 40 * 9
    second = head + -(-(N - 40) // 8) + 40 * 9
    assert len(plan.since(0) or b"") == first + second
    assert len(grown(1, half=True).since(0) or b"") == first - 40 * 4


def test_a_follower_of_another_plan_asks_for_everything() -> None:
    plan, other = grown(), grown(1, seed=5)
    assert plan.since(other.identity) is None
    with pytest.raises(NeedResync, match=r"plan .* is not known here, resend"):
        other.extend(grown(1).identity, b"", plan.identity)


def test_round_trip() -> None:
    plan = grown()
    copy = Plan.from_bytes(plan.to_bytes())
    assert copy.identity == plan.identity
    assert copy.to_bytes() == plan.to_bytes()
    assert Plan.from_bytes(Plan(5).to_bytes()).identity == 0


@given(st.integers(0, 8 * 400))
def test_a_damaged_increment_never_becomes_a_plan(position: int) -> None:
    plan = grown(2)
    before = grown(1)
    data = bytearray(plan.since(before.identity) or b"")
    position %= 8 * len(data)
    data[position // 8] ^= 1 << position % 8
    with pytest.raises(FrameError):
        before.extend(before.identity, bytes(data), plan.identity)


def test_references_and_overflowing_members_stay_free() -> None:
    plan = Plan(N)
    members = np.array([1, 2, 50, 60])
    plan.embed(
        members,
        np.zeros(4, np.uint8),
        np.array([1.0, 1e6, 1.0, 1.0]),  # 1e6 is no float16
        np.zeros(4),
        REFERENCES,
        half=True,
    )
    assert plan.members.tolist() == [1, 60]
    plan.embed(np.array([50]), np.zeros(1, np.uint8), np.ones(1), np.ones(1), REFERENCES)
    assert plan.members.tolist() == [1, 60]


def test_average_then_expand_is_expand_then_average() -> None:
    """Both ways of averaging agree, because the weights of an average sum to one."""
    plan = grown()
    generator = np.random.default_rng(2)
    clients = generator.standard_normal((5, N)).astype(np.float32)
    weights = generator.dirichlet(np.ones(5))
    first = plan.expand((weights @ clients).astype(np.float32))
    second = weights @ np.stack([plan.expand(client.copy()) for client in clients])
    # three roundings of float32 on values of some units
    assert np.abs(first - second).max() < 1e-6 * np.abs(clients).max()


def test_pooled_references_are_the_least_squares_projection() -> None:
    plan = grown()
    generator = np.random.default_rng(3)
    start = plan.expand(generator.standard_normal(N))
    trained = start + 0.1 * generator.standard_normal(N)
    found = plan.pool(trained.copy(), start)
    untouched = np.setdiff1d(np.arange(N), REFERENCES)
    assert np.array_equal(found[untouched], trained[untouched])
    for number, reference in enumerate(REFERENCES):
        rows = np.append(plan.members[plan.mode == number], reference)
        slopes = np.append(plan.scale[plan.mode == number], 1.0)
        step, *_ = np.linalg.lstsq(slopes[:, None], (trained - start)[rows], rcond=None)
        assert found[reference] - start[reference] == pytest.approx(step[0], rel=1e-12)
    # linear in the update: pooling goes together with averaging
    other = start + 0.1 * generator.standard_normal(N)
    mixed = plan.pool(0.3 * trained + 0.7 * other, start)
    parts = 0.3 * plan.pool(trained.copy(), start) + 0.7 * plan.pool(other.copy(), start)
    assert np.abs(mixed - parts).max() < 1e-14
