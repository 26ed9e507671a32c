"""Whether branches do different work."""

from __future__ import annotations

import pytest
import torch

from cmd_plugin.distinction import branch_covariance, importance, specialization
from cmd_plugin.errors import ShapeError


def test_identical_branches_are_not_specialized() -> None:
    one = torch.randn(5, 1, 1, 4, 4)
    assert specialization(branch_covariance(one.expand(5, 3, 1, 4, 4))) == pytest.approx(0.0)


def test_orthogonal_branches_of_equal_power_are() -> None:
    waves = torch.stack([torch.sin(2 * torch.pi * k * torch.arange(16) / 16) for k in (1, 2, 3)])
    covariance = branch_covariance(waves.reshape(1, 3, 1, 4, 4).expand(2, 3, 1, 4, 4))
    torch.testing.assert_close(covariance, 0.5 * torch.eye(3).double())
    assert specialization(covariance) == pytest.approx(1.0)
    torch.testing.assert_close(importance(covariance), torch.full((3,), 3**-0.5).double())


def test_covariance_is_numpys() -> None:
    branches = torch.randn(6, 4, 2, 3, 3)
    rows = branches.transpose(0, 1).reshape(4, -1)
    torch.testing.assert_close(branch_covariance(branches), torch.cov(rows.double(), correction=0))


def test_silent_branches_and_wrong_shapes() -> None:
    assert specialization(torch.zeros(3, 3)) == 0.0
    assert importance(torch.zeros(3, 3)).tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ShapeError):
        specialization(torch.ones(1, 1))
    with pytest.raises(ShapeError):
        branch_covariance(torch.ones(3, 3))
