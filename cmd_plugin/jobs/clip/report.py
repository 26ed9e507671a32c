"""Show the geometry of embeddings on one page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cmd_plugin.jobs.clip.encode import open_input
from cmd_plugin.jobs.clip.geometry import PairGeometry, SetGeometry, measure_pairs, measure_set
from cmd_plugin.jobs.clip.inputs import Rows
from cmd_plugin.jobs.clip.options import ReportOptions
from cmd_plugin.jobs.clip.page import STYLE, facts, section, table
from cmd_plugin.runs.figures import save_figure, write_page
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.process import own_threads
from cmd_plugin.runs.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PAGE", "run"]

PAGE = "report.html"

_FACTS = {
    "rows": "rows",
    "skipped_rows": "rows left out (not finite)",
    "dimension": "values in a row",
    "mean_norm": "mean norm",
    "radius": "mean distance to the mean",
    "thickness": "its standard deviation",
    "offset": "distance of the mean to the origin / spread",
    "anisotropy": "anisotropy (0 sphere, 1 line)",
    "diagonal_share": "share of the covariance on its diagonal",
    "conformity.mean": "mean conformity",
    "conformity.std": "its standard deviation",
    "conformity.correlation_with_likelihood": "correlation of conformity and likelihood",
    "rank": "rank of the whitening",
    "intensity": "share it was shrunk by",
    "floored": "variances raised to the floor",
    "squared_norm.in_sample": "mean ||y||², rows of the fit",
    "squared_norm.leave_one_out": "mean ||y||², as if left out",
}
_GAP = {
    "gap": "distance of the mean directions",
    "rmg": "relative modality gap",
    "paired_cosine": "mean cosine of a pair",
    "image_cosine": "mean cosine of two images",
    "text_cosine": "mean cosine of two texts",
}


@make_job("clip report")
def run(job: Job, options: ReportOptions) -> Result:
    """Measure embeddings, and write what a person wants to see.

    Returns:
        Metrics: one entry for each set (``image``, ``text`` or ``embedding``) with its shape, its
        whitening, conformity, tests of normality by ``group_size`` and the effect of normalisation;
        of pairs also ``pairs``: the ``gap``, ``recall``, the curve over ``alpha`` and the features
        that separate best. Data: the input.

    Raises:
        InputError: If the input, the encoder or the folder cannot be used.
    """
    with own_threads(options.threads):
        opened = open_input(job, options, options.input, options.captions)
        parts = opened.file.parts
        if len(parts) == 1:
            parts = (opened.file.single(options.modality),)
        total = sum(map(len, parts))
        sets = [
            measure_set(job, options, rows, sum(map(len, parts[:number])), total)
            for number, rows in enumerate(parts)
        ]
        pairs = measure_pairs(job, options, *_both(parts)) if len(parts) == 2 else None
        job.report("drawing", 0, 1)
        found: dict[str, Any] = {one.name: one.metrics() for one in sets}
        if pairs is not None:
            found["pairs"] = pairs.metrics()
        _write(job, options, sets, pairs, found)
    return job.finish(metrics=found, data=opened.data)


def _both(parts: Sequence[Rows]) -> tuple[Rows, Rows]:
    return parts[0], parts[1]


def _write(
    job: Job,
    options: ReportOptions,
    sets: Sequence[SetGeometry],
    pairs: PairGeometry | None,
    found: dict[str, Any],
) -> None:
    from cmd_plugin.jobs.clip import drawing

    page: list[str | bytes] = [STYLE, _head(options, sets)]

    def add(name: str, figure: Figure | None) -> None:
        if figure is not None:
            path = job.folder.path(f"{name}.png")
            save_figure(figure, path, {"input": str(options.input)})
            page.append(path.read_bytes())  # drawn once: drawing is what takes the time

    own = {name: one for name, one in found.items() if name != "pairs"}
    page += [section("Shape and likelihood", _shape_text(sets)), facts(own, _FACTS)]
    if pairs is not None:
        page += _pair_text(pairs, found["pairs"])
        add("separability", drawing.draw_separability(pairs))
        page.append(section("Offset of the modalities", _ALPHA.format(best=pairs.curve.best)))
        add("alpha", drawing.draw_alpha(pairs))
    page.append(section("Spectrum", _SPECTRUM))
    add("spectrum", drawing.draw_spectrum(sets))
    page.append(section("Norms of whitened embeddings", _NORMS))
    add("norms", drawing.draw_norms(sets))
    page.append(section("Normality", _NORMALITY))
    add("normality", drawing.draw_normality(sets))
    page.append(_normality_table(own))
    page.append(section("Raw or normalised", *_normalization_text(own)))
    add("normalization", drawing.draw_normalization(sets))
    for one in sets:
        image = drawing.images_of(one)
        if not options.shown or not one.scores:
            continue
        if image is None:
            page += _extreme_names(one)
            continue
        page.append(section("Least and most likely images", _IMAGES))
        for name, rows in (("least", one.lowest), ("most", one.highest)):
            title = f"The {name} likely images (log-likelihood)"
            add(f"{name}_likely", drawing.draw_images(one, image, rows, title))
    write_page(job.folder.path(PAGE), f"Geometry of {options.input.name}", page)


_ALPHA = (
    "Each modality is moved along its own mean: 0 leaves it where training put it, 1 centres it at "
    "the origin. That the contrastive loss is least at 0 is a claim about pairs with little noise; "
    "here it is least at {best:g}."
)
_SPECTRUM = (
    "Variances of the principal directions. The dashed line is what embeddings are divided by: it "
    "differs where the covariance was shrunk or small variances were raised to the floor."
)
_NORMS = (
    "The log-likelihood is -(r log 2π + ||y||²) / 2. Rows of the fit look more likely than they "
    "are; the filled histogram scores each as if it had not been in the fit. Were the embeddings "
    "Gaussian, norms would follow the grey law: real ones are spread much more widely, so the "
    "likelihood is a surrogate that ranks and gives no p-values."
)
_NORMALITY = (
    "Anderson-Darling and D'Agostino-Pearson tests of each whitened feature alone. Averages over "
    "small groups pass far more often than the whole sample, so that a pass rate says nothing "
    "without its group size."
)
_NORMALIZATION = (
    "Dividing an embedding by its norm throws its length away; directions alone are what "
    "Mahalanobis++ scores. Both ways are fitted here, and every row is scored as if left out."
)
_IMAGES = (
    "Rare images first, then the most usual ones; each is scored as if it had not been in the fit "
    "where there are rows enough for that."
)


def _head(options: ReportOptions, sets: Sequence[SetGeometry]) -> str:
    rows = " and ".join(f"{len(one.rows):,} {one.name}s" for one in sets)
    about = sets[0].rows.about or {}
    text = f"{rows} of {sets[0].rows.dimension} values"
    if "encoder" in about:
        weights = f" ({about['weights']})" if "weights" in about else ""
        text += f", encoder {about['encoder']}{weights}"
    title = html.escape(f"Geometry of {options.input.name}")
    return f'<h1>{title}</h1><p class="note">{html.escape(text)}</p>'


def _shape_text(sets: Sequence[SetGeometry]) -> str:
    text = (
        "Embeddings lie in a thin ellipsoidal shell away from the origin; y is an embedding after "
        "whitening."
    )
    if all(abs(one.statistics.mean_norm - 1) < 1e-3 for one in sets):
        text += (
            " These were divided by their norms before they came here: the likelihood is that of "
            "directions, not of raw embeddings."
        )
    return text


def _pair_text(pairs: PairGeometry, found: dict[str, Any]) -> list[str]:
    gap = table(["", "value"], [[title, found[name]] for name, title in _GAP.items()])
    recall = table(
        [f"retrieval among {pairs.pairs:,} pairs", "R@1", "R@5", "R@10"],
        [[name.replace("_", " "), *values.values()] for name, values in found["recall"].items()],
    )
    return [
        section("Images and texts apart", "Images and their texts form two clouds."),
        gap,
        recall,
    ]


def _normality_table(own: dict[str, Any]) -> str:
    rows = [
        [
            f"{name}s",
            test["group_size"],
            test["groups"],
            test["anderson"],
            f"{test['anderson_pass']:.1%}",
            test["dagostino"],
            f"{test['dagostino_pass']:.1%}",
        ]
        for name, found in own.items()
        for test in found["normality"]
    ]
    columns = ["", "group size", "groups", "mean A²", "A² passes", "mean p of K²", "K² passes"]
    return table(columns, rows)


def _normalization_text(own: dict[str, Any]) -> list[str]:
    texts = [_NORMALIZATION]
    for name, found in own.items():
        effect = found["normalization"]
        if effect is None:
            continue
        if effect["norm_variation"] < 1e-3:
            texts.append(f"The {name}s were normalised before: both scores are the same.")
            continue
        texts.append(
            f"Of the {effect['rarest']} rarest {name}s by one score "
            f"{effect['rarest_in_common']:.0%} are among the rarest by the other (norms vary by "
            f"{effect['norm_variation']:.1%})."
        )
    return texts


def _extreme_names(one: SetGeometry) -> list[str]:
    ends = (("least", one.lowest), ("most", one.highest))
    named = one.rows.names is not None
    rows = [
        [
            kind,
            str(one.rows.first + row),
            *([one.rows.name_of(row)] if named else []),
            one.scores[row],
        ]
        for kind, chosen in ends
        for row in chosen
    ]
    columns = ["likely", "row", *(["name"] if named else []), "log-likelihood"]
    return [section(f"Least and most likely {one.name}s"), table(columns, rows)]
