"""What do importance scores find, does refocusing repair a network, and what do they cost?

    python -m benchmarks.point_importance --data-root DATA                 # all, 20 minutes
    python -m benchmarks.point_importance --data-root DATA --timing-only   # replaces the times
    python -m benchmarks.point_importance --data-root DATA --quality-only  # replaces the rest
    python -m benchmarks.point_importance --data-root DATA --defence-only  # replaces the attacks
    python -m benchmarks.point_importance --data-root DATA --quick         # writes nothing

A PointNet that nobody here trained (ModelNet40 weights of learning3d, MIT) on real shapes: chairs
and monitors of ModelNet10, as surface points of voxel grids. These shapes are in the weights'
training set, so the accuracies below are regression numbers, never an accuracy claim.

Corruptions are ModelNet-C-style with the seeds named, not the official files. Every method sees
the same clouds; SOR is the statistical outlier removal of Zhou et al. with k = 2, alpha = 1.1.
Results: ``results/point_importance.json`` and ``.png``. Times depend on the machine and are better
taken on an idle one; the rest does not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from benchmarks.machine import RESULTS, describe_machine
from benchmarks.point_importance_timing import measure_others, measure_overhead
from benchmarks.point_importance_unusual import (
    measure_axes,
    measure_roughness,
    measure_unusual,
)
from cmd_plugin.errors import require
from cmd_plugin.networks import load_weights
from cmd_plugin.pointcloud import (
    CORRUPTIONS,
    Attack,
    DropCurve,
    SubsetDefence,
    corrupt,
    gradient_attack,
    perturbed_logits,
    point_importance,
    random_scores,
    refocus,
    shuffle_points,
    statistical_outliers,
    statistical_scores,
    strongest_attack,
)
from cmd_plugin.pointcloud.files import load_voxels, voxel_clouds
from cmd_plugin.pointcloud.networks import DGCNN, PointNet
from cmd_plugin.pointcloud.refocusing import run_on
from cmd_plugin.pointcloud.score_metrics import ScoreAUROC

CLASSES = {"chair": 8, "monitor": 22}  # their numbers in ModelNet40
POINTS = 1024
_CHUNK = 8  # clouds in a forward pass: their features stay in the cache


def load(root: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network, and all voxel grids by class."""
    folder = root / "pointcloud" if (root / "pointcloud").is_dir() else root
    network = PointNet(40).eval()
    load_weights(network, folder / "pointnet_modelnet40.t7")
    grids = {n: load_voxels(folder / f"modelnet10_{n}_voxels.npy.gz") for n in CLASSES}
    return network, grids


def spread(grids: Tensor, count: int) -> Tensor:
    """So many grids, evenly spread over the file."""
    return grids[torch.arange(count) * len(grids) // count]


def chunked(function: Callable[[Tensor], Tensor], clouds: Tensor) -> Tensor:
    """Apply a function to a few clouds at a time."""
    return torch.cat([function(part) for part in clouds.split(_CHUNK)])


def share_right(scores: Tensor, label: int) -> float:
    """Accuracy on clouds that are all of one class."""
    return float((scores.argmax(dim=1) == label).double().mean())


def answers(network: nn.Module, clouds: Tensor) -> dict[str, Tensor]:
    """Scores of the plain network and behind each removal of points; and what refocusing kept."""
    plain, refocused, kept, entropy, half = [], [], [], [], []
    for part in clouds.split(_CHUNK):
        again = refocus(network, part)
        plain.append(again.importance.output)
        refocused.append(again.output)
        kept.append(again.kept)
        entropy.append(again.importance.entropy)
        half.append(refocus(network, part, keep=part.shape[1] // 2).output)
    with torch.no_grad():
        sor = run_on(network, clouds, statistical_outliers(clouds))
    return {
        "plain": torch.cat(plain),
        "refocused": torch.cat(refocused),
        "lowest half": torch.cat(half),
        "SOR": sor,
        "kept": torch.cat(kept),
        "entropy": torch.cat([e for e in entropy if e is not None]),
    }


def measure_outliers(
    network: nn.Module, clean: Tensor, label: int, seed: int
) -> list[dict[str, Any]]:
    """Planted outliers: who finds them, and who answers rightly in spite of them."""
    rows = []
    for level, added in ((0, 10), (4, 50)):
        clouds = corrupt(clean, "add_global", level, seed=seed)
        planted = torch.zeros(clouds.shape[:2], dtype=torch.int64)
        planted[:, POINTS:] = 1
        seen = [point_importance(network, part, "critical++") for part in clouds.split(_CHUNK)]
        norm = torch.cat([s.norm for s in seen])
        wins = torch.cat([s.wins for s in seen if s.wins is not None])
        centre = clouds.mean(dim=1, keepdim=True)
        scores = {
            "count": wins.double(),
            "L1": norm,
            "SOR": statistical_scores(clouds),
            "radius": (clouds - centre).norm(dim=2),
        }
        found = answers(network, clouds)
        row: dict[str, Any] = {"seed": seed, "added": added}
        for name, score in scores.items():
            metric = ScoreAUROC()
            metric.update(score.flatten(), planted.flatten())
            row[f"AUROC {name}"] = float(metric.compute())
        for name in ("plain", "refocused", "SOR"):
            row[f"OA {name}"] = share_right(found[name], label)
        row["added points kept"] = float(found["kept"][:, POINTS:].double().mean())
        row["entropy"] = float(found["entropy"].mean())
        rows.append(row)
    return rows


def measure_corruptions(
    network: nn.Module, clean: dict[str, Tensor], seed: int
) -> list[dict[str, Any]]:
    """The strongest level of each corruption, without retraining anything."""
    rows = []
    for kind in ("clean", *CORRUPTIONS):
        right: dict[str, list[float]] = {}
        entropy = []
        for name, clouds in clean.items():
            bad = clouds if kind == "clean" else corrupt(clouds, kind, 4, seed=seed)
            found = answers(network, shuffle_points(bad, seed=seed))
            entropy.append(float(found["entropy"].mean()))
            for method in ("plain", "refocused", "lowest half", "SOR"):
                right.setdefault(method, []).append(share_right(found[method], CLASSES[name]))
        means = {method: statistics.fmean(values) for method, values in right.items()}
        rows.append(
            {"seed": seed, "corruption": kind, "entropy": statistics.fmean(entropy), **means}
        )
    return rows


def gradients(network: nn.Module, clouds: Tensor, labels: Tensor) -> Tensor:
    """Captum's saliency, its absolute gradient summed over coordinates: [B, N]."""
    saliency = require("captum.attr", "xai").Saliency(network)
    rows = [
        saliency.attribute(part.clone().requires_grad_(), target=target).sum(dim=2).detach()
        for part, target in zip(clouds.split(_CHUNK), labels.split(_CHUNK), strict=True)
    ]
    return torch.cat(rows)


def integrated(network: nn.Module, clouds: Tensor, labels: Tensor) -> Tensor:
    """Captum's integrated gradients from the origin, absolute, summed over coordinates: [B, N]."""
    method = require("captum.attr", "xai").IntegratedGradients(network)
    rows = [
        method.attribute(cloud, target=target, n_steps=32, internal_batch_size=_CHUNK).abs().sum(2)
        for cloud, target in zip(clouds.split(1), labels.split(1), strict=True)
    ]
    return torch.cat(rows).detach()


def measure_drops(network: nn.Module, clouds: Tensor, labels: Tensor, seed: int) -> dict[str, Any]:
    """Drop curves of our scores, Captum's, and random order."""
    order = {1.0: "L1", 2.0: "L2", float("inf"): "Linf"}
    scores = {
        name: chunked(lambda p, o=norm: point_importance(network, p, norm=o).scores, clouds)
        for norm, name in order.items()
    }
    scores["count"] = chunked(lambda p: point_importance(network, p, "critical++").scores, clouds)
    scores["saliency (Captum)"] = gradients(network, clouds, labels)
    scores["integrated gradients (Captum)"] = integrated(network, clouds, labels)
    scores["random"] = random_scores(clouds, seed=seed)
    rough = measure_roughness(clouds, scores)
    result: dict[str, Any] = {}
    for name, score in track(scores.items(), description="drop curves", transient=True):
        result[name] = {"roughness": rough[name]}
        for direction in ("high", "low"):
            curve = DropCurve()
            for start in range(0, len(clouds), _CHUNK):
                part = slice(start, start + _CHUNK)
                logits = perturbed_logits(
                    network,
                    clouds[part],
                    score[part],
                    direction,  # type: ignore[arg-type]
                    seed=seed,
                    index=torch.arange(start, min(start + _CHUNK, len(clouds))),
                )
                curve.update(logits, labels[part])
            found = curve.compute()
            result[name][direction] = {
                "area": float(found["accuracy_auc"]),
                "accuracy": [round(v, 4) for v in found["accuracy"].tolist()],
            }
    return result


def measure_defence(
    network: nn.Module, clouds: Tensor, labels: Tensor, steps: int
) -> list[dict[str, Any]]:
    """The subset defence against attacks that do not know it, and the same ones that do.

    Each attack is the stronger one, cloud by cloud, of steps normalised over the cloud and steps
    normalised at each point (projected gradient descent).
    """
    defended, rows = SubsetDefence(network), []
    with torch.no_grad():
        clean = chunked(defended, clouds).argmax(dim=1) != labels
    for limit in track((0.02, 0.05, 0.16), description="attacks", transient=True):
        plain = attack(network, clouds, labels, steps, limit)
        adaptive = attack(defended, clouds, labels, steps, limit, samples=2, noise=limit / 8)
        with torch.no_grad():
            transferred = chunked(defended, plain.points).argmax(dim=1) != labels
        rows.append(
            {
                "clouds": len(clouds),
                "steps": steps,
                "limit": limit,
                "attacks": 2,
                "wrong without attack, plain": float(plain.wrong_before.double().mean()),
                "wrong without attack, defended": float(clean.double().mean()),
                "attack on the plain network": plain.rate,
                "the same clouds, defended": float(transferred.double().mean()),
                "adaptive attack on the defence": adaptive.rate,
            }
        )
    return rows


def attack(
    network: nn.Module, clouds: Tensor, labels: Tensor, steps: int, limit: float, **smoothing: Any
) -> Attack:
    """The stronger one of both kinds of steps on each cloud, a few clouds at a time."""
    found = []
    for start in range(0, len(clouds), _CHUNK):
        part = clouds[start : start + _CHUNK], labels[start : start + _CHUNK]
        given = {"steps": steps, "size": limit / 4, "limit": limit, **smoothing}
        cloud = gradient_attack(network, *part, **given)
        point = gradient_attack(network, *part, normalise="point", tangential=False, **given)
        found.append(strongest_attack(cloud, point))
    fields = ("points", "success", "wrong_before", "queries")
    return Attack(*(torch.cat([getattr(one, name) for one in found]) for name in fields))


def measure_quality(
    network: nn.Module, grids: dict[str, Tensor], seeds: int, count: int, *, quick: bool
) -> dict[str, Any]:
    """Everything but times, each with all seeds except for the attacks."""
    few, some = (8, 4) if quick else (40, 32)
    outliers, corruptions, unusual, drops, axes = [], [], [], [], []
    labels = torch.tensor(list(CLASSES.values())).repeat_interleave(some)
    for seed in track(range(seeds), description="seeds", transient=True):
        for name, label in CLASSES.items():
            clean = voxel_clouds(spread(grids[name], count), POINTS, seed)
            rows = measure_outliers(network, clean, label, seed)
            outliers += [{"class": name, "clouds": count, **row} for row in rows]
        sets = {n: voxel_clouds(spread(g, few), POINTS, seed) for n, g in grids.items()}
        rows = measure_corruptions(network, sets, seed)
        corruptions += [{"clouds": 2 * few, **row} for row in rows]
        pairs = {n: spread(g, 4 * few) for n, g in grids.items()}
        rows = measure_unusual(network, pairs, CLASSES, POINTS, seed)
        unusual += [{"clouds": 4 * few, **row} for row in rows]
        alarms = measure_axes(network, torch.cat(list(sets.values())))
        axes.append({"seed": seed, "clouds": 2 * few, **alarms})
        both = torch.cat([voxel_clouds(spread(g, some), POINTS, seed) for g in grids.values()])
        drops.append(measure_drops(network, both, labels, seed))
    return {
        "outliers": outliers,
        "corruptions": corruptions,
        "unusual": unusual,
        "axes": axes,
        "drops": over_seeds(drops),
        "defence": defence_rows(network, grids, quick=quick),
    }


def defence_rows(
    network: nn.Module, grids: dict[str, Tensor], *, quick: bool
) -> list[dict[str, Any]]:
    """The subset defence on 50 clouds of each class."""
    each, steps = (4, 5) if quick else (50, 20)
    clouds = torch.cat([voxel_clouds(spread(g, each), POINTS, 0) for g in grids.values()])
    labels = torch.tensor(list(CLASSES.values())).repeat_interleave(each)
    return measure_defence(network, clouds, labels, steps)


def over_seeds(drops: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean drop curves of all seeds, and the area of each."""
    result: dict[str, Any] = {}
    for name in drops[0]:
        rough = [seed[name]["roughness"] for seed in drops]
        result[name] = {"roughness": statistics.fmean(rough), "roughnesses": rough}
        for direction in ("high", "low"):
            curves = [seed[name][direction] for seed in drops]
            areas = [curve["area"] for curve in curves]
            steps = zip(*(curve["accuracy"] for curve in curves), strict=True)
            accuracy = [round(statistics.fmean(step), 4) for step in steps]
            mean = statistics.fmean(areas)
            result[name][direction] = {"area": mean, "areas": areas, "accuracy": accuracy}
    return {**result, "fractions": list(DropCurve().fractions)}


def measure_times(network: nn.Module, grids: dict[str, Tensor], *, quick: bool) -> dict[str, Any]:
    """What scores cost, here and elsewhere."""
    torch.manual_seed(0)
    cloud = voxel_clouds(spread(grids["chair"], 1), POINTS, 0)
    often, seldom = (5, 3) if quick else (201, 21)
    graphs = {"DGCNN, untrained": DGCNN(40).eval()}  # a hundred times as slow
    overhead = measure_overhead({"PointNet": network}, cloud, often)
    return {
        "overhead": overhead + measure_overhead(graphs, cloud, seldom),
        "others": measure_others(network, cloud, CLASSES["chair"], 1 if quick else 3),
        "machine": describe_machine(),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the result files (not with ``--quick``)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, default=os.environ.get("CMD_PLUGIN_DATA"))
    parser.add_argument("--clouds", type=int, default=200, help="of each class, planted outliers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few clouds, nothing is written")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--timing-only", action="store_true", help="keep all but times as in --out")
    part.add_argument("--quality-only", action="store_true", help="keep the times as in --out")
    part.add_argument("--defence-only", action="store_true", help="keep all but the attacks")
    parser.add_argument("--out", type=Path, default=RESULTS / "point_importance.json")
    options = parser.parse_args(arguments)
    if options.data_root is None:
        parser.error("say where the data lie: --data-root, or the variable CMD_PLUGIN_DATA")
    partly = options.timing_only or options.quality_only or options.defence_only
    if partly and not options.out.is_file():
        parser.error(f"there is no {options.out} with the other part: measure both first")
    torch.set_num_threads(options.threads)
    network, grids = load(Path(options.data_root))
    result: dict[str, Any] = {}
    if partly:
        result = json.loads(options.out.read_text(encoding="utf-8"))
    if options.defence_only:
        result["defence"] = defence_rows(network, grids, quick=options.quick)
    elif not options.timing_only:
        seeds, count = (1, 16) if options.quick else (options.seeds, options.clouds)
        result |= measure_quality(network, grids, seeds, count, quick=options.quick)
    if not options.quality_only and not options.defence_only:
        result |= measure_times(network, grids, quick=options.quick)
    from benchmarks.point_importance_report import draw, show

    show(result, Console(width=140))
    if not options.quick:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        draw(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
