"""The detector of generated images against its formulas, recomputed with NumPy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor
from torch.nn.functional import interpolate

from cmd_plugin.diffusion import (
    LatentCodec,
    ManifoldBiasDetector,
    RealReference,
    ScoreModel,
    p_laplace,
    sphere_directions,
    verdicts,
)
from cmd_plugin.diffusion.codecs import clip_embedding, to_square
from cmd_plugin.errors import InputError, NonFiniteError, ShapeError, StateMismatch
from tests.helpers.diffusion_toys import LINEAR, gaussian, network_model, smooth_network


def test_the_papers_terms_are_inner_products_of_the_estimates() -> None:
    d, t = 16, 50
    network = smooth_network(d)
    detector = ManifoldBiasDetector(network_model(network, d), t=t, directions=6, weights=(1, 2, 3))
    images = torch.rand(3, d) * 2 - 1
    found = detector.terms(images)
    a, s = LINEAR.level(t)
    u = sphere_directions((d,), 6).float()
    for n, image in enumerate(images):
        h = network(a * image + s * u).detach()
        unit = h / h.norm(dim=1, keepdim=True)
        expected = {
            "curvature": (unit * u).sum(1).mean() / s,
            "gradient": h.norm(dim=1).mean() / s,
            "bias": (unit @ image).mean(),
            "criterion": (unit * (u - 2 * h + 3 * math.sqrt(d) * image)).sum(1).mean(),
        }
        for name, value in expected.items():
            assert float(getattr(found, name)[n]) == pytest.approx(float(value), rel=1e-4), name
    flux = p_laplace(detector.model, images, t, 1, directions=6)
    torch.testing.assert_close(found.curvature, math.sqrt(d) / s * flux.value[:, 0, 0])
    assert float(found.scores()["gradient"][0]) == -float(found.gradient[0])


def test_more_generated_is_larger() -> None:
    """A point on a mode of the model's density against one beside it."""
    d = 16
    model = gaussian(torch.full((d,), 0.5), torch.full((d,), 0.01))
    detector = ManifoldBiasDetector(model, t=100)
    found = detector.terms(torch.stack([torch.full((d,), 0.5), torch.zeros(d)]))
    for name in ("criterion", "curvature", "gradient"):
        on, beside = found.scores()[name]
        assert on > beside, name


class Net(torch.nn.Module):
    """Two convolutions that see the time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = (
            torch.nn.Conv2d(4, 8, 3, padding=1),
            torch.nn.Conv2d(8, 4, 3, padding=1),
        )

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(y) + 0.01 * t.to(y)[:, None, None, None]))


def test_the_authors_criterion_is_theirs_recomputed() -> None:
    pytest.importorskip("diffusers")
    from tests.helpers.tiny_diffusers import autoencoder

    vae, network = autoencoder().eval(), Net().eval()
    head = torch.randn(3 * 16 * 16, 12, generator=torch.Generator().manual_seed(1))

    def embed(pictures: Tensor) -> Tensor:
        return pictures.flatten(1) @ head - 3.0

    model = ScoreModel(lambda y, t, _: network(y, t), LINEAR, (4, 8, 8), networks=[network])
    detector = ManifoldBiasDetector(
        model,
        parity="authors",
        directions=3,
        codec=LatentCodec(vae),
        embed=embed,
        size=16,
        batch_size=4,
    )
    images = torch.rand(2, 3, 20, 24) * 2 - 1
    found = detector.terms(images)

    a, s = LINEAR.level(10)
    u = sphere_directions((4, 8, 8), 3, "independent").float()

    def cut(pictures: Tensor) -> Tensor:
        factor = 19 / min(pictures.shape[-2:])
        size = [round(side * factor) for side in pictures.shape[-2:]]
        pictures = interpolate(pictures, size, mode="bilinear", antialias=True)
        top, left = (size[0] - 16) // 2, (size[1] - 16) // 2
        return pictures[..., top : top + 16, left : left + 16]

    def features(pictures: Tensor) -> Any:
        levels = np.round(np.clip(cut(pictures).numpy() / 2 + 0.5, 0, 1) * 255) / 255
        return levels.reshape(len(levels), -1).astype(np.float32) @ head.numpy() - 3.0

    def cosine(x: Any, y: Any) -> float:
        return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))

    with torch.no_grad():
        of_u = features(vae.decode(u).sample)
        for n in range(2):
            small = cut(images[n : n + 1])
            z = vae.encode(small).latent_dist.mode() * 0.18215
            h = network(a * z + s * u, torch.full((3,), 10)) / 0.18215
            of_h = features(vae.decode(h).sample)
            levels = np.round(np.clip(small.numpy() / 2 + 0.5, 0, 1) * 255) / 255
            raw = levels.reshape(1, -1).astype(np.float32) @ head.numpy() - 3.0
            bias = np.mean([cosine(raw[0], f) for f in of_h])
            kappa = np.mean([cosine(f, g) for f, g in zip(of_h, of_u, strict=True)])
            gradient = np.mean([np.sqrt((f * f).sum()) for f in of_h])
            criterion = 1 + (math.sqrt(512) * bias - gradient + kappa) / (math.sqrt(512) + 2)
            assert float(found.bias[n]) == pytest.approx(bias, abs=2e-3)
            assert float(found.curvature[n]) == pytest.approx(kappa, abs=2e-3)
            assert float(found.gradient[n]) == pytest.approx(gradient, rel=2e-3)
            assert float(found.criterion[n]) == pytest.approx(criterion, abs=2e-3)
    again = detector.terms(images)
    assert torch.equal(found.criterion, again.criterion)


def test_a_clip_tower_embeds_pictures_of_any_size() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=10,
    )
    tower = transformers.CLIPVisionModelWithProjection(config).eval()
    pictures = torch.rand(2, 3, 16, 16)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(1, 3, 1, 1)
    with torch.no_grad():
        expected = tower(pixel_values=(pictures - mean) / std).image_embeds
    embed = clip_embedding(tower)
    torch.testing.assert_close(embed(pictures), expected)
    assert embed(torch.rand(2, 1, 30, 20)).shape == (2, 10)
    with pytest.raises(ShapeError, match="1 or 3"):
        embed(torch.rand(2, 4, 16, 16))


def test_p_values_of_real_images_are_uniform_and_keep_the_level() -> None:
    reference = RealReference({"criterion": torch.randn(400)})
    fresh = torch.randn(2000)
    p = reference.p_values("criterion", fresh)
    assert kstest(p.numpy(), "uniform").statistic < 1.63 * math.sqrt(1 / 400 + 1 / 2000)
    # Averaged over references the rate is at most the level; one reference scatters around it.
    rates = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        known = RealReference({"c": torch.randn(99, generator=generator)})
        rates.append((known.p_values("c", fresh[:500]) <= 0.1).double().mean())
    rate, error = torch.stack(rates).mean(), torch.stack(rates).std() / math.sqrt(200)
    assert float(rate) <= 0.1 + 3 * float(error) + 3 * math.sqrt(0.09 / 500)
    ties = RealReference({"c": torch.tensor([1.0, 1.0, 2.0])})
    assert ties.p_values("c", torch.tensor([0.0, 1.0, 1.5, 2.0, 3.0])).tolist() == [
        1.0, 1.0, 0.5, 0.5, 0.25,
    ]  # fmt: skip
    assert ties.threshold("c", 2.0) == pytest.approx(4 / 3 + 2 * math.sqrt(1 / 3))


def test_a_calibration_is_kept_and_serves_its_own_detector_only(tmp_path: Path) -> None:
    d = 8
    model = network_model(smooth_network(d), d)
    detector = ManifoldBiasDetector(model, t=50)
    real = torch.rand(30, d) * 2 - 1
    with pytest.raises(InputError, match="fit_real"):
        detector.p_values(real)
    whole = detector.fit_real(real)
    parts = ManifoldBiasDetector(model, t=50).fit_real([real[:10], real[10:]])
    for name, scores in whole.scores.items():
        torch.testing.assert_close(parts.scores[name], scores)
    whole.save(tmp_path / "real.safetensors")
    again = RealReference.load(tmp_path / "real.safetensors")
    assert again.about == whole.about
    assert len(again) == 30
    other = ManifoldBiasDetector(model, t=50)
    other.use_reference(again)
    assert torch.equal(other.p_values(real), detector.p_values(real))
    for changed in (
        ManifoldBiasDetector(model, t=51),
        ManifoldBiasDetector(network_model(smooth_network(d, seed=1), d), t=50),
    ):
        with pytest.raises(StateMismatch, match="calibrate again"):
            changed.use_reference(again)


def test_a_verdict_that_flips_on_delivery_is_unsure() -> None:
    p = torch.tensor([[0.01, 0.02, 0.05], [0.5, 0.9, 0.06], [0.01, 0.5, 0.01], [0.9, 0.01, 0.9]])
    assert verdicts(p, 0.05) == ["generated", "real", "unsure", "unsure"]
    with pytest.raises(InputError, match="rate"):
        verdicts(p, 0.0)


def test_the_middle_is_cut_out_of_the_resized_image() -> None:
    assert to_square(torch.zeros(1, 3, 40, 30), 16).shape == (1, 3, 16, 16)
    assert to_square(torch.zeros(1, 1, 8, 8), 512).shape == (1, 1, 512, 512)
    image = torch.arange(19.0 * 19).reshape(1, 1, 19, 19)
    assert torch.equal(to_square(image, 16), image[..., 1:17, 1:17])


def test_what_is_no_detector_is_refused() -> None:
    model = network_model(smooth_network(4), 4)
    for options in (
        {"parity": "released"},
        {"embed": torch.flatten},
        {"weights": (1.0, math.nan, 1.0)},
        {"parity": "authors", "size": 0},
        {"t": 5000},
        {"directions": 3},
    ):
        with pytest.raises(InputError):
            ManifoldBiasDetector(model, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"\[-1, 1\]"):
        ManifoldBiasDetector(model).terms(torch.full((1, 4), 255.0))
    with pytest.raises(InputError, match="at least one"):
        ManifoldBiasDetector(model).fit_real([])
    with pytest.raises(NonFiniteError):
        RealReference({"c": torch.tensor([math.nan])})
    with pytest.raises(ShapeError):
        RealReference({"c": torch.zeros(2), "d": torch.zeros(3)})
    with pytest.raises(InputError, match="unknown criterion"):
        RealReference({"c": torch.zeros(2)}).threshold("d")
