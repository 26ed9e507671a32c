"""Linear quantisation in blocks: values of 4, 8 or 16 bits, one float32 scale per 256 values."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cmd_plugin.errors import InputError
from cmd_plugin.federated.frame import FrameError

__all__ = [
    "BITS",
    "BLOCK",
    "REFERENCE_BITS",
    "check_bits",
    "dequantise",
    "quantise",
    "quantised_bytes",
]

BITS = (4, 8)
REFERENCE_BITS = 16
"""Of the references, when the other values have 4 or 8: an error there is multiplied by slopes."""

BLOCK = 256

Floats = npt.NDArray[np.floating]


def check_bits(bits: int | None) -> int:
    """Return the bits of a value, 0 for None.

    Raises:
        InputError: If they are not supported.
    """
    if bits is None:
        return 0
    if bits not in BITS:
        raise InputError(f"bits must be one of {', '.join(map(str, BITS))} or None, got {bits!r}.")
    return bits


def quantised_bytes(count: int, bits: int) -> tuple[int, int]:
    """Return the bytes of the codes and of the scales of ``count`` values."""
    return -(-count * bits // 8), 4 * -(-count // BLOCK)


def _whole(bits: int) -> np.dtype[np.signedinteger]:
    """Return the dtype of a code of 8 or 16 bits; those of 4 are packed from int8."""
    return np.dtype("<i2" if bits == REFERENCE_BITS else np.int8)


def quantise(
    values: Floats, bits: int, generator: np.random.Generator | None = None
) -> tuple[bytes, bytes]:
    r"""Round values to :math:`s\,q`, q a whole number in -(2^(bits-1) - 1)..2^(bits-1) - 1.

    Each block of 256 has the scale ``s = max|v| / (2^(bits-1) - 1)``. The error is below s, and
    with a generator its mean is zero (stochastic rounding, as FedPAQ and QSGD need it); without one
    it is at most s / 2.

    Args:
        values: [n], finite.
        bits: 4, 8 or 16.
        generator: Source of the stochastic rounding; None rounds to nearest.

    Returns:
        Codes (two a byte with 4 bits) and scales, as bytes.
    """
    top = 2 ** (bits - 1) - 1
    count = values.size
    padded = np.zeros(-(-count // BLOCK) * BLOCK, dtype=np.float32)
    padded[:count] = values
    blocks = padded.reshape(-1, BLOCK)
    scales = np.abs(blocks).max(axis=1, initial=0.0) / np.float32(top)
    divisor = np.where(scales > 0.0, scales, np.float32(1.0))[:, None]
    exact = blocks / divisor
    if generator is None:
        codes = np.rint(exact)
    else:
        codes = np.floor(exact + generator.random(exact.shape, dtype=np.float32))
    whole = np.clip(codes, -top, top).astype(_whole(bits)).reshape(-1)[:count]
    if bits == 4:
        nibbles = np.zeros(count + count % 2, dtype=np.uint8)
        nibbles[:count] = (whole + 8).astype(np.uint8)
        return (nibbles[::2] | nibbles[1::2] << 4).tobytes(), scales.astype("<f4").tobytes()
    return whole.tobytes(), scales.astype("<f4").tobytes()


def dequantise(
    codes: bytes, scales: bytes, count: int, bits: int, field: str = "values"
) -> npt.NDArray[np.float32]:
    """Return the [count] float32 values that :func:`quantise` wrote.

    Args:
        codes: As written.
        scales: As written.
        count: Number of values.
        bits: As they were quantised to.
        field: What a refusal names.

    Raises:
        FrameError: If the bytes are not those of ``count`` values.
    """
    expected = quantised_bytes(count, bits)
    if (len(codes), len(scales)) != expected:
        raise FrameError(
            field,
            f"expected {expected[0]} + {expected[1]} bytes for {count} values of {bits} bits, got "
            f"{len(codes)} + {len(scales)}.",
        )
    if bits == 4:
        packed = np.frombuffer(codes, dtype=np.uint8)
        nibbles = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:count]
        whole = nibbles.astype(np.float32) - np.float32(8.0)
    else:
        whole = np.frombuffer(codes, dtype=_whole(bits)).astype(np.float32)
    factors = np.frombuffer(scales, dtype="<f4").astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # the receiver refuses what is not finite
        values: npt.NDArray[np.float32] = whole * np.repeat(factors, BLOCK)[:count]
    return values
