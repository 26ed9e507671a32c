"""Entry point of `cmd-plugin`: the commands, and what becomes of errors."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from cmd_plugin import __version__
from cmd_plugin.cli.commands import COMMANDS, Command, Given, load, make_function
from cmd_plugin.cli.output import (
    DEBUG_VARIABLE,
    own_warnings,
    progress_bar,
    say,
    stdout_for_results,
)
from cmd_plugin.errors import InputError, MissingDependency, PluginError

__all__ = ["make_app", "run"]

_HELP = """Instruments for training runs and trained networks.

Example, about a minute, nothing to download:
  cmd-plugin train
"""
_NOUNS = {
    "points": "Point clouds: train a network, and see what it looks at.",
    "diffusion": "Diffusion models: what has one memorised, and which images did it make?",
    "distinction": "Class evidence in images: split it from the rest, and judge the split.",
    "federated": "Federated learning that sends less, on Flower.",
    "clip": "Embeddings of CLIP and others: likelihood, geometry, drift, one space for search.",
    "bench": "Measure this package on this machine.",
}


def make_app() -> App:
    """Return the command line: one command a job, generated from its options."""
    app = App(
        name="cmd-plugin",
        help=_HELP,
        version=f"cmd-plugin {__version__}",
        version_flags=["--version"],
        help_flags=["--help", "-h"],
        help_format="plaintext",
        result_action="return_value",
    )
    nouns: dict[str, App] = {}
    for command in COMMANDS:
        noun, _, verb = command.name.rpartition(" ")
        parent = app
        if noun:
            if noun not in nouns:
                nouns[noun] = App(name=noun, help=_NOUNS[noun])
                app.command(nouns[noun])
            parent = nouns[noun]
        options = load(command.options)
        parent.command(make_function(command, _act), name=verb, help=_help(options))
    app.command(_doctor, name="doctor")
    app.register_install_completion_command()
    return app


def _help(options: type) -> str:
    """Return the docstring of a job's options for a terminal of any width."""
    paragraphs = (inspect.getdoc(options) or "").split("\n\n")
    # The colon would make it a section of a docstring, which help pages leave out.
    return "\n\n".join(
        part.replace("Examples:", "Examples")
        if part.startswith("Examples:")
        else " ".join(part.split())
        for part in paragraphs
    )


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process.

    Exit codes: 0 done, 2 wrong input, 130 interrupted, 1 a fault of this program. An error is one
    line on stderr; with `CMD_PLUGIN_DEBUG=1` a fault shows its traceback.

    Args:
        arguments: Command line without the program's name; taken from the process by default.
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    app = make_app()
    try:
        code = app(tokens, exit_on_error=False, print_error=False)
        if not tokens or (len(tokens) == 1 and tokens[0] in _NOUNS):
            code = 2  # the help was shown, nothing was done
    except Exception as error:
        code = _report(error)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _act(command: Command, given: Given) -> int:
    """Do what a command says, and print its result."""
    with stdout_for_results(), own_warnings():
        job, show = load(command.run), load(command.show)
        try:
            with progress_bar(shown=not (given.json or given.quiet)) as progress:
                result = job(
                    given.options,
                    given.out,
                    resume=given.resume,
                    overwrite=given.overwrite,
                    progress=progress,
                )
        except (KeyboardInterrupt, SystemExit) as stopped:
            kept = given.out / "unfinished"
            say(
                f"interrupted: what was finished is kept in {kept}; add --resume to go on."
                if kept.exists()
                else "interrupted: nothing was finished."
            )
            # Ctrl-C, or the end of the program that Lightning makes of a SIGTERM
            return 130 if isinstance(stopped, KeyboardInterrupt) else 143
    if given.json:
        print(json.dumps(result.as_dict(), indent=2, allow_nan=False))  # noqa: T201
        return 0
    show(result)
    for name in result.files:
        if "/" not in name:
            print(f"wrote {given.out / name}")  # noqa: T201
    folders = sorted({name.partition("/")[0] for name in result.files if "/" in name})
    for name in folders:
        print(f"wrote {given.out / name}{os.sep}")  # noqa: T201
    return 0


def _doctor(
    *,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    data_root: str | None = None,
) -> int:
    """Say what works on this machine, and what to install for the rest.

    Exit code 2 means that something which is required is missing or broken.

    Example, for a program: cmd-plugin doctor --data-root DATA --json

    Args:
        json: Print it as JSON.
        data_root: Where data lies. Default: environment variable CMD_PLUGIN_DATA.
    """
    from cmd_plugin.cli.doctor import examine

    return examine(as_json=json, data_root=data_root)


def _report(error: Exception) -> int:
    """Say in one line what went wrong; the exit code."""
    debug = bool(os.environ.get(DEBUG_VARIABLE))
    if isinstance(error, CycloptsError):
        say(f"error: {error}")
        return 2
    if isinstance(error, PluginError):
        if debug:
            raise error
        say(f"error: {error}")
        return 2 if isinstance(error, (InputError, MissingDependency)) else 1
    if debug:
        raise error
    text = " ".join(str(error).split())
    kind = type(error).__name__
    say(f"error: {kind}: {text} (a fault of this program; {DEBUG_VARIABLE}=1 shows where)")
    return 1
