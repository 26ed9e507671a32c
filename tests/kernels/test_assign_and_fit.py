"""One pass of assignment and least squares against its float64 specification."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_toys import INTERPRETING
from torch import Tensor

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.kernels import AffineFit, assign_and_fit
from cmd_plugin.kernels.assign_and_fit import _blocked, reference

pytestmark = pytest.mark.paths("torch", "numba", "triton")

ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def walks(snapshots: int, numel: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random walks that start anywhere, [T, N]: the first snapshot lies far from the mean."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(snapshots, numel, generator=generator, dtype=torch.float64)
    start = 3 * torch.randn(numel, generator=generator, dtype=torch.float64)
    return (start + 0.3 * steps.cumsum(dim=0)).to(dtype)


def profiles_of(snapshots: int, modes: int, seed: int = 1) -> Tensor:
    return walks(snapshots, modes, seed, torch.float64).T.contiguous()


def require_close(
    fit: AffineFit, trajectory: Tensor, profiles: Tensor, base: Tensor | None = None
) -> None:
    """Compare with the specification in float64, in units of each weight's roundoff.

    Bounds are derived: a sum of T products of unit rows errs by at most T u; four more roundings
    make the slope; pivoting costs one roundoff of the distance to the first snapshot. The
    specification itself rounds in float64 and does not pivot.
    """
    expected = AffineFit(*reference.assign_and_fit(trajectory, profiles, base))
    rows, source = trajectory.double(), trajectory
    if base is not None:
        rows, source = torch.cat([torch.zeros_like(rows[:1]), rows]) + base.double(), base
    snapshots = rows.shape[0]
    unit = ROUNDOFF[fit.scale.dtype]
    spread = expected.total.sqrt()
    reach = (rows - rows[0]).abs().amax(dim=0)
    own = 2.0**-53 * rows.abs().amax(dim=0)
    tolerance = (2 * snapshots + 8) * unit * spread + snapshots**0.5 * (4 * unit * reach + 4 * own)
    gap = (fit.mean - expected.mean).abs()
    assert (gap <= 2 * unit * expected.mean.abs() + 4 * unit * reach + 4 * own).all()
    assert ((fit.total - expected.total).abs() <= 2 * spread * tolerance + tolerance**2).all()

    floor = snapshots * (4 * reference.UNIT_ROUNDOFF[source.dtype] * rows.mean(dim=0)).square()
    still = expected.total <= floor
    edge = (expected.total - floor).abs() <= 2 * spread * tolerance + tolerance**2
    assert not fit.mode[still & ~edge].any()
    assert not fit.scale[still & ~edge].any()

    moving = ~still & ~edge
    centred = profiles - profiles.mean(dim=1, keepdim=True)
    norm = centred.norm(dim=1)
    chosen, best = fit.mode.long(), expected.mode.long()
    products = (centred / norm[:, None]) @ (rows - rows.mean(dim=0))
    reached = products.gather(0, chosen[None])[0]
    top = products.abs().topk(min(2, len(norm)), dim=0).values
    assert (reached.abs() >= top[0] - 2 * tolerance)[moving].all(), "a worse mode was chosen"
    clear = (top[0] - top[-1] > 4 * tolerance) | (len(norm) == 1)
    assert (chosen == best)[moving & clear].all()
    assert ((fit.scale * norm[chosen] - reached).abs() <= tolerance)[moving].all()


# The interpreter takes a second for a hundred thousand products: there, the corners of the grid.
GRID = (
    [(3, 256), (21, 10), (37, 2), (128, 1)]
    if INTERPRETING
    else list(product([3, 21, 37, 128], [1, 2, 10, 256]))
)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize(("snapshots", "modes"), GRID)
def test_equals_the_specification(dtype: torch.dtype, snapshots: int, modes: int) -> None:
    trajectory = walks(snapshots, 515 if INTERPRETING else 1237, dtype=dtype)
    profiles = profiles_of(snapshots, modes)
    fit = assign_and_fit(trajectory, profiles)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    assert [part.dtype for part in fit] == [torch.uint8, state, state, state]
    require_close(fit, trajectory, profiles)


@pytest.mark.parametrize("snapshots", [3, 21])
@pytest.mark.parametrize("modes", [1, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_differences_to_a_first_snapshot(snapshots: int, modes: int, dtype: torch.dtype) -> None:
    trajectory = walks(snapshots, 801, dtype=dtype)
    base, deltas = trajectory[0].clone(), (trajectory[1:] - trajectory[0]).bfloat16()
    profiles = profiles_of(snapshots, modes)
    fit = assign_and_fit(deltas, profiles, base)
    assert fit.mean.dtype == dtype
    require_close(fit, deltas, profiles, base)


@pytest.mark.parametrize("numel", [1, 2, 255, 256, 257, 511, 512, 513])
def test_any_number_of_weights_and_blocks(numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blocked, "_BLOCK_VALUES", 1)  # the narrowest blocks: 256 weights
    trajectory, profiles = walks(9, numel), profiles_of(9, 4)
    require_close(assign_and_fit(trajectory, profiles), trajectory, profiles)


def test_assignment_is_the_best_fit() -> None:
    trajectory, profiles = walks(21, 500, dtype=torch.float64), profiles_of(21, 8)
    fit = assign_and_fit(trajectory, profiles)
    residuals = []
    for profile in profiles:  # brute force: a least-squares solve for each weight and profile
        design = torch.stack([profile, torch.ones_like(profile)], dim=1)
        solution = torch.linalg.lstsq(design, trajectory).solution
        residuals.append((design @ solution - trajectory).square().sum(dim=0))
    assert torch.equal(fit.mode.long(), torch.stack(residuals).argmin(dim=0))


def test_least_squares_equals_the_normal_equations() -> None:
    trajectory, profiles = walks(21, 300, dtype=torch.float64), profiles_of(21, 5)
    fit = assign_and_fit(trajectory, profiles)
    for weight in range(300):
        profile = profiles[int(fit.mode[weight])]
        design = torch.stack([profile, torch.ones_like(profile)], dim=1)
        slope, offset = torch.linalg.lstsq(design, trajectory[:, weight]).solution.tolist()
        assert float(fit.scale[weight]) == pytest.approx(slope, rel=1e-9, abs=1e-12)
        mean = float(fit.mean[weight] - fit.scale[weight] * profile.mean())
        assert mean == pytest.approx(offset, rel=1e-9, abs=1e-11)


def test_ties_go_to_the_lowest_mode() -> None:
    profile = profiles_of(21, 1)
    # Exact copies, and the mirror image, whose products differ in sign alone.
    profiles = torch.cat([profile, profile, -profile, 2 * profile])
    fit = assign_and_fit(walks(21, 1001), profiles)
    assert not fit.mode.any()
    reversed_roles = torch.cat([-profile, profile])
    assert not assign_and_fit(walks(21, 1001), reversed_roles).mode.any()


def test_the_last_of_256_modes_can_win() -> None:
    profiles = profiles_of(20 if INTERPRETING else 300, 256)
    trajectory = profiles.T.float()
    fit = assign_and_fit(trajectory, profiles)
    assert fit.mode.tolist() == list(range(256))
    assert (fit.scale - 1).abs().max() < 1e-5


@pytest.mark.parametrize("modes", [1, 5, 256])
def test_non_finite_rows_stay_in_range_and_alone(modes: int) -> None:
    trajectory, profiles = walks(9, 300), profiles_of(9, modes)
    clean = assign_and_fit(trajectory, profiles)
    broken, others = trajectory.clone(), torch.ones(300, dtype=torch.bool)
    for first, value in ((7, float("nan")), (107, float("inf")), (207, -float("inf"))):
        broken[4, first] = value
        broken[0, first + 1] = value
        broken[:, first + 2] = value
        others[first : first + 3] = False
    fit = assign_and_fit(broken, profiles)
    assert int(fit.mode.max()) < modes
    assert not torch.isfinite(fit.total[~others]).any()
    for before, after in zip(clean, fit, strict=True):
        assert torch.equal(before[others], after[others])


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1e4, 1e-7])
def test_constant_rows_are_exact(dtype: torch.dtype, value: float) -> None:
    trajectory = walks(21, 50, dtype=dtype)
    trajectory[:, ::5] = value
    fit = assign_and_fit(trajectory, profiles_of(21, 3))
    assert not fit.mode[::5].any()
    assert not fit.scale[::5].any()
    assert torch.equal(fit.mean[::5], trajectory[0, ::5].to(fit.mean.dtype))
    assert not fit.total[::5].any()
    assert (fit.scale[1::5] != 0).all()


def test_rounding_noise_is_constant_and_real_movement_is_not() -> None:
    unit = 2.0**-24
    noise = torch.ones(21, 2)
    noise[::2, 0] += 2 * unit  # one unit in the last place, as an lr of 1e-12 does
    noise[:, 1] += torch.linspace(0, 400 * unit, 21)
    fit = assign_and_fit(noise, profiles_of(21, 2))
    assert float(fit.scale[0]) == 0
    assert float(fit.scale[1]) != 0


# A whole block of the interpreter's and a rest, or several of the other paths'.
PLANTED = 600 if INTERPRETING else 4000


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
def test_an_offset_costs_no_accuracy(ratio: float) -> None:
    """The authors' float32 formula gets half of the modes wrong at mean / std = 1000."""
    generator = torch.Generator().manual_seed(3)
    profiles = profiles_of(21, 10)
    profiles = (profiles - profiles.mean(dim=1, keepdim=True)) / profiles.std(dim=1, keepdim=True)
    planted = torch.randint(10, (PLANTED,), generator=generator)
    rows = profiles[planted].T + ratio * (1 + torch.rand(PLANTED, generator=generator).double())
    fit = assign_and_fit(rows.float(), profiles)
    assert torch.equal(fit.mode.long(), planted)


@pytest.mark.parametrize("spread", [1e-4, 1e-5, 1e-6])
def test_near_constant_weights_keep_their_mode(spread: float) -> None:
    """LayerNorm's gains: mean 1, and movement of a few hundred units in the last place at most."""
    generator = torch.Generator().manual_seed(4)
    basis = torch.linalg.qr(torch.randn(40, 10, generator=generator).double())[0]
    profiles = basis.T - basis.T.mean(dim=1, keepdim=True)
    profiles /= profiles.std(dim=1, keepdim=True)
    planted = torch.randint(10, (PLANTED,), generator=generator)
    rows = 1 + spread * profiles[planted].T
    fit = assign_and_fit(rows.float(), profiles)
    assert torch.equal(fit.mode.long(), planted)


def test_memory_layout_does_not_matter() -> None:
    profiles = profiles_of(21, 6)
    trajectory = walks(21, 700)
    expected = assign_and_fit(trajectory, profiles)
    wide = torch.zeros(42, 1400)
    wide[::2, ::2] = trajectory
    for same in (trajectory.T.contiguous().T, wide[::2, ::2]):
        assert not same.is_contiguous()
        for one, other in zip(expected, assign_and_fit(same, profiles), strict=True):
            assert torch.equal(one, other)
    strided = profiles.T.contiguous().T
    for one, other in zip(expected, assign_and_fit(trajectory, strided), strict=True):
        assert torch.equal(one, other)


def test_arguments_are_left_as_they_are() -> None:
    trajectory, profiles = walks(21, 700), profiles_of(21, 6)
    base, deltas = trajectory[0].clone(), (trajectory[1:] - trajectory[0]).bfloat16()
    copies = [t.clone() for t in (trajectory, profiles, base, deltas)]
    assign_and_fit(trajectory, profiles)
    assign_and_fit(deltas, profiles, base)
    for now, before in zip((trajectory, profiles, base, deltas), copies, strict=True):
        assert torch.equal(now, before)


@pytest.fixture
def _half_precision_products() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.paths("torch")
@pytest.mark.usefixtures("_half_precision_products")
def test_products_stay_ieee(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    multiply = torch.mm

    def watched(*args: Tensor, **kwargs: Tensor) -> Tensor:
        backend = torch.backends.cuda.matmul
        if hasattr(backend, "fp32_precision"):
            seen.append(backend.fp32_precision)
        else:
            seen.append({"highest": "ieee"}.get(torch.get_float32_matmul_precision()))
        return multiply(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", watched)
    assign_and_fit(walks(9, 50), profiles_of(9, 2))
    assert seen
    assert set(seen) == {"ieee"}
    assert torch.get_float32_matmul_precision() == "medium"  # and the training has its own again


@pytest.mark.paths("torch")
@pytest.mark.usefixtures("_half_precision_products")
def test_settings_return_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Tensor, **__: Tensor) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(torch, "mm", broken)
    with pytest.raises(MemoryError):
        assign_and_fit(walks(9, 50), profiles_of(9, 2))
    assert torch.get_float32_matmul_precision() == "medium"


def test_autocast_does_not_reach_the_fit() -> None:
    trajectory, profiles = walks(9, 300), profiles_of(9, 4)
    expected = assign_and_fit(trajectory, profiles)
    with torch.autocast("cpu", torch.bfloat16):
        for one, other in zip(expected, assign_and_fit(trajectory, profiles), strict=True):
            assert torch.equal(one, other)


seeds = st.integers(0, 10**6)


@given(seeds, st.floats(-8, 8).filter(lambda s: abs(s) > 0.01), st.floats(-100, 100))
def test_affine_invariance(seed: int, stretch: float, shift: float) -> None:
    trajectory, profiles = walks(15, 60, seed, torch.float64), profiles_of(15, 4, seed + 1)
    fit = assign_and_fit(trajectory, profiles)
    moved = assign_and_fit(stretch * trajectory + shift, profiles)
    assert torch.equal(moved.mode, fit.mode)
    torch.testing.assert_close(moved.scale, stretch * fit.scale, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(moved.mean, stretch * fit.mean + shift, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(moved.total, stretch**2 * fit.total, rtol=1e-9, atol=1e-10)


@given(seeds, st.integers(0, 3), st.floats(-50, 50).filter(lambda s: abs(s) > 0.01))
def test_scaling_one_reference(seed: int, mode: int, stretch: float) -> None:
    trajectory, profiles = walks(15, 60, seed, torch.float64), profiles_of(15, 4, seed + 1)
    fit = assign_and_fit(trajectory, profiles)
    scaled = profiles.clone()
    scaled[mode] *= stretch
    other = assign_and_fit(trajectory, scaled)
    assert torch.equal(other.mode, fit.mode)
    factor = torch.where(fit.mode == mode, 1 / stretch, torch.ones(60, dtype=torch.float64))
    torch.testing.assert_close(other.scale, factor * fit.scale, rtol=1e-9, atol=1e-10)


@given(seeds)
def test_permutation_equivariance(seed: int) -> None:
    trajectory, profiles = walks(15, 70, seed, torch.float64), profiles_of(15, 4, seed + 1)
    fit = assign_and_fit(trajectory, profiles)
    generator = torch.Generator().manual_seed(seed)
    weights, times = (
        torch.randperm(70, generator=generator),
        torch.randperm(15, generator=generator),
    )
    modes = torch.randperm(4, generator=generator)

    shuffled = assign_and_fit(trajectory[:, weights], profiles)
    assert torch.equal(shuffled.mode, fit.mode[weights])
    torch.testing.assert_close(shuffled.scale, fit.scale[weights], rtol=1e-9, atol=1e-12)

    later = assign_and_fit(trajectory[times], profiles[:, times])
    assert torch.equal(later.mode, fit.mode)
    torch.testing.assert_close(later.scale, fit.scale, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(later.mean, fit.mean, rtol=1e-9, atol=1e-12)

    renamed = assign_and_fit(trajectory, profiles[modes])
    assert torch.equal(modes[renamed.mode.long()], fit.mode.long())
    torch.testing.assert_close(renamed.scale, fit.scale, rtol=1e-9, atol=1e-12)


@given(seeds)
def test_another_candidate_never_hurts(seed: int) -> None:
    trajectory, profiles = walks(12, 80, seed, torch.float64), profiles_of(12, 4, seed + 1)

    def residual(count: int) -> Tensor:
        fit = assign_and_fit(trajectory, profiles[:count])
        centred = profiles - profiles.mean(dim=1, keepdim=True)
        model = fit.mean + fit.scale * centred[fit.mode.long()].T
        return (trajectory - model).square().sum(dim=0)

    residuals = [residual(count) for count in (1, 2, 3, 4)]
    for fewer, more in pairwise(residuals):
        assert (more <= fewer * (1 + 1e-12)).all()


@pytest.mark.parametrize(
    ("trajectory", "profiles", "base", "kind", "message"),
    [
        (torch.ones(5), torch.randn(1, 5), None, ShapeError, r"\[T, N\]"),
        (torch.ones(5, 0), torch.randn(1, 5), None, ShapeError, r"\[T, N\]"),
        (torch.ones(5, 2), torch.randn(1, 4), None, ShapeError, r"profiles must be \[M, 5\]"),
        (torch.ones(5, 2), torch.randn(5), None, ShapeError, "profiles must be"),
        (torch.ones(5, 2), torch.randn(0, 5), None, ShapeError, "profiles must be"),
        (torch.ones(5, 2), torch.randn(257, 5), None, ShapeError, "profiles must be"),
        (torch.ones(5, 2), torch.randn(1, 5), torch.ones(2), ShapeError, r"\[M, 6\]"),
        (torch.ones(5, 2), torch.randn(1, 6), torch.ones(3), ShapeError, r"base must be \[2\]"),
        (torch.ones(5, 2).long(), torch.randn(1, 5), None, ShapeError, "torch.int64"),
        (torch.ones(5, 2), torch.ones(1, 5), None, InputError, "constant over time"),
    ],
)
def test_bad_arguments(
    trajectory: Tensor, profiles: Tensor, base: Tensor | None, kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        assign_and_fit(trajectory, profiles, base)
    assert type(caught.value) is kind


def test_the_specification_is_exported_beside_the_kernel() -> None:
    module = importlib.import_module("cmd_plugin.kernels.assign_and_fit.reference")
    assert module.assign_and_fit is reference.assign_and_fit
