"""The seven corruptions do what their recipes say, whatever batch a cloud is in."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.pointcloud.corruptions import CORRUPTIONS, LEVELS, corrupt, shuffle_points

CASES = [(kind, level) for kind in CORRUPTIONS for level in range(LEVELS)]


def clouds(batch: int = 6, points: int = 1024, seed: int = 0) -> Tensor:
    """Clouds in the unit ball, each touching it."""
    drawn = torch.randn(batch, points, 3, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=2).amax(dim=1)[:, None, None]


def rows(cloud: Tensor) -> set[tuple[float, ...]]:
    return {tuple(point) for point in cloud.tolist()}


EXPECTED = {
    "scale": [1024] * 5,
    "jitter": [1024] * 5,
    "rotate": [1024] * 5,
    "drop_global": [768, 640, 512, 384, 256],
    "drop_local": [924, 824, 724, 624, 524],
    "add_global": [1034, 1044, 1054, 1064, 1074],
    "add_local": [1124, 1224, 1324, 1424, 1524],
}


@pytest.mark.parametrize(("kind", "level"), CASES)
def test_point_counts_dtype_and_that_the_input_is_left_alone(kind: str, level: int) -> None:
    given = clouds(2)
    before = given.clone()
    result = corrupt(given, kind, level)
    assert result.shape == (2, EXPECTED[kind][level], 3)
    assert result.dtype == given.dtype
    assert result.isfinite().all()
    assert torch.equal(given, before)


@pytest.mark.parametrize(("kind", "level"), CASES)
def test_a_cloud_is_corrupted_alike_in_any_batch(kind: str, level: int) -> None:
    given = clouds()
    whole = corrupt(given, kind, level, seed=5)
    assert torch.equal(corrupt(given, kind, level, seed=5), whole)
    picked = torch.tensor([4, 1])
    assert torch.equal(corrupt(given[picked], kind, level, seed=5, index=picked), whole[picked])
    single = corrupt(given[3], kind, level, seed=5, index=torch.tensor([3]))
    assert torch.equal(single, whole[3])


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_seed_number_and_level_each_matter(kind: str) -> None:
    one = clouds(1)
    base = corrupt(one, kind, 1)
    others = [
        corrupt(one, kind, 1, seed=1),
        corrupt(one, kind, 1, index=torch.tensor([1])),
        corrupt(one, kind, 2),
    ]
    for other in others:
        assert other.shape != base.shape or not torch.equal(other, base)


@pytest.mark.parametrize("level", range(LEVELS))
def test_scale_is_affine_per_axis_and_ends_in_the_unit_ball(level: int) -> None:
    given = clouds(50, 64).double()
    result = corrupt(given, "scale", level)
    assert result.mean(dim=1).abs().max() < 1e-12
    assert (result.norm(dim=2).amax(dim=1) - 1).abs().max() < 1e-12
    spread = given - given.mean(dim=1, keepdim=True)
    factor = (result * spread).sum(dim=1) / spread.square().sum(dim=1)
    assert (result - spread * factor[:, None, :]).abs().max() < 1e-12
    # Axes are stretched by U(1/S, S) before the common normalisation: ratios stay within S^2.
    largest = 1.6 + 0.1 * level
    assert (factor.amax(dim=1) / factor.amin(dim=1)).max() < largest**2


@pytest.mark.parametrize("level", range(LEVELS))
def test_jitter_has_its_standard_deviation(level: int) -> None:
    given = clouds(20).double()
    residual = corrupt(given, "jitter", level) - given
    sigma, count = 0.01 * (level + 1), residual.numel()
    assert abs(float(residual.std()) - sigma) < 3 * sigma / math.sqrt(2 * count)
    assert abs(float(residual.mean())) < 3 * sigma / math.sqrt(count)


@pytest.mark.parametrize("level", range(LEVELS))
def test_rotate_is_a_proper_rotation_within_its_angles(level: int) -> None:
    given = clouds(40, 50).double()
    result = corrupt(given, "rotate", level)
    assert (torch.cdist(result, result) - torch.cdist(given, given)).abs().max() < 1e-7
    rotation = torch.linalg.lstsq(given, result).solution
    assert (torch.linalg.det(rotation) - 1).abs().max() < 1e-9
    # R = Rz(c) Ry(b) Rx(a): read the angles back.
    a = torch.atan2(rotation[:, 2, 1], rotation[:, 2, 2])
    b = torch.asin(-rotation[:, 2, 0])
    c = torch.atan2(rotation[:, 1, 0], rotation[:, 0, 0])
    largest = math.pi / 6 * (level + 1) / 5
    angles = torch.stack([a, b, c])
    assert angles.abs().max() < largest
    assert angles.abs().amax(dim=1).min() > 0.7 * largest


@pytest.mark.parametrize("kind", ["drop_global", "drop_local"])
@pytest.mark.parametrize("level", range(LEVELS))
def test_dropping_keeps_points_of_the_cloud_once_each(kind: str, level: int) -> None:
    given = clouds(3)
    result = corrupt(given, kind, level)
    for before, after in zip(given, result, strict=True):
        assert len(rows(after)) == len(after)
        assert rows(after) <= rows(before)


def test_drop_local_removes_whole_neighbourhoods() -> None:
    """A random tenth leaves gaps everywhere; a tenth in 1 to 7 places takes neighbours along."""
    given = clouds(20)
    share = {}
    for kind in ("drop_global", "drop_local"):
        total = 0.0
        for before, after in zip(given, corrupt(given, kind, 0), strict=True):
            kept = rows(after)
            gone = torch.tensor([tuple(point) not in kept for point in before.tolist()])
            near = (before[:, None] - before[None]).norm(dim=2).topk(4, largest=False).indices
            total += float(gone[near[gone, 1:]].double().mean()) / len(given)
        share[kind] = total
    assert abs(share["drop_global"] - 0.25) < 0.03  # level 0 removes a quarter
    assert share["drop_local"] > 0.6  # of a tenth that is removed


def test_drop_local_in_one_place_is_a_ball() -> None:
    """On a line, C places leave at most C gaps beyond the two ends."""
    line = torch.linspace(-1, 1, 1024).repeat(200, 1)
    kept = corrupt(torch.stack([line, 0 * line, 0 * line], dim=2), "drop_local", 2)[:, :, 0]
    gaps = (kept.diff(dim=1) > 3 / 1024).sum(dim=1)
    assert gaps.max() <= 7
    assert len(gaps.unique()) >= 6
    single = (gaps <= 1).double().mean()  # of 200, one in seven has one place, and a few merge
    assert 0.08 < single < 0.4


@pytest.mark.parametrize("kind", ["add_global", "add_local"])
@pytest.mark.parametrize("level", range(LEVELS))
def test_adding_appends_points_of_the_unit_ball(kind: str, level: int) -> None:
    given = clouds(5).double()
    result = corrupt(given, kind, level)
    assert torch.equal(result[:, :1024], given)
    assert result[:, 1024:].norm(dim=2).max() <= 1


def test_added_points_fill_the_ball_evenly() -> None:
    added = corrupt(clouds(200), "add_global", 4)[:, 1024:]
    cubes = added.norm(dim=2).flatten().double() ** 3  # uniform on (0, 1) for a uniform ball
    count = cubes.numel()
    assert abs(float(cubes.mean()) - 0.5) < 5 * (1 / 12 / count) ** 0.5
    assert added.flatten(0, 1).mean(dim=0).abs().max() < 5 * (0.2 / count) ** 0.5


def test_locally_added_points_scatter_by_their_standard_deviation() -> None:
    added = corrupt(torch.zeros(50, 1024, 3), "add_local", 4)[:, 1024:]
    spread = added.double().square().mean(dim=(1, 2)).sqrt()
    assert spread.min() > 0.075 * 0.95
    assert spread.max() < 0.125 * 1.05
    assert spread.max() - spread.min() > 0.02


def test_locally_added_points_lie_around_one_to_seven_points() -> None:
    corners = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * 3)  # eight deviations apart
    added = corrupt(corners.repeat(150, 128, 1), "add_local", 4)[:, 1024:]
    nearest = torch.cdist(added, corners).argmin(dim=2)
    used = torch.zeros(150, 8).scatter_(1, nearest, 1).sum(dim=1)
    assert used.max() <= 7
    assert used.min() == 1
    # E[number of different corners] = 8 (1 - E[(7/8)^C]), C uniform on 1..7.
    expected = 8 * (1 - sum((7 / 8) ** c for c in range(1, 8)) / 7)
    assert abs(float(used.mean()) - expected) < 5 * 1.6 / 150**0.5


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_smaller_clouds_get_counts_in_proportion(kind: str) -> None:
    result = corrupt(clouds(2, 256), kind, 4)
    full = EXPECTED[kind][4]
    expected = {"add_global": 256 + 12, "drop_global": 64}.get(kind, round(full / 4))
    assert result.shape == (2, expected, 3)


@pytest.mark.parametrize("kind", [kind for kind in CORRUPTIONS if kind != "scale"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_tiny_clouds_stay_clouds(kind: str, size: int) -> None:
    result = corrupt(clouds(3, size), kind, 4)
    assert result.shape[1] >= 1
    assert result.isfinite().all()


def test_shuffling_is_a_permutation_of_its_own_for_every_cloud() -> None:
    given = clouds(4, 40)
    result = shuffle_points(given, seed=2)
    for before, after in zip(given, result, strict=True):
        assert rows(before) == rows(after)
    moved = torch.cdist(result, given).argmin(dim=2)
    assert len(moved.unique(dim=0)) == 4
    picked = torch.tensor([2])
    assert torch.equal(shuffle_points(given[2], seed=2, index=picked), result[2])


def test_bad_input() -> None:
    given = clouds(2, 10)
    with pytest.raises(InputError, match="corruption 'blur' is unknown: use scale"):
        corrupt(given, "blur", 0)  # type: ignore[arg-type]
    for level in (-1, 5, 1.0, True):
        with pytest.raises(InputError, match=r"level must be an integer in 0\.\.4"):
            corrupt(given, "scale", level)  # type: ignore[arg-type]
    for shape in ((2, 3, 10), (10,), (0, 3), (2, 0, 3)):
        with pytest.raises(ShapeError, match="points must be"):
            corrupt(torch.zeros(shape), "scale", 0)
    with pytest.raises(ShapeError, match="float32 or float64"):
        corrupt(given.half(), "scale", 0)
    with pytest.raises(ShapeError, match="index must be"):
        corrupt(given, "scale", 0, index=torch.arange(3))
    with pytest.raises(InputError, match="seed"):
        corrupt(given, "scale", 0, seed=-1)
    with pytest.raises(InputError, match="one place"):
        corrupt(torch.zeros(2, 10, 3), "scale", 0)
    given[1, 3, 0], given[0, 0, 2] = math.nan, math.inf
    with pytest.raises(NonFiniteError, match="2 NaN or infinite"):
        corrupt(given, "jitter", 0)
