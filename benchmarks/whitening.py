"""What do fitting and scoring a whitening cost, beside a plain matrix product and beside others?

    python -m benchmarks.whitening                   # 1e6 x 768 stored rows, two threads
    python -m benchmarks.whitening --rows 100000     # a tenth of it
    python -m benchmarks.whitening --parts scale     # one part alone; the others keep their numbers

Parts, each on this machine in this run:

- ``speed``: rows on disk are scored and fitted a slice at a time, in turn with a float32 product of
  the same slice in memory: of [n, d] by [d, d] for scoring and of [d, n] by [n, d] for fitting.
- ``memory``: the largest memory of its own (not of the mapped file) that a fit and a score of 1e5
  and of all rows take, each in a process of its own.
- ``conditional``: one whitening for each query among its 500 nearest of 5000 rows, against the
  covariance of these rows and its eigenvectors, in float64 and in float32.
- ``others``: scikit-learn and pytorch-ood on the same rows in memory, fit and score.
- ``scale``: AUROC of all of them at telling other rows from usual ones, all features multiplied by
  1e-3, 1 and 1e3. Digits 0 to 7 against 8 and 9 (pixels, embedded in scikit-learn); with
  ``--data-root`` also CLIP embeddings of single photos against those of COCO photos.

Wall seconds are those of the clock, CPU seconds those of all threads of the process; where the two
ratios to the product differ, the machine was busy, which the load averages tell as well.
Results: ``results/whitening.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import RESULTS, describe_machine
from cmd_plugin.clip import ConditionalWhitening, GaussianStatistics, Whitening

PARTS = ("speed", "memory", "conditional", "others", "scale")
SLICE = 65536
SCALES = (1e-3, 1.0, 1e3)


class Clock:
    """Wall and CPU seconds of works, added up."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """Do the work and add its seconds to those of its name."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu
        self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall
        return result


def spectrum(dim: int) -> Tensor:
    """Standard deviations whose squares span those of CLIP ViT-L/14 images: 8 to 3e-6."""
    return torch.logspace(np.log10(8.0), np.log10(3e-6), dim).sqrt()


def write_rows(path: Path, rows: int, dim: int) -> None:
    """Write [rows, dim] float32 of that spectrum, correlated, a slice at a time."""
    generator = torch.Generator().manual_seed(0)
    mixing = spectrum(dim)[:, None] * torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    out = np.lib.format.open_memmap(path, "w+", np.float32, (rows, dim))
    for start in range(0, rows, SLICE):
        count = min(SLICE, rows - start)
        out[start : start + count] = (torch.randn(count, dim, generator=generator) @ mixing).numpy()
    out.flush()


def measure_speed(path: Path, repeats: int) -> dict[str, Any]:
    """Score and fit rows on disk, in turn with products of the same size."""
    x = np.load(path, mmap_mode="r")
    count, dim = x.shape
    fitted = Whitening.fit(x[:SLICE], shrinkage="none")
    matrix, product = fitted.matrix.float(), torch.empty(SLICE, dim)
    square = torch.empty(dim, dim)
    runs = []
    for number in range(repeats + 1):
        clock, gathered = Clock(), GaussianStatistics(dim)
        for start in range(0, SLICE if number == 0 else count, SLICE):
            part = x[start : start + SLICE]
            inside = torch.from_numpy(np.array(part))
            out = product[: len(inside)]
            clock.time("product for scoring", lambda: torch.mm(inside, matrix, out=out))  # noqa: B023
            clock.time("score", lambda: fitted.squared_norm(part))  # noqa: B023
            clock.time("product for fitting", lambda: torch.mm(inside.T, inside, out=square))  # noqa: B023
            clock.time("fit, sums", lambda: gathered.update(part))  # noqa: B023
        clock.time("fit, eigenvectors", lambda: Whitening.fit(gathered, shrinkage="none"))  # noqa: B023
        if number:  # the first round, of one slice, is not counted
            runs.append(clock)
    flops = 2.0 * count * dim * dim
    result: dict[str, Any] = {"rows": count, "dim": dim, "repeats": repeats}
    for kind in ("wall", "cpu"):
        seconds = [getattr(clock, kind) for clock in runs]
        result[f"{kind}_seconds"] = {
            n: statistics.median(s[n] for s in seconds) for n in seconds[0]
        }
        result[f"{kind}_score_share_of_product"] = statistics.median(
            s["product for scoring"] / s["score"] for s in seconds
        )
        result[f"{kind}_fit_share_of_product"] = statistics.median(
            s["product for fitting"] / (s["fit, sums"] + s["fit, eigenvectors"]) for s in seconds
        )
    wall = result["wall_seconds"]
    result["product_gflops"] = flops / wall["product for scoring"] / 1e9
    result["rows_scored_a_second"] = count / wall["score"]
    exact = fitted.squared_norm(x[:2048].astype(np.float64))
    result["largest_relative_error"] = float(
        (fitted.squared_norm(x[:2048]).double() / exact - 1).abs().max()
    )
    return result


def own_memory() -> int:
    """Return the bytes of this process that no file is behind (Linux), or 0."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def peak_memory(path: Path, rows: int) -> dict[str, float]:
    """Fit and score the first rows on disk; the most memory that each adds, in MiB."""
    x = np.load(path, mmap_mode="r")[:rows]
    Whitening.fit(x[:4096], shrinkage="none").squared_norm(x[:4096])  # what a first call sets up
    done, peak = threading.Event(), 0
    found = {}

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, own_memory())

    fitted = None
    for name in ("fit", "score"):
        done.clear()
        before = peak = own_memory()
        watcher = threading.Thread(target=watch)
        watcher.start()
        if fitted is None:
            fitted = Whitening.fit(x, shrinkage="none")
        else:
            for start in range(0, rows, SLICE):
                fitted.squared_norm(x[start : start + SLICE])
        done.set()
        watcher.join()
        found[name] = (peak - before) / 2**20
    return found


def measure_memory(path: Path, rows: int, threads: int) -> dict[str, Any]:
    """Run :func:`peak_memory` in processes of their own."""
    result = {}
    for count in sorted({min(rows, 100_000), rows}):
        command = [sys.executable, "-m", "benchmarks.whitening", "--peak-of", str(path)]
        command += ["--rows", str(count), "--threads", str(threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result[str(count)] = json.loads(done.stdout.splitlines()[-1])
    return {"mebibytes": result}


def measure_conditional(repeats: int) -> dict[str, Any]:
    """Score queries among their neighbours, ours against a covariance and eigh for each."""
    rows, dim, k, m, queries = 5000, 768, 500, 400, 10
    generator = torch.Generator().manual_seed(0)
    mixing = spectrum(dim)[:, None] * torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    features = torch.randn(rows + queries, dim, generator=generator) @ mixing
    features, x = features[queries:], features[:queries]
    conditional = ConditionalWhitening(features, k, m)

    def by_covariance(dtype: torch.dtype) -> Tensor:
        wide, result = features.to(dtype), []
        unit = torch.nn.functional.normalize(wide, dim=1)
        for query in x.to(dtype):
            near = wide[(unit @ query).topk(k).indices]
            values, vectors = torch.linalg.eigh(near.T.cov())
            y = (query - near.mean(dim=0)) @ vectors[:, -m:] / values[-m:].sqrt()
            result.append(y.square().sum())
        return torch.stack(result)

    works: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: conditional.squared_norm(x),
        "covariance and eigh, float64": lambda: by_covariance(torch.float64),
        "covariance and eigh, float32": lambda: by_covariance(torch.float32),
    }
    exact = works["covariance and eigh, float64"]()
    clocks = []
    for number in range(repeats + 1):
        clock = Clock()
        for name, work in works.items():
            clock.time(name, work)
        if number:
            clocks.append(clock)
    result: dict[str, Any] = {"rows": rows, "dim": dim, "neighbours": k, "components": m}
    for kind in ("wall", "cpu"):
        median = {n: statistics.median(getattr(c, kind)[n] for c in clocks) for n in works}
        result[f"{kind}_milliseconds_a_query"] = {n: 1e3 * s / queries for n, s in median.items()}
        result[f"{kind}_times_as_fast"] = {
            n: statistics.median(getattr(c, kind)[n] / getattr(c, kind)["ours"] for c in clocks)
            for n in works
        }
    result["largest_relative_difference"] = {
        n: float((work().double() / exact.double() - 1).abs().max()) for n, work in works.items()
    }
    return result


def methods() -> dict[str, tuple[Callable[[Tensor], Any], Callable[[Any, Tensor], Any]]]:
    """Return how each method is fitted to rows and how its fit scores rows; high is unusual."""
    from pytorch_ood.detector import Mahalanobis
    from sklearn.covariance import EmpiricalCovariance, LedoitWolf
    from sklearn.decomposition import PCA

    def ours(shrinkage: str) -> tuple[Callable[[Tensor], Any], Callable[[Any, Tensor], Any]]:
        def fit(x: Tensor) -> Any:
            return Whitening.fit(x, shrinkage=shrinkage)  # type: ignore[arg-type]

        return fit, lambda fitted, x: fitted.squared_norm(x)

    def one_class(x: Tensor) -> Any:
        return Mahalanobis(None).fit_features(x, torch.zeros(len(x), dtype=torch.int64))

    return {
        "Whitening, none": ours("none"),
        "Whitening, OAS": ours("oas"),
        "Whitening, Ledoit-Wolf": ours("ledoit-wolf"),
        "sklearn EmpiricalCovariance": (
            lambda x: EmpiricalCovariance().fit(x.numpy()),
            lambda fitted, x: torch.from_numpy(fitted.mahalanobis(x.numpy())),
        ),
        "sklearn PCA(whiten=True)": (
            lambda x: PCA(whiten=True).fit(x.numpy()),
            lambda fitted, x: torch.from_numpy(fitted.transform(x.numpy())).square().sum(dim=1),
        ),
        "sklearn LedoitWolf": (
            lambda x: LedoitWolf().fit(x.numpy()),
            lambda fitted, x: torch.from_numpy(fitted.mahalanobis(x.numpy())),
        ),
        "pytorch-ood Mahalanobis": (one_class, lambda fitted, x: fitted.predict_features(x)),
    }


def measure_others(path: Path, repeats: int) -> dict[str, Any]:
    """Fit and score the same rows in memory by every method, in turn."""
    x = torch.from_numpy(np.array(np.load(path, mmap_mode="r")[:100_000]))
    clocks = []
    for number in range(repeats + 1):
        clock = Clock()
        part = x[:5000] if number == 0 else x
        for name, (fit, score) in methods().items():
            fitted = clock.time(f"{name}: fit", lambda: fit(part))  # noqa: B023
            clock.time(f"{name}: score", lambda: score(fitted, part))  # noqa: B023
        if number:
            clocks.append(clock)
    result: dict[str, Any] = {"rows": len(x), "dim": x.shape[1], "repeats": repeats}
    for kind in ("wall", "cpu"):
        result[f"{kind}_seconds"] = {
            name: statistics.median(getattr(clock, kind)[name] for clock in clocks)
            for name in clocks[0].wall
        }
    return result


def measure_scale(data_root: str | None) -> dict[str, Any]:
    """Return AUROCs by set, method and factor on all features."""
    from sklearn.datasets import load_digits
    from sklearn.metrics import roc_auc_score

    digits = load_digits()
    pixels, label = torch.from_numpy(digits.data).float(), torch.from_numpy(digits.target)
    usual, other = pixels[label < 8], pixels[label >= 8]
    sets = {"digits": (usual[::2], usual[1::2], other)}
    folder = Path(data_root or "") / "clip_embeddings"
    if data_root is not None:
        photos = torch.from_numpy(np.load(folder / "image_b16_photos1000.npy"))
        coco = torch.from_numpy(np.load(folder / "image_b16_coco159.npy"))
        sets["photos against COCO photos"] = (photos[:800], photos[800:], coco)
    result: dict[str, Any] = {}
    for name, (train, usual, other) in sets.items():
        target = np.r_[np.zeros(len(usual)), np.ones(len(other))]
        result[name] = {"rows": [len(train), len(usual), len(other)], "dim": train.shape[1]}
        for method, (fit, score) in methods().items():
            found = {}
            for scale in SCALES:
                scores = score(fit(scale * train), scale * torch.cat([usual, other]))
                good = bool(torch.as_tensor(scores).isfinite().all())
                auroc = float(roc_auc_score(target, scores)) if good else None
                found[f"{scale:g}"] = auroc
            result[name][method] = found
    return {"sets": result}


def show(results: dict[str, Any], console: Console) -> None:
    """Print what was measured."""
    speed, conditional = results.get("speed"), results.get("conditional")
    if speed is not None:
        shares = [
            speed[f"{kind}_{what}_share_of_product"]
            for what in ("score", "fit")
            for kind in ("wall", "cpu")
        ]
        console.print(
            f"{speed['rows']:,} x {speed['dim']}, throughput relative to a product: scoring "
            "{:.0%} ({:.0%} by CPU seconds), fitting {:.0%} ({:.0%}).".format(*shares)
        )
    for rows, mebibytes in results.get("memory", {}).get("mebibytes", {}).items():
        console.print(
            f"Memory at {int(rows):,} rows: fit {mebibytes['fit']:.0f} MiB, "
            f"score {mebibytes['score']:.0f} MiB."
        )
    if conditional is not None:
        for name, times in conditional["wall_times_as_fast"].items():
            console.print(
                f"A query, {name}: {conditional['wall_milliseconds_a_query'][name]:.1f} ms, "
                f"{times:.1f} times ours."
            )
    others = results.get("others")
    if others is not None:
        table = Table(title=f"{others['rows']:,} x {others['dim']} in memory")
        for column in ("method", "fit, s", "score, s"):
            table.add_column(column)
        seconds = others["wall_seconds"]
        for name in methods():
            table.add_row(name, *(f"{seconds[f'{name}: {what}']:.2f}" for what in ("fit", "score")))
        console.print(table)
    for name, found in results.get("scale", {}).get("sets", {}).items():
        table = Table(title=f"AUROC, {name}, features multiplied")
        table.add_column("method")
        for scale in SCALES:
            table.add_column(f"by {scale:g}")
        for method in methods():
            values = found[method].values()
            table.add_row(method, *("not finite" if v is None else f"{v:.4f}" for v in values))
        console.print(table)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data-root", default=os.environ.get("CMD_PLUGIN_DATA"))
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message=".*covariance is shrunk.*")
    if arguments.peak_of:
        print(json.dumps(peak_memory(Path(arguments.peak_of), arguments.rows)))
        return
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / "whitening.json"
    results: dict[str, Any] = json.loads(target.read_text()) if target.is_file() else {}
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        if {"speed", "memory", "others"} & {*arguments.parts}:
            write_rows(path, arguments.rows, arguments.dim)
        works: dict[str, Callable[[], dict[str, Any]]] = {
            "speed": lambda: measure_speed(path, arguments.repeats),
            "memory": lambda: measure_memory(path, arguments.rows, arguments.threads),
            "conditional": lambda: measure_conditional(arguments.repeats),
            "others": lambda: measure_others(path, arguments.repeats),
            "scale": lambda: measure_scale(arguments.data_root),
        }
        for part in arguments.parts:
            console.print(f"measuring {part} ...")
            before = os.getloadavg()[0]
            found = works[part]()
            load = {"before": before, "after": os.getloadavg()[0]}
            results[part] = {"machine": describe_machine(), "load": load, **found}
            target.write_text(json.dumps(results, indent=2) + "\n")
    show(results, console)
    console.print(f"wrote {target}", highlight=False)


if __name__ == "__main__":
    main()
