"""The parts of a turn as one text; loads no library, because the server reads requests with it too."""

from __future__ import annotations

from collections.abc import Iterable


def joined(parts: Iterable[str]) -> str:
    """The parts in their order, on lines of their own where no white space separates them."""
    text = ""
    for part in parts:
        if text and part and not text[-1].isspace() and not part[0].isspace():
            text += "\n"
        text += part
    return text
