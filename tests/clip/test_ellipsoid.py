"""The shape of a cloud, against NumPy and clouds whose shape is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cmd_plugin.clip import fit_ellipsoid
from cmd_plugin.errors import InputError


def test_every_number_is_that_of_numpy() -> None:
    x = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 2.0
    found, rows = fit_ellipsoid(x), x.numpy()
    covariance = np.cov(rows.T)
    norms = np.linalg.norm(rows - rows.mean(0), axis=1)
    assert np.allclose(found.mean, rows.mean(0))
    assert np.allclose(found.covariance, covariance)
    assert np.allclose(found.eigenvalues, np.linalg.eigvalsh(covariance)[::-1])
    assert found.radius == pytest.approx(norms.mean())
    assert found.thickness == pytest.approx(norms.std(ddof=1))
    spread = np.linalg.norm(rows.std(0, ddof=1))
    assert found.offset == pytest.approx(np.linalg.norm(rows.mean(0)) / spread)
    size, own = np.abs(covariance), np.diag(covariance)
    assert np.allclose(found.dominance, (size.sum(1) - own) / own)
    assert found.diagonal_share == pytest.approx(own.sum() / size.sum())
    assert found.count == 200


def test_a_sphere_and_a_line_are_the_two_ends() -> None:
    axes = torch.cat((torch.eye(5), -torch.eye(5))).double()
    sphere = fit_ellipsoid(axes + 3.0)
    assert sphere.participation == pytest.approx(1.0)
    assert sphere.anisotropy == pytest.approx(0.0)
    assert sphere.thickness == pytest.approx(0.0, abs=1e-12)
    assert float(sphere.dominance.max()) == pytest.approx(0.0, abs=1e-12)
    line = fit_ellipsoid(torch.arange(9.0)[:, None] * torch.ones(5))
    assert line.participation == pytest.approx(1 / 5)
    assert torch.allclose(line.dominance, torch.full((5,), 4.0, dtype=torch.float64))


def test_a_feature_that_does_not_vary_has_no_dominance() -> None:
    x = torch.randn(20, 3)
    x[:, 1] = 7.0
    assert fit_ellipsoid(x).dominance.isnan().tolist() == [False, True, False]


def test_clouds_without_a_shape_are_refused() -> None:
    with pytest.raises(InputError, match="all rows of x are equal"):
        fit_ellipsoid(torch.ones(4, 3))
    with pytest.raises(InputError, match="at least 2"):
        fit_ellipsoid(torch.ones(1, 3))
