"""The scikit-learn face: its own checks, and the numbers of the whitening it wraps."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from cmd_plugin.clip import Whitener, Whitening
from cmd_plugin.errors import InputError

MIXING = np.random.default_rng(1).normal(size=(6, 6)) @ np.diag([1, 0.5, 0.2, 0.1, 2, 3])
X = np.random.default_rng(0).normal(size=(150, 6)) @ MIXING.T + 4.0


@pytest.mark.filterwarnings("ignore:.*the covariance is shrunk")
@parametrize_with_checks([Whitener(), Whitener("zca", shrinkage="oas", n_components=1)])  # type: ignore[untyped-decorator]
def test_scikit_learn_checks_it(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


def test_numbers_are_those_of_the_whitening() -> None:
    estimator = Whitener("zca", shrinkage=0.1).fit(X)
    fitted = Whitening.fit(torch.from_numpy(X), "zca", shrinkage=0.1)
    x = torch.from_numpy(X)
    for found, expected in (
        (estimator.transform(X), fitted.transform(x)),
        (estimator.score_samples(X), fitted.log_density(x)),
        (estimator.squared_norm(X), fitted.squared_norm(x)),
        (estimator.leave_one_out(X), fitted.leave_one_out(x)),
        (estimator.percentile(X), fitted.percentile(fitted.squared_norm(x))),
        (estimator.inverse_transform(estimator.transform(X)), x),
        (estimator.mean_, fitted.mean),
        (estimator.components_, fitted.vectors.T),
        (estimator.eigenvalues_, fitted.eigenvalues),
    ):
        assert np.allclose(found, expected.numpy(), atol=1e-12)
    assert estimator.score(X) == pytest.approx(float(fitted.log_density(x).mean()))
    assert estimator.intensity_ == 0.1
    assert estimator.noise_floor_count_ == 0
    assert list(estimator.get_feature_names_out()) == [f"whitener{i}" for i in range(6)]


def test_parts_make_the_whole() -> None:
    whole, parts = Whitener(shrinkage="none").fit(X), Whitener(shrinkage="none")
    for part in np.array_split(X, 7):
        parts.partial_fit(part)
    assert parts.n_samples_seen_ == len(X)
    assert np.allclose(parts.transform(X), whole.transform(X), atol=1e-10)
    with pytest.raises(InputError, match="calibrate"):
        parts.percentile(X)
    again = pickle.loads(pickle.dumps(parts)).partial_fit(X + 1.0)
    assert again.n_samples_seen_ == 2 * len(X)
    assert parts.n_samples_seen_ == len(X)


def test_directions_are_named_and_single_precision_stays() -> None:
    estimator = Whitener(n_components=2, shrinkage="none").fit(X.astype(np.float32))
    assert estimator.transform(X.astype(np.float32)).dtype == np.float32
    assert len(estimator.get_feature_names_out()) == 2
    with pytest.raises(InputError, match="no inverse"):
        estimator.inverse_transform(estimator.transform(X))


def test_shrinkage_is_chosen_by_held_out_density() -> None:
    pipeline = make_pipeline(StandardScaler(), Whitener())
    search = GridSearchCV(pipeline, {"whitener__shrinkage": [0.0, 0.05, 0.99]}, cv=3)
    assert search.fit(X).best_params_["whitener__shrinkage"] < 0.99
    assert clone(Whitener("zca", floor=0.1)).get_params()["floor"] == 0.1
