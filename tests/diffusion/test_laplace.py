"""The kernel against closed forms, a quadrature, and itself under changes that must not matter."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from cmd_plugin.diffusion import (
    NoiseSchedule,
    ScoreModel,
    p_laplace,
    p_laplace_exact,
    sphere_directions,
)
from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from tests.helpers.diffusion_toys import (
    F64,
    LINEAR,
    circle,
    data_level,
    gaussian,
    network_model,
    smooth_network,
)


def two_modes(schedule: NoiseSchedule) -> ScoreModel:
    means = torch.tensor([[2.0, 0.0], [-2.0, 0.0]], dtype=F64)
    half = torch.full((2,), 0.5, dtype=F64)
    return ScoreModel.from_mixture(half, means, half, schedule)


def test_a_sphere_round_the_mode_of_a_round_gaussian_is_a_perfect_sink_however_wide_it_is() -> None:
    schedule, t, s = data_level()
    for variance in (0.2, 1.0, 5.0):
        mean = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=F64)
        model = gaussian(mean, torch.full((4,), variance, dtype=F64), schedule)
        rho = 0.7 / (s * 2.0)  # radius .7 in four dimensions
        found = p_laplace(model, mean[None], t, (1, 2, 3), rho=rho, units="density")
        expected = [(0.7 / variance) ** (p - 1) for p in (1, 2, 3)]
        assert found.value[0, 0].tolist() == pytest.approx(expected, rel=1e-6)
        assert float(found.cosine.min()) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(
    ("d", "radius", "away", "expected"),
    [(2, 1.0, 0.5, 0.934215), (2, 1.0, 2.0, 0.258658), (64, 1.0, 1.0, 0.705705)],
)
def test_off_the_mode_the_flux_is_the_integral_over_the_angle(
    d: int, radius: float, away: float, expected: float
) -> None:
    def density(w: float) -> float:
        return float((1.0 - w * w) ** ((d - 3) / 2))

    def cosine(w: float) -> float:
        return (radius + away * w) / math.sqrt(radius**2 + 2 * radius * away * w + away**2)

    points = {"points": [0.0], "limit": 200}
    total = quad(density, -1, 1, **points)[0]
    integral = quad(lambda w: density(w) * cosine(w), -1, 1, **points)[0] / total
    assert integral == pytest.approx(expected, abs=1e-6)
    schedule, t, s = data_level()
    model = gaussian(torch.zeros(d, dtype=F64), torch.ones(d, dtype=F64), schedule)
    image = torch.zeros(1, d, dtype=F64)
    image[0, 0] = away
    directions = circle(3600) if d == 2 else 20_000
    found = p_laplace(
        model, image, t, 1, directions=directions, rho=radius / (s * math.sqrt(d)), batch_size=4096
    )
    if d == 2:
        assert float(found.value) == pytest.approx(expected, abs=2e-6)
    else:
        assert abs(float(found.value) - expected) < 4 * float(found.standard_error)


@pytest.mark.parametrize("axes", [10, 100, 400])
def test_noised_gaussian_data_with_flat_axes_reads_the_co_dimension(axes: int) -> None:
    kept, d = 0.99, 784
    variances = torch.zeros(d, dtype=F64)
    variances[:axes] = 1.0
    schedule = NoiseSchedule("steps", torch.tensor([kept]))
    model = gaussian(torch.zeros(d, dtype=F64), variances, schedule)
    share = (1 - kept) / (kept * variances + 1 - kept)
    found = p_laplace(model, torch.zeros(1, d, dtype=F64), 0, (1, 2), directions=256)
    k1 = float(share.sum() / (d * share.square().sum()).sqrt())
    assert k1 == pytest.approx({10: 0.9937, 100: 0.9355, 400: 0.7066}[axes], abs=1e-3)
    error = found.standard_error[0, 0]
    # The large-d formula for k1 is itself accurate to O(1/d).
    assert abs(float(found.value[0, 0, 0]) - k1) < 4 * float(error[0]) + 1 / d
    assert abs(float(found.value[0, 0, 1]) - float(share.mean())) < 4 * float(error[1])


def test_a_linear_field_gives_its_trace_from_an_orthonormal_frame_alone() -> None:
    d, t = 12, 300
    matrix = torch.randn(d, d, dtype=F64)
    offset = torch.randn(d, dtype=F64)
    model = ScoreModel(lambda y, *_: y @ matrix.T + offset, LINEAR, (d,))
    _, s = LINEAR.level(t)
    image = torch.randn(3, d, dtype=F64)
    found = p_laplace(model, image, t, 2, directions=2 * d, kind="orthogonal")
    expected = s * float(matrix.trace()) / d
    assert found.value.flatten().tolist() == pytest.approx([expected] * 3, rel=1e-9)
    basis = torch.eye(d, dtype=F64) * math.sqrt(d)
    own = torch.stack([basis, -basis], 1).reshape(2 * d, d)
    assert float(p_laplace(model, image[:1], t, 2, directions=own).value) == pytest.approx(
        expected, rel=1e-9
    )


def test_a_constant_field_has_no_flux() -> None:
    model = ScoreModel(lambda y, *_: torch.ones_like(y), LINEAR, (3, 2, 2))
    found = p_laplace(model, torch.randn(2, 3, 2, 2, dtype=F64), 100, 1)
    assert found.value.abs().max() == 0.0


def test_three_modes_on_a_triangle_sink_at_the_means_and_source_between() -> None:
    schedule, t, s = data_level()
    angle = math.pi / 2 + torch.arange(3, dtype=F64) * (2 * math.pi / 3)
    means = 5 / math.sqrt(3) * torch.stack([angle.cos(), angle.sin()], 1)
    variance = torch.full((3,), 0.1, dtype=F64)
    model = ScoreModel.from_mixture(torch.ones(3, dtype=F64), means, variance, schedule)
    places = torch.stack([means[0], (means[0] + means[1]) / 2, means.mean(0)])
    options = {"directions": circle(4096), "rho": 1 / (s * math.sqrt(2.0)), "batch_size": 4096}
    total = p_laplace(model, places, t, 1, units="total", **options)
    assert total.value.flatten().tolist() == pytest.approx(
        [6.283185, -2.339335, -4.327659], rel=1e-6
    )
    density = p_laplace(model, places, t, 2, units="density", **options)
    assert (-density.value.flatten()).tolist() == pytest.approx(
        [-10.0, 5.905008, 13.857512], rel=1e-6
    )


def test_the_ball_average_approaches_the_pointwise_value_with_the_square_of_the_radius() -> None:
    schedule, t, s = data_level()
    model = two_modes(schedule)
    place = torch.tensor([[1.1, 0.7]], dtype=F64)
    pointwise = [-0.875828, -3.990356, -13.640723]
    for p, value in zip((1, 2, 3), pointwise, strict=True):
        found = p_laplace_exact(model, place, t, p)
        assert float(found.value) == pytest.approx(value, abs=1e-6)
        assert found.antisymmetry is not None
        assert float(found.antisymmetry) < 1e-9

    def balls(radius: float) -> Tensor:
        rho = radius / (s * math.sqrt(2.0))
        found = p_laplace(
            model,
            place,
            t,
            (1, 2, 3),
            directions=circle(2048),
            rho=rho,
            units="ball",
            batch_size=4096,
        )
        return found.value[0, 0]

    tenth = balls(0.1)
    assert tenth.tolist() == pytest.approx([-0.876631, -3.989564, -13.649660], abs=2e-6)
    rates = [(balls(radius) - torch.tensor(pointwise)) / radius**2 for radius in (0.1, 0.05)]
    assert rates[1].tolist() == pytest.approx([-0.080, 0.078, -0.90], abs=0.01)
    assert rates[0].tolist() == pytest.approx(rates[1].tolist(), abs=0.01)


def test_the_flux_through_the_boundary_is_the_mean_over_the_volume() -> None:
    schedule, t, s = data_level()
    model = two_modes(schedule)
    place, radius = torch.tensor([[1.1, 0.7]], dtype=F64), 0.4
    inside = radius * torch.rand(400, 1, dtype=F64).sqrt()
    angle = 2 * math.pi * torch.rand(400, dtype=F64)
    points = place + inside * torch.stack([angle.cos(), angle.sin()], 1)
    for p in (1.0, 2.0, 3.0):
        volume = p_laplace_exact(model, points, t, p).value
        rho = radius / (s * math.sqrt(2.0))
        boundary = p_laplace(
            model, place, t, p, directions=circle(720), rho=rho, units="ball"
        ).value
        error = float(volume.std()) / math.sqrt(len(volume))
        assert abs(float(volume.mean()) - float(boundary)) < 4 * error


def test_p_1_does_not_see_the_scale_of_the_output_and_p_is_homogeneous() -> None:
    d = 9
    network = smooth_network(d).double()
    image = torch.randn(4, d, dtype=F64)

    def flux(factor: float) -> Tensor:
        model = ScoreModel(lambda y, *_: factor * network(y), LINEAR, (d,), networks=[network])
        return p_laplace(model, image, 200, (1, 2, 2.5)).value[:, 0]

    one, three, minus = flux(1.0), flux(3.0), flux(-1.0)
    power = torch.tensor([1.0, 3.0, 3.0**1.5], dtype=F64)
    torch.testing.assert_close(three, one * power, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(minus, -one, rtol=1e-12, atol=1e-14)


def test_turning_the_space_changes_nothing() -> None:
    d = 5
    turn = torch.linalg.qr(torch.randn(d, d, dtype=F64)).Q
    means, weights = torch.randn(3, d, dtype=F64), torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    root = torch.randn(3, d, d, dtype=F64)
    spread = root @ root.mT / d + 0.1 * torch.eye(d, dtype=F64)
    image, u = torch.randn(4, d, dtype=F64), sphere_directions((d,), 32)
    plain = ScoreModel.from_mixture(weights, means, spread, LINEAR)
    turned = ScoreModel.from_mixture(weights, means @ turn.T, turn @ spread @ turn.T, LINEAR)
    one = p_laplace(plain, image, (50, 300), (1, 2), directions=u)
    other = p_laplace(turned, image @ turn.T, (50, 300), (1, 2), directions=u @ turn.T)
    torch.testing.assert_close(one.value, other.value, rtol=1e-9, atol=1e-10)
    order = torch.randperm(d)
    shuffled = ScoreModel.from_mixture(
        weights, means[:, order], spread[:, order][:, :, order], LINEAR
    )
    other = p_laplace(shuffled, image[:, order], (50, 300), (1, 2), directions=u[:, order])
    torch.testing.assert_close(one.value, other.value, rtol=1e-9, atol=1e-10)


def test_batches_order_and_company_do_not_change_a_value() -> None:
    d = 6
    model = network_model(smooth_network(d), d)
    images = torch.randn(5, d)
    whole = p_laplace(model, images, (25, 400), (1, 2))
    pieces = p_laplace(model, images, (25, 400), (1, 2), batch_size=7)
    torch.testing.assert_close(whole.value, pieces.value, rtol=1e-5, atol=1e-6)
    back = p_laplace(model, images.flip(0), (400, 25), (1, 2))
    torch.testing.assert_close(whole.value, back.value.flip(0, 1), rtol=1e-5, atol=1e-6)
    again = p_laplace(model, images, (25, 400), (1, 2))
    assert torch.equal(whole.value, again.value)
    other = p_laplace(model, images, (25, 400), (1, 2), seed=1)
    both = (whole.standard_error.square() + other.standard_error.square()).sqrt()
    assert float(((whole.value - other.value).abs() / both).max()) < 5.0
    assert not torch.equal(whole.value, other.value)


def test_the_standard_error_is_that_of_pairs() -> None:
    d = 6
    model = network_model(smooth_network(d).double(), d)
    found = p_laplace(model, torch.randn(2, d, dtype=F64), 50, 1, directions=10)
    pairs = found.cosine[:, 0].unflatten(1, (5, 2)).mean(2)
    expected = pairs.std(1) / math.sqrt(5)
    torch.testing.assert_close(found.standard_error[:, 0, 0], expected)
    spread = [
        float(p_laplace(model, torch.zeros(1, d, dtype=F64), 50, 1, directions=10, seed=s).value)
        for s in range(60)
    ]
    said = float(
        p_laplace(model, torch.zeros(1, d, dtype=F64), 50, 1, directions=400).standard_error
    )
    assert torch.tensor(spread).std() == pytest.approx(said * math.sqrt(40), rel=0.35)
    assert math.isnan(
        float(p_laplace(model, torch.zeros(1, d, dtype=F64), 50, 1, directions=2).standard_error)
    )


def test_a_network_in_bfloat16_agrees_with_one_in_float32() -> None:
    d = 64
    network = smooth_network(d)
    images = torch.randn(4, d)
    full = p_laplace(network_model(network, d), images, (50, 400))
    half = p_laplace(network_model(smooth_network(d).bfloat16(), d), images, (50, 400))
    assert float((full.value - half.value)[..., 0].abs().max()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_estimates_that_are_nothing_or_very_long_are_counted_right(dtype: torch.dtype) -> None:
    d = 4096
    image = torch.zeros(1, d)
    none = ScoreModel(lambda y, *_: torch.zeros_like(y), LINEAR, (d,), dtype=dtype)
    assert p_laplace(none, image, 10, (0.5, 1, 2)).value.abs().max() == 0.0
    # Published code reduces in float16, where this dot product, about 1e6, is infinite.
    long = ScoreModel(lambda y, *_: y * 1e3, LINEAR, (d,), dtype=dtype)
    found = p_laplace(long, image, 10, 1)
    assert float(found.value) == pytest.approx(1.0, abs=1e-4)


def test_a_gap_between_equal_conditions_is_no_flux() -> None:
    d = 5
    condition = torch.randn(1, 3)
    network = smooth_network(d)
    model = ScoreModel(
        lambda y, _, c: network(y) + c.sum(1, keepdim=True),
        LINEAR,
        (d,),
        networks=[network],
        condition=condition,
        unconditional=condition,
        mode="gap",
    )
    found = p_laplace(model, torch.randn(2, d), (10, 500))
    assert found.value.abs().max() == 0.0


def test_every_image_is_looked_at_under_its_own_condition() -> None:
    d = 4
    model = ScoreModel(lambda y, _, c: y - c, LINEAR, (d,))
    images, conditions = torch.randn(3, d), torch.randn(3, d)
    found = p_laplace(model, images, (10, 100), condition=conditions, batch_size=5)
    for n in range(3):
        alone = p_laplace(model, images[n : n + 1], (10, 100), condition=conditions[n : n + 1])
        torch.testing.assert_close(found.value[n], alone.value[0], rtol=1e-5, atol=1e-6)
    moved = p_laplace(model, images, (10, 100), condition=conditions.flip(0))
    assert not torch.allclose(moved.value, found.value)


def test_what_cannot_be_measured_is_refused() -> None:
    model = network_model(smooth_network(4), 4)
    image = torch.zeros(1, 4)
    with pytest.raises(ShapeError, match=r"\[B, 4\]"):
        p_laplace(model, torch.zeros(1, 5), 10)
    with pytest.raises(ShapeError, match="floating"):
        p_laplace(model, torch.zeros(1, 4, dtype=torch.uint8), 10)
    with pytest.raises(NonFiniteError, match="number 1"):
        p_laplace(model, torch.tensor([[0.0] * 4, [math.nan] * 4]), 10)
    for options in (
        {"t": 1000},
        {"t": -1},
        {"t": 1.5},
        {"t": ()},
        {"p": math.inf},
        {"rho": 0.0},
        {"units": "volume"},
        {"kind": "random"},
        {"directions": 3},
        {"batch_size": 0},
    ):
        with pytest.raises(InputError):
            p_laplace(model, image, **{"t": 10, **options})
    with pytest.raises(ShapeError, match="conditions"):
        p_laplace(model, torch.zeros(3, 4), 10, condition=torch.zeros(2, 1))
    broken = ScoreModel(lambda y, *_: torch.where(y > 50, math.nan, y), LINEAR, (4,))
    with pytest.raises(NonFiniteError, match="1 of 2 images, first number 1"):
        p_laplace(broken, torch.tensor([[0.0] * 4, [100.0] * 4]), 10)
