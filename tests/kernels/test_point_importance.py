"""Norms, counts and entropy against hand cases and a loop in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.kernels import normalised_entropy, point_importance
from cmd_plugin.kernels.point_importance import reference

pytestmark = pytest.mark.paths()  # each names the paths it is about itself

HAND = torch.tensor([[[1.0, 0, 0, 0], [0, 5, 4, 0], [0, 0, 9, 0]]])


def by_hand(features: torch.Tensor, mask: torch.Tensor | None, order: float) -> torch.Tensor:
    """Norms by a loop over every single number, in float64."""
    batch, _, tokens = features.shape
    result = torch.zeros(batch, tokens, dtype=torch.float64)
    for b in range(batch):
        for m in range(tokens):
            if mask is None or bool(mask[b, m]):
                column = [abs(float(v)) for v in features[b, :, m].double()]
                if order == math.inf:
                    result[b, m] = max(column)
                else:
                    result[b, m] = sum(v**order for v in column) ** (1 / order)
    return result


def count_by_hand(features: torch.Tensor, mask: torch.Tensor | None, ties: str) -> torch.Tensor:
    batch, channels, tokens = features.shape
    result = torch.zeros(batch, tokens, dtype=torch.float64)
    for b in range(batch):
        real = [m for m in range(tokens) if mask is None or bool(mask[b, m])]
        for f in range(channels):
            values = {m: float(features[b, f, m]) for m in real}
            best = [m for m in real if values[m] == max(values.values())]
            for m in best if ties == "split" else best[:1]:
                result[b, m] += 1 / len(best) if ties == "split" else 1
    return result


def test_the_hand_case_of_the_specification() -> None:
    found = point_importance(HAND)
    assert found.wins is not None
    assert found.wins.tolist() == [[1, 1, 1, 0]]
    assert found.norm.tolist() == [[1, 5, 13, 0]]
    assert normalised_entropy(found.wins).item() == pytest.approx(math.log2(3) / 2, abs=1e-4)


@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 12),
    st.sampled_from([1.0, 2.0, math.inf]),
    st.sampled_from(["first", "split"]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_both_paths_agree_with_loops_over_single_numbers(
    batch: int,
    channels: int,
    tokens: int,
    order: float,
    ties: str,
    dtype: torch.dtype,
    masked: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, so that ties are the rule.
    features = torch.randint(-3, 4, (batch, channels, tokens), generator=generator).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, tokens, generator=generator) < 0.6
        mask[:, 0] = True
    found = point_importance(features, mask, order=order, ties=ties)  # type: ignore[arg-type]
    assert found.wins is not None
    # Sums of at most nine small integers are exact; only the square root rounds.
    expected = by_hand(features, mask, order)
    torch.testing.assert_close(found.norm.double(), expected, rtol=2**-22, atol=0)
    expected = count_by_hand(features, mask, ties)
    torch.testing.assert_close(found.wins.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(reference.norms(features, mask, order), found.norm)
    again = reference.wins(features, mask, ties)
    torch.testing.assert_close(again.double(), found.wins.double())


def test_strides_do_not_matter() -> None:
    features = torch.randn(2, 40, 30)
    other = features.transpose(1, 2).contiguous().transpose(1, 2)
    assert other.stride() != features.stride()
    first, second = point_importance(features), point_importance(other)
    assert torch.equal(first.wins, second.wins)  # type: ignore[arg-type]
    torch.testing.assert_close(first.norm, second.norm)


def test_half_precision_is_summed_in_single() -> None:
    features = torch.full((1, 4096, 2), 1.0, dtype=torch.float16)
    assert point_importance(features).norm.tolist() == [[4096.0, 4096.0]]
    features = torch.full((1, 70000, 1), 1.0, dtype=torch.float16)  # beyond half's largest number
    assert point_importance(features).norm.item() == 70000.0


def test_counts_add_up_to_the_channels_and_split_ignores_the_order_of_points() -> None:
    features = torch.randint(0, 3, (4, 64, 50)).float()
    whole = point_importance(features)
    assert whole.wins is not None
    assert whole.wins.sum(dim=1).tolist() == [64] * 4
    assert ((whole.wins > 0).sum(dim=1) <= 50).all()
    order = torch.randperm(50)
    split = point_importance(features, ties="split").wins
    moved = point_importance(features[:, :, order], ties="split").wins
    assert split is not None
    torch.testing.assert_close(moved, split[:, order])
    assert not torch.equal(point_importance(features[:, :, order]).wins, whole.wins[:, order])


def test_entropy_of_known_distributions() -> None:
    assert normalised_entropy(torch.full((1, 32), 7)).item() == pytest.approx(1.0)
    one = torch.zeros(1, 1024)
    one[0, 5] = 1024
    assert normalised_entropy(one).item() < 1e-3
    four = torch.zeros(1, 16)
    four[0, :4] = 1
    assert normalised_entropy(four).item() == pytest.approx(0.5, abs=1e-3)
    assert normalised_entropy(four, bits=True).item() == pytest.approx(2.0, abs=1e-3)
    assert normalised_entropy(torch.tensor([[3]])).item() == 1.0  # a cloud of one point


def test_entropy_of_a_batch_is_that_of_its_clouds() -> None:
    wins = torch.randint(0, 9, (7, 7))  # B = N: dividing by a [B] vector would go unnoticed
    singles = torch.cat([normalised_entropy(row[None]) for row in wins])
    assert torch.equal(normalised_entropy(wins), singles)


def test_entropy_counts_real_tokens_only() -> None:
    wins = torch.tensor([[3, 1, 2, 0, 0]])
    mask = torch.tensor([[True, True, True, False, False]])
    torch.testing.assert_close(normalised_entropy(wins, mask), normalised_entropy(wins[:, :3]))


def test_infinite_padding_behind_a_mask_is_ignored() -> None:
    features = torch.tensor([[[1.0, 2.0, -math.inf]]])
    found = point_importance(features, torch.tensor([[True, True, False]]))
    assert found.norm.tolist() == [[1.0, 2.0, 0.0]]
    assert found.wins is not None
    assert found.wins.tolist() == [[0, 1, 0]]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"\[B, F, M\]"):
        point_importance(HAND[0])
    with pytest.raises(ShapeError, match="floating"):
        point_importance(HAND.long())
    with pytest.raises(ShapeError, match="mask must be"):
        point_importance(HAND, torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match="without any point"):
        point_importance(HAND, torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="order must be"):
        point_importance(HAND, order=3.0)
    with pytest.raises(InputError, match="ties must be"):
        point_importance(HAND, ties="last")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="use 'auto' to split"):
        point_importance(HAND, ties="split", backend="triton")
    with pytest.raises(InputError, match="not one of"):
        point_importance(HAND, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="wins and mask"):
        normalised_entropy(torch.zeros(3))


@pytest.mark.parametrize("layout", ["channels first", "tokens first"])
@pytest.mark.parametrize(
    "shape", [(2, 1024, 128), (1, 48, 256), (2, 33, 257), (1, 16, 1000), (1, 2064, 320), (1, 5, 64)]
)
def test_norms_have_the_bits_of_plain_sums_however_they_are_taken(
    shape: tuple[int, int, int], layout: str
) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    if layout == "tokens first":
        features = features.transpose(1, 2).contiguous().transpose(1, 2)
    for order, plain in ((1.0, torch.abs), (2.0, torch.square)):
        sums = torch.stack([plain(cloud).sum(dim=0) for cloud in features])
        expected = sums.sqrt() if order == 2.0 else sums
        assert torch.equal(point_importance(features, order=order, wins=False).norm, expected)
    rectified = features.relu()
    for order in (1.0, 2.0, math.inf):
        plainly = point_importance(rectified, order=order)
        told = point_importance(rectified, order=order, nonnegative=True)
        assert torch.equal(told.norm, plainly.norm)
        assert torch.equal(told.wins, plainly.wins)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [255, 256, 257, 300, 319, 320, 1024])
def test_of_equal_maxima_the_first_token_wins_wherever_it_lies(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    # At most four values, so that every channel has many maxima, also across blocks of tokens.
    features = torch.randint(0, 4, (2, 90, tokens), generator=generator).float()
    features[0, :30] = 0.0  # dead channels
    features[0, 30:60] = 0.0
    places = torch.randint(0, tokens, (30,), generator=generator)
    features[0, torch.arange(30, 60), places] = 1.0  # one maximum, anywhere, also in the tail
    features[0, 59] = 0.0
    features[0, 59, -1] = 1.0
    found = point_importance(features).wins
    assert torch.equal(found, reference.wins(features, None, "first"))  # type: ignore[arg-type]
    mask = torch.rand(2, tokens, generator=generator) < 0.5
    mask[:, 3] = True
    found = point_importance(features, mask).wins
    assert torch.equal(found, reference.wins(features, mask, "first"))  # type: ignore[arg-type]
