"""MCE, RmCE and mOA as the published tables have them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.pointcloud import CORRUPTIONS, CorruptionError, mean_corruption_error
from cmd_plugin.pointcloud.corruption_error import DGCNN_ACCURACY

# Accuracy level by level of the authors' RPC + WolfMix + EPiC, and the row they print.
RUN_LOG = {
    "scale": [0.9165, 0.9190, 0.9133, 0.9133, 0.9060],
    "jitter": [0.9125, 0.8898, 0.8197, 0.7314, 0.5717],
    "rotate": [0.9283, 0.9242, 0.9173, 0.8707, 0.7755],
    "drop_global": [0.9271, 0.9234, 0.9275, 0.9206, 0.9096],
    "drop_local": [0.9238, 0.9218, 0.9169, 0.9129, 0.8874],
    "add_global": [0.9287, 0.9254, 0.9283, 0.9234, 0.9238],
    "add_local": [0.9194, 0.9096, 0.9019, 0.8878, 0.8562],
}
PRINTED_CE = [0.915, 0.680, 0.544, 0.315, 0.420, 0.251, 0.382]


@pytest.mark.parametrize("rounding", ["official", "exact"])
def test_the_reference_network_has_error_one(rounding: str) -> None:
    row = {name: DGCNN_ACCURACY[name] for name in CORRUPTIONS}
    result = mean_corruption_error(row, DGCNN_ACCURACY["clean"], rounding=rounding)
    assert result.mce == 1.0
    assert result.rmce == 1.0
    assert set(result.ce.values()) == {1.0}


def test_the_published_summary_of_three_decimals() -> None:
    row = dict(zip(CORRUPTIONS, [0.914, 0.785, 0.883, 0.922, 0.913, 0.926, 0.895], strict=True))
    result = mean_corruption_error(row, 0.927)
    assert (result.mce, result.rmce, result.moa) == (0.501, 0.264, 0.891)


def test_the_published_row_from_the_levels() -> None:
    result = mean_corruption_error(RUN_LOG, 0.9271)
    assert list(result.ce.values()) == PRINTED_CE
    assert (result.mce, result.rmce, result.moa, result.clean) == (0.501, 0.264, 0.891, 0.927)


def test_exact_means_no_rounding_anywhere() -> None:
    result = mean_corruption_error(RUN_LOG, 0.9271, rounding="exact")
    errors = [(1 - sum(RUN_LOG[name]) / 5) / (1 - DGCNN_ACCURACY[name]) for name in CORRUPTIONS]
    assert result.mce == pytest.approx(sum(errors) / 7, rel=1e-14)
    lost = [
        (0.9271 - sum(RUN_LOG[name]) / 5) / (0.926 - DGCNN_ACCURACY[name]) for name in CORRUPTIONS
    ]
    assert result.rmce == pytest.approx(sum(lost) / 7, rel=1e-14)
    assert result.moa == pytest.approx(sum(sum(row) for row in RUN_LOG.values()) / 35, rel=1e-14)
    assert result.mce != mean_corruption_error(RUN_LOG, 0.9271).mce


def test_a_network_may_be_the_reference_of_another() -> None:
    reference = {**dict.fromkeys(CORRUPTIONS, 0.5), "clean": 0.9}
    result = mean_corruption_error(
        dict.fromkeys(CORRUPTIONS, 0.75), 0.95, rounding="exact", reference=reference
    )
    assert result.mce == pytest.approx(0.5)
    assert result.rmce == pytest.approx(0.5)


def test_arrays_and_scalars_of_numpy_and_torch_are_accuracies() -> None:
    plain = {name: [0.5, 0.7] for name in CORRUPTIONS}
    for kind in (np.array, torch.tensor):
        given = {name: kind(row) for name, row in plain.items()}
        result = mean_corruption_error(given, kind(0.9), rounding="exact")
        assert result.moa == pytest.approx(0.6)
    assert mean_corruption_error(plain, np.float32(0.9)).clean == 0.9


def test_bad_tables() -> None:
    row = dict.fromkeys(CORRUPTIONS, 0.5)
    with pytest.raises(InputError, match="accuracy lacks jitter and has unknown blur"):
        mean_corruption_error({**{k: v for k, v in row.items() if k != "jitter"}, "blur": 1}, 0.9)
    for bad in (1.1, -0.1, math.nan, [], [0.5, math.nan]):
        with pytest.raises(InputError, match=r"accuracy of 'jitter' must be in \[0, 1\]"):
            mean_corruption_error({**row, "jitter": bad}, 0.9)
    with pytest.raises(InputError, match="accuracy of 'clean'"):
        mean_corruption_error(row, 92.6)
    with pytest.raises(InputError, match="rounding"):
        mean_corruption_error(row, 0.9, rounding="floor")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="reference lacks clean"):
        mean_corruption_error(row, 0.9, reference=row)
    with pytest.raises(InputError, match="must lose accuracy under scale"):
        mean_corruption_error(row, 0.9, reference={**row, "clean": 0.5})


def filled(metric: CorruptionError, clouds: int = 40, seed: int = 0) -> CorruptionError:
    """Every cell with random predictions; odd cells as scores, even ones as labels."""
    generator = torch.Generator().manual_seed(seed)
    cells = [("clean", 0)] + [(name, level) for name in CORRUPTIONS for level in range(5)]
    for number, (name, level) in enumerate(cells):
        scores = torch.randn(clouds, 4, generator=generator)
        target = torch.randint(4, (clouds,), generator=generator)
        scores[torch.arange(0, clouds, 2), target[::2]] += 2.0
        metric.update(scores if number % 2 else scores.argmax(dim=1), target, name, level)
    return metric


def test_the_metric_counts_cell_by_cell() -> None:
    metric = CorruptionError("exact")
    target = torch.tensor([0, 1, 2, 0])
    filled(metric)
    metric.reset()
    for name in CORRUPTIONS:
        for level in range(5):
            hits = (CORRUPTIONS.index(name) + level) % 5
            labels = target.clone()
            labels[hits:] = 3
            metric.update(labels, target, name, level)
    metric.update(target, target)
    metric.update(torch.full((4,), 3), target)
    accuracy = metric.accuracy()
    assert accuracy["clean"] == [0.5]
    assert accuracy["jitter"] == [0.25, 0.5, 0.75, 1.0, 0.0]
    summary = metric.summary()
    assert summary == mean_corruption_error(
        {k: v for k, v in accuracy.items() if k != "clean"}, 0.5, rounding="exact"
    )
    computed = metric.compute()
    assert float(computed["mCE"]) == summary.mce
    assert float(computed["CE_scale"]) == summary.ce["scale"]
    assert len(computed) == 4 + 3 * 7


def test_batches_and_processes_add_up() -> None:
    whole, first, second = CorruptionError(), CorruptionError(), CorruptionError()
    filled(whole, seed=1)
    filled(whole, seed=2)
    filled(first, seed=1)
    filled(second, seed=2)
    # What torchmetrics does across processes: states are summed.
    for state in ("correct", "seen"):
        assert first._reductions[state] is not None
        setattr(first, state, getattr(first, state) + getattr(second, state))
    assert first.compute() == whole.compute()
    restored = CorruptionError()
    restored.persistent(mode=True)
    whole.persistent(mode=True)
    restored.load_state_dict(whole.state_dict())
    assert restored.summary() == whole.summary()


def test_the_metric_refuses_what_it_cannot_count() -> None:
    metric = CorruptionError()
    target = torch.tensor([0, 1])
    with pytest.raises(ShapeError, match="preds must be"):
        metric.update(torch.zeros(3, 2), target)
    with pytest.raises(InputError, match="no corruption 'blur' at level 0"):
        metric.update(target, target, "blur")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'clean' at level 1"):
        metric.update(target, target, "clean", 1)
    metric.update(target, target)
    with pytest.raises(InputError, match="no clouds were seen for every level of scale, jitter"):
        metric.compute()
