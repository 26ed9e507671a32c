"""Splitting data over clients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmd_plugin.errors import InputError
from cmd_plugin.federated import partition_indices
from cmd_plugin.federated.partition import parse_partition

LABELS = np.repeat(np.arange(5), 40)


@given(
    clients=st.integers(1, 12),
    partition=st.sampled_from(["iid", "dirichlet:0.3", "dirichlet:5"]),
    seed=st.integers(0, 50),
)
def test_every_image_has_one_owner(clients: int, partition: str, seed: int) -> None:
    parts = partition_indices(LABELS, clients, partition, seed)
    assert len(parts) == clients
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))
    assert min(map(len, parts)) >= 2
    assert all((np.diff(part) > 0).all() for part in parts)
    again = partition_indices(LABELS, clients, partition, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    if partition == "iid":
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_smaller_alpha_the_fewer_classes() -> None:
    def imbalance(partition: str) -> float:
        shares = []
        for seed in range(20):
            for part in partition_indices(LABELS, 4, partition, seed):
                counts = np.bincount(LABELS[part], minlength=5)
                shares.append(counts.max() / counts.sum())
        return float(np.mean(shares))

    assert imbalance("dirichlet:0.1") > imbalance("dirichlet:1") > imbalance("iid")


@pytest.mark.parametrize(
    "text", ["", "idd", "dirichlet", "dirichlet:", "dirichlet:x", "dirichlet:0", "dirichlet:inf"]
)
def test_unknown_partitions(text: str) -> None:
    with pytest.raises(InputError, match="--partition must be iid or dirichlet:ALPHA"):
        parse_partition(text)


def test_too_few_images() -> None:
    with pytest.raises(InputError, match="200 training images are too few for 101 clients"):
        partition_indices(LABELS, 101, "iid", 0)
    with pytest.raises(InputError, match="--clients must be at least 1"):
        partition_indices(LABELS, 0, "iid", 0)
    with pytest.raises(InputError, match="use a larger ALPHA, fewer clients or more images"):
        partition_indices(LABELS[:21], 10, "dirichlet:0.01", 0)
