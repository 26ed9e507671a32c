"""EDEN: rotations that are rotations, the best points, no bias, and the error that theory gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from scipy.linalg import hadamard as dense_hadamard

from cmd_plugin.federated.eden import (
    EDEN_BITS,
    centroids,
    dequantise_rotated,
    eden_bytes,
    quantise_rotated,
)
from cmd_plugin.federated.frame import FrameError
from cmd_plugin.federated.rotation import hadamard, rotate, rotate_back

# Distortion of the best 2^b points of a Gaussian: Max (1960) as published, and for 8 bits
# the limit sqrt(3) pi / 2 / 4^b of Panter and Dite.
DISTORTION = {1: 0.3634, 2: 0.1175, 4: 0.009497, 8: np.sqrt(3.0) * np.pi / 2.0 / 4.0**8}


def heavy(count: int, seed: int = 0) -> np.ndarray:
    """Values of very different sizes: rotated ones look alike all the same."""
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(count) * 10.0 ** generator.normal(size=count)).astype("f4")


def test_hadamard_is_the_matrix() -> None:
    for count in (1, 2, 8, 64):
        x = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        expected = dense_hadamard(count) @ x.numpy() / np.sqrt(count)
        assert np.allclose(hadamard(x).numpy(), expected, atol=1e-14)


@given(count=st.integers(0, 300), seed=st.integers(0, 2**64 - 1))
def test_a_rotation_keeps_lengths_and_can_be_undone(count: int, seed: int) -> None:
    x = torch.from_numpy(heavy(count)).double()
    rotated = rotate(x, seed)
    size = float(x.norm())
    assert rotated.shape == x.shape
    assert abs(float(rotated.norm()) - size) <= 1e-12 * size
    assert float((rotate_back(rotated, seed) - x).norm()) <= 1e-12 * size


@pytest.mark.parametrize("count", [256, 255, 257, 380])
def test_a_spike_is_spread_over_all_places_alike(count: int) -> None:
    """Also where the two blocks overlap in one place only, and the spike is in one of them."""
    for where in (0, count - 1):
        x = torch.zeros(count, dtype=torch.float64)
        x[where] = 1.0
        draws = torch.stack([rotate(x, seed) for seed in range(200)])
        energy = draws.square().mean(0) * count
        # the mean of 200 squared values of variance at most 2 each
        assert float((energy - 1.0).abs().max()) < 6 * np.sqrt(2 / 200)
        assert float((energy[: count // 2].mean() - 1.0).abs()) < 0.05


@pytest.mark.parametrize("bits", EDEN_BITS)
def test_points_are_the_best_for_a_gaussian(bits: int) -> None:
    points = centroids(bits).double().numpy()
    assert len(points) == 2**bits
    assert np.allclose(points, -points[::-1])
    edges = np.concatenate(([-np.inf], (points[1:] + points[:-1]) / 2, [np.inf]))
    # E (x - q)^2 = 1 - sum of p_i (2 m_i q_i - q_i^2), with p_i and m_i from scipy
    mass = np.diff(stats.norm.cdf(edges))
    first = -np.diff(stats.norm.pdf(edges))
    found = 1.0 - float((2.0 * first * points - mass * points**2).sum())
    assert found == pytest.approx(DISTORTION[bits], rel=0.03 if bits == 8 else 5e-4)
    if bits == 1:
        assert points[1] == pytest.approx(np.sqrt(2.0 / np.pi), abs=1e-6)
    if bits == 2:
        assert points[2:] == pytest.approx([0.4528, 1.510], abs=5e-4)  # Max, table I
        value, _ = integrate.quad(lambda t: (t - points[3]) ** 2 * stats.norm.pdf(t), edges[3], 9)
        assert 0.0 < value < found


def decoded(x: np.ndarray, bits: int, seed: int, *, unbiased: bool = True) -> np.ndarray:
    codes, scale = quantise_rotated(x, bits, seed, unbiased=unbiased)
    assert (len(codes), len(scale)) == eden_bytes(len(x), bits)
    return dequantise_rotated(codes, scale, len(x), bits)


@pytest.mark.parametrize("bits", EDEN_BITS)
@pytest.mark.parametrize("count", [512, 700])
def test_no_bias_and_the_error_of_the_theory(bits: int, count: int) -> None:
    """vNMSE = 1 / (1 - D) - 1, pi / 2 - 1 for one bit; D with the least-squares scale."""
    x, draws = heavy(count), 100
    size = float(np.square(x, dtype=np.float64).sum())
    found = np.stack([decoded(x, bits, seed) for seed in range(draws)]).astype(np.float64)
    error = np.square(found - x).sum(axis=1) / size
    distortion = DISTORTION[bits]
    expected = np.pi / 2.0 - 1.0 if bits == 1 else 1.0 / (1.0 - distortion) - 1.0
    assert error.mean() == pytest.approx(expected, rel=0.05)
    # The squared error of a mean of unbiased draws is the draws' over their number.
    bias = np.square(found.mean(axis=0) - x).sum() / size
    assert bias == pytest.approx(expected / draws, rel=0.25)
    small = np.mean(
        [
            np.square(decoded(x, bits, seed, unbiased=False) - x).sum() / size
            for seed in range(draws)
        ]
    )
    assert small == pytest.approx(distortion, rel=0.05)


def test_the_same_as_with_a_uniformly_random_rotation() -> None:
    """Independent: dense rotations of scipy, the formula of the paper, one bit."""
    x, count = heavy(64), 64
    size = float(np.square(x, dtype=np.float64).sum())
    errors = []
    for seed in range(150):
        rotation = stats.ortho_group.rvs(count, random_state=seed)
        rotated = rotation @ x
        signs = np.sign(rotated)
        back = rotation.T @ (size / np.abs(rotated).sum() * signs)
        errors.append(np.square(back - x).sum() / size)
    found = [np.square(decoded(x, 1, seed) - x).sum() / size for seed in range(150)]
    spread = np.sqrt(np.var(errors) / 150 + np.var(found) / 150)
    assert abs(np.mean(errors) - np.mean(found)) < 5 * spread


def test_short_vectors_and_zeros_are_exact() -> None:
    for bits in EDEN_BITS:
        assert decoded(np.zeros(0, "f4"), bits, 1).shape == (0,)
        assert np.array_equal(decoded(np.zeros(5, "f4"), bits, 1), np.zeros(5, "f4"))
        assert decoded(np.array([-3.0], "f4"), bits, 1) == pytest.approx([-3.0], rel=1e-6)


def test_same_seed_same_bytes_and_another_seed_another_rotation() -> None:
    x = heavy(777)
    assert quantise_rotated(x, 2, 5) == quantise_rotated(x, 2, 5)
    assert quantise_rotated(x, 2, 5)[0] != quantise_rotated(x, 2, 6)[0]


def test_wrong_sizes_are_refused() -> None:
    codes, scale = quantise_rotated(heavy(20), 2, 0)
    for wrong in ((codes[:-1], scale), (codes, scale[:-1])):
        with pytest.raises(FrameError, match=r"expected 5 \+ 12 bytes for 20 rotated values of 2"):
            dequantise_rotated(*wrong, 20, 2)
