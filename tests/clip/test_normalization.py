"""What dividing by the norm does to scores: nothing, where there is nothing to divide away."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from cmd_plugin.clip import Whitening, normalization_effect
from cmd_plugin.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:the features look L2-normalised")


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """Rows [200, 5], float64, of lengths that vary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(200, 5, generator=generator, dtype=torch.float64) + 2.0


def test_scores_are_those_of_two_fits(rows: torch.Tensor) -> None:
    found = normalization_effect(rows, shrinkage="none", rarest=0.1)
    units = rows / rows.norm(dim=1, keepdim=True)
    raw, l2 = (Whitening.fit(x, shrinkage="none").leave_one_out(x) for x in (rows, units))
    torch.testing.assert_close(found.raw, raw)
    torch.testing.assert_close(found.l2, l2)
    assert found.rank_correlation == pytest.approx(spearmanr(raw, l2).statistic)
    rarest = [set(x.argsort(descending=True)[:20].tolist()) for x in (raw, l2)]
    assert found.rarest == 20
    assert found.rarest_in_common == pytest.approx(len(rarest[0] & rarest[1]) / 20)
    norms = rows.norm(dim=1)
    assert found.norm_variation == pytest.approx(float(norms.std() / norms.mean()))


def test_rows_that_were_normalised_before_score_alike(rows: torch.Tensor) -> None:
    found = normalization_effect(rows / rows.norm(dim=1, keepdim=True))
    torch.testing.assert_close(found.raw, found.l2)
    assert found.rank_correlation == pytest.approx(1.0)
    assert found.norm_variation < 1e-12


def test_a_share_of_rarest_rows_is_above_zero(rows: torch.Tensor) -> None:
    with pytest.raises(InputError, match="rarest must be above 0"):
        normalization_effect(rows, rarest=0.0)
