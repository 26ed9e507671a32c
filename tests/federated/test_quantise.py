"""Quantisation: error bounds, unbiased rounding, and exact sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmd_plugin.errors import InputError
from cmd_plugin.federated.frame import FrameError
from cmd_plugin.federated.quantise import (
    BLOCK,
    check_bits,
    dequantise,
    quantise,
    quantised_bytes,
)


def values(count: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    scale = np.repeat(10.0 ** generator.uniform(-8, 3, -(-count // BLOCK)), BLOCK)[:count]
    return (generator.standard_normal(count) * scale).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8, 16])
@given(count=st.integers(0, 3 * BLOCK), seed=st.integers(0, 100), stochastic=st.booleans())
def test_error_is_below_a_step(bits: int, count: int, seed: int, stochastic: bool) -> None:
    exact = values(count, seed)
    generator = np.random.default_rng(seed) if stochastic else None
    codes, scales = quantise(exact, bits, generator)
    assert (len(codes), len(scales)) == quantised_bytes(count, bits)
    found = dequantise(codes, scales, count, bits)
    step = np.repeat(np.frombuffer(scales, "<f4"), BLOCK)[:count].astype(np.float64)
    error = np.abs(found.astype(np.float64) - exact)
    # float32 arithmetic rounds the quotient and the product: a few units of 2^-24 of the value
    slack = np.abs(exact) * 2.0**-21
    assert (error <= step * (1.0 if stochastic else 0.5) + slack).all()


def test_stochastic_rounding_is_unbiased() -> None:
    exact = values(BLOCK)
    generator = np.random.default_rng(0)
    draws = 4000
    total = np.zeros(BLOCK)
    for _ in range(draws):
        codes, scales = quantise(exact, 8, generator)
        total += dequantise(codes, scales, BLOCK, 8)
    step = float(np.frombuffer(scales, "<f4")[0])
    # A rounding error within one step has at most step / 2 standard deviation; five of the mean's.
    assert np.abs(total / draws - exact).max() < 5 * step / 2 / np.sqrt(draws)


def test_zeros_and_largest_values_are_exact() -> None:
    exact = np.zeros(2 * BLOCK, np.float32)
    exact[3], exact[300] = -2.5, 1e-20
    for bits in (4, 8, 16):
        codes, scales = quantise(exact, bits)
        assert np.array_equal(dequantise(codes, scales, len(exact), bits), exact)


def test_same_generator_same_bytes() -> None:
    exact = values(1000)
    first, second = (quantise(exact, 8, np.random.default_rng([3, 4])) for _ in range(2))
    assert first == second


def test_wrong_sizes_are_refused() -> None:
    codes, scales = quantise(values(300), 8)
    for wrong in ((codes[:-1], scales), (codes, scales[:-4]), (codes, scales + b"\0\0\0\0")):
        with pytest.raises(FrameError, match=r"values: expected 300 \+ 8 bytes for 300 values"):
            dequantise(*wrong, 300, 8)


def test_bits() -> None:
    assert [check_bits(bits) for bits in (None, 4, 8)] == [0, 4, 8]
    with pytest.raises(InputError, match="bits must be one of 4, 8 or None, got 7"):
        check_bits(7)


def test_a_scale_that_is_too_large_gives_infinity_without_a_warning() -> None:
    """The receiver refuses it by client and tensor; a warning would end strict runs instead."""
    for scale in (3e38, np.inf):
        found = dequantise(bytes([127, 0]), np.float32(scale).tobytes(), 2, 8)
        assert not np.isfinite(found).all()
