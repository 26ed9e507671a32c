"""A fit, alone or of shards, is that of the rows; scores are what their formulas say."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmd_plugin.clip import GaussianStatistics, Whitening
from cmd_plugin.errors import InputError, ShapeError, StateMismatch
from cmd_plugin.jobs.clip import fit, merge, score
from cmd_plugin.jobs.clip.options import FitOptions, MergeOptions, ScoreOptions
from tests.jobs.clip.conftest import draw


def scores(out: Path) -> dict[str, np.ndarray]:
    """Columns of a scores.csv; NaN where a cell is empty."""
    with (out / "scores.csv").open(encoding="utf-8") as stream:
        table = list(csv.DictReader(stream))
    return {
        name: np.array([float(row[name] or "nan") for row in table])
        for name in table[0]
        if name != "name"
    }


@pytest.fixture
def fitted(saved: Path, tmp_path: Path) -> Path:
    """A fit of the rows."""
    fit.run(FitOptions(input=saved), tmp_path / "fit")
    return tmp_path / "fit"


def test_a_fit_is_that_of_all_rows(rows: np.ndarray, fitted: Path) -> None:
    wide = rows.astype(float)
    statistics = GaussianStatistics.load(fitted / "statistics.safetensors").compute()
    np.testing.assert_allclose(statistics.mean, wide.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(wide.T), rtol=1e-10)
    found = json.loads((fitted / "result.json").read_text())["metrics"]
    assert (found["rows"], found["dimension"], found["rank"]) == (240, 6, 6)
    assert (found["shrinkage"], found["floored"], found["skipped_rows"]) == ("none", 0, 0)
    values = np.linalg.eigvalsh(np.cov(wide.T))
    assert found["condition"] == pytest.approx(values[-1] / values[0], rel=1e-9)
    # Of the rows of a fit the mean squared norm is d (N - 1) / N, whatever they are.
    assert found["in_sample"] == pytest.approx(6 * 239 / 240, rel=1e-5)
    refits = []
    for row in range(240):
        rest = np.delete(wide, row, axis=0)
        off = wide[row] - rest.mean(axis=0)
        refits.append(off @ np.linalg.solve(np.cov(rest.T), off))
    assert found["leave_one_out"] == pytest.approx(np.mean(refits), rel=1e-9)
    units = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    cosines = units @ units.T
    mean = (cosines.sum() - 240) / (240 * 239)
    assert found["mean_conformity"] == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("normalize", ["raw", "l2"])
@pytest.mark.parametrize("shards", [2, 7])
def test_shards_merged_equal_one_fit(
    saved: Path, tmp_path: Path, shards: int, normalize: str
) -> None:
    fit.run(FitOptions(input=saved, normalize=normalize), tmp_path / "whole")
    parts = tuple(tmp_path / f"shard{number}" for number in range(1, shards + 1))
    for number, part in enumerate(parts, 1):
        chosen = FitOptions(
            input=saved, shard=f"{number}/{shards}", normalize=normalize, shrinkage="0.5"
        )
        fit.run(chosen, part)
    result = merge.run(MergeOptions(inputs=parts[::-1]), tmp_path / "merged")
    assert result.data["rows"] == 240
    one, other = (
        Whitening.load(tmp_path / n / "whitening.safetensors") for n in ("whole", "merged")
    )
    for name in ("mean", "matrix", "variances", "reference"):
        found, expected = getattr(other, name), getattr(one, name)
        assert float((found - expected).abs().max()) <= 1e-10 * float(expected.abs().max())
    whole = json.loads((tmp_path / "whole/result.json").read_text())["metrics"]
    assert result.metrics.pop("shrinkage") == whole.pop("shrinkage")
    assert result.metrics == pytest.approx(whole, rel=1e-6)


def test_what_cannot_be_merged_is_refused(
    saved: Path, fitted: Path, tmp_path: Path, rows: np.ndarray
) -> None:
    fit.run(FitOptions(input=saved, normalize="l2"), tmp_path / "l2")
    with pytest.raises(InputError, match="are fits of the same rows, which would count twice"):
        merge.run(MergeOptions(inputs=(fitted, fitted)))
    with pytest.raises(InputError, match="are fits of the same rows"):
        merge.run(MergeOptions(inputs=(fitted, tmp_path / "l2")))
    np.save(tmp_path / "others.npy", rows[:, ::-1])
    fit.run(FitOptions(input=tmp_path / "others.npy", normalize="l2"), tmp_path / "other")
    with pytest.raises(StateMismatch, match="cannot be merged"):
        merge.run(MergeOptions(inputs=(fitted, tmp_path / "other")))
    with pytest.raises(InputError, match="there are no statistics"):
        merge.run(MergeOptions(inputs=(tmp_path,)))


def test_without_the_embeddings_a_merged_fit_has_no_percentiles(
    saved: Path, fitted: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "others.npy", draw(100, 4))
    fit.run(FitOptions(input=tmp_path / "others.npy"), tmp_path / "other")
    (tmp_path / "others.npy").unlink()
    options = MergeOptions(inputs=(fitted, tmp_path / "other"))
    with pytest.warns(UserWarning, match="the embeddings behind .*other are not there"):
        result = merge.run(options, tmp_path / "merged")
    assert result.metrics["leave_one_out"] is None
    score.run(ScoreOptions(input=saved, whitening=tmp_path / "merged"), tmp_path / "s")
    assert "percentile" not in scores(tmp_path / "s")
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((fitted / "statistics.safetensors").read_bytes())
    with pytest.warns(UserWarning, match="are not there"):
        assert merge.run(MergeOptions(inputs=(bare,))).metrics["rows"] == 240


def test_scores_are_what_their_formulas_say(rows: np.ndarray, fitted: Path, tmp_path: Path) -> None:
    new = draw(50, seed=3)
    new[7, 2] = np.nan
    np.save(tmp_path / "new.npy", new)
    options = ScoreOptions(input=tmp_path / "new.npy", whitening=fitted)
    result = score.run(options, tmp_path / "out")
    found = scores(tmp_path / "out")
    wide, fine = rows.astype(float), np.arange(50) != 7
    off = new.astype(float) - wide.mean(axis=0)
    squared = np.einsum("nd,nd->n", off @ np.linalg.inv(np.cov(wide.T)), off)
    units = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    norms = np.linalg.norm(new.astype(float), axis=1)
    reference = Whitening.load(fitted / "whitening.safetensors").reference
    assert reference is not None
    rarer = (reference.numpy()[None] >= found["squared_norm"][:, None]).sum(axis=1)
    expected = {
        "row": np.arange(50),
        "embedding_norm": norms,
        "norm": np.sqrt(squared),
        "squared_norm": squared,
        "log_likelihood": -0.5 * (6 * np.log(2 * np.pi) + squared),
        "percentile": 100 * (1 + rarer) / 241,
        "conformity": (new @ units.mean(axis=0)) / norms,
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name][fine], value[fine], rtol=2e-5, err_msg=name)
        assert np.isnan(found[name][7]) == (name != "row")
    assert (result.metrics["rows"], result.metrics["not_finite"]) == (50, 1)
    order = np.argsort(np.where(fine, squared, np.inf))
    assert [row["row"] for row in result.metrics["highest"]] == order[:10].tolist()
    assert [row["row"] for row in result.metrics["lowest"]] == order[:-1][::-1][:10].tolist()
    likelihood = expected["log_likelihood"][fine].mean()
    assert result.metrics["mean_log_likelihood"] == pytest.approx(likelihood, rel=1e-5)
    about = json.loads((tmp_path / "out/columns.json").read_text())
    assert list(about["columns"]) == list(found)
    assert about["whitening"]["rows"] == 240


def test_rows_of_the_fit_are_scored_as_if_left_out(
    rows: np.ndarray, saved: Path, fitted: Path, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="these are rows of the fit, which look likelier"):
        score.run(ScoreOptions(input=saved, whitening=fitted), tmp_path / "in")
    options = ScoreOptions(input=saved, whitening=fitted, leave_one_out=True)
    result = score.run(options, tmp_path / "out")
    inside, outside = scores(tmp_path / "in"), scores(tmp_path / "out")
    assert inside["squared_norm"].mean() < outside["squared_norm"].mean()
    # Against themselves, percentiles are ranks (one more where a row's own score is rounded down);
    # conformity is the mean cosine to the others.
    ranks = [100 * (n + 1) / 241 for n in range(1, 241)]
    assert sorted(outside["percentile"]) == pytest.approx(ranks, abs=100.01 / 241)
    assert result.metrics["below_5_percent"] == pytest.approx(0.05, abs=1.01 / 240)
    units = rows.astype(float) / np.linalg.norm(rows.astype(float), axis=1, keepdims=True)
    others = ((units @ units.T).sum(axis=1) - 1) / 239
    np.testing.assert_allclose(outside["conformity"], others, rtol=1e-9)
    np.save(tmp_path / "new.npy", rows[:9])
    with pytest.raises(InputError, match=r"which were 240, and .* holds 9: leave it out"):
        score.run(ScoreOptions(input=tmp_path / "new.npy", whitening=fitted, leave_one_out=True))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_pieces_do_not_change_the_table(fitted: Path, tmp_path: Path, kind: str) -> None:
    np.save(tmp_path / "new.npy", draw(50, 3).astype(np.float16))
    for size in (7, 1000):
        options = ScoreOptions(input=tmp_path / "new.npy", whitening=fitted, rows=size, format=kind)
        score.run(options, tmp_path / f"out{size}")
    tables = [(tmp_path / f"out{size}/scores.{kind}").read_text() for size in (7, 1000)]
    if kind == "jsonl":
        first, second = ([json.loads(line) for line in table.splitlines()] for table in tables)
        assert first == [pytest.approx(row, rel=1e-5) for row in second]
        assert list(first[0])[:2] == ["row", "embedding_norm"]
    else:
        assert scores(tmp_path / "out7") == {
            name: pytest.approx(column, rel=1e-5)
            for name, column in scores(tmp_path / "out1000").items()
        }


def test_a_multiple_of_all_rows_has_the_same_scores(rows: np.ndarray, tmp_path: Path) -> None:
    for factor in (1e-3, 1e3):
        np.save(tmp_path / "scaled.npy", factor * rows)
        np.save(tmp_path / "new.npy", factor * draw(50, 3))
        name = str(factor)
        fit.run(FitOptions(input=tmp_path / "scaled.npy"), tmp_path / name)
        score.run(
            ScoreOptions(input=tmp_path / "new.npy", whitening=tmp_path / name),
            tmp_path / f"s{name}",
        )
    small, large = (scores(tmp_path / f"s{factor}") for factor in (1e-3, 1e3))
    np.testing.assert_allclose(small["squared_norm"], large["squared_norm"], rtol=1e-4)
    assert small["percentile"].tolist() == large["percentile"].tolist()


def test_what_does_not_fit_the_whitening_is_refused(fitted: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", draw(50, dim=7))
    with pytest.raises(ShapeError, match=r"rows of 7 values and .* is of 6"):
        score.run(ScoreOptions(input=tmp_path / "wide.npy", whitening=fitted))
    with pytest.raises(InputError, match="there is no whitening"):
        score.run(ScoreOptions(input=tmp_path / "wide.npy", whitening=tmp_path))
    np.save(tmp_path / "nan.npy", np.full((3, 6), np.nan))
    with pytest.raises(InputError, match="no row of the input is finite"):
        score.run(ScoreOptions(input=tmp_path / "nan.npy", whitening=fitted))


def test_pairs_are_fitted_one_modality_at_a_time(rows: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "pairs.npy", np.stack([rows, rows[:, ::-1]]))
    with pytest.raises(InputError, match="choose one by --modality"):
        fit.run(FitOptions(input=tmp_path / "pairs.npy"))
    for modality in ("image", "text"):
        options = FitOptions(input=tmp_path / "pairs.npy", modality=modality)
        fit.run(options, tmp_path / modality)
    image, text = (
        Whitening.load(tmp_path / m / "whitening.safetensors") for m in ("image", "text")
    )
    np.testing.assert_allclose(image.mean, text.mean.flip(0))
    assert text.about["modality"] == "text"
    options = ScoreOptions(
        input=tmp_path / "pairs.npy", modality="image", whitening=tmp_path / "text"
    )
    with pytest.warns(UserWarning, match="modality 'image' and the rows of the fit 'text'"):
        score.run(options, tmp_path / "s")


@pytest.mark.parametrize("shrinkage", ["2", "-1", "nan", "oass", ""])
def test_a_shrinkage_is_a_name_or_a_share(shrinkage: str) -> None:
    for options in (FitOptions, MergeOptions):
        given: dict[str, Any] = {"input": Path("x")} if options is FitOptions else {}
        given = given or {"inputs": (Path("x"),)}
        with pytest.raises(InputError, match="--shrinkage must be auto, none, oas"):
            options(**given, shrinkage=shrinkage)


@pytest.mark.filterwarnings("ignore:1203 rows are less than 10")
def test_raw_text_embeddings_are_fitted_and_scored(
    real: Callable[[str], Path], tmp_path: Path
) -> None:
    path = real("text_b32_lvis1203")
    result = fit.run(FitOptions(input=path), tmp_path / "fit")
    # Conformity as measured elsewhere; leave-one-out scores do not flatter.
    assert result.metrics["mean_conformity"] == pytest.approx(0.7426, abs=5e-5)
    assert result.metrics["shrinkage"] == "oas"
    assert result.metrics["leave_one_out"] > 1.3 * result.metrics["in_sample"]
    options = ScoreOptions(input=path, whitening=tmp_path / "fit", leave_one_out=True)
    found = score.run(options, tmp_path / "scores").metrics
    assert found["below_5_percent"] == pytest.approx(0.05, abs=1e-3)
