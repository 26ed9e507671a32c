"""The order of a cloud's axes: found where the network knows it, doubted where it is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cmd_plugin.errors import InputError
from cmd_plugin.pointcloud.axes import AxisOrder, axis_doubt, axis_orders


class Upright(nn.Module):
    """Answers 1 if the cloud is taller in its second axis than wide in the others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        extent = x.amax(dim=1) - x.amin(dim=1)
        tall = extent[:, 1] - torch.maximum(extent[:, 0], extent[:, 2])
        return torch.stack((-tall, tall), dim=1)


def test_the_axis_check_finds_the_order_the_network_was_trained_on() -> None:
    points = torch.rand(5, 50, 3) * torch.tensor([1.0, 2.0, 5.0])
    ones = torch.ones(5, dtype=torch.int64)
    best = axis_orders(Upright(), points, ones)
    assert best[0].axes in ((0, 2, 1), (1, 2, 0))
    assert [order.accuracy for order in best] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert axis_orders(Upright(), points)[0].accuracy is None
    with pytest.raises(InputError):
        axis_orders(Upright(), points[0])


def test_another_order_is_proposed_only_if_it_is_clearly_better() -> None:
    points = torch.rand(5, 50, 3) * torch.tensor([1.0, 2.0, 5.0])
    ones = torch.ones(5, dtype=torch.int64)
    orders = axis_orders(Upright(), points, ones)
    assert axis_doubt(orders) == orders[0]
    turned = points[..., list(orders[0].axes)]
    assert axis_doubt(axis_orders(Upright(), turned, ones)) is None
    sure, given = AxisOrder((0, 2, 1), None, 0.85), AxisOrder((0, 1, 2), None, 0.8)
    assert axis_doubt([sure, given]) is None
    assert axis_doubt([sure, given], margin=0.04) == sure
    with pytest.raises(InputError, match="lack"):
        axis_doubt([sure])
