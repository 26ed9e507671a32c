"""Pictures of decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cmd_plugin.distinction import PixelRange, decompose
from cmd_plugin.distinction.plots import plot_decomposition
from cmd_plugin.errors import ShapeError
from tests.helpers.distinction import decomposer, images


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_for_each_image_and_a_panel_for_each_part(channels: int) -> None:
    net, x = decomposer(channels), images(2, channels)
    split = decompose(net, x, [0, 1])
    figure = plot_decomposition(x, split, net.pixels, ("cat", "dog"), ("one.png", "two.png"))
    axes = np.array(figure.axes).reshape(2, 6)
    titles = [axis.get_title() for axis in axes[1]]
    assert titles[0] == f"image\ndog {100 * float(split.before[1]):.0f} %"  # type: ignore[index]
    assert titles[2:4] == ["distinct\nof dog", "signed map"]
    shown = axes[0, 0].images[0].get_array()
    plain = (x[0] + 1) / 2
    wanted = plain[0] if channels == 1 else plain.permute(1, 2, 0)
    np.testing.assert_allclose(shown, wanted.numpy(), atol=1e-6)
    low, high = axes[0, 3].images[0].get_clim()
    assert low == -high
    assert axes[0, 3].images[0].get_clim() == axes[1, 3].images[0].get_clim()


def test_an_empty_part_is_grey_and_no_error() -> None:
    net, x = decomposer(), images(1)
    with torch.no_grad():
        net.generator.head.weight.zero_()
    split = decompose(net, x, 0)
    figure = plot_decomposition(x, split, PixelRange(), ("a", "b"))
    assert set(np.unique(figure.axes[2].images[0].get_array())) == {0.5}
    with pytest.raises(ShapeError, match="do not go together"):
        plot_decomposition(x, split, PixelRange(), ("a", "b"), ("one", "two"))
