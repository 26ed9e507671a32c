"""The options of a job: each said once, with its type, bounds, choices, help and panel.

A job declares a frozen dataclass that inherits :class:`JobOptions`. The command line is generated
from it, Python callers fill it in, and both get the same checks and the same sentences. Nothing
here imports torch, so that a typing error on the command line is answered at once.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmd_plugin.errors import InputError

__all__ = ["JobOptions", "OptionField", "argument", "flag", "option", "option_fields"]

_KEY = "cmd_plugin.option"


@dataclass(frozen=True)
class OptionField:
    """What an option says about itself besides its name, type and default.

    Attributes:
        help: One or two sentences for the help page.
        panel: Heading it stands under there.
        choices: The values allowed; empty if any.
        at_least: Smallest value allowed.
        above: Value it must be above.
        at_most: Largest value allowed.
        below: Value it must be below.
        free: Whether it says where or how fast, not what: a run may be resumed with another value.
        only: Name of another option -> its values with which this one has an effect.
        positional: Whether it is given without a name.
        flag: Name on the command line if it is not the field's.
        off: Name that turns a switch off, without dashes; empty if nothing does.
    """

    help: str
    panel: str = "Options"
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    free: bool = False
    only: Mapping[str, Sequence[object]] = dataclasses.field(default_factory=dict)
    positional: bool = False
    flag: str = ""
    off: str = ""

    def condition(self) -> str:
        """Return the bounds in words: "at least 0 and below 1"."""
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least:g} to {self.at_most:g}"
        bounds = (
            ("at least", self.at_least),
            ("above", self.above),
            ("at most", self.at_most),
            ("below", self.below),
        )
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)

    def allows(self, value: float) -> bool:
        """Whether a number is finite and within the bounds."""
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def option(default: Any, help: str, **about: Any) -> Any:  # noqa: A002 the word every library uses
    """Declare an option as a dataclass field; see :class:`OptionField` for the keywords."""
    return dataclasses.field(default=default, metadata={_KEY: OptionField(help, **about)})


def argument(help: str, **about: Any) -> Any:  # noqa: A002
    """Declare an option that has to be given; ``positional=True`` for one without a name."""
    return dataclasses.field(metadata={_KEY: OptionField(help, **about)})


def flag(name: str) -> str:
    """Return an option's name on the command line: ``batch_size`` is ``--batch-size``."""
    return f"--{name.replace('_', '-')}"


def option_fields(
    kind: type[JobOptions],
) -> Iterator[tuple[dataclasses.Field[Any], Any, OptionField]]:
    """Yield each field of a job's options with its resolved type and what it says of itself."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        yield field, hints[field.name], field.metadata[_KEY]


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Base of all options: checks every field when it is made.

    Subclasses are frozen, keyword-only dataclasses whose fields are made by :func:`option` and
    :func:`argument`. What one field alone cannot decide is checked in :meth:`check_together`.

    Raises:
        InputError: If a value has another type, is out of range, or has no effect with the others.
    """

    def __post_init__(self) -> None:
        """Check all fields; the message names the first that is wrong as the command line does."""
        for field, hint, about in option_fields(type(self)):
            _check(_name(field, about), getattr(self, field.name), hint, about)
        self._refuse_idle()
        self.check_together()

    def check_together(self) -> None:
        """Raise InputError if options do not go together; for subclasses."""

    def _refuse_idle(self) -> None:
        for field, _, about in option_fields(type(self)):
            if getattr(self, field.name) == field.default:
                continue
            for other, values in about.only.items():
                if getattr(self, other) in values:
                    continue
                wanted = f" {' or '.join(map(str, values))}, and it is {getattr(self, other)}"
                if values == (True,):  # a switch has no value
                    wanted = ""
                raise InputError(
                    f"{_name(field, about)} has an effect only with {flag(other)}{wanted}: change "
                    "that or leave it out."
                )

    def as_dict(self) -> dict[str, Any]:
        """Return all options as JSON types."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def deciding(self) -> dict[str, Any]:
        """Return the options that decide the results, as JSON types: all that are not free."""
        everything = self.as_dict()
        return {
            field.name: everything[field.name]
            for field, _, about in option_fields(type(self))
            if not about.free
        }


def _name(field: dataclasses.Field[Any], about: OptionField) -> str:
    return (
        field.name.upper()
        if about.positional
        else f"--{about.flag}"
        if about.flag
        else flag(field.name)
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _check(name: str, value: Any, hint: Any, about: OptionField) -> None:
    """Raise InputError unless a value has the field's type and lies within its bounds."""
    allowed = set(typing.get_args(hint)) if _is_union(hint) else {hint}
    if value is None and type(None) in allowed:
        return
    (kind,) = allowed - {type(None)}
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (str, Path)) or not isinstance(value, Sequence):
            raise InputError(f"{name} must be a list, got {value!r}.")
        for item in value:
            _check(name, item, typing.get_args(kind)[0], about)
        return
    numeric = kind in (int, float)
    fits = isinstance(
        value, (int, float) if kind is float else (str, Path) if kind is Path else kind
    )
    if not fits or (numeric and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", bool: "True or False"}
        raise InputError(f"{name} must be {names.get(kind, 'text')}, got {value!r}.")
    if about.choices and value not in about.choices:
        raise InputError(f"{name} must be one of {', '.join(about.choices)}, got {value}.")
    if numeric and not about.allows(value):
        raise InputError(f"{name} must be {about.condition() or 'finite'}, got {value}.")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)
