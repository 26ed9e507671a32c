"""Files damaged at random: each is read or refused with a sentence, whatever its format."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from cmd_plugin.data import ReadLimits, read_images
from tests.helpers.damage import refuses_damaged
from tests.helpers.image_files import encoded, noise, tiff, to_tar, to_zip

# So that no damaged header makes a test slow.
LIMITS = ReadLimits(image_pixels=10**6, file_bytes=10**7, archive_bytes=10**7, memory_bytes=10**7)

FILES = {"a/1.png": noise(1, size=(9, 8)), "a/2.png": encoded(3), "b/10.png": encoded(4)}


def saved_tiff(compression: str) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(noise(5))).save(stream, "TIFF", compression=compression)
    return stream.getvalue()


def array(name: str) -> bytes:
    values = np.random.default_rng(0).random((3, 6, 5), dtype=np.float32)
    stream = io.BytesIO()
    if name == "npy":
        np.save(stream, values)
    else:
        np.savez_compressed(stream, images=values, labels=np.arange(3))
    return stream.getvalue()


def archive(name: str, mode: str) -> Callable[[Path], bytes]:
    return lambda folder: to_tar(folder / name, FILES, mode).read_bytes()


KINDS: dict[str, bytes | Callable[[Path], bytes]] = {
    "x.png": noise(1),
    "x.jpg": noise(2, "JPEG"),
    "x.webp": noise(3, "WEBP"),
    "x.bmp": noise(4, "BMP"),
    "x.ppm": noise(5, "PPM"),
    "lzw.tif": saved_tiff("tiff_lzw"),
    "jpeg.tif": saved_tiff("jpeg"),
    "float.tif": tiff(np.linspace(0, 1, 63, dtype="<f4").tobytes(), (9, 7), 32, 3),
    "x.npy": array("npy"),
    "x.npz": array("npz"),
    "x.safetensors": save({"images": torch.rand(3, 6, 5), "labels": torch.arange(3)}),
    "x.tar": archive("x.tar", "w"),
    "x.tar.gz": archive("x.tar.gz", "w:gz"),
    "x.tar.xz": archive("x.tar.xz", "w:xz"),
    "x.zip": lambda folder: to_zip(folder / "x.zip", FILES).read_bytes(),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_or_refused_with_a_sentence(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    whole = kind if isinstance(kind, bytes) else kind(tmp_path)

    def read(path: Path) -> None:
        found = read_images(path, limits=LIMITS)
        assert len(found.images) in (1, 3) or path.read_bytes() != whole
        found.images.read(torch.tensor([0]))

    assert refuses_damaged(tmp_path / name, whole, read) > 5
