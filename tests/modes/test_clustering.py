"""Clustering and reference choice against scipy and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mode_toys import planted, same_partition, walks
from scipy.cluster import hierarchy
from scipy.spatial.distance import pdist

from cmd_plugin.modes.choice import choose_modes, moving_rows
from cmd_plugin.modes.clustering import (
    choose_references,
    cluster_correlations,
    correlation_matrix,
    row_distances,
)


def rows(count: int, snapshots: int = 21, seed: int = 0) -> torch.Tensor:
    return walks(snapshots, count, seed).T


def test_correlation_equals_numpy() -> None:
    data = rows(90)
    ours = correlation_matrix(data)
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours.numpy(), np.abs(np.corrcoef(data.numpy())), atol=1e-12)
    assert (ours.diagonal() == 1).all()
    assert ours.max() <= 1
    assert torch.equal(correlation_matrix(data.float()).diagonal(), torch.ones(90).double())


def test_correlation_of_rows_far_from_zero() -> None:
    data = rows(40)
    shifted = correlation_matrix(data + 1e6)
    torch.testing.assert_close(shifted, correlation_matrix(data), rtol=0, atol=1e-8)


@pytest.mark.parametrize("count", [1, 2, 3, 255, 256, 257, 300])
def test_distances_equal_pdist(count: int) -> None:
    matrix = correlation_matrix(rows(count))
    ours = row_distances(matrix)
    # D^2 is a difference of sums of K terms up to 1: an error of K u in D^2 is sqrt(K u) in D.
    np.testing.assert_allclose(ours, pdist(matrix.numpy()), atol=3e-7)
    np.testing.assert_allclose(ours**2, pdist(matrix.numpy(), "sqeuclidean"), atol=1e-12 * count)


def test_equal_rows_are_at_distance_zero_and_never_nan() -> None:
    data = rows(4).repeat(70, 1)
    distances = row_distances(correlation_matrix(data))
    assert np.isfinite(distances).all()
    assert distances.min() >= 0


@pytest.mark.parametrize("modes", [1, 2, 5, 10, 50, 256])
@pytest.mark.parametrize("count", [60, 257])
def test_equals_scipy_complete_linkage(count: int, modes: int) -> None:
    matrix = correlation_matrix(rows(count, seed=modes))
    ours = cluster_correlations(matrix, modes)
    tree = hierarchy.linkage(pdist(matrix.numpy()), method="complete")
    theirs = torch.from_numpy(hierarchy.fcluster(tree, t=modes, criterion="maxclust"))
    assert same_partition(ours, theirs)
    found = int(ours.max()) + 1
    assert found <= modes
    assert sorted(set(ours.tolist())) == list(range(found))


@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 10**6))
def test_labels_are_sorted_by_size(count: int, modes: int, seed: int) -> None:
    labels = cluster_correlations(correlation_matrix(rows(count, 9, seed)), modes)
    sizes = torch.bincount(labels)
    assert (sizes > 0).all()
    assert len(sizes) <= min(modes, count)
    assert torch.equal(sizes, sizes.sort(descending=True).values)
    # Of equal ones, the one that begins first is named first.
    firsts = [int((labels == k).nonzero()[0, 0]) for k in range(len(sizes))]
    for k in range(len(sizes) - 1):
        assert sizes[k] > sizes[k + 1] or firsts[k] < firsts[k + 1]


def test_ties_can_give_fewer_modes() -> None:
    # Four uncorrelated groups of three equal rows: all groups are equally far from each other.
    matrix = torch.eye(4, dtype=torch.float64).repeat_interleave(3, 0).repeat_interleave(3, 1)
    labels = cluster_correlations(matrix, 3)
    assert int(labels.max()) + 1 < 3
    assert int(cluster_correlations(matrix, 4).max()) + 1 == 4


@given(st.integers(2, 60), st.integers(1, 8), st.integers(0, 10**6))
def test_references_match_brute_force(count: int, modes: int, seed: int) -> None:
    matrix = correlation_matrix(rows(count, 9, seed))
    labels = cluster_correlations(matrix, modes)
    references = choose_references(matrix, labels)
    for cluster in range(int(labels.max()) + 1):
        members = [p for p in range(count) if int(labels[p]) == cluster]
        means = [np.mean([float(matrix[p, q]) for q in members]) for p in members]
        best = max(means)
        # Means that differ by rounding alone are equal, and then the first one counts.
        first = next(p for p, mean in zip(members, means, strict=True) if mean > best - 1e-13)
        chosen = int(references[cluster])
        assert means[members.index(chosen)] == pytest.approx(best, abs=1e-13)
        assert chosen >= first


def test_the_first_of_equals_wins() -> None:
    matrix = torch.ones(5, 5, dtype=torch.float64)
    assert choose_references(matrix, torch.zeros(5, dtype=torch.int64)).tolist() == [0]


@pytest.mark.parametrize("modes", [2, 5, 10])
def test_planted_groups_are_found(modes: int) -> None:
    weights, truth = planted(modes, numel=300, seed=modes)
    samples = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    choice = choose_modes(weights.T[samples], samples, modes, "reference", torch.float64)
    assert choice.modes == modes
    assert choice.labels is not None
    assert same_partition(choice.labels, truth[samples])
    assert (truth[choice.references].unique().numel()) == modes
    assert set(choice.references.tolist()) <= set(samples.tolist())


def test_constant_samples_do_not_cost_a_mode() -> None:
    weights, truth = planted(3, numel=200)
    weights[:, ::7] = 0.1  # 15 % constants, whose mean does not round to themselves
    weights[:, 1::7] = weights[0, 1::7]
    choice = choose_modes(weights.T.float().double(), torch.arange(200), 3, "mean", torch.float32)
    constant = set(range(0, 200, 7)) | set(range(1, 200, 7))
    assert choice.modes == 3
    assert not constant & set(choice.references.tolist())
    assert not constant & set(choice.members.tolist())
    assert truth[choice.references].unique().numel() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_counts_as_constant(dtype: torch.dtype) -> None:
    unit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-9}[dtype]
    data = torch.full((6, 21), 3.0, dtype=torch.float64)
    data[1, ::2] += 2 * 3.0 * unit  # one unit in the last place
    data[2] += torch.linspace(0, 100 * unit, 21)
    data[3] = 0
    data[4] = 0.1  # not representable, so that its mean rounds
    data[5] = torch.linspace(0, 1e-30, 21)  # its squares vanish in float32
    assert moving_rows(data, dtype).tolist() == [False, False, True, False, False, False]


def test_fewer_moving_samples_than_modes() -> None:
    data = rows(30)
    data[3:] = 1.0
    choice = choose_modes(data, torch.arange(30), 10, "reference", torch.float64)
    assert choice.modes <= 3
    assert set(choice.references.tolist()) <= {0, 1, 2}


def test_nothing_moves() -> None:
    choice = choose_modes(torch.ones(5, 9).double(), torch.arange(5), 2, "mean", torch.float32)
    assert choice.modes == 0
    assert choice.members.numel() == 0


def test_mean_profile_equals_brute_force() -> None:
    data, samples = rows(40), torch.arange(100, 140)
    choice = choose_modes(data, samples, 4, "mean", torch.float64)
    profile = choice.profile(data[choice.members - 100])
    assert choice.labels is not None
    centred = data - data.mean(dim=1, keepdim=True)
    for mode in range(choice.modes):
        leader = centred[int(choice.references[mode]) - 100]
        members = (choice.labels == mode).nonzero()[:, 0].tolist()
        total = torch.zeros(21).double()
        for member in members:
            row = centred[member]
            sign = 1.0 if float(row @ leader) >= 0 else -1.0
            total += sign * leader.norm() / row.norm() * row
        moved = profile[mode] - profile[mode].mean()
        torch.testing.assert_close(moved, total / len(members), rtol=1e-9, atol=1e-12)
