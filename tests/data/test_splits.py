"""Seeded choices over labels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmd_plugin.data.splits import corrupt_labels, split_indices, stratified_subset
from cmd_plugin.errors import InputError

LABELS = torch.tensor([0] * 60 + [1] * 30 + [2] * 9 + [3])


def test_subset_keeps_class_shares_and_every_class() -> None:
    chosen = stratified_subset(LABELS, 20, seed=3)
    # Exact shares are 12, 6, 1.8, 0.2: the single item of class 3 costs one of the largest surplus.
    assert torch.bincount(LABELS[chosen]).tolist() == [12, 6, 1, 1]
    assert torch.equal(chosen, chosen.unique())
    assert torch.equal(chosen, stratified_subset(LABELS, 20, seed=3))
    assert not torch.equal(chosen, stratified_subset(LABELS, 20, seed=4))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=8),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 99),
)
def test_subset_has_the_size_asked_for(sizes: list[int], share: float, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    count = len(sizes) + round(share * (len(labels) - len(sizes)))
    chosen = stratified_subset(labels, count, seed)
    assert len(chosen.unique()) == count
    assert (torch.bincount(labels[chosen], minlength=len(sizes)) >= 1).all()


@pytest.mark.parametrize("count", [3, 101])
def test_subset_of_impossible_size(count: int) -> None:
    with pytest.raises(InputError, match=f"cannot choose {count} of 100 images"):
        stratified_subset(LABELS, count, seed=0)


def test_split_is_a_partition_with_both_sides_in_every_class() -> None:
    labels = LABELS[:-1]
    train, test = split_indices(labels, 0.2, 0, ("a", "b", "c"))
    assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(len(labels)))
    assert torch.bincount(labels[test]).tolist() == [12, 6, 2]


def test_split_refuses_a_class_with_one_image() -> None:
    with pytest.raises(InputError, match="class 'd' has a single image"):
        split_indices(LABELS, 0.2, 0, ("a", "b", "c", "d"))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_noise_changes_exactly_the_share_asked_for(fraction: float) -> None:
    labels = torch.randint(0, 7, (1000,))
    before = labels.clone()
    noisy = corrupt_labels(labels, fraction, 7, seed=1)
    assert int((noisy != labels).sum()) == round(fraction * 1000)
    assert noisy.min() >= 0
    assert noisy.max() <= 6
    assert torch.equal(labels, before)


def test_noise_draws_every_other_class_equally() -> None:
    noisy = corrupt_labels(torch.zeros(40_000, dtype=torch.int64), 0.9, 4, seed=2)
    counts = torch.bincount(noisy, minlength=4)[1:]
    assert counts.sum() == 36_000
    assert (counts - 12_000).abs().max() < 400  # 4.5 standard deviations


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_noise_out_of_range(fraction: float) -> None:
    with pytest.raises(InputError, match="label noise"):
        corrupt_labels(LABELS, fraction, 4, seed=0)


def test_choices_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    corrupt_labels(LABELS, 0.3, 4, seed=0)
    stratified_subset(LABELS, 20, seed=0)
    assert torch.equal(before, torch.get_rng_state())
