"""Whether branches do different work."""

from __future__ import annotations

import pytest
import torch

from cmd_plugin.distinction import branch_covariance, class_cosine, importance, specialization
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


def test_parts_for_classes_are_compared_in_pairs() -> None:
    parts = torch.randn(4, 3, 1, 5, 5)
    cosine = torch.nn.functional.cosine_similarity
    pairs = [
        cosine(parts[:, i].flatten(1), parts[:, j].flatten(1)) for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert class_cosine(parts) == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)
    same = parts[:, :1].expand(-1, 3, -1, -1, -1)
    assert class_cosine(same) == pytest.approx(1.0)
    assert class_cosine(torch.cat([same[:, :1], -same[:, :1]], dim=1)) == pytest.approx(-1.0)
    with pytest.raises(ShapeError, match="k from 2"):
        class_cosine(parts[:, :1])
