"""What a class's score loses without a point, against a network whose loss is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.pointcloud import build_network, channels_first
from cmd_plugin.pointcloud.class_evidence import class_evidence


class Furthest(nn.Module):
    """Class c scores the largest coordinate c; class 3 the sum of all x."""

    def forward(self, points: Tensor) -> Tensor:
        return torch.cat((points.amax(dim=1), points[..., :1].sum(dim=1)), dim=1)


def test_a_maximum_is_lost_with_the_point_that_has_it() -> None:
    points = torch.rand(50, 3)
    for axis in range(3):
        found = class_evidence(Furthest(), points, axis, batch_size=7)
        first, second = points[:, axis].topk(2).values
        expected = torch.zeros(50)
        expected[points[:, axis].argmax()] = first - second
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        class_evidence(Furthest(), points, 3), points[:, 0], rtol=0, atol=50 * 2**-23 * 25
    )
    turned = class_evidence(Turned(), points, 0, forward=channels_first)
    assert turned.argmax() == points[:, 0].argmax()


class Turned(Furthest):
    def forward(self, points: Tensor) -> Tensor:
        return super().forward(points.transpose(1, 2))


def test_the_network_answers_without_the_point_and_keeps_its_mode() -> None:
    network = build_network("pointnet", 3, 0.25).train()
    points = torch.rand(40, 3)
    found = class_evidence(network, points, 1)
    assert network.training
    network.eval()
    with torch.no_grad():
        one = network(points[None])[0, 1] - network(points[None, 1:])[0, 1]
    torch.testing.assert_close(found[0], one, rtol=1e-4, atol=1e-6)


def test_what_is_no_cloud_or_class_is_refused() -> None:
    with pytest.raises(ShapeError, match="one cloud"):
        class_evidence(Furthest(), torch.rand(1, 3), 0)
    with pytest.raises(InputError, match="there is no class 4"):
        class_evidence(Furthest(), torch.rand(9, 3), 4)
