"""Whitening against scipy, scikit-learn and fits that were made again without a row."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.covariance import OAS, EmpiricalCovariance, LedoitWolf
from sklearn.decomposition import PCA
from torch import Tensor

from cmd_plugin.clip import GaussianStatistics, Whitening
from cmd_plugin.errors import InputError, ShapeError

DIM, ROWS = 8, 120
BASES = ("pca", "zca", "cholesky")
SHRINKAGES = ("none", 0.3, "oas", "ledoit-wolf")


def features(rows: int = ROWS, dim: int = DIM, seed: int = 0, spread: float = 1e-3) -> Tensor:
    """Rows around a mean far from the origin, of standard deviations from 1 down to ``spread``."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(dim, dim, generator=generator).double()).Q
    scale = torch.logspace(0, math.log10(spread), dim, dtype=torch.float64)
    return torch.randn(rows, dim, generator=generator).double() * scale @ mixing + 3.0


X = features()


def without(x: Tensor, row: int) -> Tensor:
    return torch.cat([x[:row], x[row + 1 :]])


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("rows", [DIM + 3, ROWS])
def test_whitened_rows_have_unit_covariance_and_the_norms_they_must_have(
    basis: str, rows: int
) -> None:
    x = features(rows)
    fitted = Whitening.fit(x, basis, shrinkage="none", floor=0.0)
    y = fitted.transform(x)
    assert (y.T.cov() - torch.eye(DIM)).abs().max() < 1e-8
    squared = fitted.squared_norm(x)
    assert float(squared.mean()) == pytest.approx(DIM * (rows - 1) / rows, rel=1e-9)
    assert squared.max() <= (rows - 1) ** 2 / rows * (1 + 1e-12)


def test_the_density_is_scipys() -> None:
    fitted = Whitening.fit(X, shrinkage="none")
    normal = stats.multivariate_normal(X.mean(dim=0).numpy(), np.cov(X.numpy().T))
    expected = torch.from_numpy(normal.logpdf(X.numpy()))
    assert torch.allclose(fitted.log_density(X), expected, atol=1e-8, rtol=0)
    logdet = float(np.linalg.slogdet(np.cov(X.numpy().T))[1])
    assert fitted.logdet == pytest.approx(logdet, abs=1e-8)
    assert torch.allclose(fitted.log_likelihood(X), expected + 0.5 * logdet, atol=1e-8, rtol=0)


def test_distances_and_coordinates_are_scikit_learns() -> None:
    fitted = Whitening.fit(X, shrinkage="none")
    squared = EmpiricalCovariance().fit(X.numpy()).mahalanobis(X.numpy())
    assert np.allclose(fitted.squared_norm(X), squared * (ROWS - 1) / ROWS, rtol=1e-9)
    scores = PCA(whiten=True, svd_solver="full").fit_transform(X.numpy())
    y = fitted.transform(X).numpy()
    assert np.allclose(y * np.sign((y * scores).sum(axis=0)), scores, atol=1e-8)


@pytest.mark.parametrize("kind", ["oas", "ledoit-wolf"])
@pytest.mark.parametrize("rows", [3, 12, ROWS])
def test_shrunk_covariances_are_scikit_learns(kind: str, rows: int) -> None:
    x = features(rows)
    estimator = (OAS() if kind == "oas" else LedoitWolf()).fit(x.numpy())
    fitted = Whitening.fit(x, shrinkage=kind, floor=0.0)  # type: ignore[arg-type]
    assert fitted.intensity == pytest.approx(estimator.shrinkage_, rel=1e-9)
    covariance = fitted.vectors * fitted.variances @ fitted.vectors.T
    assert np.allclose(covariance, estimator.covariance_ * rows / (rows - 1), rtol=1e-8)


def test_the_bases_differ_by_a_rotation_only() -> None:
    pca, zca, cholesky = (Whitening.fit(X, basis, shrinkage="none") for basis in BASES)
    squared = pca.squared_norm(X)
    for other in (zca, cholesky):
        assert torch.allclose(other.squared_norm(X), squared, rtol=1e-12)
        ours, theirs = other.transform(X), pca.transform(X)
        assert torch.allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-9)
    assert torch.allclose(zca.matrix, zca.matrix.T, rtol=1e-10)
    lower = torch.linalg.cholesky(X.T.cov())
    assert torch.allclose(cholesky.matrix, torch.linalg.inv(lower).T, rtol=1e-8, atol=1e-8)
    assert torch.equal(cholesky.matrix, cholesky.matrix.triu())


@pytest.mark.parametrize("rank", [1, 5, DIM])
@pytest.mark.parametrize("basis", BASES)
def test_fewer_directions_are_those_of_largest_variance(basis: str, rank: int) -> None:
    fitted = Whitening.fit(X, basis, shrinkage="none", rank=rank)
    scores = PCA(rank, whiten=True, svd_solver="full").fit_transform(X.numpy())
    expected = torch.from_numpy((scores**2).sum(axis=1))
    assert torch.allclose(fitted.squared_norm(X), expected, rtol=1e-9)
    assert torch.allclose(fitted.transform(X).square().sum(dim=1), expected, rtol=1e-9)
    row, column = torch.arange(DIM)[:, None], torch.arange(rank)
    assert (fitted.triangle[row - column > DIM - rank] == 0).all()
    assert fitted.rank == rank


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("shrinkage", SHRINKAGES)
def test_rows_come_back(basis: str, shrinkage: str) -> None:
    for normalize, rows in (("raw", X), ("l2", X / X.norm(dim=1, keepdim=True))):
        fitted = Whitening.fit(X, basis, shrinkage=shrinkage, normalize=normalize)  # type: ignore[arg-type]
        assert torch.allclose(fitted.inverse(fitted.transform(X)), rows, atol=1e-10)


def test_rows_of_dropped_directions_do_not_come_back() -> None:
    fitted = Whitening.fit(X, shrinkage="none", rank=5)
    with pytest.raises(InputError, match="rank 5 of 8 features, so that no inverse"):
        fitted.inverse(fitted.transform(X))
    with pytest.raises(InputError, match="no density"):
        fitted.log_density(X)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_scores_do_not_depend_on_the_units_or_on_a_mixing_of_the_features(scale: float) -> None:
    mixing = scale * torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1)).double()
    plain = Whitening.fit(X, shrinkage="none", floor=0.0)
    mixed = Whitening.fit(X @ mixing - 2.0, shrinkage="none", floor=0.0)
    moved = X @ mixing - 2.0
    assert torch.allclose(mixed.squared_norm(moved), plain.squared_norm(X), rtol=1e-6)
    logdet = float(torch.linalg.slogdet(mixing).logabsdet)
    shifted = plain.log_density(X) - logdet
    assert torch.allclose(mixed.log_density(moved), shifted, rtol=0, atol=1e-6)
    for shrinkage in SHRINKAGES:  # units alone
        one = Whitening.fit(X, shrinkage=shrinkage).squared_norm(X)  # type: ignore[arg-type]
        other = Whitening.fit(scale * X, shrinkage=shrinkage).squared_norm(scale * X)  # type: ignore[arg-type]
        assert torch.allclose(one, other, rtol=1e-9)


@pytest.mark.parametrize("normalize", ["raw", "l2"])
@pytest.mark.parametrize("shrinkage", SHRINKAGES)
def test_a_row_left_out_scores_as_in_a_fit_without_it(shrinkage: str, normalize: str) -> None:
    x = features(DIM + 6, spread=0.05)
    options = {"shrinkage": shrinkage, "normalize": normalize, "floor": 0.0}
    left_out = Whitening.fit(x, **options).leave_one_out(x)  # type: ignore[arg-type]
    for row in range(5):
        refit = Whitening.fit(without(x, row), **options)  # type: ignore[arg-type]
        expected = float(refit.squared_norm(x[row : row + 1]))
        assert float(left_out[row]) == pytest.approx(expected, rel=1e-8)


def test_without_shrinkage_that_is_the_closed_form_of_the_specification() -> None:
    fitted = Whitening.fit(X, shrinkage="none")
    n, squared = ROWS, fitted.squared_norm(X)
    expected = (n - 2) * n**2 * squared / ((n - 1) * ((n - 1) ** 2 - n * squared))
    assert torch.allclose(fitted.leave_one_out(X), expected, rtol=1e-9)


def test_a_row_left_out_of_kept_directions_is_left_out_within_them() -> None:
    kept = Whitening.fit(X, shrinkage="none", rank=3)
    inside = (X - kept.mean) @ kept.vectors
    expected = Whitening.fit(inside, shrinkage="none").leave_one_out(inside)
    assert torch.allclose(kept.leave_one_out(X), expected, rtol=1e-9)


def test_rows_that_cannot_be_of_the_fit_are_not_left_out_of_it() -> None:
    fitted = Whitening.fit(X, shrinkage="none")
    far = X + 1000.0
    assert fitted.leave_one_out(far).isnan().all()
    with pytest.raises(InputError, match="rows of the fit that are finite"):
        fitted.calibrate(far)
    assert fitted.calibrate(far, held_out=True).reference is not None


def test_rows_of_the_fit_look_nearer_than_they_are() -> None:
    """Of a Gaussian: d (N - 1) / N in the fit, d (N^2 - 1) / (N (N - d - 2)) held out."""
    dim, rows = 30, 90
    fitted = Whitening.fit(features(rows, dim, spread=0.1), shrinkage="none")
    held_out = fitted.squared_norm(features(20000, dim, spread=0.1)[rows:])
    assert float(held_out.mean() / dim) == pytest.approx(
        (rows**2 - 1) / (rows * (rows - 32)), rel=0.15
    )


def test_percentiles_of_rows_left_out_are_uniform() -> None:
    x = features(600)
    fitted = Whitening.fit(x, shrinkage="none")
    inside = fitted.percentile(fitted.leave_one_out(x)) / 100
    assert stats.kstest(inside.numpy(), "uniform").pvalue > 0.99  # they are the reference
    others = features(4000)[600:]
    outside = fitted.percentile(fitted.squared_norm(others)) / 100
    assert stats.ks_2samp(inside.numpy(), outside.numpy()).pvalue > 0.01
    reference = fitted.reference
    assert reference is not None
    squared = float(fitted.squared_norm(others[:1]))
    by_hand = 100 * (1 + int((reference >= squared).sum())) / (1 + len(reference))
    assert float(fitted.percentile(torch.tensor([squared]).double())) == pytest.approx(by_hand)
    assert fitted.percentile(torch.tensor([torch.nan])).isnan().all()


def test_noise_makes_rows_less_likely() -> None:
    fitted = Whitening.fit(X, shrinkage="none")
    noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(2)).double()
    means = [float(fitted.squared_norm(X + level * noise).mean()) for level in (0, 0.01, 0.1, 1)]
    assert means == sorted(means)
    ranks = [
        float(fitted.percentile(fitted.squared_norm(X + a * noise)).mean()) for a in (0, 0.1, 1)
    ]
    assert ranks == sorted(ranks, reverse=True)


def test_statistics_and_features_give_one_fit() -> None:
    statistics = GaussianStatistics(DIM, about={"model": "a"})
    for part in X.split(17):
        statistics.update(part)
    fitted = Whitening.fit(statistics, shrinkage="none")
    assert fitted.about == {"model": "a"}
    assert torch.allclose(
        fitted.squared_norm(X), Whitening.fit(X, shrinkage="none").squared_norm(X)
    )
    with pytest.raises(InputError, match="calibrate"):
        fitted.percentile(fitted.squared_norm(X))
    calibrated = fitted.calibrate(X)
    assert calibrated.reference is not None
    assert torch.allclose(calibrated.reference, fitted.leave_one_out(X).sort().values)
    other = features(50, seed=0)
    held_out = fitted.calibrate(other, held_out=True).reference
    assert held_out is not None
    assert torch.allclose(held_out, fitted.squared_norm(other).sort().values)
    with pytest.raises(InputError, match="normalize='raw', not 'l2'"):
        Whitening.fit(statistics, normalize="l2")


def test_the_reference_of_many_rows_is_a_part_of_them() -> None:
    x = features(40000, 3)
    reference = Whitening.fit(x).reference
    assert reference is not None
    assert 10000 < len(reference) <= 16384


def test_too_few_rows_are_refused_and_few_are_shrunk_with_a_warning() -> None:
    with pytest.raises(InputError, match="10 rows are too few for 8 directions"):
        Whitening.fit(features(DIM + 2), shrinkage="none")
    with pytest.raises(InputError, match="1 rows are too few"):
        Whitening.fit(features(1), shrinkage="oas")
    with pytest.warns(UserWarning, match="shrunk .OAS."):
        few = Whitening.fit(features(10 * DIM - 1))
    assert few.shrinkage == "oas"
    assert 0.0 < few.intensity < 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Whitening.fit(features(10 * DIM)).shrinkage == "none"
        assert Whitening.fit(features(7), shrinkage="none", rank=4).rank == 4
        assert Whitening.fit(features(20), shrinkage=0.5).intensity == 0.5


def test_small_variances_are_raised_to_the_floor_and_counted() -> None:
    x = features(spread=1e-4)  # variances down to 1e-8
    x[:, 3] = x[:, 2]
    fitted = Whitening.fit(x, shrinkage="none")
    share = fitted.eigenvalues / fitted.eigenvalues[0]
    assert fitted.floored == int((share < 1e-6).sum()) >= 2
    assert float(fitted.variances.min() / fitted.variances.max()) == pytest.approx(1e-6)
    assert fitted.squared_norm(x).isfinite().all()
    assert Whitening.fit(x, shrinkage="none", floor=1e-3).floored > fitted.floored


def test_equal_rows_have_no_directions() -> None:
    with pytest.raises(InputError, match="without any variance"):
        Whitening.fit(torch.ones(50, 3).double() * 2)
    x = features(100)
    x[:, 1] = 0.0
    with pytest.raises(InputError, match="set a floor"):
        Whitening.fit(x, shrinkage="none", floor=0.0)


def test_normalised_features_are_warned_of() -> None:
    unit = torch.nn.functional.normalize(X, dim=1)
    with pytest.warns(UserWarning, match="L2-normalised"):
        Whitening.fit(unit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Whitening.fit(X, normalize="l2")


def test_the_released_step_replaces_the_later_of_two_correlated_features() -> None:
    x = features(400, spread=0.1)
    x[:, 5] = x[:, 2] + 1e-3 * x[:, 0]
    x[:, 6] = -x[:, 2]  # correlated at -1, which the released code leaves
    fitted = Whitening.fit(x, shrinkage="none", legacy_noise=True)
    covariance = fitted.vectors * fitted.variances @ fitted.vectors.T
    assert float(covariance[5, 5]) == pytest.approx(0.01, rel=0.2)
    assert torch.allclose(fitted.mean, x.mean(dim=0))
    assert float(covariance[6, 6]) == pytest.approx(float(x[:, 6].var()), rel=1e-3)
    with pytest.raises(InputError, match="without one of its"):
        fitted.leave_one_out(x)
    with pytest.raises(InputError, match="needs the features"):
        Whitening.fit(GaussianStatistics(3), legacy_noise=True)


def test_rows_of_lower_precision_are_scored_in_single() -> None:
    fitted = Whitening.fit(X, shrinkage="none")
    for dtype in (torch.float32, torch.float16):
        x = X.to(dtype)
        squared = fitted.squared_norm(x)
        assert squared.dtype == fitted.transform(x).dtype == torch.float32
        assert torch.allclose(squared.double(), fitted.squared_norm(x.double()), rtol=1e-3)


def test_rows_that_are_not_finite_score_nan_and_do_not_enter_the_fit() -> None:
    bad = X.clone()
    bad[5, 2], bad[9, 0] = torch.nan, torch.inf
    fitted = Whitening.fit(bad, shrinkage="none")
    assert fitted.rows == ROWS - 2
    for scores in (fitted.squared_norm(bad), fitted.log_likelihood(bad), fitted.leave_one_out(bad)):
        assert scores.isnan().nonzero()[:, 0].tolist() == [5, 9]
    assert fitted.reference is not None
    assert len(fitted.reference) == ROWS - 2


def test_arrays_on_disk_are_scored_in_blocks(tmp_path: Path) -> None:
    x = features(20000).float()
    np.save(tmp_path / "x.npy", x.numpy())
    fitted = Whitening.fit(np.load(tmp_path / "x.npy", mmap_mode="r"))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert torch.equal(fitted.squared_norm(mapped), fitted.squared_norm(x))
    assert fitted.squared_norm(mapped[:0]).shape == (0,)


def test_equal_data_make_equal_eigenvectors() -> None:
    fitted, again = Whitening.fit(X), Whitening.fit(X.flip(0))
    largest = fitted.vectors.gather(0, fitted.vectors.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()
    assert torch.allclose(fitted.vectors, again.vectors, atol=1e-9)


@pytest.mark.parametrize("basis", BASES)
def test_a_file_holds_all_of_it(basis: str, tmp_path: Path) -> None:
    fitted = Whitening.fit(
        X, basis, shrinkage="ledoit-wolf", normalize="l2", about={"model": "ViT-B-32", "tag": "x"}
    )
    fitted.save(tmp_path / "w.safetensors")
    again = Whitening.load(tmp_path / "w.safetensors")
    assert again.about == fitted.about
    assert repr(again.basis) == repr(basis)
    for ask in ("squared_norm", "transform", "leave_one_out", "log_density"):
        assert torch.equal(getattr(again, ask)(X), getattr(fitted, ask)(X))
    assert torch.equal(again.percentile(X[:, 0]), fitted.percentile(X[:, 0]))
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "w.safetensors").read_bytes() == (
        tmp_path / "again.safetensors"
    ).read_bytes()


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    from safetensors import safe_open

    Whitening.fit(X, about={"modality": "image"}).save(tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        about = file.metadata()
        mean, matrix = file.get_tensor("mean"), file.get_tensor("matrix")
    assert about["row_convention"] == "y = (x - mean) @ matrix"
    assert about["ddof"] == "1"
    assert '"modality": "image"' in about["about"]
    assert torch.allclose((X - mean) @ matrix, Whitening.fit(X).transform(X))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    fitted = Whitening.fit(X)
    path = tmp_path / "w.safetensors"
    fitted.save(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    for name, value in (
        ("mean", tensors["mean"][1:]),
        ("variances", -tensors["variances"]),
        ("vectors", tensors["vectors"].float()),
        ("eigenvalues", tensors["eigenvalues"][:2]),
    ):
        save_file({**tensors, name: value.clone()}, path, about)
        with pytest.raises(InputError, match="damaged"):
            Whitening.load(path)
    GaussianStatistics(3).save(path)
    with pytest.raises(InputError, match="is not a Whitening"):
        Whitening.load(path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"basis": "svd"}, "basis"),
        ({"shrinkage": "much"}, "shrinkage"),
        ({"shrinkage": 1.5}, "shrinkage"),
        ({"floor": 1.0}, "floor"),
        ({"rank": 0}, "rank"),
        ({"rank": DIM + 1}, "rank"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Whitening.fit(X, **options)  # type: ignore[arg-type]


def test_rows_of_other_features_are_refused() -> None:
    fitted = Whitening.fit(X)
    for ask in (fitted.squared_norm, fitted.transform, fitted.leave_one_out, fitted.inverse):
        with pytest.raises(ShapeError, match=r"\[N, 8\]"):
            ask(X[:, 1:])
