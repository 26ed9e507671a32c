"""Splitting data over clients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmd_plugin.errors import InputError
from cmd_plugin.federated import FederatedConfig, partition_indices
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


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "sgd"}, "--method must be one of fedavg, cmd"),
        ({"engine": "dask"}, "--engine must be one of inprocess, ray"),
        ({"project": "round"}, "--project must be one of epoch, step, tie"),
        ({"fraction": 0.0}, "--fraction must be above 0 and at most 1, got 0.0"),
        ({"clients": 0}, "--clients must be at least 1, got 0"),
        ({"bits": 5}, "--bits must be 4 or 8, got 5"),
        ({"lr": float("nan")}, "--lr must be above 0"),
        ({"embed_percent": 0.0}, "--embed-percent must be above 0"),
        ({"rounds": 5, "warmup": 5}, r"--rounds must be above --warmup \(5\), got 5"),
        ({"topk": 1.0}, "--topk must be above 0 and below 1"),
        ({"test_limit": 0}, "--test-limit must be at least 1"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        FederatedConfig(**options)  # type: ignore[arg-type]


def test_options_from_a_flower_run_configuration() -> None:
    config = FederatedConfig.from_run_config(
        {"embed-every": 3, "bits": 0, "data-root": "", "lr": 0.1, "something-else": True}
    )
    assert config == FederatedConfig(embed_every=3, lr=0.1)
    assert FederatedConfig.from_run_config({"bits": 8}).bits == 8
    assert FederatedConfig(clients=10, fraction=0.25).clients_per_round == 2
    assert FederatedConfig(clients=3, fraction=0.01).clients_per_round == 1
