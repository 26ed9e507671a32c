"""Arrays of NumPy's format: as NumPy reads them, or refused before memory is taken."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest

from cmd_plugin.data.npy import read_npy


def saved(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<u2", "i1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_read_as_numpy_reads_it(dtype: str, order: str) -> None:
    array = np.asarray(np.arange(24).reshape(2, 3, 4), dtype=dtype, order=order)  # type: ignore[call-overload]
    content = saved(array)
    found = read_npy(io.BytesIO(content), len(content))
    expected = np.load(io.BytesIO(content))
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "array",
    [
        np.array(["1.5", "2.5"]),
        np.array([b"1.5"]),
        np.zeros(3, dtype="V8"),
        np.array([1 + 2j]),
        np.array([True]),
        np.zeros(2, dtype=[("x", "f4")]),
    ],
)
def test_what_is_no_plain_number_is_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="not plain numbers"):
        read_npy(io.BytesIO(saved(array)), 1000)


def test_a_header_that_says_too_much_takes_no_memory() -> None:
    content = saved(np.zeros((10, 3))).replace(b"(10, 3)", b"(9**9,)")
    with pytest.raises(ValueError, match="header is damaged"):
        read_npy(io.BytesIO(content), 10**12)
    content = saved(np.zeros((10, 3))).replace(b"(10, 3), }  ", b"(10000000,3)}")[:-1]
    tracemalloc.start()
    with pytest.raises(ValueError, match="do not agree"):
        read_npy(io.BytesIO(content), 10**12)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()
    with pytest.raises(ValueError, match="holds 240000000 bytes, of at most 1000"):
        read_npy(io.BytesIO(content), 1000)


@pytest.mark.parametrize(
    "header", [b"{'descr': '<f8", b"{" * 50, b"(((", b"1 if", b"{'descr': 3, 'shape': 4}", b"\xff'"]
)
def test_a_damaged_header_is_a_value_error(header: bytes) -> None:
    whole = saved(np.zeros(3))
    changed = whole[:10] + header.ljust(len(whole) - 34, b" ") + whole[-24:]
    with pytest.raises(ValueError, match="header is damaged"):
        read_npy(io.BytesIO(changed), 1000)


def test_more_and_less_than_the_header_says_is_refused() -> None:
    whole = saved(np.zeros(3))
    for changed in (whole[:-1], whole + b"\0"):
        with pytest.raises(ValueError, match="do not agree"):
            read_npy(io.BytesIO(changed), 1000)
