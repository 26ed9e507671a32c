"""The draw of the weights that are clustered."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mode_toys import assert_one_sentence

from cmd_plugin.errors import InputError
from cmd_plugin.modes.sampling import draw_distinct, layer_quotas, sample_weights

LENET = [1350, 18, 21600, 48, 432000, 360, 90720, 252, 2520, 10]


@pytest.mark.parametrize(
    ("sizes", "samples", "quotas"),
    [
        ([10, 5, 1000, 100], 100, [10, 5, 56, 29]),
        ([1000, 1000], 100, [50, 50]),
        ([3, 3, 3, 9000], 100, [3, 3, 3, 91]),
        ([4, 4, 4, 4], 100, [4, 4, 4, 4]),
        ([1, 999], 10, [1, 9]),
        (LENET, 1000, [51, 18, 69, 48, 443, 127, 132, 50, 52, 10]),
    ],
)
def test_quotas_of_the_authors_code(sizes: list[int], samples: int, quotas: list[int]) -> None:
    assert layer_quotas(sizes, samples) == quotas


@pytest.mark.parametrize(
    ("layers", "samples", "base"), [(62, 1000, 8), (158, 1000, 3), (819, 10000, 6), (386, 5000, 6)]
)
def test_base_of_the_published_networks(layers: int, samples: int, base: int) -> None:
    # Layers so many and so equal that the proportional half gives each the same as well.
    quotas = layer_quotas([10**6] * layers, samples)
    assert quotas is not None
    assert min(quotas) == base + samples // (2 * layers)


sizes_of_layers = st.lists(st.integers(1, 400), min_size=1, max_size=12)


def per_layer(sizes: list[int], drawn: torch.Tensor) -> list[int]:
    edges = list(accumulate(sizes, initial=0))
    return [int(((drawn >= low) & (drawn < high)).sum()) for low, high in pairwise(edges)]


@given(sizes_of_layers, st.integers(1, 600))
def test_quotas_are_sound(sizes: list[int], samples: int) -> None:
    quotas = layer_quotas(sizes, samples)
    if samples / 2 < len(sizes):
        assert quotas is None
        return
    assert quotas is not None
    assert sum(quotas) <= samples
    assert all(0 <= quota <= size for quota, size in zip(quotas, sizes, strict=True))
    assert all(quota >= 1 for quota in quotas)  # samples >= 2 layers
    rest = samples - sum(quotas)
    # What is left over fits into no layer whole.
    assert rest == 0 or all(s - q < rest for q, s in zip(quotas, sizes, strict=True))


@given(sizes_of_layers, st.integers(1, 600), st.integers(0, 2**31))
def test_draw(sizes: list[int], samples: int, seed: int) -> None:
    drawn = sample_weights(sizes, samples, seed)
    assert drawn.dtype == torch.int64
    assert drawn.numel() <= samples
    assert drawn.unique().numel() == drawn.numel()
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < sum(sizes)
    assert torch.equal(drawn, sample_weights(sizes, samples, seed))
    budget = min(samples, sum(sizes))
    quotas = layer_quotas(sizes, budget)
    if quotas is None:
        assert drawn.numel() == budget
        assert torch.equal(drawn, drawn.sort().values)
    else:
        assert per_layer(sizes, drawn) == quotas
        owners = torch.bucketize(drawn, torch.tensor(list(accumulate(sizes))), right=True)
        assert torch.equal(owners, owners.sort().values)  # in layer order


def test_everything_is_drawn_when_the_budget_allows() -> None:
    assert sorted(sample_weights([7], 100).tolist()) == list(range(7))


def test_seeds_differ_and_the_global_generator_is_untouched() -> None:
    before = torch.get_rng_state()
    assert not torch.equal(sample_weights([1000], 50, 0), sample_weights([1000], 50, 1))
    assert torch.equal(torch.get_rng_state(), before)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 10**6))
def test_distinct_draws(population: int, count: int, seed: int) -> None:
    count = min(count, population)
    drawn = draw_distinct(population, count, torch.Generator().manual_seed(seed))
    assert drawn.numel() == count
    assert drawn.unique().numel() == count
    assert all(0 <= value < population for value in drawn.tolist())


def test_both_ways_of_drawing_are_uniform() -> None:
    for population, count in ((40, 8), (40, 30)):  # by rejection, and by permutation
        counts = torch.zeros(population)
        first = torch.zeros(population)
        for seed in range(1500):
            drawn = draw_distinct(population, count, torch.Generator().manual_seed(seed))
            counts[drawn] += 1
            first[drawn[0]] += 1
        expected = 1500 * count / population
        assert (counts - expected).abs().max() < 5 * (expected * (1 - count / population)) ** 0.5
        # The order is random too: small indices do not come first.
        assert (first - 1500 / population).abs().max() < 5 * (1500 / population) ** 0.5


def test_a_draw_from_a_thousand_million_weights_is_small() -> None:
    drawn = sample_weights([10**9, 5, 7 * 10**9], 100)
    assert drawn.numel() == 100
    assert int(drawn.max()) > 2**32  # int64 throughout


@pytest.mark.parametrize("samples", [0, -1, True, 1.5, "10", None])
def test_bad_number_of_samples(samples: object) -> None:
    with pytest.raises(InputError) as caught:
        sample_weights([10], samples)
    assert_one_sentence(caught.value, "samples", repr(samples))
