"""Ranks and recalls against sorting by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cmd_plugin.clip import ranks_of, recall_at
from cmd_plugin.errors import InputError, ShapeError


def test_ranks_are_places_in_the_sorted_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmd_plugin.clip.retrieval._BLOCK", 4)
    queries, gallery = torch.randn(11, 5), torch.randn(17, 5)
    targets, skipped = torch.arange(11) + 3, torch.arange(11) + 4
    cosines = cosine_similarity(queries[:, None].double(), gallery[None].double(), dim=2)
    for leave_out in (None, skipped):
        expected = []
        for row, target, out in zip(cosines, targets, skipped, strict=True):
            order = row.argsort(descending=True).tolist()
            if leave_out is not None:
                order.remove(int(out))
            expected.append(1 + order.index(int(target)))
        assert ranks_of(queries, gallery, targets, leave_out).tolist() == expected
    found = recall_at(queries, gallery, (1, 3, 17), targets)
    ranks = ranks_of(queries, gallery, targets)
    assert found == {k: pytest.approx(float((ranks <= k).double().mean())) for k in (1, 3, 17)}
    assert found[17] == 1.0


def test_duplicates_never_flatter() -> None:
    gallery = torch.eye(3)[[0, 0, 1, 2]]
    assert ranks_of(torch.eye(3)[:1], gallery).tolist() == [2]
    # Embeddings that all are one would otherwise be found at once.
    assert recall_at(torch.ones(5, 4), torch.ones(5, 4), (1, 5)) == {1: 0.0, 5: 1.0}


def test_recall_of_the_coco_pairs(stored: Callable[[str], Tensor]) -> None:
    images, texts = stored("pairs_b16_coco500_unit")
    assert recall_at(images, texts, (1,))[1] == pytest.approx(0.552)
    assert recall_at(texts, images, (1,))[1] == pytest.approx(0.506)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(InputError, match="k must be"):
        recall_at(x, x, ())
    with pytest.raises(InputError, match="rows of the gallery, 0 to 2"):
        ranks_of(x, x[:3])
    with pytest.raises(ShapeError, match=r"targets must be whole numbers \[4\]"):
        ranks_of(x, x, torch.zeros(4))
    with pytest.raises(InputError, match="leave_out names the target"):
        ranks_of(x, x, leave_out=torch.arange(4))
    with pytest.raises(ShapeError, match="of one model"):
        ranks_of(x, x[:, :2])
