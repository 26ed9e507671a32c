"""All scores of rows at once: each is what its own function gives."""

from __future__ import annotations

import pytest
import torch

from cmd_plugin.clip import (
    SCORES,
    GaussianStatistics,
    Whitening,
    conformity,
    conformity_to,
    score_rows,
)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """Rows [100, 5], float64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(100, 5, generator=generator, dtype=torch.float64) + 2.0


def test_scores_of_new_rows(rows: torch.Tensor) -> None:
    fit, new = rows[:80], rows[80:].clone()
    new[3, 1] = torch.nan
    statistics = GaussianStatistics(5)
    statistics.update(fit)
    whitening = Whitening.fit(fit)
    found = score_rows(new, whitening, statistics.unit_mean)
    assert list(found) == list(SCORES)
    good = torch.arange(20) != 3
    squared = whitening.squared_norm(new[good])
    expected = {
        "embedding_norm": new[good].norm(dim=1),
        "norm": squared.sqrt(),
        "squared_norm": squared,
        "log_likelihood": whitening.log_likelihood(new[good]),
        "percentile": whitening.percentile(squared),
        "conformity": conformity_to(new[good], statistics.unit_mean),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name][good], value)
        assert not bool(found[name][3].isfinite())


def test_scores_of_rows_of_the_fit(rows: torch.Tensor) -> None:
    statistics = GaussianStatistics(5)
    statistics.update(rows)
    whitening = Whitening.fit(rows)
    found = score_rows(rows, whitening, statistics.unit_mean, leave_one_out=True)
    torch.testing.assert_close(found["squared_norm"], whitening.leave_one_out(rows))
    torch.testing.assert_close(found["conformity"], conformity(rows))


def test_what_cannot_be_known_is_left_out(rows: torch.Tensor) -> None:
    statistics = GaussianStatistics(5)
    statistics.update(rows)
    found = score_rows(rows, Whitening.fit(statistics))
    assert list(found) == ["embedding_norm", "norm", "squared_norm", "log_likelihood"]
