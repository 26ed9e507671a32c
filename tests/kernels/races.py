"""Find loads and stores of compiled Triton code that may overtake one another.

The threads of a program run in warps, at their own pace. Where the compiler loads a vector in one
layout (which thread has which values) and stores to it in another, a thread may store what another
has yet to load, unless the stored values are made of the loaded ones or a barrier lies between.
Read from the text of Triton's GPU dialect (``asm["ttgir"]``), one statement a line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import count

__all__ = ["find_races"]

_NAME = re.compile(r"%[\w-]+(?:#\d+)?")
_RESULT = re.compile(r"(%[\w-]+)(?::\d+)? = ")
_POINTERS = re.compile(r"(tensor<[^>]*!tt\.ptr<\w+>, #\w+>|!tt\.ptr<\w+>)")
# What a pointer is made of by these comes first among the operands.
_MOVES = ("tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "ttg.convert_layout")
_CASTS = ("tt.bitcast", "tt.int_to_ptr", "tt.ptr_to_int", "arith.divsi", "arith.muli", "tt.reshape")

# (number, branch) of the regions a statement stands in, the outermost first.
_Path = tuple[tuple[int, int], ...]
# An open region: (number, branch), its result, the values it carries from round to round.
_Region = tuple[tuple[int, int], str | None, list[str]]


@dataclass
class _Access:
    """A load or a store: where it stands, of what, in which layout, and what it reads."""

    at: int
    path: _Path
    store: bool
    base: str
    layout: str
    value: str


@dataclass
class _Code:
    """A function: which value is made of which others, and what touches memory."""

    sources: dict[str, set[str]] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    accesses: list[_Access] = field(default_factory=list)
    barriers: list[tuple[int, _Path]] = field(default_factory=list)

    def base(self, pointer: str) -> str:
        """Return the argument, or the loaded address, that a pointer is an offset to."""
        seen = {pointer}
        while (origin := self.origins.get(pointer)) is not None and origin not in seen:
            pointer = origin
            seen.add(pointer)
        return pointer

    def made_of(self, value: str, part: str) -> bool:
        """Whether ``part`` is among all that ``value`` was computed from."""
        todo, seen = [value], {value}
        while todo:
            name = todo.pop()
            if name == part:
                return True
            new = self.sources.get(name, set()) - seen
            seen |= new
            todo += new
        return False


def find_races(text: str) -> list[str]:
    """Return one line for each pair of a load and a store of one pointer that may overtake.

    Two statements in the branches of one ``if`` exclude one another. The rounds of a loop are taken
    to touch different places.
    """
    code = _parse(text)
    found = []
    for first in code.accesses:
        for second in code.accesses:
            pair = first.base == second.base and first.layout != second.layout
            if not pair or first.store == second.store or first.at >= second.at:
                continue
            if _exclusive(first.path, second.path) or _parted(code, first, second):
                continue
            if second.store and code.made_of(second.value, first.value):
                continue
            words = ("store", "load") if first.store else ("load", "store")
            found.append(
                f"{first.base}: {words[0]} in {first.layout}, then {words[1]} in {second.layout}"
            )
    return sorted(set(found))


def _exclusive(one: _Path, other: _Path) -> bool:
    return any(a[0] == b[0] and a[1] != b[1] for a, b in zip(one, other, strict=False))


def _parted(code: _Code, first: _Access, second: _Access) -> bool:
    """Whether every way from the first to the second leads through a barrier."""
    return any(
        first.at < at < second.at and path in (first.path[: len(path)], second.path[: len(path)])
        for at, path in code.barriers
    )


def _parse(text: str) -> _Code:
    code = _Code()
    numbers = count()
    regions: list[_Region] = []
    for at, raw in enumerate(text.splitlines()):
        line = re.sub(r" loc\(.*", "", raw).strip()
        path = tuple(region[0] for region in regions[1:])
        result = _RESULT.match(line)
        name = None if result is None else result[1]
        body = line if result is None else line[result.end() :]
        operation = body.split("(")[0].split(" ")[0].strip('"')
        names = _NAME.findall(body)
        if name is not None:
            code.sources.setdefault(name, set()).update(names)
        if operation in (*_MOVES, *_CASTS) and name is not None:
            code.origins[name] = names[0]
        elif operation == "tt.load" and name is not None:
            code.accesses.append(_access(code, at, path, body, names, name))
        elif operation in ("tt.store", "tt.atomic_rmw", "tt.atomic_cas"):
            code.accesses.append(_access(code, at, path, body, names, None))
        elif operation in ("gpu.barrier", "ttg.barrier", "ttg.local_barrier"):
            code.barriers.append((at, path))
        elif operation in ("scf.for", "scf.while"):
            for carried, given in re.findall(r"(%[\w-]+) = (%[\w#-]+)", body):
                code.sources.setdefault(carried, set()).add(given)
                code.origins.setdefault(carried, given)
        elif operation in ("scf.yield", "scf.condition") and regions:
            _, owner, carried = regions[-1]
            given = names[operation == "scf.condition" :]
            for index, value in enumerate(given):
                if owner is not None:
                    for target in (owner, f"{owner}#{index}"):
                        code.sources.setdefault(target, set()).add(value)
                        code.origins.setdefault(target, value)
                if index < len(carried):
                    code.sources.setdefault(carried[index], set()).add(value)
        if line.startswith("}") and regions:
            closed = regions.pop()
            if line.endswith("{"):  # else, do
                (number, branch), owner, carried = closed
                regions.append(((number, branch + ("else" in line)), owner, carried))
        elif line.endswith("{"):
            carried = re.findall(r"(%[\w-]+) = %", body)
            regions.append(((next(numbers), 0), name, carried))
    return code


def _access(
    code: _Code,
    at: int,
    path: _Path,
    body: str,
    names: list[str],
    loaded: str | None,
) -> _Access:
    types = _POINTERS.findall(body)
    layout = re.search(r"#\w+", types[-1])
    return _Access(
        at,
        path,
        loaded is None,
        code.base(names[0]),
        "scalar" if layout is None else layout[0],
        names[1] if loaded is None else loaded,
    )
