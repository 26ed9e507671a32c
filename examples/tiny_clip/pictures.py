"""Pictures with captions: what is in them, in which colour, at which place.

Made of a data set of small images: each is scaled down, put on a canvas of 32 x 32 pixels at one of
five places, and coloured (a grey image itself, a colour image by its canvas). Colours are not
equally frequent, so that there are common and rare captions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cmd_plugin.data import load_dataset

SIZE, INNER = 32, 18
COLOURS = {
    "red": (1.0, 0.2, 0.2),
    "green": (0.2, 0.9, 0.2),
    "blue": (0.3, 0.4, 1.0),
    "yellow": (1.0, 0.9, 0.2),
    "purple": (0.8, 0.3, 0.9),
    "white": (1.0, 1.0, 1.0),
}
SHARES = (0.40, 0.25, 0.15, 0.10, 0.06, 0.04)
"""How often each colour comes."""
PLACES = {
    "at the top left": (0, 0),
    "at the top right": (0, SIZE - INNER),
    "at the bottom left": (SIZE - INNER, 0),
    "at the bottom right": (SIZE - INNER, SIZE - INNER),
    "in the centre": ((SIZE - INNER) // 2, (SIZE - INNER) // 2),
}
TEMPLATES = (
    "a {colour} {what} {place}",
    "{place} there is a {colour} {what}",
    "{colour} {what}, {place}",
)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LENGTH = 10  # words of the longest caption, and one


@dataclass(frozen=True)
class Pairs:
    """Pictures with captions.

    Attributes:
        images: uint8 [N, 3, 32, 32].
        tokens: Word numbers of the captions, int64 [N, LENGTH]; 0 fills up.
        concepts: Class, colour and place of each, int64 [N, 3].
    """

    images: Tensor
    tokens: Tensor
    concepts: Tensor


class Captions:
    """Writes captions and numbers their words.

    Args:
        classes: What pictures show.
    """

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes = classes
        everything = (self.write(c, p) for c in self.all_concepts() for p in range(len(TEMPLATES)))
        words = sorted({word for caption in everything for word in caption.split()})
        self.numbers = {word: number for number, word in enumerate(words, start=1)}

    def all_concepts(self) -> list[tuple[int, int, int]]:
        """Every class in every colour at every place."""
        return [*product(range(len(self.classes)), range(len(COLOURS)), range(len(PLACES)))]

    def write(self, concept: tuple[int, ...], template: int) -> str:
        """Return the caption of a class, a colour and a place."""
        what, colour, place = concept
        return TEMPLATES[template].format(
            what=self.classes[what], colour=[*COLOURS][colour], place=[*PLACES][place]
        )

    def tokens(self, captions: list[str]) -> Tensor:
        """Return word numbers [N, LENGTH], int64."""
        rows = torch.zeros(len(captions), LENGTH, dtype=torch.int64)
        for row, caption in zip(rows, captions, strict=True):
            numbers = [self.numbers[word] for word in caption.split()]
            row[: len(numbers)] = torch.tensor(numbers)
        return rows


def load_pictures(
    name: str, data_root: str | None, train: int, held_out: int, seed: int
) -> tuple[Pairs, Pairs, Captions]:
    """Return training pairs, held-out pairs, and the writer of their captions.

    Args:
        name: ``mnist``, ``cifar10`` or ``digits`` (which comes with scikit-learn).
        data_root: Where data sets lie; ``CMD_PLUGIN_DATA`` if None.
        train: Number of training pairs; images repeat in other colours and places if there are
            fewer.
        held_out: Number of held-out pairs, of held-out images.
        seed: Of colours, places and the wording.
    """
    data = load_dataset(name, data_root=data_root, seed=seed)
    words = tuple(entry.split(" - ")[-1] for entry in data.classes)  # MNIST's are "7 - seven"
    captions = Captions(DIGITS if set(words) <= {str(n) for n in range(10)} else words)
    parts = []
    for part, (found, count) in enumerate(((data.train, train), (data.test, held_out))):
        generator = torch.Generator().manual_seed(1000 * seed + part)
        parts.append(_draw(found, count, captions, generator))
    return parts[0], parts[1], captions


def _draw(data: object, count: int, captions: Captions, generator: torch.Generator) -> Pairs:
    store, labels = data.store, data.labels  # type: ignore[attr-defined]
    order = torch.cat(
        [torch.randperm(len(labels), generator=generator) for _ in range(-(-count // len(labels)))]
    )[:count]
    shares = torch.tensor(SHARES)
    colour = torch.multinomial(shares, count, replacement=True, generator=generator)
    place = torch.randint(len(PLACES), (count,), generator=generator)
    template = torch.randint(len(TEMPLATES), (count,), generator=generator)
    concepts = torch.stack((labels[order], colour, place), dim=1)
    images = torch.cat(
        [
            _paint(store.read(rows), colour[start : start + 1000], place[start : start + 1000])
            for start, rows in zip(range(0, count, 1000), order.split(1000), strict=True)
        ]
    )
    texts = [
        captions.write(tuple(concept), int(t))
        for concept, t in zip(concepts.tolist(), template, strict=True)
    ]
    return Pairs(images, captions.tokens(texts), concepts)


def _paint(images: Tensor, colour: Tensor, place: Tensor) -> Tensor:
    """Put images [B, C, h, w] in [0, 1] on canvases; uint8 [B, 3, SIZE, SIZE]."""
    inner = interpolate(images, (INNER, INNER), mode="bilinear", antialias=True).clamp(0.0, 1.0)
    paint = torch.tensor([*COLOURS.values()])[colour][:, :, None, None]
    canvas = torch.zeros(len(images), 3, SIZE, SIZE)
    if inner.shape[1] == 1:
        inner = inner * paint
    else:
        canvas += 0.6 * paint
    corners = torch.tensor([*PLACES.values()])[place].tolist()
    for row, picture, (top, left) in zip(canvas, inner, corners, strict=True):
        row[:, top : top + INNER, left : left + INNER] = picture
    return (canvas * 255.0).round().to(torch.uint8)
