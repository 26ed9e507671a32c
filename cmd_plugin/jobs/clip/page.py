"""The page of a report: what was measured in words, tables and pictures, in one HTML file."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["STYLE", "facts", "section", "table"]

STYLE = """<style>
body { color: #222; line-height: 1.5; max-width: 62rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; border-top: 1px solid #ddd; padding-top: 1.2rem; }
p { max-width: 48rem; margin: .4rem 0 .8rem; }
p.note { color: #555; }
img { display: block; margin: .6rem 0; }
table { border-collapse: collapse; margin: .6rem 0 1rem; font-size: .92rem; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #e5e5e5; text-align: right; }
th { font-weight: 600; border-bottom: 2px solid #bbb; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
</style>"""


def section(title: str, *texts: str) -> str:
    """Return a heading with paragraphs below; plain text."""
    body = "".join(f"<p>{html.escape(text)}</p>" for text in texts)
    return f"<h2>{html.escape(title)}</h2>{body}"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table; numbers are shortened, None is a dash."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_short(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def facts(sets: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """Return a table with a line a fact and a column a set of embeddings.

    Args:
        sets: What was found of each, by its name.
        names: Dotted path of each fact -> how it is called.
    """
    rows = [
        [title, *(_inner(found, path) for found in sets.values())] for path, title in names.items()
    ]
    return table(["", *(f"{name}s" for name in sets)], rows)


def _inner(found: Any, path: str) -> Any:
    for part in path.split("."):
        found = None if found is None else found[part]
    return found


def _short(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.3f}" if abs(cell) < 10 else f"{cell:,.1f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)
