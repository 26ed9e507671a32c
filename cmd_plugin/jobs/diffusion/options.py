"""The options of ``cmd-plugin diffusion``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cmd_plugin.errors import InputError
from cmd_plugin.runs.options import JobOptions, argument, option
from cmd_plugin.runs.process import ACCELERATORS

__all__ = [
    "CalibrateOptions",
    "DetectOptions",
    "FewShotOptions",
    "MemorizationOptions",
    "TrainOptions",
]

_DATA = "Data and network"
_TRAINING = "Training"
_WATCHING = "Memorisation"
_MODEL = "Model"
_MEASURING = "Measurement"
_DETECTING = "Detector"
_MACHINE = "Machine"


@dataclass(frozen=True, kw_only=True)
class TrainOptions(JobOptions):
    """Train a small diffusion model, with duplicates planted, and watch what it memorises.

    Writes model.safetensors, probes.safetensors (images that were trained on and held out),
    metrics.csv, memorization.csv, pictures and result.json; `diffusion memorization --model` and
    `diffusion detect --model` take the folder.

    Examples:
      cmd-plugin diffusion train --duplicate 20x2,20x4,20x8,20x16,20x32 --out M
      cmd-plugin diffusion train --data mnist --data-root DATA --model unet --epochs 20
    """

    data: str = option(
        "digits",
        "digits (comes with scikit-learn), mnist, fashion-mnist, cifar10 or folder.",
        panel=_DATA,
    )
    data_root: str | None = option(
        None,
        "Where data lies. Default: environment variable CMD_PLUGIN_DATA. Nothing is downloaded.",
        panel=_DATA,
        free=True,
    )
    image_size: int | None = option(
        None, "Resize images to this side length.", panel=_DATA, at_least=1
    )
    duplicate: str = option(
        "",
        "Images to plant several times: 20x2,20x8 trains on 20 images twice and 20 eight times.",
        panel=_DATA,
    )
    singles: int | None = option(
        800, "Images trained on once, beside the planted ones.", panel=_DATA, at_least=1
    )
    held_out: int = option(400, "Most images to hold out.", panel=_DATA, at_least=10)
    model: str = option(
        "mlp",
        "mlp (for small images) or unet (the UNet2DModel of diffusers).",
        panel=_DATA,
        choices=("mlp", "unet"),
    )
    width: int | None = option(
        None, "Hidden width; default 512 of mlp, 32 of unet.", panel=_DATA, at_least=1
    )
    steps: int = option(
        8000, "Optimizer steps, about: whole epochs are trained.", panel=_TRAINING, at_least=1
    )
    batch_size: int = option(128, "Images in a step.", panel=_TRAINING, at_least=2)
    lr: float = option(2e-3, "Highest learning rate.", panel=_TRAINING, above=0)
    lr_end: float = option(
        0.1,
        "Share of it left at the end of a cosine; 1 keeps it constant.",
        panel=_TRAINING,
        above=0,
        at_most=1,
    )
    ema: float = option(
        0.999,
        "Decay of the averaged weights, which are the result.",
        panel=_TRAINING,
        at_least=0,
        below=1,
    )
    seed: int = option(
        0, "Of data, initial weights and all that is drawn later.", panel=_TRAINING, at_least=0
    )
    looks: int = option(
        12, "How often to look at what is memorised; 0 never.", panel=_WATCHING, at_least=0
    )
    time: tuple[float, ...] = option(
        (25.0, 200.0), "Noise levels to look at, as training steps (repeatable).", panel=_WATCHING
    )
    accelerator: str = option(
        "cpu", "cpu, gpu, mps or auto.", panel=_MACHINE, choices=ACCELERATORS, free=True
    )
    threads: int | None = option(
        None, "CPU threads; default: torch's choice.", panel=_MACHINE, at_least=1, free=True
    )

    def check_together(self) -> None:
        """Refuse duplicates that are no plan, and looking at no time."""
        from cmd_plugin.diffusion.doses import parse_doses

        parse_doses(self.duplicate)
        if self.looks and not self.time:
            raise InputError("--time is empty: give at least one, or --looks 0.")


@dataclass(frozen=True, kw_only=True)
class _ScoringOptions(JobOptions):
    """What every command says that asks a model about images."""

    model: Path | None = option(
        None, "Folder of `diffusion train`, or of a diffusers pipeline.", panel=_MODEL
    )
    directions: int = option(8, "Directions, in pairs.", panel=_MEASURING, at_least=2)
    seed: int = option(
        0, "Of the directions and of all else that is drawn.", panel=_MEASURING, at_least=0
    )
    batch_size: int = option(
        256,
        "Images per call of the network: bounds the memory.",
        panel=_MACHINE,
        at_least=1,
        free=True,
    )
    accelerator: str = option(
        "cpu",
        "cpu, gpu or auto.",
        panel=_MACHINE,
        choices=("cpu", "auto", "gpu", "cuda"),
        free=True,
    )
    threads: int | None = option(
        None, "CPU threads; default: torch's choice.", panel=_MACHINE, at_least=1, free=True
    )

    def check_together(self) -> None:
        """Refuse what cannot be asked."""
        if self.model is None:
            raise InputError("--model is missing: give the folder of a trained model.")
        if self.directions % 2:
            raise InputError(f"--directions come in pairs: {self.directions} is odd.")


@dataclass(frozen=True, kw_only=True)
class MemorizationOptions(_ScoringOptions):
    """Score images by how memorised a diffusion model has them, with all controls beside the score.

    Without IMAGES it scores the probes of a model of `diffusion train` and says how well each
    statistic finds the planted ones, and tells members, held-out images and the model's own samples
    from one another. With --suspects and --controls it gives one p-value for the whole set of
    suspects. Writes scores.csv, pictures and result.json; files that cannot be read are listed and
    left out.

    Examples:
      cmd-plugin diffusion memorization --model M
      cmd-plugin diffusion memorization photos/ --model M --out S
      cmd-plugin diffusion memorization --suspects mine/ --controls others/ --model M
    """

    images: tuple[Path, ...] = option(
        (), "Folder, archive or array of images to score.", panel=_MODEL, positional=True
    )
    suspects: Path | None = option(
        None, "Images that may have been trained on, as one set.", panel=_MODEL
    )
    controls: Path | None = option(
        None, "Images of the same kind that surely were not.", panel=_MODEL
    )
    time: tuple[float, ...] = option(
        (25.0, 50.0), "Noise levels, as training steps (repeatable).", panel=_MEASURING
    )
    directions: int = option(16, "Directions, in pairs.", panel=_MEASURING, at_least=2)
    samples: int = option(
        200,
        "Images to let the model make, which its probes are compared with; 0 for none.",
        panel=_MEASURING,
        at_least=0,
    )
    permutations: int = option(
        9999, "Permutations behind the p-value of suspects.", panel=_MEASURING, at_least=99
    )

    def check_together(self) -> None:
        """Refuse what cannot be asked at once."""
        super().check_together()
        if (self.suspects is None) != (self.controls is None):
            raise InputError("--suspects and --controls go together: give both.")
        if self.suspects is not None and self.images:
            raise InputError("IMAGES and --suspects are two questions: ask one at a time.")
        if len(self.images) > 1:
            raise InputError("IMAGES must be one folder, archive or array: put them together.")
        if not self.time:
            raise InputError("--time is empty: give at least one.")


@dataclass(frozen=True, kw_only=True)
class _DetectorOptions(_ScoringOptions):
    """What decides a score of how generated an image looks."""

    images: tuple[Path, ...] = argument(
        "Folder, archive or array of images.", panel=_MODEL, positional=True
    )
    time: float = option(10.0, "Noise level, as a training step.", panel=_DETECTING, at_least=0)
    captions: Path | None = option(
        None,
        "CSV file of image names and captions, for a model that takes prompts; without it every "
        "prompt is empty.",
        panel=_DETECTING,
    )

    def check_together(self) -> None:
        """Refuse what cannot be asked at once."""
        super().check_together()
        if len(self.images) != 1:
            raise InputError("IMAGES must be one folder, archive or array: put them together.")


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(_DetectorOptions):
    """Score real images, which `diffusion detect` then compares others with.

    Writes reference.safetensors (the scores, and the settings they hold for), scores.csv and
    result.json. The images must be real, of the kind and file format that will be asked about, and
    none of them may be asked about later.

    Examples:
      cmd-plugin diffusion calibrate reals/ --model M --out C
    """


@dataclass(frozen=True, kw_only=True)
class DetectOptions(_DetectorOptions):
    """Say of each image whether a diffusion model made it: real, generated or unsure.

    Unsure is a verdict that changes when the image is delivered in another way: as JPEG 90 or 70,
    at half its size and back, cropped, as WebP. With a folder for each kind of image, one of them
    named real, it also says how well each statistic tells the kinds, as they are and with the
    others' grey levels matched to the real ones'. It knows images of this very model and its kin,
    at best. Writes scores.csv, verdicts.csv and result.json.

    Examples:
      cmd-plugin diffusion detect images/ --model M --reference C --out D
    """

    reference: Path | None = option(
        None, "Folder that `diffusion calibrate` wrote with this model.", panel=_MODEL
    )
    level: float = option(
        0.05,
        "False-positive rate: at most this share of real images is called generated.",
        panel=_DETECTING,
        above=0,
        below=1,
    )
    real: str = option(
        "real", "Name of the folder of real images, where kinds have folders.", panel=_DETECTING
    )

    def check_together(self) -> None:
        """Refuse what cannot be asked at once."""
        super().check_together()
        if self.reference is None:
            raise InputError(
                "--reference is missing: give the folder that `diffusion calibrate` wrote."
            )


@dataclass(frozen=True, kw_only=True)
class FewShotOptions(_ScoringOptions):
    """Learn to tell generated from real images from a few labels, and say how far that carries.

    IMAGES has a folder for each kind: one of them named real, the others each a generator. For each
    number of labels and each generator a detector is fitted on that generator alone and tested on
    other images of it (seen) and of the other generators (unseen), a few times over. Writes
    features.csv, fewshot.safetensors (fitted on everything) and result.json.

    Examples:
      cmd-plugin diffusion fewshot images/ --model M --per-class 5 --per-class 50
    """

    images: tuple[Path, ...] = argument(
        "Folder or archive with a folder for each kind of image.", panel=_MODEL, positional=True
    )
    real: str = option("real", "Name of the folder of real images.", panel=_DETECTING)
    per_class: tuple[int, ...] = option(
        (5, 25, 100), "Labels of each kind, 5 to 500 (repeatable).", panel=_DETECTING, at_least=5
    )
    draws: int = option(5, "How often labels are drawn anew.", panel=_DETECTING, at_least=1)
    matched: bool = option(
        False,
        "Match the grey levels of each generator to the real images' first, so that contrast is no "
        "evidence.",
        panel=_DETECTING,
    )
    time: tuple[float, ...] = option(
        (10.0, 50.0, 100.0, 200.0, 400.0),
        "Noise levels, as training steps (repeatable).",
        panel=_DETECTING,
    )
    gate: str = option(
        "logistic", "logistic or forest.", panel=_DETECTING, choices=("logistic", "forest")
    )

    def check_together(self) -> None:
        """Refuse what cannot be asked."""
        super().check_together()
        if len(self.images) != 1:
            raise InputError("IMAGES must be one folder or archive: put them together.")
        if not self.time or not self.per_class:
            raise InputError("--time and --per-class need a value each.")
