"""What `cmd-plugin clip` prints fits a terminal and says what counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cmd_plugin.cli import show_clip
from cmd_plugin.jobs.clip import align, compare, fit, merge, report, score
from cmd_plugin.jobs.clip.options import (
    AlignOptions,
    CompareOptions,
    FitOptions,
    MergeOptions,
    ReportOptions,
    ScoreOptions,
)


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, others, pairs, and fits of two halves of the rows."""
    out = tmp_path_factory.mktemp("clip")
    rows = np.random.default_rng(0).normal(2, 1, size=(600, 6))
    rows[3, 1] = np.nan
    np.save(out / "rows.npy", rows[:200])
    np.save(out / "others.npy", rows[200:300] + 5)
    np.save(out / "pairs.npy", np.stack([rows[300:400], rows[300:400] - rows[400:500] / 4]))
    for shard in (1, 2):
        options = FitOptions(input=out / "rows.npy", shard=f"{shard}/2")
        fit.run(options, out / f"fit{shard}")
    return out


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, if it fits."""
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    return " ".join(text.split())


def test_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_clip.show_fit(fit.run(FitOptions(input=folder / "rows.npy")))
    text = printed(capsys)
    assert "200 embeddings of 6 values covariance of 199 rows: rank 6 of 6, not shrunk" in text
    assert "1 rows hold NaN or infinite values: left out" in text
    assert "mean squared norm of the rows 6.0, as if each had not been in the fit 6." in text
    merged = merge.run(MergeOptions(inputs=(folder / "fit1", folder / "fit2"), shrinkage="0.1"))
    show_clip.show_merge(merged)
    assert "2 fits, 199 rows" in (text := printed(capsys))
    assert "shrunk (given, 0.100)" in text


def test_scores(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ScoreOptions(input=folder / "others.npy", whitening=folder / "fit1")
    result = score.run(options)
    show_clip.show_score(result)
    text = printed(capsys)
    assert "100.0% of the rows are rarer than 95 % of the reference (of its own, 5 %)" in text
    assert f"{result.metrics['lowest'][0]['log_likelihood']:.1f}" in text
    assert text.index("rarest") < text.index("most usual")


def test_comparisons(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = CompareOptions(
        reference=folder / "rows.npy", sample=folder / "others.npy", permutations=19
    )
    show_clip.show_compare(compare.run(options))
    text = printed(capsys)
    assert "permutation test: p = 0.0500" in text
    assert "(level 0.05): they differ" in text
    assert "AUC 1.000 (chance 0.5)" in text


def test_alignments(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = align.run(AlignOptions(input=folder / "pairs.npy"))
    show_clip.show_align(result)
    text = printed(capsys)
    found = result.metrics["retrieval"]["whitened"]["text_to_image"]
    cells = " ".join(f"{v:.3f}" for kind in ("mixed", "alone") for v in found[kind].values())
    assert f"whitened {cells}" in text
    assert "Images look for their text" in text


def test_reports(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_write", lambda *_: None)
    result = report.run(ReportOptions(input=folder / "pairs.npy", group_size=50))
    show_clip.show_report(result)
    text = printed(capsys)
    assert f"gap {result.metrics['pairs']['gap']:.4f}" in text
    assert "pass Anderson-Darling" in text
    assert "contrastive loss least at alpha" in text
