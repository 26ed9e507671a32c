r"""One p-value for a set of images: was it in the training data?

Single images are hard to tell; a set of them is not. A scorer is learned from many weak features of
suspects and of controls, each image is scored by one that never saw it, and the suspects' lead is
compared with what chance gives.

Source of the idea: "Dataset Inference" (Maini et al., 2021) and "CDI: Copyrighted Data
Identification in Diffusion Models" (Dubiński et al., 2025). The test here is a permutation test, so
that it holds at any number of images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.runs.separation import auroc

__all__ = ["SetTest", "infer_membership", "membership_power", "pixel_separation", "refuse_unlike"]

_SMALLEST = 5
PIXEL_LIMIT = 0.6
"""AUROC by pixels alone from which two sets of images differ in more than membership."""


@dataclass(frozen=True)
class SetTest:
    """Whether suspects score above controls.

    Attributes:
        p_value: Chance of a lead as large where suspects and controls are alike; at least
            1 / (1 + permutations).
        auroc: How well the cross-fitted scores tell suspects from controls.
        suspects: Number of suspects.
        controls: Number of controls.
    """

    p_value: float
    auroc: float
    suspects: int
    controls: int


def infer_membership(
    suspects: Tensor,
    controls: Tensor,
    *,
    permutations: int = 9999,
    folds: int = 5,
    ridge: float = 1.0,
    seed: int = 0,
) -> SetTest:
    """Test whether a set of suspects was trained on, against images that surely were not.

    The scorer is a ridge regression of the label on standardised features, fitted on all folds but
    the one it scores. The lead is the difference of mean scores within folds; labels are permuted
    within folds, and the whole fit repeated for each permutation. If suspects and controls come
    from one source and neither was trained on, the p-value is below any level with at most that
    chance. It is one-sided only in that the lead must be the suspects': the scorer learns itself
    which features point where.

    Args:
        suspects: [S, F] features, such as :meth:`.memorization.MemorizationReport.features`.
        controls: [C, F] likewise.
        permutations: How many.
        folds: Into how many parts the images are cut.
        ridge: Regularisation, in units of the number of images fitted on.
        seed: Of folds and permutations.

    Raises:
        InputError: If there are fewer than 5 of a kind, or an option is out of range.
        ShapeError: If features do not fit.
        NonFiniteError: If a feature is NaN or infinite.
    """
    table, labels = _joined(suspects, controls)
    if permutations < 1 or folds < 2 or not (math.isfinite(ridge) and ridge > 0.0):
        raise InputError(
            f"permutations must be at least 1, folds 2 and ridge above 0, got {permutations}, "
            f"{folds} and {ridge}."
        )
    generator = torch.Generator().manual_seed(seed)
    fold = _folds(labels, min(folds, len(suspects), len(controls)), generator)
    smoother = _smoother(table, fold, ridge)
    drawn = _shuffled(labels, fold, permutations, generator)
    leads = _leads(smoother, torch.cat([labels[:, None], drawn], dim=1), fold)
    # Sums of the same numbers in another order differ in their last bits.
    above = int((leads[1:] >= leads[0] - 1e-12 * leads.abs().max()).sum())
    scores = (smoother @ _centred(labels[:, None], fold))[:, 0]
    return SetTest(
        (1 + above) / (1 + permutations),
        auroc(scores[labels == 0], scores[labels == 1]),
        len(suspects),
        len(controls),
    )


def membership_power(
    suspects: Tensor,
    controls: Tensor,
    sizes: Sequence[int] = (10, 30, 70),
    *,
    level: float = 0.05,
    draws: int = 50,
    permutations: int = 199,
    seed: int = 0,
) -> dict[int, float | None]:
    """Return how often so many suspects, against as many controls, would be found.

    Subsets are drawn without replacement, so this holds for sets like these: where suspects were
    not trained on, it is near the level.

    Args:
        suspects: [S, F] features.
        controls: [C, F] features.
        sizes: Numbers of images.
        level: p-value that counts as found.
        draws: Subsets of each size.
        permutations: For each subset.
        seed: Of everything random.

    Returns:
        Size -> share of subsets found; None where there are not as many images.

    Raises:
        InputError: As :func:`infer_membership`, or if a size is below 5.
    """
    _joined(suspects, controls)
    if not 0.0 < level < 1.0 or draws < 1 or min(sizes, default=0) < _SMALLEST:
        raise InputError(
            f"level must be in (0, 1), draws at least 1 and sizes at least {_SMALLEST}, got "
            f"{level}, {draws} and {tuple(sizes)}."
        )
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, float | None] = {}
    for size in sizes:
        if size > min(len(suspects), len(controls)):
            found[size] = None
            continue
        hits = 0
        for draw in range(draws):
            some = [
                group[torch.randperm(len(group), generator=generator)[:size]]
                for group in (suspects, controls)
            ]
            test = infer_membership(*some, permutations=permutations, seed=seed + draw)
            hits += test.p_value <= level
        found[size] = hits / draws
    return found


def pixel_separation(suspects: Tensor, controls: Tensor, *, seed: int = 0) -> float:
    """Return the AUROC at which a classifier that sees only pixels tells the sets apart.

    Above .6 the two sets differ in more than what a model was trained on, and a test of membership
    would find that difference: :func:`infer_membership` must not be believed then.

    Args:
        suspects: [S, C, H, W] images in one range.
        controls: [C, C, H, W] likewise, the same size.
        seed: Of the folds; ten cuts are averaged.

    Raises:
        InputError: If there are fewer than 5 of a kind.
        ShapeError: If sizes differ.
        NonFiniteError: If a pixel is NaN or infinite.
    """
    table, labels = _joined(_pixel_features(suspects), _pixel_features(controls))
    found = []
    for cut in range(10):
        generator = torch.Generator().manual_seed(seed * 10 + cut)
        fold = _folds(labels, min(5, len(suspects), len(controls)), generator)
        scores = (_smoother(table, fold, 1.0) @ _centred(labels[:, None], fold))[:, 0]
        found.append(auroc(scores[labels == 0], scores[labels == 1]))
    return sum(found) / len(found)


def refuse_unlike(suspects: Tensor, controls: Tensor, *, seed: int = 0) -> float:
    """Return :func:`pixel_separation` of two sets of images, unless it is above .6.

    Raises:
        InputError: If it is, or as :func:`pixel_separation`.
    """
    found = pixel_separation(suspects, controls, seed=seed)
    if found > PIXEL_LIMIT:
        raise InputError(
            f"suspects and controls are told apart by their pixels alone (AUROC {found:.2f}, limit "
            f"{PIXEL_LIMIT}), so a difference in scores would not mean that a model was trained on "
            "them: choose controls of the same source and kind of file."
        )
    return found


def _pixel_features(images: Tensor) -> Tensor:
    """What pixels say without a model: a thumbnail, and brightness, contrast, roughness, levels."""
    if images.ndim != 4 or not images.is_floating_point():
        raise ShapeError(
            f"images must be [N, C, H, W] in floating point, got {tuple(images.shape)} "
            f"{images.dtype}."
        )
    wide = images.detach().cpu().double()
    small = torch.nn.functional.adaptive_avg_pool2d(
        wide, (min(8, wide.shape[2]), min(8, wide.shape[3]))
    ).flatten(1)
    rough = [
        wide.diff(dim=axis).abs().flatten(1).mean(1) for axis in (2, 3) if wide.shape[axis] > 1
    ]
    levels = [float(len(image.unique())) for image in wide]
    flat = wide.flatten(1)
    whole = [flat.mean(1), flat.std(1), flat.norm(dim=1), flat.amin(1), flat.amax(1), *rough]
    whole.append(torch.tensor(levels, dtype=torch.float64).log())
    return torch.cat([small, torch.stack(whole, dim=1)], dim=1)


def _joined(suspects: Tensor, controls: Tensor) -> tuple[Tensor, Tensor]:
    """Standardised features of both, suspects first, and labels 1 and 0."""
    if suspects.ndim != 2 or controls.ndim != 2 or suspects.shape[1] != controls.shape[1]:
        raise ShapeError(
            f"features must be [S, F] and [C, F], got {tuple(suspects.shape)} and "
            f"{tuple(controls.shape)}."
        )
    if min(len(suspects), len(controls)) < _SMALLEST or not suspects.shape[1]:
        raise InputError(
            f"there must be at least {_SMALLEST} suspects and controls, got {len(suspects)} and "
            f"{len(controls)}."
        )
    table = torch.cat([suspects, controls]).detach().cpu().double()
    bad = int((~table.isfinite()).sum())
    if bad:
        raise NonFiniteError(f"{bad} features are NaN or infinite: leave those images out.")
    spread = table.std(0)
    table = (table - table.mean(0)) / torch.where(spread > 0, spread, math.inf)
    labels = torch.cat([torch.ones(len(suspects)), torch.zeros(len(controls))]).double()
    return table, labels


def _folds(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A fold for each image; of each label every fold gets its share."""
    fold = torch.empty(len(labels), dtype=torch.int64)
    for label in (0, 1):
        places = (labels == label).nonzero().flatten()
        order = places[torch.randperm(len(places), generator=generator)]
        fold[order] = torch.arange(len(order)) % count
    return fold


def _shuffled(labels: Tensor, fold: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Labels permuted within folds, ``count`` times, [N, count]."""
    drawn = labels[:, None].repeat(1, count)
    for part in range(int(fold.max()) + 1):
        places = (fold == part).nonzero().flatten()
        order = torch.rand(len(places), count, generator=generator).argsort(0)
        drawn[places] = labels[places][order]
    return drawn


def _smoother(table: Tensor, fold: Tensor, ridge: float) -> Tensor:
    """The matrix that turns labels into scores of images not fitted on, [N, N].

    Ridge regression is linear in the labels, so one matrix serves all permutations.
    """
    smoother = torch.zeros(len(table), len(table), dtype=torch.float64)
    for part in range(int(fold.max()) + 1):
        rest, known = (fold == part).nonzero().flatten(), (fold != part).nonzero().flatten()
        centre = table[known].mean(0)
        fitted, asked = table[known] - centre, table[rest] - centre
        # In the smaller of the two forms: features may be more than images.
        gram = fitted @ fitted.T
        gram.diagonal().add_(ridge * len(known))
        smoother[rest[:, None], known] = torch.linalg.solve(gram, fitted @ asked.T).T
    return smoother


def _centred(labels: Tensor, fold: Tensor) -> Tensor:
    """Labels [N, P] less their mean in their fold, so that folds do not tell labels."""
    centred = labels.clone()
    for part in range(int(fold.max()) + 1):
        rows = fold == part
        centred[rows] -= labels[rows].mean(0)
    return centred


def _leads(smoother: Tensor, labels: Tensor, fold: Tensor) -> Tensor:
    """By how much images labelled 1 score above the others within folds, [P]."""
    centred = _centred(labels, fold)
    return (centred * (smoother @ centred)).sum(0)
