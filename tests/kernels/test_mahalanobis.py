"""Squared Mahalanobis distances on every path against loops of float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.kernels import last_backend, mahalanobis
from cmd_plugin.kernels.mahalanobis import reference

pytestmark = pytest.mark.paths("torch", "triton")

ALL = (torch.float16, torch.bfloat16, torch.float32)


def problem(
    rows: int, dim: int, columns: int, dtype: torch.dtype, *, triangular: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    matrix = normal(dim, columns)
    if triangular:
        matrix = matrix.triu(columns - dim)
    return (normal(rows, dim) + 3.0).to(dtype), normal(dim), matrix


def exact(x: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    """Every row by itself, every coordinate a sum of float64 products."""
    rows = [(row - mean) for row in x.double()]
    return torch.stack(
        [torch.stack([(row * w).sum() ** 2 for w in matrix.T]).sum() for row in rows]
    )


def close(found: Tensor, x: Tensor, mean: Tensor, matrix: Tensor) -> bool:
    """Whether the error is at most twice that of one product in the same precision."""
    right = exact(x, mean, matrix)
    plain = reference.mahalanobis(x, mean.to(found.dtype), matrix.to(found.dtype))
    unit = torch.finfo(found.dtype).eps
    allowed = 2 * ((plain - right) / right).abs().max() + unit * len(mean)
    return bool((((found - right) / right).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize(
    ("rows", "dim", "columns"),
    [(1, 1, 1), (3, 5, 5), (64, 64, 64), (65, 33, 33), (127, 130, 130), (70, 131, 67), (9, 70, 1)],
)
def test_rows_of_any_size_are_as_far_as_a_loop_says(
    rows: int, dim: int, columns: int, dtype: torch.dtype, path: str
) -> None:
    for triangular in (False, True):
        x, mean, matrix = problem(rows, dim, columns, dtype, triangular=triangular)
        found = mahalanobis(x, mean, matrix, triangular=triangular)
        assert last_backend("mahalanobis") == path
        assert found.dtype == torch.float32
        assert close(found, x, mean, matrix)


def test_more_blocks_than_one_and_strides_of_any_kind(path: str) -> None:
    x, mean, matrix = problem(2500 if path == "torch" else 200, 20, 20, torch.float32)
    for view in (x.mT.contiguous().mT, torch.stack([x, x], dim=2)[:, :, 1], x.flip(0)[::3]):
        assert close(mahalanobis(view, mean, matrix, triangular=True), view, mean, matrix)


def test_a_wide_matrix_and_no_rows() -> None:
    x, mean, matrix = problem(7, 5, 9, torch.float32, triangular=False)
    assert close(mahalanobis(x, mean, matrix), x, mean, matrix)
    assert mahalanobis(x[:0], mean, matrix).shape == (0,)


def test_one_bad_row_spoils_no_other() -> None:
    x, mean, matrix = problem(40, 12, 12, torch.float32)
    good = mahalanobis(x, mean, matrix, triangular=True)
    x[3, 2], x[17, 11] = torch.nan, torch.inf
    found = mahalanobis(x, mean, matrix, triangular=True)
    assert (~found.isfinite()).nonzero()[:, 0].tolist() == [3, 17]
    kept = found.isfinite()
    assert torch.equal(found[kept], good[kept])


@pytest.mark.paths("torch")
def test_float64_stays_float64() -> None:
    x, mean, matrix = problem(50, 30, 30, torch.float64)
    found = mahalanobis(x, mean, matrix, triangular=True)
    assert found.dtype == torch.float64
    assert close(found, x, mean, matrix)


@pytest.mark.paths("torch")
def test_centring_comes_before_rounding() -> None:
    """A mean a thousand times the spread costs the digits of its own rounding and no more."""
    x, mean, matrix = problem(100, 16, 16, torch.float32)
    near = x - mean.float()
    far = (near.double() + 1024.0 * mean).float()
    expected = exact(far, 1024.0 * mean, matrix)
    found = mahalanobis(far, 1024.0 * mean, matrix, triangular=True)
    assert ((found - expected) / expected).abs().max() < 1e-2


@pytest.mark.paths("torch")
@pytest.mark.parametrize(
    "change",
    [
        lambda x, m, w: (x[0], m, w),
        lambda x, m, w: (x.long(), m, w),
        lambda x, m, w: (x, m[1:], w),
        lambda x, m, w: (x, m, w[1:]),
        lambda x, m, w: (x, m, w[:, :0]),
        lambda x, m, w: (x, m, torch.cat([w, w], dim=1)),
        lambda x, m, w: (x, m.to("meta"), w),
    ],
)
def test_what_does_not_fit_is_refused(change: object) -> None:
    assert callable(change)
    with pytest.raises(ShapeError):
        mahalanobis(*change(*problem(4, 3, 3, torch.float32)), triangular=True)


@pytest.mark.paths("triton")
def test_triton_by_name_takes_no_float64() -> None:
    with pytest.raises(InputError, match="takes no float64"):
        mahalanobis(*problem(4, 3, 3, torch.float64), backend="triton")
