"""The output folder of a comparison, written so that a killed run leaves no halves.

::

    metrics.csv               seed,epoch,variant,loss,accuracy: one row per evaluation
    result.json               the table, complete (written last)
    modes.safetensors         the first seed's decomposition
    model_cmd.safetensors     the first seed's network with modelled weights
    report.png
    checkpoints/epoch=NNN.ckpt    the first seed's weights after each epoch
    resume/config.json        options of the run
    resume/seedS/last.ckpt    everything needed to go on after the last finished epoch
    resume/seedS/done.json    the seed's result, once it is finished
    embedded/                 the same files of the embedded trainings, if there are any
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmd_plugin.errors import InputError
from cmd_plugin.networks import Score

__all__ = ["Row", "RunFolder", "write_atomically"]

_HEADER = ("seed", "epoch", "variant", "loss", "accuracy")


@dataclass(frozen=True)
class Row:
    """One evaluation: a line of metrics.csv."""

    seed: int
    epoch: int
    variant: str
    score: Score


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    temporary.replace(path)


class RunFolder:
    """Access to the files of one comparison.

    Args:
        out: The folder; :meth:`open` creates it.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.metrics = out / "metrics.csv"
        self.result = out / "result.json"
        self.modes = out / "modes.safetensors"
        self.model = out / "model_cmd.safetensors"
        self.report = out / "report.png"
        self.checkpoints = out / "checkpoints"
        self.resume = out / "resume"
        self._config = self.resume / "config.json"

    @property
    def embedded(self) -> RunFolder:
        """Where the files of the embedded trainings lie."""
        return RunFolder(self.out / "embedded")

    @property
    def started(self) -> bool:
        """Whether a run has been started here."""
        return self._config.exists()

    def seed_folder(self, seed: int) -> Path:
        """Where the state of one seed lies."""
        return self.resume / f"seed{seed}"

    def last_checkpoint(self, seed: int) -> Path:
        """The full checkpoint after the last finished epoch of a seed."""
        return self.seed_folder(seed) / "last.ckpt"

    def epoch_checkpoint(self, epoch: int) -> Path:
        """The weights after an epoch of the first seed."""
        return self.checkpoints / f"epoch={epoch:03d}.ckpt"

    def correlation(self, seed: int) -> Path:
        """The correlation matrix the modes of a seed were made from."""
        return self.seed_folder(seed) / "correlation.safetensors"

    def open(self, config: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Make the folder ready: empty for a new run, as it was for a resumed one.

        Args:
            config: The options that decide the results.
            resume: Continue the run that lies there.
            overwrite: Replace an unfinished run; a finished one is always replaced.

        Raises:
            InputError: If the folder cannot be written to, holds an unfinished run that is neither
                resumed nor overwritten, or a resumed run had other options.
        """
        self._check_writable()
        before = self._read_config()
        if resume:
            if before is None:
                raise InputError(f"{self.out} holds no run to resume: leave out --resume.")
            self._compare(before, config)
            return
        if before is not None and not self.result.exists() and not overwrite:
            message = (
                f"{self.out} holds an unfinished run: add --resume to finish it, --overwrite to "
                "replace it, or choose another --out."
            )
            raise InputError(message)
        self._clear()
        self.resume.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config, indent=2) + "\n"
        write_atomically(self._config, lambda path: path.write_text(text, encoding="utf-8"))
        self._write_rows([])

    def _check_writable(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.out):
                pass
        except OSError as error:
            message = f"cannot write to --out {self.out} ({error.strerror}): choose another folder."
            raise InputError(message) from error

    def _read_config(self) -> dict[str, Any] | None:
        if not self._config.exists():
            return None
        try:
            config: dict[str, Any] = json.loads(self._config.read_text(encoding="utf-8"))
        except ValueError as error:
            message = f"{self._config} is damaged: start again with --overwrite."
            raise InputError(message) from error
        return config

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                message = (
                    f"the run in {self.out} was started with {name}={before.get(name)}, now it is "
                    f"{now.get(name)}: resume with the same options or choose another --out."
                )
                raise InputError(message)

    def _clear(self) -> None:
        # Only files this class writes; whatever else lies there belongs to somebody else.
        for path in (self.result, self.metrics, self.modes, self.model, self.report, self._config):
            path.unlink(missing_ok=True)
        for path in self.checkpoints.glob("epoch=*.ckpt"):
            path.unlink()
        for folder in self.resume.glob("seed*"):
            for name in ("last.ckpt", ".last.ckpt.tmp", "done.json", "correlation.safetensors"):
                (folder / name).unlink(missing_ok=True)
        if self.embedded.started:
            self.embedded._clear()

    # -- metrics.csv ------------------------------------------------------------------------------

    def append(self, rows: list[Row]) -> None:
        """Add the rows of an epoch."""
        with self.metrics.open("a", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(_cells(row) for row in rows)

    def rows(self) -> list[Row]:
        """All complete rows, in the order they were written."""
        if not self.metrics.exists():
            return []
        with self.metrics.open(newline="", encoding="utf-8") as stream:
            lines = stream.read().splitlines(keepends=True)
        # A kill may have cut the last line short.
        complete = [line for line in lines if line.endswith("\n")][1:]
        return [
            Row(int(seed), int(epoch), variant, Score(float(loss), float(accuracy)))
            for seed, epoch, variant, loss, accuracy in csv.reader(complete)
        ]

    def forget_from(self, seed: int, epoch: int) -> None:
        """Drop the rows of a seed from an epoch on, because they are going to be made again."""
        self._write_rows([row for row in self.rows() if row.seed != seed or row.epoch < epoch])

    def _write_rows(self, rows: list[Row]) -> None:
        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.writer(stream)
                writer.writerow(_HEADER)
                writer.writerows(_cells(row) for row in rows)

        write_atomically(self.metrics, write)

    # -- results ----------------------------------------------------------------------------------

    def finish_seed(self, seed: int, result: Mapping[str, Any]) -> None:
        """Keep the result of a finished seed and drop what only an unfinished one needs."""
        path = self.seed_folder(seed) / "done.json"
        write_json(path, result)
        self.last_checkpoint(seed).unlink(missing_ok=True)

    def finished_seed(self, seed: int) -> dict[str, Any] | None:
        """The result of a seed, or `None` if it is not finished."""
        path = self.seed_folder(seed) / "done.json"
        if not path.exists():
            return None
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON (no NaN) in one step."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _cells(row: Row) -> tuple[str, ...]:
    # repr keeps every digit of a float.
    loss, accuracy = row.score
    return (str(row.seed), str(row.epoch), row.variant, repr(loss), repr(accuracy))
