"""Progress of work that takes long: the form of the function that is told of it."""

from __future__ import annotations

from collections.abc import Callable

#: Called with (step, done, total): what is being done, and how many parts of it are done.
Progress = Callable[[str, int, int], None]


def silent(step: str, done: int, total: int) -> None:
    """Report no progress."""
