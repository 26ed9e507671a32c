"""How much of a stranger's files is read before they are refused."""

from __future__ import annotations

from dataclasses import dataclass, fields

from cmd_plugin.errors import InputError

__all__ = ["DEFAULT_LIMITS", "ReadLimits"]


@dataclass(frozen=True)
class ReadLimits:
    """Bounds that are checked before anything is decoded or held.

    Attributes:
        image_pixels: Pixels of one image. The default is where Pillow begins to warn; above twice
            Pillow's own `Image.MAX_IMAGE_PIXELS`, that has to be raised as well.
        file_bytes: Bytes of one encoded image: a file, or a member of an archive once unpacked.
        archive_bytes: Bytes by which an archive may grow beyond its own size when unpacked.
        memory_bytes: Bytes of decoded images held in memory; larger collections are decoded when
            they are read. What can be read from front to back only (a compressed tar archive,
            `.npz`) and needs more is refused.

    Raises:
        InputError: If a bound is below 1.
    """

    image_pixels: int = 89_478_485
    file_bytes: int = 256 * 1024**2
    archive_bytes: int = 2 * 1024**3
    memory_bytes: int = 2 * 1024**3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise InputError(f"ReadLimits.{field.name} must be at least 1, got {value}.")


DEFAULT_LIMITS = ReadLimits()
