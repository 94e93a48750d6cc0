"""Safe names for files, and text from strangers in a form that every program can show."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence


def unique_names(names: Sequence[str]) -> list[str]:
    """Return names that are safe in file names, each different from the others.

    >>> unique_names(["grey matter", "grey_matter", "../x", "Läsion"])
    ['grey_matter', 'grey_matter_2', 'x', 'L_sion']
    """
    found: list[str] = []
    for name in names:
        safe = re.sub(r"[^A-Za-z0-9-]+", "_", name).strip("_")[:60] or "target"
        choices = (safe if n == 1 else f"{safe}_{n}" for n in itertools.count(1))
        # Some file systems do not distinguish upper and lower case.
        taken = {other.lower() for other in found}
        found.append(next(choice for choice in choices if choice.lower() not in taken))
    return found


def printable(text: str) -> str:
    """Return a text in one line, without invisible characters.

    Control characters break file headers and XML, and some reverse the text that follows them.

    >>> printable("liver\\r\\nright\\u202e")
    'liver right'
    >>> printable("Läsion 肝臓")
    'Läsion 肝臓'
    """
    return re.sub(" +", " ", "".join(c if c.isprintable() else " " for c in text)).strip()


def visible(text: str) -> str:
    """Return a text without the characters that control a terminal; line breaks stay.

    >>> visible("two\\nlines, \\x1b[2Jthe screen as it was")
    'two\\nlines, [2Jthe screen as it was'
    """
    return "".join(c for c in text if c.isprintable() or c == "\n")


def shortened(name: str, most: int = 40) -> str:
    """Leave out the middle of a long name, since its ends distinguish it from other names.

    >>> shortened("encoder.stages.0.blocks.3.conv", 20)
    'encoder.st…ks.3.conv'
    """
    if len(name) <= most:
        return name
    kept = (most - 1) // 2
    return f"{name[: most - 1 - kept]}…{name[-kept:]}"
