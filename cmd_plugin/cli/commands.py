"""Every command: which options it has, what it runs, and how its result is shown.

The options come from the job's dataclass; there is no list of them here. What a command needs is
named by import strings, so that asking for help, or a typing error, loads no torch.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

from cmd_plugin.runs.options import JobOptions, option_fields

__all__ = ["COMMANDS", "Command", "make_function"]


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: Its words, for example ``"points train"``.
        options: Where its options are, ``"module:class"``.
        run: Where the function is that does it.
        show: Where the function is that prints a result.
    """

    name: str
    options: str
    run: str
    show: str

    @property
    def default_out(self) -> Path:
        """Where results go if nobody says."""
        return Path("out", self.name.replace(" ", "-"))


def _job(name: str, module: str, kind: str, run: str, show: str) -> Command:
    return Command(
        name, f"cmd_plugin.jobs.{module}:{kind}", f"cmd_plugin.jobs.{run}", f"cmd_plugin.cli.{show}"
    )


COMMANDS = (
    _job("train", "compare.options", "TrainOptions", "compare.train:run", "show_train:show"),
    _job("decompose", "decompose", "DecomposeOptions", "decompose:run", "show_decompose:show"),
    _job(
        "points train",
        *("points.options", "TrainOptions", "points.train:run", "show_points:show_train"),
    ),
    _job(
        "points robustness",
        *("points.options", "RobustnessOptions"),
        *("points.robustness:run", "show_points:show_robustness"),
    ),
    _job(
        "points explain",
        *("points.options", "ExplainOptions", "points.explain:run", "show_points:show_explain"),
    ),
    _job(
        "diffusion train",
        *("diffusion.options", "TrainOptions", "diffusion.train:run", "show_diffusion:show_train"),
    ),
    _job(
        "diffusion memorization",
        *("diffusion.options", "MemorizationOptions"),
        *("diffusion.memorization:run", "show_diffusion:show_memorization"),
    ),
    _job(
        "diffusion calibrate",
        *("diffusion.options", "CalibrateOptions"),
        *("diffusion.detect:calibrate", "show_diffusion:show_calibrate"),
    ),
    _job(
        "diffusion detect",
        *("diffusion.options", "DetectOptions"),
        *("diffusion.detect:detect", "show_diffusion:show_detect"),
    ),
    _job(
        "diffusion fewshot",
        *("diffusion.options", "FewShotOptions"),
        *("diffusion.fewshot:run", "show_diffusion:show_fewshot"),
    ),
    _job(
        "distinction train",
        *("distinction.options", "TrainOptions"),
        *("distinction.train:run", "show_distinction:show_train"),
    ),
    _job(
        "distinction evaluate",
        *("distinction.options", "EvaluateOptions"),
        *("distinction.evaluate:run", "show_distinction:show_evaluate"),
    ),
    _job(
        "distinction explain",
        *("distinction.options", "ExplainOptions"),
        *("distinction.explain:run", "show_distinction:show_explain"),
    ),
    _job(
        "federated simulate",
        *("federated.options", "SimulateOptions", "federated.simulate:run"),
        "show_federated:show",
    ),
    _job(
        "clip fit",
        *("clip.options", "FitOptions", "clip.fit:run", "show_clip:show_fit"),
    ),
    _job(
        "clip score",
        *("clip.options", "ScoreOptions", "clip.score:run", "show_clip:show_score"),
    ),
    _job(
        "clip report",
        *("clip.options", "ReportOptions", "clip.report:run", "show_clip:show_report"),
    ),
    _job(
        "clip merge",
        *("clip.options", "MergeOptions", "clip.merge:run", "show_clip:show_merge"),
    ),
    _job(
        "clip compare",
        *("clip.options", "CompareOptions", "clip.compare:run", "show_clip:show_compare"),
    ),
    _job(
        "clip align",
        *("clip.options", "AlignOptions", "clip.align:run", "show_clip:show_align"),
    ),
    _job("bench kernels", "bench", "BenchOptions", "bench:run", "show_bench:show"),
)


def load(place: str) -> Any:
    """Return what an import string names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Given:
    """What a user gave: the job's options, and what every command has besides."""

    options: JobOptions
    out: Path
    resume: bool
    overwrite: bool
    json: bool
    quiet: bool


_OUTPUT = "Output"
_SHARED: tuple[tuple[str, type, Any, str], ...] = (
    ("resume", bool, False, "Go on with the unfinished run in --out."),
    (
        "overwrite",
        bool,
        False,
        "Replace the run in --out; a finished one once this is complete.",
    ),
    ("json", bool, False, "Print result.json and nothing else."),
    ("quiet", bool, False, "No progress bar."),
)


def make_function(command: Command, act: Callable[[Command, Given], int]) -> Callable[..., int]:
    """Return the function that cyclopts makes a command of.

    Args:
        command: The command.
        act: Is given what the user gave; returns the exit code.
    """
    kind: type[JobOptions] = load(command.options)
    parameters = [*_own_parameters(kind), *_shared_parameters(command)]
    signature = inspect.Signature(sorted(parameters, key=lambda p: p.kind))
    own = {field.name for field in fields(kind)}

    def function(*args: Any, **kwargs: Any) -> int:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values = dict(bound.arguments)
        options = kind(**{name: values.pop(name) for name in own})
        return act(command, Given(options, **values))

    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__name__ = command.name.rpartition(" ")[2]
    return function


def _own_parameters(kind: type[JobOptions]) -> list[inspect.Parameter]:
    found: list[inspect.Parameter] = []
    panels: dict[str, Group] = {}
    for field, hint, about in option_fields(kind):
        panel = panels.setdefault(about.panel, Group.create_ordered(about.panel))
        negative: Any = ()
        if hint is bool and about.off:
            negative = f"--{about.off}"
        extra: dict[str, Any] = {}
        if about.choices:
            # For help and completion; a wrong one is refused by the options, in our words.
            hint = Literal[about.choices]
            extra["converter"] = _as_given
        if about.flag:
            extra["name"] = f"--{about.flag}"
        found.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.POSITIONAL_ONLY
                if about.positional
                else inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=Annotated[
                    hint,
                    Parameter(
                        help=about.help,
                        group=panel,
                        negative=negative,
                        # The last one counts, as everywhere else: scripts add to a fixed command.
                        allow_repeating=True,
                        show_default=field.default not in (None, (), MISSING) and hint is not bool,
                        **extra,
                    ),
                    _Unchecked(),
                ],
            )
        )
    return found


class _Unchecked:
    """Where another package has loaded pydantic, cyclopts asks it to check values as well.

    The options check them, in our words, and a default may lie outside the choices.
    """

    def __get_pydantic_core_schema__(self, *_: Any) -> dict[str, str]:
        return {"type": "any"}


def _as_given(hint: Any, tokens: Any) -> str:  # noqa: ARG001 the library's signature
    return str(tokens[0].value)


def _shared_parameters(command: Command) -> list[inspect.Parameter]:
    panel = Group.create_ordered(_OUTPUT)
    rows = (("out", Path, command.default_out, "Folder for all results."), *_SHARED)
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[
                kind,
                Parameter(
                    help=text,
                    group=panel,
                    negative=(),
                    allow_repeating=True,
                    show_default=kind is not bool,
                ),
            ],
        )
        for name, kind, default, text in rows
    ]
