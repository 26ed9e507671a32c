"""Ways between embeddings: the identities that hold exactly, and the released fault."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmd_plugin.clip import Whitening, slerp, slerp_circle, vslerp
from cmd_plugin.errors import InputError, NonFiniteError, ShapeError


def ends(dim: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x[0] + 1.0, x[1] + 1.0, x[2]


def near(x: Tensor, y: Tensor) -> bool:
    return torch.allclose(x, y, rtol=0.0, atol=1e-11)


def test_slerp_turns_at_even_speed_in_the_plane_of_its_ends() -> None:
    a, b, _ = ends()
    a, b = a / a.norm(), b / b.norm()
    angle = math.acos(float(a @ b))
    way = slerp(a, b, torch.arange(6.0, dtype=torch.float64) / 5)
    assert near(way[0], a)
    assert near(way[-1], b)
    assert near(way.norm(dim=1), torch.ones(6, dtype=torch.float64))
    for step, point in enumerate(way):
        assert math.acos(min(1.0, float(a @ point))) == pytest.approx(angle * step / 5, abs=1e-7)
    assert near(slerp(a, b, 0.4), way[2])


def test_lengths_are_kept_as_they_are() -> None:
    a, b, _ = ends()
    middle = slerp(a, 2.0 * b, 0.5)
    angle = math.acos(float(a @ b / a.norm() / b.norm()))
    assert near(middle, (a + 2.0 * b) * math.sin(angle / 2) / math.sin(angle))


def test_parallel_ends_are_joined_by_a_line() -> None:
    a, _, _ = ends()
    assert near(slerp(a, 3.0 * a, 0.25), 1.5 * a)
    assert near(slerp(a, a, 0.5), a)
    tilted = a + 1e-9 * torch.arange(12.0)
    assert torch.isfinite(slerp(a, tilted, 0.5)).all()


@pytest.mark.parametrize("kind", ["centred", "whitened", "singular"])
def test_the_circle_meets_its_four_points_whatever_the_whitening(kind: str) -> None:
    a, b, mean = ends()
    rows = torch.randn(60, 12, dtype=torch.float64) * torch.linspace(0.1, 3.0, 12) + mean
    if kind == "singular":
        rows[:, 5] = rows[:, 6]
    white = Whitening.fit(rows, shrinkage="none")
    whiten = None if kind == "centred" else white.transform
    seen = torch.stack((a, b)) - white.mean if whiten is None else whiten(torch.stack((a, b)))
    cosine = float(seen[0] @ seen[1] / seen[0].norm() / seen[1].norm())
    theta = math.degrees(math.acos(cosine))
    found = slerp_circle(
        a, b, torch.tensor([0.0, theta, 180.0, 360.0], dtype=torch.float64), white.mean, whiten
    )
    for point, expected in zip(found, (a, b, 2.0 * white.mean - a, a), strict=True):
        assert torch.allclose(point, expected, rtol=0.0, atol=1e-9)


def test_the_circle_is_the_unwhitened_slerp_of_whitened_ends() -> None:
    a, b, mean = ends()
    rows = torch.randn(80, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    white = Whitening.fit(rows + mean, shrinkage="none")
    y = white.transform(torch.stack((a, b)))
    theta = math.acos(float(y[0] @ y[1] / y[0].norm() / y[1].norm()))
    degrees = torch.arange(0.0, 361.0, 45.0, dtype=torch.float64)
    expected = white.inverse(slerp(y[0], y[1], degrees.deg2rad() / theta))
    found = slerp_circle(a, b, degrees, white.mean, white.transform)
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-8)


def test_vertical_slerp_is_slerp_about_a_moved_origin() -> None:
    a, b, mean = ends()
    times = torch.linspace(0.0, 1.0, 6)
    assert near(vslerp(a, b, times, 0.0, mean), slerp(a, b, times))
    moved = vslerp(a, b, times, 2.5, mean)
    assert near(moved, slerp(a - 2.5 * mean, b - 2.5 * mean, times) + 2.5 * mean)
    assert near(moved[0], a)
    assert near(moved[-1], b)


def test_the_released_fault_is_reproduced_on_request_alone() -> None:
    a, b, mean = (x * 3.0 for x in ends(768))
    for alpha in (-1.0, 0.0, 1.0, 3.0):
        right = vslerp(a, b, 0.5, alpha, mean)
        faulty = vslerp(a, b, 0.5, alpha, mean, legacy=True)
        # An angle for each feature: the product of two small numbers, so a quarter turn.
        p, q = (x - alpha * mean for x in (a, b))
        angles = (p / p.norm() * q / q.norm()).acos()
        by_hand = (0.5 * angles).sin() * (p + q) / angles.sin() + alpha * mean
        assert torch.allclose(faulty, by_hand, rtol=0.0, atol=0.05)  # it computes in half precision
        assert float((faulty - right).norm() / right.norm()) > 0.05


def test_ends_without_a_way_are_refused() -> None:
    a, b, mean = ends()
    with pytest.raises(InputError, match="opposite directions"):
        slerp(a, -2.0 * a, 0.5)
    with pytest.raises(InputError, match="is zero"):
        slerp(a, torch.zeros_like(a), 0.5)
    with pytest.raises(ShapeError, match=r"two embeddings \[d\]"):
        slerp(a, b[:3], 0.5)
    with pytest.raises(NonFiniteError, match="NaN"):
        slerp(a, b * torch.nan, 0.5)
    with pytest.raises(InputError, match="span no circle"):
        slerp_circle(a, mean + 2.0 * (a - mean), torch.zeros(1), mean)
    with pytest.raises(ShapeError, match="mean must be"):
        slerp_circle(a, b, torch.zeros(1), mean[:2])
    with pytest.raises(ShapeError, match="mean must be"):
        vslerp(a, b, 0.5, 1.0, mean[:2])
