"""What the README shows is what its command makes."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cmd_plugin.cli.commands import COMMANDS, Command, Given
from cmd_plugin.cli.main import make_app
from cmd_plugin.jobs.compare import train
from cmd_plugin.jobs.compare.options import TrainOptions
from cmd_plugin.runs.figures import read_about

ROOT = Path(__file__).parents[1]


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> TrainOptions:
    """The options of the README's command."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"\.venv/bin/cmd-plugin (train[^\n]*)", text)
    assert command is not None
    given: list[Given] = []

    def keep(_: Command, what: Given) -> int:
        given.append(what)
        return 0

    monkeypatch.setattr("cmd_plugin.cli.main._act", keep)
    make_app()(command[1].split(), exit_on_error=False, print_error=False)
    assert isinstance(given[0].options, TrainOptions)
    return given[0].options


def test_the_picture_is_drawn_with_the_options_of_the_command(options: TrainOptions) -> None:
    about = read_about(ROOT / "docs/report.png")
    assert about["options"] == options.as_dict()
    assert [seed["seed"] for seed in about["seeds"]] == list(options.all_seeds)


@pytest.mark.slow
def test_the_picture_shows_what_the_command_finds(options: TrainOptions) -> None:
    shown = read_about(ROOT / "docs/report.png")["seeds"][0]["accuracy"]
    torch.set_num_threads(2)  # as it was drawn: one thread adds up in another order
    found = train.run(replace(options, seeds=1)).metrics["per_seed"][0]["accuracy"]
    assert found.keys() == shown.keys()
    for name, accuracy in found.items():  # other processors round otherwise
        assert accuracy == pytest.approx(shown[name], abs=0.03), name


def test_every_command_of_the_documents_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    nouns = {command.name.split()[0] for command in COMMANDS}
    seen = 0
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for line in re.findall(r"^cmd-plugin ([^\n#]+)", page.read_text("utf-8"), re.MULTILINE):
            words = shlex.split(line)
            if words[0] not in nouns or "..." in line or line.rstrip().endswith("\\"):
                continue
            monkeypatch.setattr("cmd_plugin.cli.main._act", lambda *_: 0)
            make_app()(words, exit_on_error=False, print_error=False)
            seen += 1
    assert seen >= 5
