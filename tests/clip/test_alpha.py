"""The contrastive loss over the offset, against a loop, and against numbers measured elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from cmd_plugin.clip import alpha_curve, conformity, conformity_divergence, nt_xent
from cmd_plugin.errors import InputError


def two() -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x[0] + 0.5, x[0] + 0.3 * x[1] - 0.2


def test_the_loss_is_that_of_a_loop() -> None:
    images, texts = two()
    total = 0.0
    for a, b in ((images, texts), (texts, images)):
        for i in range(len(a)):
            cosines = [float(a[i] @ y / a[i].norm() / y.norm()) / 0.1 for y in b]
            total += math.log(sum(math.exp(c) for c in cosines)) - cosines[i]
    assert nt_xent(images, texts, 0.1) == pytest.approx(total / (2 * len(images)))
    with pytest.raises(InputError, match="temperature"):
        nt_xent(images, texts, 0.0)


def test_the_curve_is_the_loss_of_shifted_pairs() -> None:
    images, texts = two()
    found = alpha_curve(images, texts, (-0.5, 0.0, 1.0), temperature=0.1, shift="image")
    for alpha, loss, divergence in zip(found.alphas, found.loss, found.divergence, strict=True):
        moved = images - alpha * images.mean(0)
        assert float(loss) == pytest.approx(nt_xent(moved, texts, 0.1))
        expected = conformity_divergence(conformity(moved), conformity(texts))
        assert float(divergence) == pytest.approx(expected)
    assert found.best == float(found.alphas[found.loss.argmin()])


def test_the_divergence_of_normal_laws_is_the_integral() -> None:
    p, q = torch.randn(400).double() * 0.5 + 1.0, torch.randn(300).double()
    grid = np.linspace(-12, 12, 40001)

    def law(x: Tensor) -> np.ndarray:
        m, s = float(x.mean()), float(x.std())
        return np.exp(-((grid - m) ** 2) / (2 * s * s)) / (s * math.sqrt(2 * math.pi))

    left, right = law(p), law(q)
    kept = left > 1e-300
    integral = float((left[kept] * np.log(left[kept] / right[kept])).sum() * (grid[1] - grid[0]))
    assert conformity_divergence(p, q) == pytest.approx(integral, rel=1e-6)


def test_the_divergence_of_histograms_has_no_empty_bin() -> None:
    p, q = torch.tensor([0.0, 0.1, 0.2]), torch.tensor([0.8, 0.9, 1.0])
    a, b = np.array([3, 0]) + 0.5, np.array([0, 3]) + 0.5
    a, b = a / a.sum(), b / b.sum()
    expected = float((a * np.log(a / b)).sum())
    assert conformity_divergence(p, q, "hist", bins=2) == pytest.approx(expected)
    assert conformity_divergence(p, p, "hist") == pytest.approx(0.0)


def test_losses_of_the_coco_pairs(stored: Callable[[str], Tensor]) -> None:
    images, texts = stored("pairs_b16_coco500_unit")
    found = alpha_curve(images, texts, (-1.0, -0.5, 0.0, 0.25, 0.5, 0.9))
    assert found.loss.tolist() == pytest.approx(
        [2.697, 2.050, 1.801, 1.899, 2.166, 2.825], abs=6e-4
    )
    assert found.best == 0.0
    assert found.divergence[[0, -1]].tolist() == pytest.approx([0.118, 0.008], abs=6e-4)
    assert found.alignment[[2, -1]].tolist() == pytest.approx([1.380, 1.372], abs=6e-4)


def test_divergences_of_the_coco_pairs_when_images_move_alone(
    stored: Callable[[str], Tensor],
) -> None:
    images, texts = stored("pairs_b16_coco500_unit")
    found = alpha_curve(images, texts, (-1.0, -0.5, 0.0, 0.5, 0.75, 0.9), shift="image")
    assert found.divergence.tolist() == pytest.approx([14, 6.2, 0.08, 12.3, 29, 38], rel=0.06)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kl": "no"}, "hist or gauss"),
        ({"direction": "no"}, "image_text or text_image"),
        ({"shift": "no"}, "both, image or text"),
        ({"bins": 1}, "bins"),
        ({"alphas": ()}, "alphas is empty"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        alpha_curve(*two(), **options)  # type: ignore[arg-type]


def test_conformities_that_are_all_equal_have_no_divergence() -> None:
    with pytest.raises(InputError, match="all equal"):
        conformity_divergence(torch.ones(5), torch.rand(5))
