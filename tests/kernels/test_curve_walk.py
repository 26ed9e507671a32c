"""Random walks: the specification, independence of the batch, uniform choice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.kernels import curve_walk, knn, last_backend
from cmd_plugin.kernels.curve_walk import reference

pytestmark = pytest.mark.paths()  # each names the paths it is about itself


def table(batch: int, size: int = 40, k: int = 6) -> Tensor:
    points = torch.randn(batch, size, 3, generator=torch.Generator().manual_seed(0))
    return knn(points, k, exclude_self=True).positions


@pytest.mark.parametrize("length", [1, 2, 4, 5, 23])
@pytest.mark.parametrize("k", [1, 6, 39])
def test_equals_the_specification(length: int, k: int) -> None:
    neighbours = table(3, k=k)
    start = torch.tensor([[0, 5], [39, 0], [7, 7]])
    index = torch.tensor([4, 0, 2**35 + 9])
    result = curve_walk(neighbours, start, length, seed=2**33 + 5, index=index)
    assert last_backend("curve_walk") == "torch"
    assert torch.equal(result, reference.curve_walk(neighbours, start, length, 2**33 + 5, index))


def test_each_step_goes_to_a_neighbour_and_walks_from_one_start_differ() -> None:
    neighbours = table(4)
    start = torch.zeros(4, 3, dtype=torch.int64)
    paths = curve_walk(neighbours, start, 64)
    assert torch.equal(paths[:, :, 0], start)
    for sample in range(4):
        for walk in range(3):
            for here, there in paths[sample, walk].unfold(0, 2, 1).tolist():
                assert there in neighbours[sample, here]
    assert len(paths.flatten(0, 1).unique(dim=0)) == 12


def test_a_sample_walks_alike_in_any_batch_and_number_of_walks() -> None:
    neighbours = table(5)
    start = torch.arange(15).view(5, 3)
    whole = curve_walk(neighbours, start, 50, seed=1)
    picked = torch.tensor([3, 1])
    part = curve_walk(neighbours[picked], start[picked], 50, seed=1, index=picked)
    assert torch.equal(part, whole[picked])
    assert torch.equal(curve_walk(neighbours, start[:, :2], 50, seed=1), whole[:, :2])
    assert torch.equal(curve_walk(neighbours, start, 20, seed=1), whole[:, :, :20])
    assert not torch.equal(curve_walk(neighbours, start, 50, seed=2), whole)


def test_all_neighbours_are_equally_likely() -> None:
    choices = 5
    neighbours = torch.arange(1, choices + 1).expand(1, choices + 1, choices).contiguous()
    steps = 20_000
    path = curve_walk(neighbours, torch.zeros(1, 1, dtype=torch.int64), steps + 1)[0, 0, 1:]
    seen = path.bincount(minlength=choices + 1)[1:]
    expected = steps / choices
    assert ((seen - expected).abs() < 5 * (expected * (1 - 1 / choices)) ** 0.5).all()
    pairs = (path[:-1] * 8 + path[1:]).unique(return_counts=True)[1]
    assert len(pairs) == 25
    assert ((pairs - steps / 25).abs() < 5 * (steps / 25) ** 0.5).all()


def test_bad_input() -> None:
    neighbours, start = table(2), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ShapeError, match="neighbours must be"):
        curve_walk(neighbours.int(), start, 3)
    with pytest.raises(ShapeError, match=r"start must be \[2, A\]"):
        curve_walk(neighbours, start[:1], 3)
    with pytest.raises(ShapeError, match=r"start must hold positions in 0\.\.39"):
        curve_walk(neighbours, start + 40, 3)
    with pytest.raises(ShapeError, match="neighbours must hold"):
        curve_walk(neighbours - 1, start, 3)
    for length in (0, 1.5, True):
        with pytest.raises(InputError, match="length"):
            curve_walk(neighbours, start, length)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="seed"):
        curve_walk(neighbours, start, 3, seed=-1)
    with pytest.raises(InputError, match="not one of auto, torch, triton"):
        curve_walk(neighbours, start, 3, backend="scipy")  # type: ignore[arg-type]
