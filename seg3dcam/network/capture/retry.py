"""Begin an explanation again when a pass shows something that earlier passes had to know."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from seg3dcam.errors import ModelError, Seg3dcamError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

#: The most attempts at one explanation. Each network of an ensemble may need another one.
MOST_ATTEMPTS = 8


class FoundLateError(Seg3dcamError):
    """A pass showed something about the network that should have been known in earlier passes.

    It is remembered (see `seg3dcam.network.facts`), so the next attempt takes it into account.
    """


def drawn_late(draws: str) -> FoundLateError:
    """Return the error for a network that draws random numbers, but did not at first.

    Args:
        draws: the operation that draws.
    """
    return FoundLateError(
        f"the network draws random numbers ({draws}), but only now and then, as its input or a "
        "setting is: explain it again, now that this is known"
    )


def begun_again(run: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function so that it begins again after a `FoundLateError`.

    Raises:
        ModelError: every attempt found out something new.
    """

    @functools.wraps(run)
    def running(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        late: FoundLateError | None = None
        for _ in range(MOST_ATTEMPTS):
            try:
                return run(*args, **kwargs)
            except FoundLateError as error:
                late = error
        raise ModelError(str(late)) from late

    return running
