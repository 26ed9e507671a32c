"""What an error's text must be like."""

from __future__ import annotations

import re


def assert_one_sentence(error: BaseException, *parts: str) -> None:
    """One line, one sentence, and everything in ``parts`` in it."""
    text = str(error)
    assert "\n" not in text, text
    assert text.endswith("."), text
    assert not re.search(r"[.!?]\s+[A-Z]", text), text
    for part in parts:
        assert part in text, text
