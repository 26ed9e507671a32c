"""Images delivered again: the same picture, other bytes, the same size."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from cmd_plugin.diffusion import redeliver
from cmd_plugin.diffusion.delivery import DELIVERIES
from cmd_plugin.errors import ShapeError


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (31, 20), (1, 1)])
def test_every_delivery_keeps_the_shape(channels: int, size: tuple[int, int]) -> None:
    image = torch.randint(256, (channels, *size), dtype=torch.uint8)
    found = redeliver(image)
    assert tuple(found) == DELIVERIES
    for name, other in found.items():
        assert other.dtype == torch.uint8, name
        assert other.shape == image.shape, name


def test_a_jpeg_is_pillows_and_a_smooth_picture_stays_close() -> None:
    ramp = torch.linspace(40, 200, 32)
    image = torch.stack([ramp.expand(32, 32), ramp.expand(32, 32).T, torch.full((32, 32), 90.0)])
    image = image.byte()
    found = redeliver(image)
    stream = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=70)
    expected = torch.from_numpy(np.array(Image.open(stream))).permute(2, 0, 1)
    assert torch.equal(found["jpeg70"], expected)
    for name in ("jpeg90", "half", "webp80"):
        error = (found[name].float() - image.float()).abs().mean()
        assert 0 < float(error) < 6, name
    assert not torch.equal(found["crop"], image)


def test_what_is_no_picture_is_refused() -> None:
    for image in (torch.zeros(3, 4, 4), torch.zeros(4, 4, 4, dtype=torch.uint8), torch.zeros(4, 4)):
        with pytest.raises(ShapeError, match="uint8"):
            redeliver(image)
