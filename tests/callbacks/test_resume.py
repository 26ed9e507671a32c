"""Checkpoints: exact resume at any phase, safe loading, clear refusal."""
# ruff: noqa: ARG002 - Lightning fixes the signatures of its hooks

from __future__ import annotations

import importlib
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_toys import (
    Counting,
    ResumableLoader,
    Toy,
    make_module,
    make_trainer,
    modelled_weights,
    same,
    toy_loader,
    train_with_checkpoints,
    weights_of,
)
from torch import nn

from cmd_plugin.callbacks import CMDCallback
from cmd_plugin.errors import StateMismatch
from tests.helpers.processes import run_script

HELPERS = Path(__file__).parents[1] / "helpers"
EPOCHS = 7


class Crash(Exception):
    """What stops the runs of this file."""


class Crashing(Counting):
    """Raises at the given optimizer step, after everything else of that step."""

    def __init__(self, at: int | None = None, **options: Any) -> None:
        super().__init__(**{"warmup": 3, **options})
        self.at = at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        if self.at is not None and trainer.global_step >= self.at:
            raise Crash


def no_dropout(namespace: str, kind: type = Toy, seed: int = 3, **options: Any) -> Any:
    """Without dropout a run does not depend on the random stream, which nobody saves."""
    return make_module(namespace, kind, seed=seed, dropout=0.0, **options)


def outcome(callback: CMDCallback, module: nn.Module) -> dict[str, Any]:
    assert callback.modes is not None
    return {"weights": weights_of(module), "state": callback.state_dict()}


def uninterrupted(namespace: str, options: dict[str, Any], **settings: Any) -> dict[str, Any]:
    callback, module = Crashing(**options), no_dropout(namespace)
    trainer = make_trainer(callback, namespace=namespace, **{"max_epochs": EPOCHS, **settings})
    trainer.fit(module, ResumableLoader(), toy_loader(seed=2))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {**outcome(callback, module), "metrics": metrics}


def keeper(namespace: str, folder: Path, **options: Any) -> Any:
    callbacks = importlib.import_module(f"{namespace}.callbacks")
    return callbacks.ModelCheckpoint(folder, save_last=True, **options)


def crash_and_resume(
    namespace: str,
    folder: Path,
    at: int,
    options: dict[str, Any],
    keep: dict[str, Any],
    **settings: Any,
) -> dict[str, Any]:
    settings = {"max_epochs": EPOCHS, "enable_checkpointing": True, **settings}
    first = Crashing(at, **options)
    trainer = make_trainer(
        first, keeper(namespace, folder, **keep), namespace=namespace, **settings
    )
    with pytest.raises(Crash):
        trainer.fit(no_dropout(namespace), ResumableLoader(), toy_loader(seed=2))
    second, module = Crashing(**options), no_dropout(namespace, seed=77)
    trainer = make_trainer(
        second, keeper(namespace, folder, **keep), namespace=namespace, **settings
    )
    trainer.fit(module, ResumableLoader(), toy_loader(seed=2), ckpt_path=folder / "last.ckpt")
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {**outcome(second, module), "metrics": metrics}


# Six steps an epoch. Checkpoints come at the end of each epoch or after every fourth or fifth step;
# the fit comes with the fourth snapshot, at step 24.
EPOCH_END: dict[str, Any] = {"save_on_train_epoch_end": True}
VALIDATION_END: dict[str, Any] = {"save_on_train_epoch_end": False}
STEPS: dict[str, Any] = {"every_n_train_steps": 4}
LAST_STEP: dict[str, Any] = {"every_n_train_steps": 6}


# Events after epochs 4 and 5 as well, that is, at steps 30 and 36.
EMBEDDED: dict[str, Any] = {"mode": "embedded", "embed_every": 1, "embed_percent": 20.0}


@pytest.mark.parametrize("at", [7, 20, 25, 32], ids=["warm-up", "before fit", "fitted", "later"])
@pytest.mark.parametrize(
    ("keep", "options"),
    [
        (EPOCH_END, {"evaluate": "both"}),
        (STEPS, {"evaluate": "both"}),
        (VALIDATION_END, {"evaluate": "modelled", "checkpoint_weights": "modelled"}),
        (LAST_STEP, {"evaluate": "raw", "shrink": True, "profile": "mean", "storage": "fp32"}),
        (STEPS, {"evaluate": "modelled", "every_n_steps": 4, "checkpoint_weights": "modelled"}),
        (STEPS, {"evaluate": "raw", **EMBEDDED, "project": "epoch"}),
        (EPOCH_END, {"evaluate": "modelled", **EMBEDDED, "project": "tie", "buffers": "keep"}),
        (STEPS, {"evaluate": "both", **EMBEDDED, "project": "pool"}),
    ],
    ids=[
        "epoch end",
        "steps",
        "validation end",
        "last step",
        "step schedule",
        "embedded",
        "tied",
        "pooled",
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, at: int, keep: dict[str, Any], options: dict[str, Any]
) -> None:
    expected = uninterrupted("pytorch_lightning", options)
    resumed = crash_and_resume("pytorch_lightning", tmp_path, at, options, keep)
    assert same(resumed["weights"], expected["weights"])
    assert same(resumed["state"], expected["state"])
    assert resumed["metrics"] == expected["metrics"]
    assert resumed["state"]["modes"]["updates"] == (
        EPOCHS if "every_n_steps" not in options else 10
    )


def test_resume_in_the_other_distribution(namespace: str, tmp_path: Path) -> None:
    """Same exactness, and a checkpoint written under one name loads under the other."""
    expected = uninterrupted(namespace, {})
    resumed = crash_and_resume(namespace, tmp_path, 20, {}, STEPS)
    assert same(resumed["state"], expected["state"])
    assert same(resumed["weights"], expected["weights"])


def test_resume_of_a_run_limited_by_steps(tmp_path: Path) -> None:
    """Lightning takes another path through its loops when max_steps is set."""
    settings = {"max_epochs": -1, "max_steps": 40}
    expected = uninterrupted("pytorch_lightning", {}, **settings)
    for number, keep in enumerate((VALIDATION_END, STEPS)):
        folder = tmp_path / str(number)
        resumed = crash_and_resume("pytorch_lightning", folder, 20, {}, keep, **settings)
        assert same(resumed["weights"], expected["weights"])
        assert same(resumed["state"], expected["state"])
    assert expected["state"]["modes"]["updates"] == 7


def test_an_epoch_that_ends_twice_counts_once(tmp_path: Path) -> None:
    """With max_steps, a run resumed from the end of an epoch calls on_train_epoch_end again."""

    class Ends(Crashing):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            self.events.append(("end", trainer.current_epoch, trainer.global_step))

    first, keep = Ends(20), keeper("pytorch_lightning", tmp_path, **EPOCH_END)
    settings = {"max_epochs": -1, "max_steps": 30, "enable_checkpointing": True}
    module = no_dropout("pytorch_lightning")
    with pytest.raises(Crash):
        make_trainer(first, keep, **settings).fit(module, ResumableLoader(), toy_loader(seed=2))
    second, keep = Ends(), keeper("pytorch_lightning", tmp_path, **EPOCH_END)
    trainer = make_trainer(second, keep, **settings)
    path = tmp_path / "last.ckpt"
    trainer.fit(module, ResumableLoader(), toy_loader(seed=2), ckpt_path=path)
    assert [event for event in second.events if event[0] in ("snapshot", "end")] == [
        ("end", 2, 18),
        ("snapshot", 3, 24),
        ("end", 3, 24),
        ("snapshot", 4, 30),
        ("end", 4, 30),
    ]
    assert second.modes is not None
    assert second.modes.updates == 5


def test_fraction_keeps_its_meaning_when_the_resumed_run_is_longer(tmp_path: Path) -> None:
    first = Crashing(warmup=0.5)
    trainer = make_trainer(first, max_epochs=8)
    trainer.fit(no_dropout("pytorch_lightning"), ResumableLoader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second = Crashing(warmup=0.5)
    trainer = make_trainer(second, max_epochs=20)
    module = no_dropout("pytorch_lightning")
    trainer.fit(module, ResumableLoader(), ckpt_path=tmp_path / "a.ckpt")
    assert second.modes is not None
    assert second.modes.state_dict()["config"]["warmup"] == 4
    assert second.modes.updates == 20


def test_checkpoint_loads_safely_in_both_phases(namespace: str, tmp_path: Path) -> None:
    for epochs in (2, 6):
        trainer = make_trainer(Crashing(), namespace=namespace, max_epochs=epochs)
        trainer.fit(no_dropout(namespace), ResumableLoader(), toy_loader(seed=2))
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)
        [key] = [key for key in loaded["callbacks"] if key.startswith("Crashing")]
        assert key == "Crashing{'prefix': 'cmd/'}"
        state = loaded["callbacks"][key]
        assert state["version"] == 1
        assert state["modes"]["updates"] == epochs
        assert state["asked_epoch"] == epochs - 1


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("evaluation", ["both", "modelled"])
def test_checkpoint_with_modelled_weights(namespace: str, tmp_path: Path, evaluation: str) -> None:
    """``state_dict`` serves a plain load, ``current_model_state`` the resumed training."""
    callback = Crashing(checkpoint_weights="modelled", evaluate=evaluation)
    module = no_dropout(namespace)
    keep = keeper(namespace, tmp_path, **VALIDATION_END)
    trainer = make_trainer(
        callback, keep, namespace=namespace, max_epochs=6, enable_checkpointing=True
    )
    trainer.fit(module, ResumableLoader(), toy_loader(seed=2))
    loaded = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert same(dict(loaded["state_dict"]), modelled_weights(callback, module))
    assert same(dict(loaded["current_model_state"]), weights_of(module))
    plain = type(module).load_from_checkpoint(tmp_path / "last.ckpt", dropout=0.0)
    assert same(weights_of(plain), modelled_weights(callback, module))
    # Testing from it: modelled weights are shown, raw ones are underneath.
    other, again = no_dropout(namespace, seed=9), Crashing(checkpoint_weights="modelled")
    trainer = make_trainer(again, namespace=namespace)
    trainer.test(other, toy_loader(seed=4), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert same(weights_of(other), weights_of(module))


def test_checkpoint_before_the_fit_has_raw_weights(tmp_path: Path) -> None:
    trainer = make_trainer(Crashing(checkpoint_weights="modelled"), max_epochs=2)
    trainer.fit(no_dropout("pytorch_lightning"), ResumableLoader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert "current_model_state" not in loaded


def test_checkpoint_written_inside_a_modelled_validation_has_raw_weights(tmp_path: Path) -> None:
    class Saving(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if batch_idx == 1 and not self.trainer.sanity_checking:
                self.shown = weights_of(self)
                self.trainer.save_checkpoint(tmp_path / "a.ckpt")
                assert same(weights_of(self), self.shown)

    module = no_dropout("pytorch_lightning", Saving)
    trainer = make_trainer(Crashing(evaluate="modelled"), max_epochs=5)
    trainer.fit(module, ResumableLoader(), toy_loader(seed=2))
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert same(dict(loaded["state_dict"]), weights_of(module))
    assert not same(module.shown, weights_of(module))


@pytest.mark.filterwarnings("ignore:.*was called without a model")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_crash_inside_a_modelled_validation_saves_raw_weights(
    namespace: str, tmp_path: Path
) -> None:
    class Broken(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.current_epoch == 4:
                raise Crash

    callbacks = importlib.import_module(f"{namespace}.callbacks")
    module = no_dropout(namespace, Broken)
    trainer = make_trainer(
        callbacks.OnExceptionCheckpoint(tmp_path, "crash"),
        Crashing(evaluate="modelled"),
        namespace=namespace,
        max_epochs=6,
        enable_checkpointing=True,
    )
    with pytest.raises(Crash):
        trainer.fit(module, ResumableLoader(), toy_loader(seed=2))
    loaded = torch.load(tmp_path / "crash.ckpt", weights_only=True)
    assert same(dict(loaded["state_dict"]), weights_of(module))
    # A shown model would differ from what the last training step left in the optimizer's tensors.
    alone = no_dropout(namespace)
    make_trainer(namespace=namespace, max_epochs=5).fit(alone, ResumableLoader())
    assert same(weights_of(module), weights_of(alone))


def test_resume_from_a_checkpoint_without_the_callback(namespace: str, tmp_path: Path) -> None:
    plain = make_trainer(namespace=namespace, max_epochs=2)
    plain.fit(no_dropout(namespace), ResumableLoader())
    plain.save_checkpoint(tmp_path / "a.ckpt")
    by_epoch, by_step = Crashing(prefix="a/"), Crashing(prefix="b/", every_n_steps=5)
    module = no_dropout(namespace)
    trainer = make_trainer(by_epoch, by_step, namespace=namespace, max_epochs=6)
    trainer.fit(module, ResumableLoader(), ckpt_path=tmp_path / "a.ckpt")
    assert [e[1:] for e in by_epoch.events if e[0] == "snapshot"] == [
        (2, 18), (3, 24), (4, 30), (5, 36),
    ]  # fmt: skip
    assert [e[2] for e in by_step.events if e[0] == "snapshot"] == [15, 20, 25, 30, 35]


class Wider(Toy):
    """A model with other shapes under the same names."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0, width=13)
        self.strict_loading = False

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.state_dict()
        checkpoint["optimizer_states"] = []


def test_a_changed_model_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(Crashing(), max_epochs=5)
    trainer.fit(no_dropout("pytorch_lightning"), ResumableLoader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer = make_trainer(Crashing(), max_epochs=7)
    with pytest.raises(StateMismatch, match=r"net\.0\.weight"):
        trainer.fit(make_module(kind=Wider), ResumableLoader(), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("options", "names"),
    [({"modes": 4}, "modes"), ({"samples": 50}, "samples"), ({"shrink": True}, "shrink")],
)
def test_changed_settings_are_refused(tmp_path: Path, options: dict[str, Any], names: str) -> None:
    trainer = make_trainer(Crashing(), max_epochs=5)
    trainer.fit(no_dropout("pytorch_lightning"), ResumableLoader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer = make_trainer(Crashing(**options), max_epochs=7)
    module = no_dropout("pytorch_lightning")
    with pytest.raises(StateMismatch, match=names):
        trainer.fit(module, ResumableLoader(), ckpt_path=tmp_path / "a.ckpt")


def test_a_state_of_another_version_is_refused() -> None:
    with pytest.raises(StateMismatch, match="version 2"):
        CMDCallback().load_state_dict({"version": 2})


def test_resuming_a_finished_run_keeps_its_state(tmp_path: Path) -> None:
    callback = Crashing()
    trainer = make_trainer(callback, max_epochs=5)
    trainer.fit(no_dropout("pytorch_lightning"), ResumableLoader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again, module = Crashing(), no_dropout("pytorch_lightning")
    trainer = make_trainer(again, max_epochs=5)
    trainer.fit(module, ResumableLoader(), ckpt_path=tmp_path / "a.ckpt")
    assert same(again.state_dict(), callback.state_dict())
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    states = [torch.load(tmp_path / f"{n}.ckpt", weights_only=True)["callbacks"] for n in "ab"]
    assert same(states[0], states[1])


KILLED = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from callback_toys import train_with_checkpoints
torch.set_num_threads(1)
train_with_checkpoints(Path(sys.argv[2]), kill_at=int(sys.argv[3]))
"""


@pytest.mark.slow
def test_killed_process_resumes_exactly(tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch: no hook runs, only the file on disk is left."""
    child = run_script(KILLED, str(HELPERS), str(tmp_path), "27")
    assert child.returncode == -signal.SIGKILL, child.stderr
    resumed = train_with_checkpoints(tmp_path, resume=True)
    assert same(resumed, train_with_checkpoints(tmp_path / "whole"))
    assert resumed["state"]["modes"]["updates"] == EPOCHS
