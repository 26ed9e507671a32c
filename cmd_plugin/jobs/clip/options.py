"""The options of ``cmd-plugin clip fit``, ``score``, ``report``, ``merge`` and the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cmd_plugin.errors import InputError
from cmd_plugin.runs.options import JobOptions, argument, option
from cmd_plugin.runs.process import ACCELERATORS

__all__ = [
    "AlignOptions",
    "CompareOptions",
    "EncoderOptions",
    "FitOptions",
    "MergeOptions",
    "ReportOptions",
    "ScoreOptions",
    "WhiteningOptions",
    "shard_of",
]

_INPUT = "Input"
_ENCODER = "Encoder, for images and captions"
_WHITENING = "Whitening"
_TEST = "Test"
_PAGE = "Page"
_MACHINE = "Machine"

_WHAT = (
    "Embeddings (.npy [N, d] or .safetensors; pairs of images and texts as [2, N, d]), images (a "
    "folder, nested or not, or an archive), or a text file with one caption a line."
)
_PAIRS = (
    "Pairs: a .npy [2, N, d] (images, then their texts), a .safetensors with the tensors image and "
    "text, or images together with --captions."
)

SHRINKAGES = ("auto", "none", "oas", "ledoit-wolf")


# What a command reads comes first on its help page: these stand last among the bases, whose fields
# come in reverse order.


@dataclass(frozen=True, kw_only=True)
class _Input(JobOptions):
    """One input."""

    input: Path = argument(_WHAT, panel=_INPUT, positional=True)


@dataclass(frozen=True, kw_only=True)
class _TwoInputs(JobOptions):
    """A reference and what is compared with it."""

    reference: Path = argument(f"Reference. {_WHAT}", panel=_INPUT, positional=True)
    sample: Path = argument(
        "What is compared with it; as the reference.", panel=_INPUT, positional=True
    )


@dataclass(frozen=True, kw_only=True)
class _Fits(JobOptions):
    """Several fits."""

    inputs: tuple[Path, ...] = argument(
        "Folders of `clip fit`, or files of statistics.", panel=_INPUT, positional=True
    )


@dataclass(frozen=True, kw_only=True)
class _Modality(JobOptions):
    """What the input is of."""

    modality: str | None = option(
        None,
        "Which of the pairs, image or text; also said of what does not say it itself.",
        panel=_INPUT,
        choices=("image", "text"),
    )


@dataclass(frozen=True, kw_only=True)
class _Captions(JobOptions):
    """Captions of images."""

    captions: Path | None = option(
        None,
        "Text file with the caption of each image, in the order of their names: makes pairs.",
        panel=_INPUT,
    )


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(JobOptions):
    """How images and captions become embeddings; of no effect where the input is embeddings."""

    model: str | None = option(
        None,
        "A folder that open_clip or transformers saved; or, with --weights, open_clip:NAME, "
        "timm:NAME, or a network of your own as module:Class with encode_image and encode_text "
        "(its module is run). Nothing is downloaded.",
        panel=_ENCODER,
    )
    weights: Path | None = option(
        None, "Weights of --model: .safetensors, .pt, .bin; a folder has its own.", panel=_ENCODER
    )
    untrained: bool = option(
        False, "Take random weights; to try a command, not to learn about images.", panel=_ENCODER
    )
    image_size: int | None = option(
        None, "Side length of the images; default: what the model says.", panel=_ENCODER, at_least=1
    )
    batch_size: int = option(32, "Images or captions at a time.", panel=_ENCODER, at_least=1)
    accelerator: str = option("cpu", "Device of the encoder.", panel=_MACHINE, choices=ACCELERATORS)
    workers: int = option(
        2, "Processes that read images; 0 reads in this one.", panel=_MACHINE, free=True, at_least=0
    )
    threads: int | None = option(
        None, "Threads on a CPU; PyTorch's own number by default.", panel=_MACHINE, at_least=1
    )
    seed: int = option(0, "Of all random choices, random weights too.", panel=_MACHINE, at_least=0)

    def check_together(self) -> None:
        """Refuse weights without a model, and two kinds of weights."""
        super().check_together()
        if self.model is None:
            for name in ("weights", "untrained", "image_size"):
                if getattr(self, name) not in (None, False):
                    raise InputError(
                        f"--{name.replace('_', '-')} has an effect only with --model: give the "
                        "encoder, or leave it out."
                    )
        if self.untrained and self.weights is not None:
            raise InputError("--weights and --untrained name two kinds of weights: leave one out.")


@dataclass(frozen=True, kw_only=True)
class WhiteningOptions(JobOptions):
    """How a whitening is made of statistics."""

    basis: str = option(
        "pca",
        "Basis of the whitened values: pca, zca (nearest to the input) or cholesky (cheapest). All "
        "give the same likelihood.",
        panel=_WHITENING,
        choices=("pca", "zca", "cholesky"),
    )
    shrinkage: str = option(
        "auto",
        "none, oas, ledoit-wolf, a share from 0 to 1, or auto: none from 10 rows a dimension on, "
        "below that oas.",
        panel=_WHITENING,
    )
    floor: float = option(
        1e-6,
        "Least variance of a direction as a share of the largest; smaller ones are raised to it: "
        "they are rounding.",
        panel=_WHITENING,
        at_least=0,
        below=1,
    )

    def check_together(self) -> None:
        """Refuse a shrinkage that is neither a name nor a share."""
        super().check_together()
        check_shrinkage(self.shrinkage)


def check_shrinkage(text: str) -> None:
    """Raise InputError unless a text names a shrinkage or is a share."""
    if text in SHRINKAGES:
        return
    try:
        good = 0.0 <= float(text) <= 1.0
    except ValueError:
        good = False
    if not good:
        raise InputError(
            f"--shrinkage must be {', '.join(SHRINKAGES)} or a number from 0 to 1, got {text}."
        )


def shard_of(text: str) -> tuple[int, int]:
    """Return number and count of a shard written as ``2/8``.

    Raises:
        InputError: If it is written otherwise, or there is no such one.
    """
    number, _, count = text.partition("/")
    if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise InputError(f"--shard is written NUMBER/COUNT, from 1/COUNT on, as 2/8, got {text!r}.")


@dataclass(frozen=True, kw_only=True)
class _Normalized(JobOptions):
    normalize: str = option(
        "raw",
        "raw (embeddings as the projection gives them, with their length) or l2 (on the unit "
        "sphere, as Mahalanobis++ does).",
        panel=_WHITENING,
        choices=("raw", "l2"),
    )


@dataclass(frozen=True, kw_only=True)
class FitOptions(EncoderOptions, WhiteningOptions, _Normalized, _Modality, _Input):
    """Fit mean and covariance of embeddings: a whitening, whose norm is a likelihood.

    Writes whitening.safetensors (read by the other commands), statistics.safetensors (read by
    merge) and result.json; of images and captions also embeddings.npy, and left_out.csv if files
    could not be read. An encoding that was stopped goes on with --resume.

    Examples:
      cmd-plugin clip fit embeddings.npy --out photos
      cmd-plugin clip fit photos/ --model open_clip:ViT-B-32 --weights clip.safetensors --shard 1/4
    """

    shard: str | None = option(
        None, "Only this part of the input, as 2/8; merge makes one of all.", panel=_INPUT
    )

    def check_together(self) -> None:
        """Refuse a shard that there is not."""
        super().check_together()
        if self.shard is not None:
            shard_of(self.shard)


@dataclass(frozen=True, kw_only=True)
class MergeOptions(WhiteningOptions, _Fits):
    """Make one whitening of several: the same as one fit of all their rows.

    Reads the folders of fit (or their statistics.safetensors). Percentiles need the embeddings
    themselves, which are read once more; without them, or for bare statistics, there are none.

    Examples:
      cmd-plugin clip merge shard1 shard2 shard3 --out all
    """

    def check_together(self) -> None:
        """Refuse a call from Python with no input at all."""
        super().check_together()
        if not self.inputs:
            raise InputError("INPUTS must name at least one folder of `clip fit`.")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(EncoderOptions, _Modality, _Input):
    """Score embeddings, images or captions against a whitening: the rare ones are unlikely.

    Writes scores.csv or scores.jsonl, one row an input row, and columns.json with the formula, unit
    and direction of every column. The rows may be any number: they are read a piece at a time.

    Examples:
      cmd-plugin clip score new.npy --whitening photos --out scores
    """

    whitening: Path = argument(
        "Folder of `clip fit` or `clip merge`, or its whitening.safetensors.", panel=_INPUT
    )
    format: str = option("csv", "csv or jsonl.", panel=_INPUT, choices=("csv", "jsonl"))
    leave_one_out: bool = option(
        False,
        "The input are the rows of the fit: score each as if the fit were without it.",
        panel=_INPUT,
    )
    rows: int = option(16384, "Rows scored at a time.", panel=_MACHINE, at_least=1)


@dataclass(frozen=True, kw_only=True)
class ReportOptions(EncoderOptions, WhiteningOptions, _Normalized, _Modality, _Captions, _Input):
    """Show the geometry of embeddings on one page: spectrum, shell, likelihood, modality gap.

    Writes report.html, which needs nothing but itself, its pictures as PNG, and result.json. Of
    pairs it also shows what separates images from texts, the gap, retrieval and the loss along the
    offset; of images it shows the most and the least likely.

    Examples:
      cmd-plugin clip report pairs.npy --out report
      cmd-plugin clip report photos/ --model saved_clip/ --out report
    """

    temperature: float = option(0.01, "Of the contrastive loss.", panel=_PAGE, above=0)
    shift: str = option(
        "both",
        "Which embeddings the offset alpha moves: both, image or text.",
        panel=_PAGE,
        choices=("both", "image", "text"),
    )
    group_size: int = option(
        250, "Rows in a group of the tests of normality.", panel=_PAGE, at_least=20
    )
    shown: int = option(12, "Most and least likely images shown, each.", panel=_PAGE, at_least=0)
    most_pairs: int = option(
        2000, "Pairs taken for retrieval and loss, at most.", panel=_PAGE, at_least=2
    )


@dataclass(frozen=True, kw_only=True)
class CompareOptions(EncoderOptions, _Modality, _TwoInputs):
    """Test whether new embeddings are distributed as reference ones.

    Two tests: a permutation test of the maximum mean discrepancy, whose p-value alarms below
    --level, and the AUC of a classifier that tells the two apart (0.5: it cannot).

    Examples:
      cmd-plugin clip compare reference.npy new.npy --out drift
    """

    normalize: str = option(
        "raw",
        "raw, or l2: compare directions only, and not lengths.",
        panel=_TEST,
        choices=("raw", "l2"),
    )
    permutations: int = option(
        999, "Random relabellings of the pooled rows.", panel=_TEST, at_least=19
    )
    level: float = option(0.05, "Alarm below this p-value.", panel=_TEST, above=0, below=1)
    most_rows: int = option(
        2000, "Rows of each side, drawn at random if there are more.", panel=_TEST, at_least=10
    )


@dataclass(frozen=True, kw_only=True)
class AlignOptions(EncoderOptions, _Captions, _Input):
    """Remove the gap between images and texts, for search among both at once.

    Each modality is moved to the origin (centred), and also whitened. Writes centred.npy and
    whitened.npy, pairs as the input, and prints retrieval before and after: among images and texts
    mixed, and among one modality alone, where something may be lost. What is printed was fitted on
    one half of the pairs and tested on the other; what is written was fitted on all.

    Examples:
      cmd-plugin clip align pairs.npy --out aligned
    """

    input: Path = argument(_PAIRS, panel=_INPUT, positional=True)
    shrinkage: str = option(
        "0.7",
        "Of the whitening: a share from 0 to 1, none, oas, ledoit-wolf or auto. Weak shrinkage "
        "spreads rare directions, which costs search in one modality.",
        panel=_WHITENING,
    )
    most_pairs: int = option(
        2000, "Pairs that retrieval is tested on, at most.", panel=_TEST, at_least=20
    )

    def check_together(self) -> None:
        """Refuse a shrinkage that is neither a name nor a share."""
        super().check_together()
        check_shrinkage(self.shrinkage)
