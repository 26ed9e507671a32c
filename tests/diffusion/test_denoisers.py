"""Small denoisers: their shapes, and a file that comes back or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cmd_plugin.diffusion import (
    NoiseSchedule,
    TrainedDenoiser,
    build_denoiser,
    denoiser_model,
    p_laplace,
)
from cmd_plugin.errors import InputError, ShapeError, StateMismatch
from tests.helpers.diffusion_toys import LINEAR

SHAPE = (1, 8, 8)


@pytest.mark.parametrize(("name", "width", "shape"), [("mlp", 8, SHAPE), ("unet", 8, (3, 16, 12))])
def test_a_denoiser_comes_back_from_its_file(
    name: str, width: int, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    if name == "unet":
        pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = build_denoiser(name, shape, width).eval()
    schedule = NoiseSchedule.scaled_linear(100)
    path = tmp_path / "model.safetensors"
    TrainedDenoiser(network, name, shape, width, schedule, "noise").save(path)
    again = TrainedDenoiser.load(path)
    assert (again.name, again.shape, again.width, again.data) == (name, shape, width, "noise")
    assert again.schedule.level(40) == schedule.level(40)
    images = torch.rand(2, *shape) * 2 - 1
    one = p_laplace(denoiser_model(network, shape, schedule), images, (10, 90), directions=4)
    assert torch.equal(p_laplace(again.model(), images, (10, 90), directions=4).value, one.value)


def test_the_time_matters_and_a_narrow_mlp_lets_the_image_past() -> None:
    network = build_denoiser("mlp", SHAPE, 4)
    y = torch.rand(2, *SHAPE)
    one, other = network(y, torch.tensor([1, 1])), network(y, torch.tensor([900, 900]))
    assert not torch.allclose(one, other)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: network(x.reshape(1, *SHAPE), torch.tensor([5])).flatten(), y[0].flatten()
    )
    assert torch.linalg.matrix_rank(jacobian) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"width": "9"},
        {"width": "99999999999"},
        {"denoiser": "vit"},
        {"shape": "[1, 8]"},
        {"shape": "[1, 8, 9]"},
        {"shape": "8"},
    ],
)
def test_a_damaged_file_is_refused(change: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    network = build_denoiser("mlp", SHAPE, 8)
    TrainedDenoiser(network, "mlp", SHAPE, 8, LINEAR, "noise").save(path)
    with safe_open(str(path), "pt") as file:
        tensors, about = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, path, {**about, **change})
    with pytest.raises((InputError, StateMismatch), match="again"):
        TrainedDenoiser.load(path)


def test_what_is_no_denoiser_is_refused() -> None:
    with pytest.raises(InputError, match="denoiser"):
        build_denoiser("vit", SHAPE, 8)
    with pytest.raises(InputError, match="width"):
        build_denoiser("unet", SHAPE, 9)
    with pytest.raises(ShapeError, match="4 divides"):
        build_denoiser("unet", (1, 6, 8), 8)
    with pytest.raises(ShapeError, match="channels, height, width"):
        build_denoiser("mlp", (64,), 8)
