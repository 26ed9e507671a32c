"""Which implementation runs, and what is said when it cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_toys import INTERPRETING
from torch import Tensor

from cmd_plugin.errors import InputError, MissingDependency
from cmd_plugin.kernels import (
    FlatView,
    _dispatch,
    last_backend,
    reconstruct,
    snapshot_delta,
    swap_out,
    update_affine,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MANY = 1 << 20


@pytest.fixture(autouse=True)
def nothing_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_last", {})
    monkeypatch.delenv(_dispatch.VARIABLE, raising=False)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let only the named packages be installed."""

    def install(*packages: str) -> None:
        monkeypatch.setattr(_dispatch, "_installed", lambda package: package in packages)

    return install


def update(weights: FlatView | list[Tensor], **options: str) -> Tensor:
    numel = sum(t.numel() for t in getattr(weights, "tensors", weights))
    mode = torch.zeros(numel, dtype=torch.uint8)
    return update_affine(
        weights, mode, torch.zeros(numel), torch.zeros(numel), torch.ones(1), 0.1, **options
    )


def test_automatic_choices(only: Callable[..., None]) -> None:
    only("triton", "numba")
    assert _dispatch.choose("k", "auto", CUDA, MANY) == "triton"
    assert _dispatch.choose("k", "auto", CUDA, 1) == "triton"
    assert _dispatch.choose("k", "auto", CUDA, MANY, triton=False) == "torch"
    assert _dispatch.choose("k", "auto", CPU, MANY, numba=True) == "numba"
    assert _dispatch.choose("k", "auto", CPU, MANY, numba=False) == "torch"
    assert _dispatch.choose("k", "auto", CPU, MANY) == "torch"
    assert _dispatch.choose("k", "auto", CPU, 100, numba=True) == "torch"
    assert _dispatch.choose("k", "auto", torch.device("mps"), MANY) == "torch"
    only()
    assert _dispatch.choose("k", "auto", CUDA, MANY) == "torch"
    assert _dispatch.choose("k", "auto", CPU, MANY, numba=True) == "torch"


def test_a_library_that_has_the_primitive_is_taken_on_cpus(only: Callable[..., None]) -> None:
    only("triton", "scipy")
    assert _dispatch.choose("k", "auto", CPU, library="scipy") == "scipy"
    assert _dispatch.choose("k", "auto", CUDA, library="scipy") == "triton"
    assert _dispatch.choose("k", "auto", CUDA, library="scipy", triton=False) == "torch"
    assert _dispatch.choose("k", "auto", torch.device("mps"), library="scipy") == "torch"
    with pytest.raises(InputError, match="scipy runs on CPUs and these tensors are on cuda"):
        _dispatch.choose("k", "scipy", CUDA, library="scipy")
    with pytest.raises(InputError, match="of k is not one of auto, torch, numba, triton"):
        _dispatch.choose("k", "scipy", CPU)  # not for these arguments
    only()
    assert _dispatch.choose("k", "auto", CPU, library="scipy") == "torch"
    with pytest.raises(MissingDependency, match="run pip install scipy"):
        _dispatch.choose("k", "scipy", CPU, library="scipy")
    with pytest.raises(MissingDependency, match=r'run pip install "cmd-plugin\[points\]"'):
        _dispatch.choose("k", "fpsample", CPU, library="fpsample")


def test_the_environment_speaks_to_the_kernels_that_have_what_it_names(
    monkeypatch: pytest.MonkeyPatch, only: Callable[..., None]
) -> None:
    only("numba", "scipy")
    monkeypatch.setenv(_dispatch.VARIABLE, "scipy")
    assert _dispatch.choose("k", "auto", CPU, library="scipy") == "scipy"
    assert _dispatch.choose("k", "auto", CPU, MANY, numba=True) == "numba"
    monkeypatch.setenv(_dispatch.VARIABLE, "numba")
    assert _dispatch.choose("k", "auto", CPU, library="scipy") == "scipy"
    assert _dispatch.choose("k", "auto", CPU) == "torch"
    with pytest.raises(InputError, match="CMD_PLUGIN_BACKEND=numba: the compiled path of k"):
        _dispatch.choose("k", "auto", CPU, numba=False)  # it has one, and that cannot run


def test_what_ran_last_is_remembered() -> None:
    assert last_backend() is None
    weights = torch.randn(10)
    update([weights], backend="torch")
    assert (last_backend(), last_backend("update_affine")) == ("torch", "torch")
    update([weights], backend="numba")
    assert last_backend("update_affine") == "numba"
    snapshot_delta([weights], torch.zeros(10), backend="torch")
    assert last_backend() == "torch"
    assert last_backend("update_affine") == "numba"
    assert last_backend("reconstruct") is None


def test_the_environment_decides_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_dispatch.VARIABLE, "numba")
    update([torch.randn(10)])
    assert last_backend() == "numba"
    update([torch.randn(10)], backend="torch")  # what the caller names stands
    assert last_backend() == "torch"
    monkeypatch.setenv(_dispatch.VARIABLE, "cuda")
    with pytest.raises(
        InputError, match="CMD_PLUGIN_BACKEND=cuda is not one of auto, torch, numba, triton, fps"
    ):
        update([torch.randn(10)])


def test_a_backend_asked_for_by_name_is_never_replaced(only: Callable[..., None]) -> None:
    weights = torch.randn(6)
    with pytest.raises(InputError, match="backend='fast' of update_affine is not one of"):
        update([weights], backend="fast")
    with pytest.raises(InputError, match="contiguous CPU tensors"):
        update([weights.view(2, 3).T], backend="numba")
    with pytest.raises(InputError, match="no compiled CPU path"):
        swap_out([weights], [weights.clone()], backend="numba")
    if not INTERPRETING:
        with pytest.raises(InputError, match="Triton runs on CUDA devices"):
            update([weights], backend="triton")
    deep = torch.zeros(2, 1, 2, 1, 2, 2).permute(5, 4, 3, 2, 1, 0)
    with pytest.raises(InputError, match="more than five dimensions"):
        update([deep], backend="triton")
    only()
    with pytest.raises(MissingDependency, match="pip install triton"):
        update([weights], backend="triton")
    assert last_backend() is None


def test_an_unknown_kernel_has_not_run() -> None:
    reconstruct(torch.zeros(3, dtype=torch.uint8), torch.ones(3), torch.ones(3), torch.ones(1))
    assert last_backend("nonsense") is None
