"""LightningCLI of both distributions: the callback in a YAML file."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from callback_toys import in_namespace, toy_loader

from cmd_plugin.callbacks import CMDCallback
from cmd_plugin.modes import Embedding

# Lightning calls jsonargparse in ways that its newest release deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*(JsonargparseDeprecationWarning|was deprecated in v)"
)

CONFIG: dict[str, Any] = {
    "trainer": {
        "max_epochs": 4,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {
                "class_path": "cmd_plugin.callbacks.CMDCallback",
                "init_args": {
                    "modes": 3,
                    "warmup": 0.5,
                    "samples": 60,
                    "evaluate": "both",
                    "include": ["net.*"],
                    "every_n_steps": 7,
                    "prog_bar": True,
                    "mode": "embedded",
                    "embed_every": 3,
                    "embed_percent": 20,
                    "relative": True,
                    "project": "step",
                    "slots": "zero",
                },
            }
        ],
    },
    "model": {"dropout": 0.1},
}


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns when it is called from Python while the process has arguments."""
    monkeypatch.setattr(sys, "argv", ["test"])


def run(namespace: str, arguments: list[str]) -> Any:
    cli = importlib.import_module(f"{namespace}.cli").LightningCLI
    return cli(
        in_namespace(namespace),
        args=arguments,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
    )


def test_round_trip(namespace: str, tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    cli = run(namespace, ["--config", str(path)])
    [callback] = [c for c in cli.trainer.callbacks if isinstance(c, CMDCallback)]
    assert (callback.number_of_modes, callback.warmup, callback.samples) == (3, 0.5, 60)
    assert (callback.include, callback.exclude, callback.every_n_steps) == (("net.*",), (), 7)
    assert callback.embedding == Embedding(3, 20, True, "step", "zero")
    cli.trainer.fit(cli.model, toy_loader(), toy_loader(seed=2))
    assert callback.modes is not None
    assert callback.modes.ready
    assert "cmd/val_loss" in cli.trainer.callback_metrics

    # What the CLI would save, read again, is the same callback.
    saved = cli.parser.dump(cli.config)
    again_path = tmp_path / "again.yaml"
    again_path.write_text(saved)
    again = run(namespace, ["--config", str(again_path)])
    [second] = [c for c in again.trainer.callbacks if isinstance(c, CMDCallback)]
    for name in (
        "number_of_modes", "warmup", "samples", "seed", "every_n_epochs", "every_n_steps",
        "evaluate", "test", "storage", "store_device", "buffers", "include", "exclude", "profile",
        "shrink", "forgetting", "checkpoint_weights", "prefix", "prog_bar", "mode", "embedding",
    ):  # fmt: skip
        assert getattr(second, name) == getattr(callback, name), name


def test_defaults_and_overrides_on_the_command_line(namespace: str) -> None:
    pytest.importorskip("jsonargparse")
    arguments = [
        "--trainer.callbacks=cmd_plugin.callbacks.CMDCallback",
        "--trainer.callbacks.modes=7",
        "--trainer.callbacks.warmup=5",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_model_summary=false",
        "--trainer.enable_progress_bar=false",
    ]
    cli = run(namespace, arguments)
    [callback] = [c for c in cli.trainer.callbacks if isinstance(c, CMDCallback)]
    assert callback.number_of_modes == 7
    assert callback.warmup == 5
    assert isinstance(callback.warmup, int)
    assert callback.evaluate == "both"


def test_a_wrong_value_names_the_argument(
    namespace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jsonargparse")
    arguments = [
        "--trainer.callbacks=cmd_plugin.callbacks.CMDCallback",
        "--trainer.callbacks.evaluate=cooked",
    ]
    with pytest.raises(SystemExit):
        run(namespace, arguments)
    assert "evaluate" in capsys.readouterr().err


def test_help_says_what_an_argument_means() -> None:
    parser = pytest.importorskip("jsonargparse").ArgumentParser()
    parser.add_class_arguments(CMDCallback, "cmd")
    assert "--cmd.modes MODES Number of modes M, 1 to 256." in " ".join(
        parser.format_help().split()
    )
