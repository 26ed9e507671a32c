"""How many images are planted how often, said in one word; loads no torch."""

from __future__ import annotations

from cmd_plugin.errors import InputError

__all__ = ["parse_doses"]


def parse_doses(text: str) -> dict[int, int]:
    """Return dose -> number of images of ``"20x2,20x4"``: 20 images twice, 20 four times.

    Raises:
        InputError: If it is not of that form, or says a dose twice.
    """
    plan: dict[int, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        images, cross, dose = part.partition("x")
        if not (
            cross and images.isdecimal() and dose.isdecimal() and int(images) and int(dose) > 1
        ):
            raise InputError(
                f"{part!r} is no dose: write IMAGESxTIMES, such as 20x4, with at least two times."
            )
        if int(dose) in plan:
            raise InputError(f"dose {dose} is said twice in {text!r}: say it once.")
        plan[int(dose)] = int(images)
    return plan
