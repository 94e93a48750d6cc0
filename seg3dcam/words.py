"""Names that strangers give, as every program can show them."""

from __future__ import annotations

import re


def printable(text: str) -> str:
    """Return a text in one line, without characters that nobody sees.

    Control characters break headers of files and XML, and some turn the direction of what follows.

    >>> printable("liver\\r\\nright\\u202e")
    'liver right'
    >>> printable("Läsion 肝臓")
    'Läsion 肝臓'
    """
    return re.sub(" +", " ", "".join(c if c.isprintable() else " " for c in text)).strip()
