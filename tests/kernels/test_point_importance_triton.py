"""The Triton path of ``point_importance``, interpreted on a CPU and compiled for GPUs elsewhere."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cmd_plugin.errors import InputError
from cmd_plugin.kernels import last_backend, point_importance
from cmd_plugin.kernels.point_importance import reference

pytest.importorskip("triton", reason="Triton has no build for this platform")

pytestmark = pytest.mark.paths()
interpreted = pytest.mark.paths("triton")  # runs on the interpreter, see conftest.py


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("number", ["fp32", "bf16", "fp64"])
def test_it_compiles_for_gpus_this_machine_need_not_have(
    capability: int, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cmd_plugin.kernels.point_importance import _triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    part = "*fp64" if number == "fp64" else "*fp32"
    sweep = {"features": f"*{number}", "mask": "*i8", "parts": part, "wins": "*i32"}
    sweep |= dict.fromkeys(("channels", "tokens"), "i32")
    sweep |= {"cloud_stride": "i64", "channel_stride": "i64", "token_stride": "i64"}
    combine = {"parts": part, "mask": "*i8", "norm": part, "blocks": "i32", "tokens": "i32"}
    common = {"MASKED": True, "WIDE": number == "fp64", "COLUMNS": _triton._COLUMNS}
    for order in (0, 1, 2):
        options = {"ORDER": order, **common}
        whole = {**options, "WINS": True, "ROWS": _triton._ROWS}
        for kernel, arguments, constants in (
            (_triton._sweep, sweep, whole),
            (_triton._combine, combine, options),
        ):
            signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert built.asm["cubin"]
            assert built.metadata.shared <= 48 * 1024


def test_triton_by_name_on_a_cpu_is_refused() -> None:
    with pytest.raises(InputError, match="runs on CUDA devices"):
        point_importance(torch.zeros(1, 2, 3), backend="triton")


@interpreted
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize(("channels", "tokens"), [(1, 1), (31, 7), (32, 128), (33, 129), (70, 300)])
def test_norms_and_counts_with_ties_everywhere(
    channels: int, tokens: int, dtype: torch.dtype, order: float
) -> None:
    # Small whole numbers: sums are exact, so the order of additions cannot show.
    features = torch.randint(-4, 5, (2, channels, tokens)).to(dtype)
    mask = torch.rand(2, tokens) < 0.7
    mask[:, -1] = True
    for hidden in (None, mask):
        found = point_importance(features, hidden, order=order, backend="triton")
        assert last_backend("point_importance") == "triton"
        expected = reference.norms(features, hidden, order)
        torch.testing.assert_close(found.norm, expected, rtol=2**-22, atol=0)
        assert torch.equal(found.wins, reference.wins(features, hidden, "first"))  # type: ignore[arg-type]
    assert point_importance(features, wins=False, backend="triton").wins is None


@interpreted
def test_any_strides_and_infinite_padding() -> None:
    features = torch.randn(2, 40, 50)
    strided = features.transpose(1, 2).contiguous().transpose(1, 2)
    first = point_importance(features, backend="triton")
    second = point_importance(strided, backend="triton")
    assert torch.equal(first.norm, second.norm)
    assert torch.equal(first.wins, second.wins)  # type: ignore[arg-type]
    exact = features.double().abs().sum(dim=1)
    # 40 additions in float32, each off by half a unit in the last place of at most the sum.
    assert ((first.norm.double() - exact).abs() <= 40 * 2**-24 * exact).all()
    padded = torch.cat((features, torch.full((2, 40, 3), -math.inf)), dim=2)
    mask = torch.arange(53).expand(2, -1) < 50
    third = point_importance(padded, mask, backend="triton")
    assert torch.equal(third.norm[:, :50], first.norm)
    assert torch.equal(third.wins[:, :50], first.wins)  # type: ignore[index, arg-type]


@interpreted
def test_nan_features_write_nothing_out_of_bounds() -> None:
    features = torch.full((1, 8, 5), math.nan)
    found = point_importance(features, backend="triton")
    assert found.norm.isnan().all()
    assert found.wins is not None
    assert int(found.wins.sum()) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_agrees_with_the_cpu_at_real_size() -> None:
    features = torch.randint(-50, 50, (16, 1024, 1024)).float()
    found = point_importance(features.cuda())
    assert last_backend("point_importance") == "triton"
    expected = point_importance(features)
    assert torch.equal(found.norm.cpu(), expected.norm)
    assert torch.equal(found.wins.cpu(), expected.wins)  # type: ignore[union-attr, arg-type]
