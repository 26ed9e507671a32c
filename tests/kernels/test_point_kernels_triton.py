"""The Triton paths of the point kernels, interpreted on a CPU, against their specifications.

Triton reads ``TRITON_INTERPRET`` when a kernel is defined, so the tests below the first one run in
a pytest process of their own, which that first one starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cmd_plugin.errors import InputError
from cmd_plugin.kernels import curve_walk, farthest_point_sampling, knn
from cmd_plugin.kernels._point_backend import last_point_backend
from cmd_plugin.kernels.curve_walk import reference as curve_walk_reference
from cmd_plugin.kernels.farthest_point_sampling import reference as sampling_reference
from cmd_plugin.kernels.knn import reference as knn_reference

pytest.importorskip("triton", reason="Triton has no build for this platform")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the child process")

pytestmark = pytest.mark.interpret


@pytest.mark.skipif(INTERPRETED, reason="this is the child process")
def test_all_below_in_a_process_of_its_own() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert " passed" in child.stdout, child.stdout


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel cannot be compiled")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("number", ["fp32", "fp64"])
def test_every_kernel_compiles_for_gpus_this_machine_need_not_have(
    capability: int, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cmd_plugin.kernels.curve_walk import _triton as walk
    from cmd_plugin.kernels.farthest_point_sampling import _triton as sampling
    from cmd_plugin.kernels.knn import _triton as neighbours

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointer = f"*{number}"
    near = {"points": pointer, "queries": pointer, "index": "*i64", "squared": pointer}
    near |= {"size": "i32", "asked": "i32", "largest": number}
    far = {"points": pointer, "start": "*i64", "picked": "*i64", "size": "i32", "count": "i32"}
    paths = {"neighbours": "*i64", "start": "*i64", "index": "*i64", "path": "*i64", "seed": "i64"}
    paths |= dict.fromkeys(("total", "walks", "size", "choices", "length"), "i32")
    cases = [
        (neighbours._knn, near, {"C": 3, "K": 20, "ROWS": 8, "COLUMNS": 1024, "EXCLUDE_SELF": 1}),
        (sampling._sample, far, {"COLUMNS": 1024}),
        (walk._walk, paths, {"LANES": 32}),
    ]
    for kernel, arguments, constants in cases:
        signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert built.asm["cubin"]
        assert built.metadata.shared <= 48 * 1024
        assert "ld.local" not in built.asm["ptx"]  # registers did not spill into an array


@pytest.mark.skipif(INTERPRETED, reason="there the CPU is allowed")
def test_triton_by_name_on_a_cpu_is_refused() -> None:
    points = torch.zeros(1, 4, 3)
    with pytest.raises(InputError, match="runs on CUDA devices"):
        knn(points, 1, backend="triton")
    with pytest.raises(InputError, match="runs on CUDA devices"):
        farthest_point_sampling(points, 1, backend="triton")
    with pytest.raises(InputError, match="runs on CUDA devices"):
        curve_walk(torch.zeros(1, 4, 1).long(), torch.zeros(1, 1).long(), 2, backend="triton")


def clouds(batch: int, size: int, axes: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, size, axes, generator=generator)


def grid(batch: int, size: int) -> Tensor:
    """Small whole numbers: distances are exact and most of them tie."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 3, (batch, size, 3), generator=generator).float()


@interpreted
@pytest.mark.parametrize("size", [1, 2, 17, 64, 100])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_neighbours_and_their_ties(size: int, exclude_self: bool) -> None:
    if size == 1 and exclude_self:
        pytest.skip("a single point has no neighbour")
    k = min(7, size - exclude_self)
    points = grid(2, size)
    result = knn(points, k, exclude_self=exclude_self, backend="triton")
    assert last_point_backend("knn") == "triton"
    positions, squared = knn_reference.knn(points, points, k, exclude_self)
    assert torch.equal(result.positions, positions)
    assert torch.equal(result.squared, squared)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("axes", [1, 3, 5])
def test_neighbours_of_other_queries(dtype: torch.dtype, axes: int) -> None:
    points, queries = clouds(2, 33, axes).to(dtype), clouds(2, 9, axes, seed=1).to(dtype)
    strided = points.mT.contiguous().mT
    result = knn(strided, 5, queries, backend="triton")
    exact = knn_reference.knn(points.double(), queries.double(), 5, exclude_self=False)
    # The chosen points are as near as the nearest ones, up to the rounding of `axes` additions.
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    chosen = points.double()[:, None].expand(-1, 9, -1, -1)
    chosen = chosen.gather(2, result.positions[..., None].expand(-1, -1, -1, axes))
    squared = (chosen - queries.double()[:, :, None]).square().sum(dim=3)
    assert ((squared - exact[1]).abs() <= 4 * axes * unit * (1 + exact[1])).all()
    store = torch.finfo(dtype).eps
    assert ((result.squared.double() - exact[1]).abs() <= 4 * axes * store * (1 + exact[1])).all()


@interpreted
@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 2), (17, 17), (100, 9), (128, 40)])
def test_farthest_points_and_their_ties(size: int, count: int) -> None:
    for points in (grid(3, size), clouds(3, size), clouds(2, size).double()):
        start = torch.arange(len(points)) % size
        result = farthest_point_sampling(points, count, start, backend="triton")
        assert last_point_backend("farthest_point_sampling") == "triton"
        assert torch.equal(result, sampling_reference.farthest_point_sampling(points, count, start))


@interpreted
@pytest.mark.parametrize("length", [1, 2, 4, 7, 13])
@pytest.mark.parametrize(("batch", "walks"), [(1, 1), (3, 4), (9, 5)])
def test_walks_are_the_same_to_the_last_bit(length: int, batch: int, walks: int) -> None:
    table = knn(clouds(batch, 30), 6, exclude_self=True).positions
    start = torch.arange(batch * walks).view(batch, walks) % 30
    index = torch.arange(batch) * (2**31 + 5)
    seed = 2**40 + 7
    result = curve_walk(table, start, length, seed=seed, index=index, backend="triton")
    assert last_point_backend("curve_walk") == "triton"
    expected = curve_walk_reference.curve_walk(table, start, length, seed, index)
    assert torch.equal(result, expected)
