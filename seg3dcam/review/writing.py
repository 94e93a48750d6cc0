"""Files about a case whose explanations come one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from seg3dcam.explaining.explanation import Explanation


class JointWriter(Protocol):
    """Writes files that show several explanations together; it keeps none of their volumes."""

    def add(self, explanation: Explanation, name: str) -> None:
        """Take one more explanation."""

    def finish(self) -> list[Path]:
        """Write what shows all, and return every file."""


def write_all(
    writer: JointWriter,
    explanations: Explanation | Iterable[Explanation],
    name_of: Callable[[Explanation], str],
) -> list[Path]:
    """Give one or several explanations to a writer, and return its files.

    Args:
        name_of: an explanation's name, by which the files tell it from others.
    """
    for one in [explanations] if isinstance(explanations, Explanation) else explanations:
        writer.add(one, name_of(one))
    return writer.finish()
