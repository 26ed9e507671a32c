"""The monitor of diffusion models: right values, a training left alone, an exact resume."""

# ruff: noqa: ARG002 - Lightning fixes the signatures of its hooks

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cmd_plugin.callbacks import MemorizationMonitor
from cmd_plugin.diffusion import (
    MemorizationScore,
    NoiseSchedule,
    ProbeSet,
    ScoreModel,
    separate,
    separate_doses,
)
from cmd_plugin.errors import InputError, StateMismatch

D = 6
SCHEDULE = NoiseSchedule.linear()
GENERATOR = torch.Generator().manual_seed(0)
DATA = torch.rand(12, D, generator=GENERATOR) * 2 - 1
PROBES = ProbeSet(
    DATA[:8], torch.rand(8, D, generator=GENERATOR) * 2 - 1, torch.tensor([1] * 4 + [4] * 4)
)
OPTIONS: dict[str, Any] = {"t": (50, 200), "directions": 4}


class Net:
    """Mixed into each distribution's LightningModule: a denoiser that does not see the time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, D))

    def score_model(self) -> ScoreModel:
        return ScoreModel(lambda y, *_: self.net(y), SCHEDULE, (D,), networks=[self.net])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        kept = SCHEDULE.alphas_cumprod[200].float()  # type: ignore[index]
        e = torch.randn(batch[0].shape)
        return (self.net(kept.sqrt() * batch[0] + (1 - kept).sqrt() * e) - e).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.03)


class Keeps:
    """Remembers the weights after every epoch, to measure again by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.states.append({k: v.clone() for k, v in pl_module.net.state_dict().items()})


def fit(
    namespace: str,
    folder: Path,
    *monitors: Any,
    epochs: int = 2,
    start: Path | None = None,
    **options: Any,
) -> tuple[Any, Any, list[dict[str, Tensor]]]:
    lightning = importlib.import_module(namespace)
    torch.manual_seed(0)
    module = type("Module", (Net, lightning.LightningModule), {})()
    keeps = type("Keeper", (Keeps, lightning.Callback), {})()
    loader = DataLoader(TensorDataset(DATA), batch_size=4)
    settings: dict[str, Any] = {"enable_checkpointing": False, **options}
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[keeps, *monitors],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **settings,
    )
    trainer.fit(module, loader, ckpt_path=start)
    return trainer, module, keeps.states


def test_what_is_logged_is_the_score_of_the_probes(namespace: str, tmp_path: Path) -> None:
    monitor = MemorizationMonitor(PROBES, picture_every_n_epochs=2, **OPTIONS)
    trainer, module, states = fit(namespace, tmp_path, monitor)
    module.net.load_state_dict(states[-1])
    score = MemorizationScore(module.score_model(), (50, 200), directions=4)
    members, held_out = score(PROBES.members), score(PROBES.held_out)
    expected = separate(held_out, members)["auroc"]
    doses = separate_doses(held_out, members, PROBES.each_dose())
    logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert set(expected) == {"p1", "p2", "mse", "centre_norm", "sharpness", "flipd"}
    for name in expected:
        assert logged[f"memorization/{name}"] == pytest.approx(expected[name][0])
        for dose in (1, 4):
            assert logged[f"memorization/{name}_x{dose}"] == pytest.approx(doses[name][dose][0])
    gap = members.values["p1"][:, 0].mean() - held_out.values["p1"][:, 0].mean()
    assert logged["memorization/gap"] == pytest.approx(float(gap), abs=1e-6)
    assert [look["step"] for look in monitor.history] == [3, 6]
    assert monitor.history[-1]["auroc"] == expected
    assert monitor.history[-1]["doses"] == doses
    assert [path.name for path in tmp_path.glob("*.png")] == ["memorization_epoch=001.png"]


def test_watching_changes_nothing(namespace: str, tmp_path: Path) -> None:
    _, plain, _ = fit(namespace, tmp_path)
    random = torch.get_rng_state()
    monitor = MemorizationMonitor(PROBES, picture_every_n_epochs=1, **OPTIONS)
    _, watched, _ = fit(namespace, tmp_path, monitor)
    assert torch.equal(random, torch.get_rng_state())
    expected, found = plain.state_dict(), watched.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert watched.net.training == plain.net.training


def test_a_resumed_run_has_seen_what_an_uninterrupted_one_has(
    namespace: str, tmp_path: Path
) -> None:
    whole = MemorizationMonitor(PROBES, **OPTIONS)
    straight, module, _ = fit(namespace, tmp_path / "a", whole, epochs=4)
    first = MemorizationMonitor(PROBES, **OPTIONS)
    trainer, _, _ = fit(namespace, tmp_path / "b", first, epochs=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    state = torch.load(tmp_path / "two.ckpt", weights_only=True)
    assert any("MemorizationMonitor" in key for key in state["callbacks"])
    random = torch.get_rng_state()
    second = MemorizationMonitor(PROBES, **OPTIONS)
    lightning = importlib.import_module(namespace)
    torch.manual_seed(0)
    resumed = type("Module", (Net, lightning.LightningModule), {})()
    again = lightning.Trainer(
        max_epochs=4, accelerator="cpu", callbacks=[second], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    torch.set_rng_state(random)
    again.fit(
        resumed, DataLoader(TensorDataset(DATA), batch_size=4), ckpt_path=tmp_path / "two.ckpt"
    )
    assert second.history == whole.history
    assert second.tau_mem == whole.tau_mem
    assert all(
        torch.equal(value, resumed.state_dict()[name])
        for name, value in module.state_dict().items()
    )
    assert straight.global_step == again.global_step


class Scripted(MemorizationMonitor):
    """Sees members whose p1 lies above that of held-out images by a given lead at each look."""

    def __init__(self, leads: list[float], **options: Any) -> None:
        super().__init__(PROBES, t=(50,), controls=(), **options)
        self.leads = leads

    def _reports(self, pl_module: Any) -> Any:
        members, held_out = super()._reports(pl_module)
        lead = self.leads[len(self.history)]
        held_out.values["p1"].copy_(torch.linspace(0, 0.7, 8, dtype=torch.float64)[:, None])
        members.values["p1"].copy_(held_out.values["p1"] + lead)
        members.values["p1"][4:] += 0.3 * (lead > 0)
        return members, held_out


def test_tau_is_the_first_step_above_the_limit_and_stays(tmp_path: Path) -> None:
    monitor = Scripted([0.0, 0.0, 0.11, 1.0, 0.0])
    trainer, _, _ = fit("pytorch_lightning", tmp_path, monitor, epochs=5)
    at = {group: [] for group in ("all", "x1", "x4")}
    for look in monitor.history:
        at["all"].append(look["auroc"]["p1"][0])
        at["x1"].append(look["doses"]["p1"][1][0])
        at["x4"].append(look["doses"]["p1"][4][0])
    for group, values in at.items():
        expected = next((3 * (n + 1) for n, value in enumerate(values) if value > 0.6), None)
        assert monitor.tau_mem.get(group) == expected
    assert monitor.tau_mem["all"] == 9
    assert float(trainer.callback_metrics["memorization/tau_mem"]) == 9.0


def test_training_stops_when_the_gap_goes_on_rising(tmp_path: Path) -> None:
    leads = [0.0, 0.1, 0.2, 0.1, 0.2, 0.3, 0.4, 0.5]
    monitor = Scripted(leads, patience=3)
    trainer, _, _ = fit("pytorch_lightning", tmp_path, monitor, epochs=8)
    assert trainer.current_epoch == 7
    assert len(monitor.history) == 7
    watching = Scripted(leads)
    fit("pytorch_lightning", tmp_path, watching, epochs=8)
    assert len(watching.history) == 8


def test_it_looks_as_often_as_asked_and_takes_its_probes_from_a_file(tmp_path: Path) -> None:
    PROBES.save(tmp_path / "probes.safetensors")
    monitor = MemorizationMonitor(
        str(tmp_path / "probes.safetensors"), every_n_epochs=2, controls=("mse",), **OPTIONS
    )
    fit("pytorch_lightning", tmp_path, monitor, epochs=3)
    assert [look["epoch"] for look in monitor.history] == [1]
    assert list(monitor.history[0]["auroc"]) == ["p1", "p2", "mse"]


@pytest.mark.filterwarnings("ignore:(?s).*(JsonargparseDeprecationWarning|was deprecated in v)")
def test_it_pickles_and_reads_from_a_configuration(tmp_path: Path) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    path = str(tmp_path / "probes.safetensors")
    PROBES.save(path)
    again = pickle.loads(pickle.dumps(MemorizationMonitor(path, patience=3)))
    assert again.patience == 3
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(MemorizationMonitor, "monitor")
    kind = "cmd_plugin.callbacks.MemorizationMonitor"
    config = {"class_path": kind, "init_args": {"probes": path, "t": [10, 20], "patience": 2}}
    made = parser.instantiate_classes(parser.parse_object({"monitor": config})).monitor
    assert (made.t, made.patience) == ((10, 20), 2)
    assert torch.equal(made.probes.members, PROBES.members)


def test_wrong_arguments_fail_where_they_are_written(tmp_path: Path) -> None:
    for options in (
        {"every_n_epochs": 0},
        {"limit": 0.4},
        {"patience": -1},
        {"t": ()},
        {"directions": 0},
    ):
        with pytest.raises(InputError):
            MemorizationMonitor(PROBES, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="there is no file"):
        MemorizationMonitor(str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"score_model\(\)"):
        MemorizationMonitor(PROBES).score_model(nn.Linear(1, 1))
    monitor = MemorizationMonitor(PROBES)
    with pytest.raises(StateMismatch):
        monitor.load_state_dict({"history": None})
