"""Tables and picture of :mod:`benchmarks.point_importance`, from its result file alone.

python -m benchmarks.point_importance_report
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import RESULTS

__all__ = ["draw", "show"]

_REPORTED = {  # a trial with the same weights and shapes that the specification reports
    ("chair", 10): (0.985, 0.995),
    ("monitor", 10): (0.950, 0.975),
    ("chair", 50): (0.670, 0.995),
    ("monitor", 50): (0.135, 0.975),
}


def _over_seeds(rows: list[dict[str, Any]], key: str, digits: int = 3) -> str:
    values = [row[key] for row in rows]
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def _grouped(rows: list[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def show(result: dict[str, Any], console: Console) -> None:
    """Print what was found, losses included."""
    rows = result["outliers"]
    seeds = len({row["seed"] for row in rows})
    table = Table(title=f"Planted outliers, {rows[0]['clouds']} clouds a class, {seeds} seeds")
    columns = ["AUROC count", "AUROC L1", "AUROC SOR", "AUROC radius"]
    columns += ["OA plain", "OA refocused", "OA SOR", "added points kept", "entropy"]
    for column in ("class", "added", *columns, "OA reported (plain, refocused)"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for (name, added), group in _grouped(rows, "class", "added").items():
        before, after = _REPORTED[name, added]
        cells = [_over_seeds(group, column) for column in columns]
        table.add_row(name, str(added), *cells, f"{before:.3f}, {after:.3f}")
    console.print(table)

    rows = result["corruptions"]
    table = Table(title=f"Level 4 of each corruption, no retraining, {rows[0]['clouds']} clouds")
    methods = ["plain", "refocused", "lowest half", "SOR", "entropy"]
    for column in ("corruption", *methods, "refocusing"):
        table.add_column(column, justify="left" if column == "corruption" else "right")
    for (kind,), group in _grouped(rows, "corruption").items():
        change = statistics.fmean(row["refocused"] - row["plain"] for row in group)
        word = "helps" if change > 0.005 else "hurts" if change < -0.005 else "no change"
        cells = [_over_seeds(group, m) for m in methods]
        table.add_row(kind, *cells, f"{change:+.3f} {word}")
    console.print(table)

    if "unusual" in result:
        _show_unusual(result["unusual"], console)
        _show_axes(result["axes"], console)

    table = Table(title="Drop curves: area under accuracy, shares 0 to 0.9 (0.9 is perfect)")
    columns = ["score", "high-drop (lower is better)", "low-drop (higher is better)", "roughness"]
    for column in columns:
        table.add_column(column, justify="left" if column == "score" else "right")
    for name, curves in _curves(result).items():
        areas = []
        for way in ("high", "low"):
            rows = [{"area": area} for area in curves[way].get("areas", [curves[way]["area"]])]
            areas.append(_over_seeds(rows, "area"))
        rough = [{"roughness": value} for value in curves.get("roughnesses", [])]
        table.add_row(name, *areas, _over_seeds(rows=rough, key="roughness") if rough else "")
    console.print(table)

    first = result["defence"][0]
    about = f"{first['clouds']} clouds, strongest of {first['attacks']}, {first['steps']} steps"
    table = Table(title=f"Subset defence: share answered wrongly ({about})")
    table.add_column("case")
    for row in result["defence"]:
        table.add_column(f"limit {row['limit']}", justify="right")
    for name in list(first)[4:]:
        table.add_row(name, *(f"{row[name]:.3f}" for row in result["defence"]))
    console.print(table)

    table = Table(title=f"Cost, {result['machine']['threads']} thread(s)")
    for column in ("what", "time", "against FBI"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in result["overhead"]:
        table.add_row(
            f"{row['network']}, forward of {row['batch']}",
            f"{row['forward_ms']:.1f} ms",
            f"FBI adds {_overheads(row, 'fbi')} %, counts {_overheads(row, 'count')} %",
        )
    for name, row in result["others"].items():
        table.add_row(
            f"PointNet, {name} (Captum)",
            f"{1e3 * row['seconds']:.1f} ms",
            f"{row['times_slower_than_fbi']:,.0f}x a forward pass with FBI, "
            f"{row['times_slower_than_what_fbi_adds']:,.0f}x what FBI adds",
        )
    console.print(table)


def _show_unusual(rows: list[dict[str, Any]], console: Console) -> None:
    """AUROC of scores of whole clouds; below 0.5 the unusual ones score lower."""
    names = [n for n in rows[0] if n not in ("seed", "clouds", "points", "against clean")]
    table = Table(
        title=f"AUROC of scores of clouds, {rows[0]['clouds']} clean and as many of level 4, "
        "equal numbers of points"
    )
    for column in ("against clean", "points", *names):
        table.add_column(column, justify="left" if column == "against clean" else "right")
    for (kind, points), group in _grouped(rows, "against clean", "points").items():
        table.add_row(kind, str(points), *(_over_seeds(group, name) for name in names))
    console.print(table)


def _show_axes(rows: list[dict[str, Any]], console: Console) -> None:
    orders = [name for name in rows[0] if name not in ("seed", "clouds")]
    table = Table(
        title=f"Alarms of the axis check at single clouds, {rows[0]['clouds']} of each order"
    )
    for order in orders:
        table.add_column(order + (" (trained)" if order == "xyz" else ""), justify="right")
    table.add_row(*(_over_seeds(rows, order) for order in orders))
    console.print(table)


def _overheads(row: dict[str, Any], what: str) -> str:
    median, fastest = (f"{what}_overhead_percent", f"{what}_overhead_percent_of_minima")
    least = f" (fastest calls {row[fastest]:.1f})" if fastest in row else ""
    return f"{row[median]:.1f}{least}"


def _curves(result: dict[str, Any]) -> dict[str, Any]:
    return {name: c for name, c in result["drops"].items() if name != "fractions"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Drop curves of all scores, and accuracies under corruption."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (high, low, bars) = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    shares = result["drops"]["fractions"]
    for number, (name, curves) in enumerate(_curves(result).items()):
        style = {"color": "0.4", "linestyle": "--"} if name == "random" else {"color": f"C{number}"}
        for ax, way in ((high, "high"), (low, "low")):
            label = f"{name} ({curves[way]['area']:.2f})"
            ax.plot(shares, curves[way]["accuracy"], label=label, **style)
    for ax, words in ((high, "most"), (low, "least")):
        ax.set(xlabel="share of points dropped", ylabel="accuracy", ylim=(0, 1.03))
        ax.set_title(f"Dropping the {words} important first (area)")
        ax.legend(fontsize="x-small", loc="lower left")
    groups = _grouped(result["corruptions"], "corruption")
    for number, method in enumerate(("plain", "refocused", "SOR")):
        heights = [statistics.fmean(row[method] for row in rows) for rows in groups.values()]
        places = [index + 0.27 * (number - 1) for index in range(len(groups))]
        bars.bar(places, heights, width=0.25, label=method)
    bars.set_xticks(range(len(groups)), [kind for (kind,) in groups], rotation=30, ha="right")
    bars.set(ylabel="accuracy", ylim=(0, 1.03), title="Level 4 corruptions, no retraining")
    bars.legend(fontsize="small", ncols=3, loc="lower center")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Print the committed result and draw its picture again."""
    path = RESULTS / "point_importance.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    show(result, Console(width=140))
    draw(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
