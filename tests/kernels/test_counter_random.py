"""Counter-based random numbers: published vectors, independence of the batch, distributions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.kernels.counter_random import (
    CounterRandom,
    check_seed,
    derived_seed,
    philox,
    sample_index,
)

pytestmark = pytest.mark.paths()  # plain PyTorch on every path


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Known answers of the authors' Random123 library for philox4x32-10.
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_vectors(counter: tuple[int, ...], key: int, expected: tuple[int, ...]) -> None:
    words = philox(key, *(torch.tensor([word]) for word in counter))
    assert tuple(int(word) for word in words) == expected


def drawn(index: list[int], seed: int = 3, purpose: int = 5) -> list[Tensor]:
    random = CounterRandom(seed, torch.tensor(index), purpose)
    bound = torch.full((len(index), 1), 6)
    return [
        random.words(5),
        random.uniform(7),
        random.normal(3),
        random.integers(9, bound),
        random.permutation(11),
    ]


def test_a_sample_gets_its_numbers_in_any_batch() -> None:
    large = 2**40 + 3
    batch = drawn([4, 0, large, 17])
    for row, sample in enumerate([4, 0, large, 17]):
        for one, many in zip(drawn([sample]), batch, strict=True):
            assert torch.equal(one[0], many[row])


def test_seed_sample_purpose_and_draw_each_give_other_numbers() -> None:
    words = [
        drawn([1])[0],
        drawn([2])[0],
        drawn([1 + 2**32])[0],
        drawn([1], seed=4)[0],
        drawn([1], seed=3 + 2**32)[0],
        drawn([1], purpose=6)[0],
    ]
    random = CounterRandom(3, torch.tensor([1]), 5)
    random.words(5)
    words.append(random.words(5))
    assert len(torch.cat(words).unique()) == 5 * len(words)


def test_distributions() -> None:
    count = 200_000
    random = CounterRandom(0, torch.tensor([0]), 1)
    uniform, normal = random.uniform(count)[0], random.normal(count)[0]
    faces = random.integers(count, 6)[0].bincount(minlength=7)
    # Five standard errors of each mean.
    assert uniform.min() > 0
    assert uniform.max() < 1
    assert abs(float(uniform.mean()) - 0.5) < 5 * (1 / 12 / count) ** 0.5
    assert abs(float(normal.mean())) < 5 * count**-0.5
    assert abs(float(normal.var()) - 1) < 5 * (2 / count) ** 0.5
    assert faces[6] == 0
    assert ((faces[:6] - count / 6).abs() < 5 * (count * 5 / 36) ** 0.5).all()


def test_permutations_are_permutations_and_reach_every_place() -> None:
    orders = CounterRandom(0, torch.arange(3000), 1).permutation(4)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(4).expand(3000, 4))
    seen = (orders @ torch.tensor([64, 16, 4, 1])).unique(return_counts=True)[1]
    assert len(seen) == 24
    assert ((seen - 125).abs() < 5 * (3000 * 23 / 576) ** 0.5).all()


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, None])
def test_bad_seed(seed: int) -> None:
    with pytest.raises(InputError, match="seed must be an integer"):
        check_seed(seed)


def test_sample_numbers() -> None:
    cpu = torch.device("cpu")
    assert torch.equal(sample_index(None, 3, cpu), torch.arange(3))
    given = torch.tensor([7, 1], dtype=torch.int32)
    assert torch.equal(sample_index(given, 2, cpu), torch.tensor([7, 1]))
    for bad in (torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.ones(2) > 0):
        with pytest.raises(ShapeError, match="index must be"):
            sample_index(bad, 2, cpu)
    with pytest.raises(InputError, match="negative"):
        sample_index(torch.tensor([0, -1]), 2, cpu)


def test_derived_seeds_are_seeds_and_all_differ() -> None:
    seeds = {derived_seed(seed, *parts) for seed in (0, 1) for parts in ((), (0,), (0, 0), (1, 2))}
    assert len(seeds) == 8
    for seed in seeds:
        check_seed(seed)
