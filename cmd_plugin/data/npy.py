"""One array of NumPy's format, out of any stream, never larger than what the stream holds."""

from __future__ import annotations

import gzip
import math
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_npy"]

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_PIECE = 16 * 1024**2


def read_npy(stream: IO[bytes] | gzip.GzipFile, at_most: int, kinds: str = "fiu") -> NDArray[Any]:
    """Read an array of numbers whose header and length agree; nothing is unpickled.

    NumPy itself allocates what a header says before it reads anything, turns text into numbers, and
    passes on whatever a damaged header makes its parser raise.

    Args:
        stream: Open at the beginning of the array; it may be unpacked while it is read.
        at_most: Bytes of values allowed.
        kinds: Letters of the dtypes allowed, as of ``numpy.dtype.kind``.

    Returns:
        The array, in the file's dtype and shape.

    Raises:
        ValueError: If the header is damaged, the dtype is another one, the values are too many, or
            more or fewer of them follow.
        OSError, EOFError, zlib.error: As the stream.
    """
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"its format has the version {version[0]}.{version[1]}, not 1 or 2")
    try:
        shape, by_columns, dtype = _HEADERS[version](stream)
    except OSError:
        raise
    except Exception as error:  # it is parsed as Python: tokens, syntax, memory, recursion, ...
        raise ValueError("its header is damaged") from error
    if dtype.kind not in kinds:
        raise ValueError(f"it holds values of type {dtype}, not plain numbers")
    if any(size < 0 for size in shape):
        raise ValueError(f"its header says the shape {shape}")
    size = math.prod(shape) * dtype.itemsize
    if size > at_most:
        raise ValueError(f"it says that it holds {size} bytes, of at most {at_most}")
    content = bytearray()
    while len(content) <= size and (piece := stream.read(min(_PIECE, size + 1 - len(content)))):
        content += piece
    if len(content) != size:
        raise ValueError("its header and its length do not agree")
    flat = np.frombuffer(content, dtype=dtype)
    return flat.reshape(shape, order="F" if by_columns else "C")
