"""The warm-up store: what goes in comes out, to the precision it promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mode_toys import walks

from cmd_plugin.errors import InputError
from cmd_plugin.kernels import FlatView
from cmd_plugin.modes.store import TrajectoryStore


def filled(
    rows: torch.Tensor, storage: str, capacity: int | None = None, block: int = 1 << 18
) -> TrajectoryStore:
    samples = torch.arange(0, rows.shape[1], 3)
    store = TrajectoryStore(rows.shape[1], capacity or len(rows), storage, samples, rows.dtype)
    for row in rows:
        cut = rows.shape[1] // 2
        view = FlatView([row[:cut], row[cut:]] if cut else [row], block=block)
        store.append(view, view.gather(samples))
    return store


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fp32_keeps_everything(dtype: torch.dtype) -> None:
    rows = walks(7, 100).to(dtype)
    store = filled(rows, "fp32")
    assert store.base is None
    assert torch.equal(store.trajectory, rows)
    assert torch.equal(store.rows, rows[:, ::3].T.double())


@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 20), st.integers(0, 10**6))
def test_deltas_are_rounded_once(numel: int, count: int, half: int, seed: int) -> None:
    rows = (100 + walks(count, numel, seed)).float()
    store = filled(rows, "delta-bf16", block=2 * half)
    assert store.base is not None
    assert torch.equal(store.base, rows[0])
    assert store.trajectory.dtype == torch.bfloat16
    assert torch.equal(store.trajectory, (rows[1:] - rows[0]).bfloat16())
    assert torch.equal(store.rows, rows[:, ::3].T.double())  # the sampled ones stay exact


def test_room_is_reserved_once() -> None:
    rows = walks(5, 1000).float()
    for storage, size in (("fp32", 4 * 9), ("delta-bf16", 4 + 2 * 8)):
        store = filled(rows, storage, capacity=9)
        assert store.nbytes == size * 1000 + 9 * 334 * 8
        assert store.count == 5
        assert len(store.trajectory) == (5 if storage == "fp32" else 4)


@pytest.mark.parametrize("storage", ["fp32", "delta-bf16"])
@pytest.mark.parametrize("count", [0, 1, 2, 6])
def test_continues_bit_for_bit(storage: str, count: int) -> None:
    rows = walks(6, 200).float()
    store = filled(rows[:count], storage, capacity=6)
    samples = torch.arange(0, 200, 3)
    other = TrajectoryStore(200, 6, storage, samples, torch.float32)
    other.load_state_dict(store.state_dict())
    assert other.count == count
    for row in rows[count:]:
        view = FlatView([row])
        other.append(view, view.gather(samples))
    assert torch.equal(other.trajectory, filled(rows, storage).trajectory)
    assert torch.equal(other.rows, filled(rows, storage).rows)


def test_the_state_is_a_copy() -> None:
    store = filled(walks(3, 20).float(), "delta-bf16", capacity=5)
    state = store.state_dict()
    kept = state["snapshots"].clone()
    view = FlatView([torch.zeros(20)])
    store.append(view, view.gather(store.samples))
    assert torch.equal(state["snapshots"], kept)
    assert state["count"] == 2 + 1


def test_half_precision_weights_are_kept_exactly() -> None:
    rows = walks(4, 60).bfloat16()
    samples = torch.arange(60)
    store = TrajectoryStore(60, 4, "fp32", samples, torch.float32)
    for row in rows:
        view = FlatView([row])
        store.append(view, view.gather(samples))
    assert torch.equal(store.trajectory, rows.float())


def test_unknown_storage() -> None:
    with pytest.raises(InputError, match="storage must be one of delta-bf16, fp32, got 'int8'"):
        TrajectoryStore(5, 3, "int8", torch.arange(2), torch.float32)
