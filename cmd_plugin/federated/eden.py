r"""EDEN (Vargaftik et al., ICML 2022): values of 1, 2, 4 or 8 bits, unbiased, one scale for all.

A vector is rotated at random, after which its values look like draws from a Gaussian; each is
rounded to the nearest of the :math:`2^b` points that are best for a Gaussian (Lloyd-Max), and the
receiver rotates back. With the scale :math:`\|x\|^2 / \langle Rx, Q \rangle` the mean of what
arrives is x, and its squared error is :math:`1 / (1 - D_b) - 1` times :math:`\|x\|^2`, where D_b is
the points' distortion: :math:`\pi/2 - 1` for one bit, .133 for two, .0096 for four.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmd_plugin.errors import InputError
from cmd_plugin.federated.frame import FrameError
from cmd_plugin.federated.rotation import rotate, rotate_back

__all__ = [
    "EDEN_BITS",
    "centroids",
    "check_eden_bits",
    "dequantise_rotated",
    "eden_bytes",
    "quantise_rotated",
]

EDEN_BITS = (1, 2, 4, 8)

_SCALE = struct.Struct("<Qf")  # seed of the rotation, scale
_GRID = 2.0**-20
"""Points are multiples of it: rounding hides the last bits in which machines differ."""


def check_eden_bits(bits: int) -> int:
    """Return the bits of a value.

    Raises:
        InputError: If they are not supported.
    """
    if bits not in EDEN_BITS:
        raise InputError(f"bits must be one of {', '.join(map(str, EDEN_BITS))}, got {bits!r}.")
    return bits


@lru_cache(maxsize=len(EDEN_BITS))
def centroids(bits: int) -> Tensor:
    """Return the ``[2**bits]`` float32 ascending points that round a standard Gaussian best.

    Lloyd's iteration (Lloyd 1982, Max 1960), from points whose density is the cube root of the
    Gaussian's, which is best for many points (Panter and Dite, 1951).
    """
    count = 2**bits
    place = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    points = math.sqrt(3.0) * torch.special.ndtri(place)
    ends = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
    for _ in range(1000):
        middle = (points[1:] + points[:-1]) / 2.0
        edges = torch.cat((ends[:1], middle, ends[1:]))
        density = torch.exp(-edges.square() / 2.0) / math.sqrt(2.0 * math.pi)
        # By symmetry only the left half is computed, where a difference of tails is exact.
        left = slice(0, count // 2)
        mass = torch.special.ndtr(edges).diff()[left]
        moved = (density[:-1] - density[1:])[left] / mass
        points = torch.cat((moved, -moved.flip(0)))
    rounded: Tensor = (points / _GRID).round() * _GRID
    return rounded.float()


def eden_bytes(count: int, bits: int) -> tuple[int, int]:
    """Return the bytes of the codes and of the scale of ``count`` values."""
    return -(-count * bits // 8), _SCALE.size


def quantise_rotated(
    values: npt.NDArray[np.floating], bits: int, seed: int, *, unbiased: bool = True
) -> tuple[bytes, bytes]:
    r"""Encode values.

    Args:
        values: [n], finite.
        bits: 1, 2, 4 or 8.
        seed: Which rotation, 0 to 2**64 - 1. Errors of several senders cancel only where their
            rotations differ.
        unbiased: Whether the mean of what arrives is what was sent. Otherwise the scale is the
            least-squares one, :math:`\langle Rx, Q \rangle / \|Q\|^2`: the error is only D_b (.363
            for one bit), which is better where what was left out is sent later.

    Returns:
        Codes (the first in the lowest bits of a byte), and seed with scale, as bytes.
    """
    rotated = rotate(torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)), seed)
    square = float(rotated.double().square().sum())
    if not square:
        codes, scale = torch.zeros(len(values), dtype=torch.int64), 0.0
    else:
        points = centroids(bits)
        standard = rotated * (math.sqrt(len(values)) / math.sqrt(square))
        codes = torch.bucketize(standard, (points[1:] + points[:-1]) / 2.0)
        chosen = points[codes].double()
        along = float(rotated.double() @ chosen)
        scale = square / along if unbiased else along / float(chosen.square().sum())
    return _pack(codes.numpy().astype(np.uint8), bits), _SCALE.pack(seed, scale)


def dequantise_rotated(
    codes: bytes, scale: bytes, count: int, bits: int
) -> npt.NDArray[np.float32]:
    """Return the [count] float32 values that :func:`quantise_rotated` wrote.

    Raises:
        FrameError: If the bytes are not those of ``count`` values.
    """
    expected = eden_bytes(count, bits)
    if (len(codes), len(scale)) != expected:
        raise FrameError(
            "values",
            f"expected {expected[0]} + {expected[1]} bytes for {count} rotated values of {bits} "
            f"bits, got {len(codes)} + {len(scale)}.",
        )
    seed, factor = _SCALE.unpack(scale)
    rotated = centroids(bits)[torch.from_numpy(_unpack(codes, count, bits))]
    values: npt.NDArray[np.float32] = (rotate_back(rotated, seed) * factor).numpy()
    return values


def _pack(codes: npt.NDArray[np.uint8], bits: int) -> bytes:
    each = 8 // bits
    padded = np.zeros(-(-len(codes) // each) * each, np.uint8)
    padded[: len(codes)] = codes
    places = (bits * np.arange(each)).astype(np.uint8)
    joined: npt.NDArray[np.uint8] = np.bitwise_or.reduce(padded.reshape(-1, each) << places, axis=1)
    return joined.tobytes()


def _unpack(data: bytes, count: int, bits: int) -> npt.NDArray[np.int64]:
    places = (bits * np.arange(8 // bits)).astype(np.uint8)
    parts = np.frombuffer(data, np.uint8)[:, None] >> places & np.uint8(2**bits - 1)
    return parts.reshape(-1)[:count].astype(np.int64)
