"""The monitor of point networks: right values, a training left alone, subsets on request."""

# ruff: noqa: ARG002 - Lightning fixes the signatures of its hooks

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from cmd_plugin.callbacks import PointImportanceMonitor
from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.pointcloud import (
    build_network,
    channels_first,
    point_importance,
    shape_clouds,
)

DATA = shape_clouds(24, 40)


class Net:
    """Mixed into each distribution's LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build_network("pointnet", 12, width=0.25)
        self.sizes: list[int] = []

    def forward(self, points: Tensor) -> Tensor:
        return self.net(points)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.sizes.append(batch[0].shape[1])
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Keeps:
    """Remembers the weights before every measurement, to measure again by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.states.append({k: v.clone() for k, v in pl_module.net.state_dict().items()})


def fit(
    namespace: str, folder: Path, *monitors: Any, epochs: int = 2, batch: Any = None
) -> tuple[Any, Any, Any]:
    """Train; the trainer, the module, and the weights at the end of each epoch."""
    lightning = importlib.import_module(namespace)
    torch.manual_seed(0)
    module = type("Module", (Net, lightning.LightningModule), {})()
    keeps = type("Keeper", (Keeps, lightning.Callback), {})()
    loader = DataLoader(DATA, batch_size=8, shuffle=True, collate_fn=batch)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[keeps, *monitors],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, loader)
    return trainer, module, keeps.states


def test_logged_values_are_those_of_the_functions(namespace: str, tmp_path: Path) -> None:
    monitor = PointImportanceMonitor(clouds=5, picture_every_n_epochs=2)
    seen: list[Tensor] = []
    measure = monitor._measure
    monitor._measure = lambda t, m, points, e: (seen.append(points), measure(t, m, points, e))  # type: ignore[method-assign, func-returns-value]
    trainer, _, states = fit(namespace, tmp_path, monitor)
    assert [len(points) for points in seen] == [5, 5]
    network = build_network("pointnet", 12, width=0.25)
    network.load_state_dict(states[-1])
    found = point_importance(network, seen[-1], "critical++")
    assert found.wins is not None
    assert found.entropy is not None
    logged = trainer.callback_metrics
    assert float(logged["importance/entropy"]) == pytest.approx(float(found.entropy.mean()), 1e-5)
    share = float((found.wins > 0).double().mean())
    assert float(logged["importance/critical_share"]) == pytest.approx(share, 1e-5)
    assert -1.0 <= float(logged["importance/rotation_consistency"]) <= 1.0
    assert float(logged["importance/outlier_alarms"]) >= 0.0
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["importance_epoch=001.png"]
    assert monitor._watched is None


def test_watching_changes_nothing(namespace: str, tmp_path: Path) -> None:
    _, plain, _ = fit(namespace, tmp_path)
    random = torch.get_rng_state()
    _, watched, _ = fit(namespace, tmp_path, PointImportanceMonitor(picture_every_n_epochs=1))
    assert torch.equal(random, torch.get_rng_state())
    expected, found = plain.state_dict(), watched.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert watched.sizes == [40] * 6
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in watched.modules()]
    assert sum(hooks) == 0


def test_subsets_differ_between_batches_and_repeat_with_the_seed(
    namespace: str, tmp_path: Path
) -> None:
    runs = [
        fit(namespace, tmp_path, PointImportanceMonitor(uncritical=True, fewest=10, seed=seed))[1]
        for seed in (3, 3, 4)
    ]
    assert runs[0].sizes == runs[1].sizes != runs[2].sizes
    assert all(10 <= size < 40 for size in runs[0].sizes)
    assert len(set(runs[0].sizes)) > 1
    first, second = runs[0].state_dict(), runs[1].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_how_often_to_look(namespace: str, tmp_path: Path) -> None:
    trainer, _, _ = fit(namespace, tmp_path, PointImportanceMonitor(every_n_epochs=3), epochs=2)
    assert "importance/entropy" not in trainer.callback_metrics


def test_batches_that_cannot_be_cut_or_read_are_refused(namespace: str, tmp_path: Path) -> None:
    def as_tuple(items: Any) -> tuple[Tensor, Tensor]:
        points, labels = zip(*items, strict=True)
        return torch.stack(points), torch.stack(labels)

    fit(namespace, tmp_path, PointImportanceMonitor(), epochs=1, batch=as_tuple)
    with pytest.raises(InputError, match="lists or dictionaries, not tuple"):
        fit(namespace, tmp_path, PointImportanceMonitor(uncritical=True), batch=as_tuple)
    monitor = PointImportanceMonitor(points_key="cloud")
    batch = {"cloud": torch.zeros(2, 5, 3), "label": torch.zeros(2)}
    assert monitor._points(batch) is batch["cloud"]
    monitor._replace(batch, torch.ones(2, 4, 3))
    assert batch["cloud"].shape == (2, 4, 3)
    with pytest.raises(InputError, match="no clouds"):
        monitor._points({"points": 1})


def test_a_module_that_takes_channels_first_says_so_and_is_watched(
    namespace: str, tmp_path: Path
) -> None:
    class ChannelsFirst:
        """Calls the network on [B, 3, N] batches, as most public PointNets want them."""

        def forward(self, points: Tensor) -> Tensor:
            if points.shape[1] != 3:
                raise RuntimeError(f"expected 3 channels, got {points.shape[1]}")
            return self.net(points.transpose(1, 2))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self(batch[0].transpose(1, 2)), batch[1])

    lightning = importlib.import_module(namespace)
    for forward in (None, channels_first):
        kind = type("Module", (ChannelsFirst, Net, lightning.LightningModule), {})
        monitor = PointImportanceMonitor(**({"forward": forward} if forward else {}))
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[monitor],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        loader = DataLoader(DATA, batch_size=8)
        if forward is None:
            with pytest.raises(ShapeError, match="forward=channels_first"):
                trainer.fit(kind(), loader)
        else:
            trainer.fit(kind(), loader)
            assert 0.0 < float(trainer.callback_metrics["importance/entropy"]) < 1.0


def test_networks_without_a_maximum_say_so(namespace: str) -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(3, 8), nn.Linear(8, 12)

        def forward(self, points: Tensor) -> Tensor:
            scores: Tensor = self.head(self.layer(points).mean(dim=1))
            return scores

    lightning = importlib.import_module(namespace)
    module = type("Module", (Net, lightning.LightningModule), {})()
    module.net = Mean()
    with pytest.raises(InputError, match="not a maximum"):
        PointImportanceMonitor()._measure(None, module, torch.randn(2, 9, 3), 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("every_n_epochs", 0),
        ("clouds", 0),
        ("alarm", 0.0),
        ("axis", 3),
        ("fewest", 0),
        ("seed", -1),
    ],
)
def test_wrong_arguments_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        PointImportanceMonitor(**{name: value})


@pytest.mark.filterwarnings("ignore:(?s).*(JsonargparseDeprecationWarning|was deprecated in v)")
def test_it_pickles_and_reads_from_a_configuration() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    again = pickle.loads(pickle.dumps(PointImportanceMonitor(clouds=3)))
    assert again.clouds == 3
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PointImportanceMonitor, "monitor")
    kind = "cmd_plugin.callbacks.PointImportanceMonitor"
    config = {"class_path": kind, "init_args": {"clouds": 7, "uncritical": True}}
    made = parser.instantiate_classes(parser.parse_object({"monitor": config})).monitor
    assert (made.clouds, made.uncritical) == (7, True)
