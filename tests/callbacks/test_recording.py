"""What monitors, loggers and the progress bar get of the modelled weights."""
# ruff: noqa: ARG002 - Lightning fixes the signatures of its hooks

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_toys import (
    PREFERRED,
    Counting,
    Toy,
    Watching,
    make_module,
    make_trainer,
    toy_loader,
)

from cmd_plugin.callbacks import CMDCallback


@pytest.mark.parametrize("weights", ["raw", "modelled"])
def test_a_checkpoint_chosen_by_modelled_weights_says_that_it_holds_raw_ones(
    weights: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callbacks = importlib.import_module(f"{PREFERRED}.callbacks")
    kept = callbacks.ModelCheckpoint(tmp_path, monitor="cmd/val_loss")
    callback = CMDCallback(modes=2, warmup=2, samples=20, checkpoint_weights=weights)  # type: ignore[arg-type]
    trainer = make_trainer(callback, kept, max_epochs=4, enable_checkpointing=True)
    trainer.fit(make_module(), toy_loader(), toy_loader(seed=2))
    said = [r for r in caplog.records if "saves the raw ones" in r.getMessage()]
    assert len(said) == (weights == "raw")


def test_monitors_see_the_metrics_of_the_modelled_weights(namespace: str, tmp_path: Path) -> None:
    """ModelCheckpoint in every phase, and a monitor that the user listed before the callback."""
    callbacks = importlib.import_module(f"{namespace}.callbacks")
    kept = callbacks.ModelCheckpoint(
        tmp_path, monitor="cmd/val_loss", filename="{epoch}", save_top_k=-1
    )
    early = callbacks.EarlyStopping("cmd/val_loss", patience=50)
    callback = Watching()
    trainer = make_trainer(
        early, callback, kept, namespace=namespace, max_epochs=6, enable_checkpointing=True
    )
    trainer.fit(make_module(namespace), toy_loader(), toy_loader(seed=2))
    losses = [logged["cmd/val_loss"] for logged, _, _ in callback.seen]
    assert float(kept.best_model_score) == min(losses)
    assert float(early.best_score) == min(losses)
    assert len(kept.best_k_models) == 6
    assert trainer.callbacks.index(callback) < trainer.callbacks.index(early)


def test_plateau_schedule_follows_the_modelled_weights() -> None:
    class Plateau(Toy):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            plan = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, mode="max")
            plan = {"scheduler": plan, "monitor": "cmd/val_loss"}
            return {"optimizer": optimizer, "lr_scheduler": plan}

    module = make_module(kind=Plateau)
    trainer = make_trainer(Counting(), max_epochs=4)
    trainer.fit(module, toy_loader(), toy_loader(seed=2))
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.1


def read_csv(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_loggers_get_both_at_the_same_step(namespace: str, tmp_path: Path) -> None:
    logger = importlib.import_module(f"{namespace}.loggers").CSVLogger(tmp_path, "", "")
    callback = Watching()
    make_trainer(callback, namespace=namespace, max_epochs=5, logger=logger).fit(
        make_module(namespace), toy_loader(), toy_loader(seed=2)
    )
    rows = read_csv(tmp_path)
    raw = {int(row["step"]): float(row["val_loss"]) for row in rows if row["val_loss"]}
    modelled = {int(r["step"]): float(r["cmd/val_loss"]) for r in rows if r["cmd/val_loss"]}
    epochs = {int(r["step"]): int(float(r["epoch"])) for r in rows if r["cmd/val_loss"]}
    assert raw.keys() == modelled.keys() == epochs.keys()
    assert list(epochs.values()) == [0, 1, 2, 3, 4]
    assert list(modelled.values()) == pytest.approx([s[0]["cmd/val_loss"] for s in callback.seen])
    assert list(raw.values()) == pytest.approx([s[0]["val_loss"] for s in callback.seen])
    variance = [
        float(row["cmd/explained_variance"]) for row in rows if row["cmd/explained_variance"]
    ]
    sizes = [float(row["cmd/state_bytes"]) for row in rows if row["cmd/state_bytes"]]
    assert callback.modes is not None
    assert len(variance) == 3
    assert variance[-1] == pytest.approx(callback.modes.explained_variance())
    assert len(sizes) == 5
    assert sizes[-1] == callback.modes.state_bytes == 9 * callback.modes.numel


def test_prefix_and_progress_bar() -> None:
    quiet, shown = Counting(prefix="quiet/"), Counting(prefix="bar_", prog_bar=True)
    trainer = make_trainer(quiet, shown, max_epochs=4)
    trainer.fit(make_module(), toy_loader(), toy_loader(seed=2))
    names = set(trainer.progress_bar_metrics)
    assert names == {"bar_val_loss", "bar_val_acc", "bar_state_bytes", "bar_explained_variance"}
    assert {"quiet/val_loss", "quiet/state_bytes"} <= set(trainer.callback_metrics)


def test_a_metric_kept_from_the_loggers_stays_out(tmp_path: Path, namespace: str) -> None:
    class Private(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("seen", 1.0, batch_size=1)
            self.log("hidden", 1.0, batch_size=1, logger=False)

    logger = importlib.import_module(f"{namespace}.loggers").CSVLogger(tmp_path, "", "")
    trainer = make_trainer(Counting(), namespace=namespace, max_epochs=4, logger=logger)
    trainer.fit(make_module(namespace, Private), toy_loader(), toy_loader(seed=2))
    assert "cmd/seen" in read_csv(tmp_path)[0]
    assert "cmd/hidden" not in read_csv(tmp_path)[0]
    assert trainer.callback_metrics["cmd/hidden"] == 1.0
