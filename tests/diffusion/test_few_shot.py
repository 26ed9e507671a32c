"""The few-shot detector: learns from few, never scores what it was fitted on, keeps its file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from cmd_plugin.diffusion import (
    FewShotDetector,
    LatentCodec,
    PixelCodec,
    manifold_features,
    p_laplace,
    reconstruction_error,
)
from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.runs.separation import auroc
from tests.helpers.diffusion_toys import network_model, smooth_network


def images(count: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """One expert that knows, one that does not, one that is wider than there are labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(2 * count) % 2
    good = torch.randn(2 * count, 3, generator=generator) + 1.5 * labels[:, None]
    bad = torch.randn(2 * count, 2, generator=generator)
    wide = torch.randn(2 * count, 60, generator=generator)
    return {"good": good, "bad": bad, "wide": wide}, labels


@pytest.mark.parametrize(
    ("gate", "count", "seeds"), [("logistic", 5, 8), ("logistic", 50, 1), ("forest", 50, 1)]
)
def test_a_handful_of_labels_is_enough_where_an_expert_knows(
    gate: str, count: int, seeds: int
) -> None:
    fresh, truth = images(300, seed=999)
    found = []
    for seed in range(seeds):
        features, labels = images(count, seed)
        detector = FewShotDetector(gate).fit(features, labels)
        probability = detector.probability(fresh)
        assert 0.0 <= float(probability.min()) <= float(probability.max()) <= 1.0
        found.append(auroc(probability[truth == 0], probability[truth == 1]))
    assert sum(found) / seeds > (0.85 if count == 5 else 0.9)
    votes = detector.votes(fresh)
    assert auroc(votes["bad"][truth == 0], votes["bad"][truth == 1]) < 0.7
    again = FewShotDetector(gate).fit(features, labels).probability(fresh)
    assert torch.equal(probability, again)


def test_an_expert_is_a_logistic_regression_on_standardised_features() -> None:
    features, labels = images(20)
    detector = FewShotDetector(strength=0.3).fit(features, labels)
    scaler = StandardScaler().fit(features["wide"].double().numpy())
    fitted = LogisticRegression(C=0.3, class_weight="balanced", max_iter=1000)
    fitted.fit(scaler.transform(features["wide"].double().numpy()), labels.numpy())
    expected = fitted.decision_function(scaler.transform(features["wide"].double().numpy()))
    assert detector.votes(features)["wide"].tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_the_gate_does_not_trust_an_expert_that_learned_noise_by_heart() -> None:
    features, labels = images(30)
    detector = FewShotDetector(strength=100.0).fit(features, labels)
    fresh, truth = images(300, seed=2)
    votes = detector.votes(features)
    assert auroc(votes["wide"][labels == 0], votes["wide"][labels == 1]) > 0.99
    probability = detector.probability(fresh)
    alone = detector.votes(fresh)["good"]
    lost = auroc(alone[truth == 0], alone[truth == 1]) - auroc(
        probability[truth == 0], probability[truth == 1]
    )
    assert lost < 0.03


def test_a_feature_that_never_varied_does_not_matter_later() -> None:
    features, labels = images(20)
    features["good"] = torch.cat([features["good"], torch.ones(40, 1)], dim=1)
    detector = FewShotDetector().fit(features, labels)
    before = detector.probability(features)
    features["good"][:, -1] = 1e6
    assert torch.equal(detector.probability(features), before)


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    features, labels = images(20)
    detector = FewShotDetector().fit(features, labels)
    path = tmp_path / "few.safetensors"
    detector.save(path)
    again = FewShotDetector.load(path)
    assert again.experts == ("good", "bad", "wide")
    assert torch.equal(again.probability(features), detector.probability(features))
    with pytest.raises(InputError, match="forest"):
        FewShotDetector("forest").fit(features, labels).save(path)
    with pytest.raises(InputError, match="not fitted"):
        FewShotDetector().save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="damaged"):
        FewShotDetector.load(path)


def test_features_are_terms_of_the_flux() -> None:
    d = 6
    model = network_model(smooth_network(d), d)
    seen = torch.randn(4, d)
    flux = p_laplace(model, seen, (10, 100), (1, 2), directions=4)
    found = manifold_features(model, seen, (10, 100), directions=4)
    assert found.shape == (4, 10)
    torch.testing.assert_close(found[:, :2], flux.value[..., 0])
    torch.testing.assert_close(found[:, 2:4], flux.value[..., 1])
    torch.testing.assert_close(found[:, 8:], flux.squared_error.mean(2))


def test_pixels_are_reconstructed_and_latents_are_not() -> None:
    pytest.importorskip("diffusers")
    from tests.helpers.tiny_diffusers import autoencoder

    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    assert reconstruction_error(PixelCodec(), pictures).tolist() == [[0.0], [0.0]]
    codec = LatentCodec(autoencoder())
    expected = (codec.decode(codec.encode(pictures)) - pictures).square().flatten(1).mean(1)
    torch.testing.assert_close(reconstruction_error(codec, pictures)[:, 0].float(), expected)


def test_what_cannot_be_learned_is_refused() -> None:
    features, labels = images(20)
    with pytest.raises(InputError, match="at least 5"):
        FewShotDetector().fit({n: f[:8] for n, f in features.items()}, labels[:8])
    with pytest.raises(InputError, match="no expert"):
        FewShotDetector().fit({}, labels)
    with pytest.raises(ShapeError, match="good"):
        FewShotDetector().fit({"good": features["good"][:3]}, labels)
    with pytest.raises(NonFiniteError, match="bad"):
        FewShotDetector().fit({"bad": features["bad"] * math.nan}, labels)
    with pytest.raises(InputError, match="gate"):
        FewShotDetector("svm")
    with pytest.raises(InputError, match="folds"):
        FewShotDetector(folds=1)
    with pytest.raises(InputError, match="fit first"):
        FewShotDetector().probability(features)
    detector = FewShotDetector().fit(features, labels)
    with pytest.raises(InputError, match="experts are"):
        detector.votes({"good": features["good"]})
    with pytest.raises(ShapeError, match="3 features"):
        detector.votes({**features, "good": features["good"][:, :2]})
