"""The options of ``cmd-plugin distinction train``, ``evaluate`` and ``explain``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cmd_plugin.distinction.names import OBJECTIVE_NAMES, PLANT_NAMES
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.image_options import DATA_PANEL, ImageOptions
from cmd_plugin.runs.options import JobOptions, argument, option
from cmd_plugin.runs.process import ACCELERATORS

__all__ = ["RIVAL_NAMES", "EvaluateOptions", "ExplainOptions", "TrainOptions"]

RIVAL_NAMES = (
    "integrated_gradients",
    "saliency",
    "gradient_shap",
    "grad_cam",
    "occlusion",
    "random",
)

_NO_PLANT = "none"
_DIGITS_SIZE = 16  # a 5x5 plant has no room on 8x8 pixels

_CLASSIFIER = "Classifier and judge"
_TRAINING = "Decomposition"
_MACHINE = "Machine"
_MODEL = "Model"
_IMAGES = "Images"


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ImageOptions):
    """Train a generator that splits images into what speaks for a class and the rest.

    A classifier is trained first (or given), and a judge: another network, from other random
    numbers, that tells whether evidence is really gone. Then the generator is trained around the
    frozen classifier. Digits are taken at 16x16 pixels unless --image-size says otherwise. With
    --plant the labels are drawn at random and images of class 1 get something added, so that it is
    known what the classes differ in.

    Writes explainer.safetensors, classifier.safetensors, judge.safetensors, metrics.csv,
    examples.png and result.json. The folder is what `distinction evaluate` and `explain` take.

    Examples:
      cmd-plugin distinction train --data digits --plant cross --out crosses
      cmd-plugin distinction train --data mnist --data-root DATA --pick 3 --pick 8 --out three-eight
    """

    plant: str = option(
        _NO_PLANT,
        "What is added to half of the images, whose labels become random: a cross somewhere, noise "
        "everywhere, or a tint of the colour.",
        panel=DATA_PANEL,
        choices=(_NO_PLANT, *PLANT_NAMES),
    )
    pick: tuple[str, ...] = option(
        (), "Use this class (its name, or number from 0); give it twice or more.", panel=DATA_PANEL
    )
    random_labels: bool = option(
        False,
        "Draw the labels at random and plant nothing: a control, in which there is no evidence.",
        panel=DATA_PANEL,
    )
    classifier: Path | None = option(
        None,
        "Weights of --model to explain, for images normalised by the training set's mean and "
        "deviation, as `cmd-plugin train` does; default: one is trained.",
        panel=_CLASSIFIER,
    )
    classifier_epochs: int = option(
        15, "Epochs of classifier and judge.", panel=_CLASSIFIER, at_least=1
    )
    classifier_lr: float = option(
        2e-3, "Learning rate of classifier and judge (Adam).", panel=_CLASSIFIER, above=0
    )
    judge: str = option("cnn:24", "The judge's architecture.", panel=_CLASSIFIER)
    objective: str = option(
        "dxai_distilled",
        "dxai_distilled (the critic has a say, which resists patterns that fool the classifier), "
        "dxai (the classifier alone), distinction (the data's difference; asks no classifier) or "
        "uniform (what is left shall be at chance).",
        panel=_TRAINING,
        choices=OBJECTIVE_NAMES,
    )
    epochs: int = option(12, "Epochs.", panel=_TRAINING, at_least=1)
    batch_size: int = option(24, "Images in a step.", panel=_TRAINING, at_least=2)
    branches: int = option(3, "Branches.", panel=_TRAINING, at_least=2)
    width: int = option(8, "Channels of a branch.", panel=_TRAINING, at_least=1)
    noise: int = option(
        0,
        "Numbers of noise in the code of a class (the papers' mapping network has 16); 0 has none.",
        panel=_TRAINING,
        at_least=0,
    )
    lr: float = option(1e-3, "Learning rate of the generator.", panel=_TRAINING, above=0)
    critic_lr: float = option(1e-3, "Learning rate of the critic.", panel=_TRAINING, above=0)
    critic_width: int = option(
        16, "Channels of the critic's first layer.", panel=_TRAINING, at_least=1
    )
    sparsity: float = option(
        0.0, "Weight of the distinct part's size.", panel=_TRAINING, at_least=0
    )
    seed: int = option(
        0, "Of labels, plants, splits, initial weights and order.", panel=_TRAINING, at_least=0
    )
    precision: str = option(
        "32-true",
        "32-true, bf16-mixed or 16-mixed.",
        panel=_MACHINE,
        choices=("32-true", "bf16-mixed", "16-mixed"),
    )
    threads: int | None = option(
        None, "CPU threads; default: torch's choice.", panel=_MACHINE, at_least=1, free=True
    )
    accelerator: str = option(
        "cpu", "cpu, gpu, mps or auto.", panel=_MACHINE, choices=ACCELERATORS, free=True
    )

    def check_together(self) -> None:
        """Refuse labels that contradict one another."""
        drawn = self.random_labels or self.plant != _NO_PLANT
        if self.random_labels and self.plant != _NO_PLANT:
            raise InputError("--random-labels plants nothing, and --plant does: leave one out.")
        if self.pick and (drawn or len(set(self.pick)) < 2):
            raise InputError(
                "--pick needs two classes or more, and labels that are not drawn: give it twice, "
                "without --plant and --random-labels."
            )
        if self.classifier is not None and drawn:
            raise InputError(
                "--classifier is for the data's own classes: leave it out, or --plant and "
                "--random-labels."
            )

    @property
    def planted(self) -> str | None:
        """What is planted; None for nothing."""
        return None if self.plant == _NO_PLANT else self.plant

    @property
    def size(self) -> int | None:
        """Side length of the images; None keeps it."""
        if self.image_size is None and self.data == "digits":
            return _DIGITS_SIZE
        return self.image_size


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(JobOptions):
    """Measure a decomposition on held-out images, beside Captum's attributions.

    Reported are how exact the sum is (PSNR), whether the classifier and an independent judge still
    see the class without the distinct part, the areas under removal and deletion curves (lower is
    better) with deletion also placed between a random (0) and a greedy (1) ranking, with grey and
    with filled-in pixels, COUT, and how much of a plant is recovered. Rivals get the same.

    Writes result.json and curves.png.

    Examples:
      cmd-plugin distinction evaluate --model crosses
      cmd-plugin distinction evaluate --model crosses --json
    """

    model: Path = argument("Folder of `distinction train`.", panel=_MODEL)
    data_root: str | None = option(
        None,
        "Where data lies, if not where it lay in training.",
        panel=_MODEL,
        free=True,
    )
    images: int = option(256, "Held-out images to measure on.", panel=_IMAGES, at_least=2)
    limit_images: int = option(
        32, "Images of these for the greedy ranking, which is slow.", panel=_IMAGES, at_least=1
    )
    rival: tuple[str, ...] = option(
        RIVAL_NAMES,
        f"Measure this rival; one or more of {', '.join(RIVAL_NAMES)}.",
        panel=_IMAGES,
    )
    seed: int = option(0, "Of random rankings and sampling rivals.", panel=_IMAGES, at_least=0)
    threads: int | None = option(
        None, "CPU threads; default: torch's choice.", panel=_MACHINE, at_least=1, free=True
    )
    accelerator: str = option(
        "cpu", "cpu, gpu, mps or auto.", panel=_MACHINE, choices=ACCELERATORS, free=True
    )

    def check_together(self) -> None:
        """Refuse rivals that there are not."""
        for name in self.rival:
            if name not in RIVAL_NAMES:
                known = ", ".join(RIVAL_NAMES)
                raise InputError(f"--rival must be one of {known}, got {name}.")


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(JobOptions):
    """Show what speaks for a class in images of yours.

    Writes for each image a picture (image, agnostic part, distinct part, signed map, branches, with
    the classifier's confidence before and after), maps.npz (arrays x_batch, y_batch, a_batch and,
    with masks, s_batch as Quantus takes them, and the parts), and page.html. Images are scaled and
    cropped to the size the decomposition was trained on.

    Examples:
      cmd-plugin distinction explain photos --model three-eight --out maps
      cmd-plugin distinction explain photos --model three-eight --masks photos-masks --out maps
      cmd-plugin distinction explain photos --model three-eight --masks boxes.csv --out maps
    """

    images: Path = argument(
        "Folder, archive, array file or one image.", panel=_IMAGES, positional=True
    )
    model: Path = argument("Folder of `distinction train`.", panel=_MODEL)
    classifier: Path | None = option(
        None,
        "Weights of the classifier, if they lie elsewhere; those of another one are refused.",
        panel=_MODEL,
    )
    target: str | None = option(
        None,
        "Class to explain (its name, or number from 0); default: the classifier's answer.",
        panel=_IMAGES,
    )
    masks: Path | None = option(
        None,
        "What is marked in the images, to compare the maps with: masks with the images' names "
        "(white is marked), or a table .csv of boxes (image, left, top, right, bottom in pixels).",
        panel=_IMAGES,
    )
    limit: int = option(64, "Images at most.", panel=_IMAGES, at_least=1)
    threads: int | None = option(
        None, "CPU threads; default: torch's choice.", panel=_MACHINE, at_least=1, free=True
    )
