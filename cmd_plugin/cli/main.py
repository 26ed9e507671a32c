"""Entry point of `cmd-plugin`: the sub-commands, and what becomes of errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from cmd_plugin import __version__
from cmd_plugin.cli.bench import bench
from cmd_plugin.cli.decompose import decompose
from cmd_plugin.cli.federated import app as federated
from cmd_plugin.cli.points import points
from cmd_plugin.cli.train import train
from cmd_plugin.errors import InputError, MissingDependency, PluginError

__all__ = ["app", "run"]

DEBUG_VARIABLE = "CMD_PLUGIN_DEBUG"

app = typer.Typer(
    name="cmd-plugin",
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cmd-plugin {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 its callback does the work
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """Instruments for training runs and trained networks.

    \b
    Example, about a minute, nothing to download:
      cmd-plugin train
    """  # noqa: D301
    if context.invoked_subcommand is None:
        shown = context.get_help()  # with rich, this prints and returns nothing
        if shown:
            typer.echo(shown)
        raise typer.Exit(2)


app.command("train")(train)
app.command("decompose")(decompose)
app.add_typer(bench, name="bench")
app.add_typer(federated)
app.add_typer(points)


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process.

    Exit codes: 0 done, 2 wrong input, 130 interrupted, 1 a fault of this program. An error is one
    line on stderr; with `CMD_PLUGIN_DEBUG=1` a fault shows its traceback.

    Args:
        arguments: Command line without the program's name; taken from the process by default.
    """
    command: Any = typer.main.get_command(app)
    try:
        code = command.main(
            args=None if arguments is None else list(arguments),
            prog_name="cmd-plugin",
            standalone_mode=False,
        )
    except Exception as error:
        code = _report(error)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception) -> int:
    """Say in one line what went wrong; the exit code."""
    debug = bool(os.environ.get(DEBUG_VARIABLE))
    if isinstance(error, PluginError):
        if debug:
            raise error
        _say(error)
        return 2 if isinstance(error, (InputError, MissingDependency)) else 1
    if isinstance(error, typer.Abort):
        return 130
    # Usage errors. Their class is not public in every version of typer, their interface is.
    message = getattr(error, "format_message", None)
    if message is not None and hasattr(error, "exit_code"):
        _say(message())
        return int(error.exit_code)
    if debug:
        raise error
    text = " ".join(str(error).split())
    kind = type(error).__name__
    _say(f"{kind}: {text} (a fault of this program; {DEBUG_VARIABLE}=1 shows where)")
    return 1


def _say(problem: object) -> None:
    typer.echo(f"error: {' '.join(str(problem).split())}", err=True)
