"""Names of files and people: their order, and one Unicode form for all systems."""

from __future__ import annotations

import re
import unicodedata


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Return a sort key that puts `Ann_2.jpg` before `Ann_10.jpg`; the name itself breaks ties."""
    parts = re.split("([0-9]+)", name)
    return [(0, int(part)) if i % 2 else (1, part.casefold()) for i, part in enumerate(parts)] + [(2, name)]


def normalise_name(name: str) -> str:
    """Return a name in Unicode NFC, so that an accent typed on one system equals that of another system's file name."""
    return unicodedata.normalize("NFC", name)
