"""Captum's contract: shapes, targets, batches, deltas, and its own metrics and pictures."""

from __future__ import annotations

import pytest
import torch

from cmd_plugin.errors import InputError, ShapeError
from tests.helpers.distinction import decomposer, images

pytest.importorskip("captum")

from captum.attr import Attribution
from captum.attr import visualization as captum_pictures
from captum.metrics import infidelity

from cmd_plugin.distinction import DecompositionAttribution, decompose


def test_it_is_one_of_captums() -> None:
    net = decomposer()
    made = DecompositionAttribution(net)
    assert isinstance(made, Attribution)
    assert made.has_convergence_delta()
    assert made.multiplies_by_inputs
    assert made.forward_func is net.classifier


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attributions_are_like_their_inputs(dtype: torch.dtype) -> None:
    net, x = decomposer(), images().to(dtype).requires_grad_()
    made = DecompositionAttribution(net)
    found, delta = made.attribute(x, 1, return_convergence_delta=True)
    assert found.shape == x.shape
    assert found.dtype == dtype
    split = decompose(net, x.detach(), 1)
    assert torch.equal(found, split.distinct)
    torch.testing.assert_close(delta, split.residual.abs().mean(dim=(1, 2, 3)))
    (several,) = made.attribute((x,), 1)
    assert torch.equal(several, found)


def test_targets_and_batches_agree() -> None:
    made, x = DecompositionAttribution(decomposer()), images()
    found = made.attribute(x, target=1)
    for target in ([1, 1, 1, 1], torch.tensor([1, 1, 1, 1]), torch.tensor([1])):
        assert torch.equal(made.attribute(x, target=target), found)
    small = made.attribute(x, target=1, internal_batch_size=1)
    torch.testing.assert_close(small, found, rtol=1e-6, atol=1e-6)


def test_channels_are_reduced_by_size_or_sign() -> None:
    made, x = DecompositionAttribution(decomposer(channels=3)), images(channels=3)
    found = made.attribute(x, 0)
    torch.testing.assert_close(
        made.attribute(x, 0, reduce="abs_mean"), found.abs().mean(dim=1, keepdim=True)
    )
    torch.testing.assert_close(
        made.attribute(x, 0, reduce="signed_sum"), found.sum(dim=1, keepdim=True)
    )


def test_captums_metrics_and_pictures_take_it() -> None:
    net, x = decomposer(), images()
    found = DecompositionAttribution(net).attribute(x, 1)

    def perturb(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        noise = 0.1 * torch.randn_like(inputs)
        return noise, inputs - noise

    assert net.classifier is not None
    score = infidelity(net.classifier, perturb, x, found, target=1, n_perturb_samples=2)
    assert score.shape == (4,)
    figure, _ = captum_pictures.visualize_image_attr(
        found[0].permute(1, 2, 0).numpy(), x[0].permute(1, 2, 0).numpy(), use_pyplot=False
    )
    assert figure.axes


def test_what_has_no_meaning_is_refused() -> None:
    made, x = DecompositionAttribution(decomposer()), images()
    with pytest.raises(InputError, match="baselines has no meaning"):
        made.attribute(x, 1, baselines=0)
    with pytest.raises(InputError, match="additional_forward_args"):
        made.attribute(x, 1, additional_forward_args=(1,))
    with pytest.raises(InputError, match="reduce"):
        made.attribute(x, 1, reduce="max")
    with pytest.raises(ShapeError, match="one tensor"):
        made.attribute((x, x), 1)
