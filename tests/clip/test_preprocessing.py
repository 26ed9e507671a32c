"""Images into pixels: as torchvision's transforms do it, batched, whatever the images are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from cmd_plugin.clip import Preprocessing
from cmd_plugin.clip.preprocessing import tokens
from cmd_plugin.errors import InputError, ShapeError


def picture(height: int, width: int, channels: int = 3) -> Tensor:
    """A smooth image, uint8 [C, H, W]."""
    rows, columns = torch.linspace(0, 6, height)[:, None], torch.linspace(0, 9, width)
    waves = [(rows * (c + 1)).sin() * columns.cos() for c in range(channels)]
    return ((torch.stack(waves) + 1.0) * 127.5).round().to(torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (32, 32), (20, 25), (33, 500)])
@pytest.mark.parametrize("crop", [1.0, 0.9])
def test_pixels_are_those_of_torchvision(height: int, width: int, crop: float) -> None:
    image = picture(height, width)
    wanted = transforms.Compose(
        [
            transforms.Resize(round(32 / crop), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
        ]
    )(Image.fromarray(image.permute(1, 2, 0).numpy()))
    found = Preprocessing((32, 32), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), crop=crop)([image])
    assert found.shape == (1, 3, 32, 32)
    # Pillow rounds to 8 bits between its two passes and after them.
    assert float((found[0] - wanted).abs().max()) <= 3.0 / 255.0 / 0.2


def test_one_batch_equals_image_by_image_of_every_kind() -> None:
    image = picture(40, 50)
    prepare = Preprocessing((24, 24))
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
    kinds = prepare([image, image.float() / 255.0, pillow])
    for found in kinds[1:]:
        assert torch.allclose(found, kinds[0], rtol=0.0, atol=1e-6)
    assert torch.allclose(prepare(torch.stack((image, image)))[1], kinds[0], rtol=0.0, atol=1e-6)


def test_grey_images_get_three_channels() -> None:
    grey = picture(30, 30, 1)
    found = Preprocessing((16, 16), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))([grey])
    assert torch.equal(found[0, 0], found[0, 2])
    pillow = Image.fromarray(np.zeros((9, 9), dtype=np.uint8))
    assert Preprocessing((4, 4))([pillow]).shape == (1, 3, 4, 4)


def test_squashing_keeps_all_of_the_image() -> None:
    image = torch.zeros(3, 16, 64, dtype=torch.uint8)
    image[:, :, 56:] = 255
    clear = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    squashed = Preprocessing((16, 16), resize="squash", **clear)([image])  # type: ignore[arg-type]
    cropped = Preprocessing((16, 16), **clear)([image])  # type: ignore[arg-type]
    assert float(squashed.max()) > 0.9
    assert float(cropped.max()) == 0.0


def test_a_line_tells_two_apart() -> None:
    assert str(Preprocessing()) == (
        "224x224 bicubic shortest crop=1 mean=0.481455,0.457827,0.408211 "
        "std=0.26863,0.261303,0.275777"
    )
    assert str(Preprocessing((32, 48), interpolation="bilinear")) != str(Preprocessing((48, 32)))


def test_images_that_are_none_are_refused() -> None:
    prepare = Preprocessing((8, 8))
    with pytest.raises(ShapeError, match=r"\[C, H, W\]"):
        prepare([torch.zeros(9, 9)])
    with pytest.raises(ShapeError, match="1 or 3"):
        prepare([torch.zeros(4, 9, 9)])
    with pytest.raises(ShapeError, match="int64"):
        prepare([torch.zeros(3, 9, 9, dtype=torch.int64)])
    for bad in (1.5, -0.1, float("nan")):
        with pytest.raises(InputError, match=r"in \[0, 1\]"):
            prepare([torch.full((3, 9, 9), bad)])
    for options in ({"size": (0, 8)}, {"crop": 0.0}, {"std": (0.0, 1.0, 1.0)}):
        with pytest.raises(InputError, match="above 0"):
            Preprocessing(**options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="bicubic or bilinear"):
        Preprocessing(interpolation="nearest")  # type: ignore[arg-type]


def test_captions_are_a_list() -> None:
    with pytest.raises(InputError, match="list of at least one"):
        tokens(lambda texts: torch.zeros(len(texts), 3), "a dog", None)
    with pytest.raises(InputError, match="list of at least one"):
        tokens(lambda texts: torch.zeros(len(texts), 3), [], None)
