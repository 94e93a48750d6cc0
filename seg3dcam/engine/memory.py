"""If memory runs out: fewer windows go through the network at once, or an error gives advice.

Windows do not influence each other, so two halves of a batch give the same as the whole batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from seg3dcam.errors import OutOfMemoryError, tell
from seg3dcam.windows import WindowPlan

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


@dataclass
class BatchLimit:
    """How many windows, or inputs, go through the network at once; fewer after they did not fit.

    >>> at_once = BatchLimit(4)
    >>> [(part.start, part.stop) for part in at_once.each(10, lambda part: part)]
    [(0, 4), (4, 8), (8, 10)]
    """

    count: int
    of: str = "windows"
    setting: str = "sw_batch_size"

    def each(self, number: int, run: Callable[[slice], Result]) -> Iterator[Result]:
        """Yield the result of `run` for each part; a part that does not fit is halved.

        Args:
            number: how many windows or inputs there are.
            run: called with the part as a slice of them.

        Raises:
            torch.OutOfMemoryError: a single one does not fit.
        """
        start = 0
        while start < number:
            part = slice(start, min(start + self.count, number))
            try:
                found = run(part)
            except torch.OutOfMemoryError as error:
                self.halve(part.stop - start, error)
                continue
            yield found
            start = part.stop

    def halve(self, tried: int, error: torch.OutOfMemoryError) -> None:
        """Take half as many from now on.

        Args:
            tried: how many did not fit.
            error: the error that said so.

        Raises:
            torch.OutOfMemoryError: the given error, if a single item does not fit.
        """
        if tried == 1:
            raise error
        self.count = tried // 2
        tell(
            f"{tried} {self.of} at once do not fit in memory: going on with {self.count}. The maps "
            f"are the same; a smaller {self.setting} saves the attempt"
        )


class _WindowUser(Protocol):
    @property
    def sliding_window(self) -> WindowPlan | None: ...


Caller = TypeVar("Caller", bound=_WindowUser)


def advising(
    run: Callable[Concatenate[Caller, Arguments], Result],
) -> Callable[Concatenate[Caller, Arguments], Result]:
    """Decorate a function so that it says what to do if memory runs out.

    The advice depends on the window plan of the function's first argument.
    """

    @functools.wraps(run)
    def advised(cam: Caller, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return run(cam, *args, **kwargs)
        except OutOfMemoryError:
            raise
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(_advice(cam.sliding_window, error)) from error

    return advised


def _advice(plan: WindowPlan | None, error: torch.OutOfMemoryError) -> str:
    if plan is None:
        tried = "the input does not fit in memory as one window"
        advice = "Explain it in windows, such as sliding_window=WindowPlan(96)"
    else:
        tried = f"a single window of {plan.roi_size} voxels does not fit in memory"
        advice = "Give a smaller roi_size, if the network was trained with one"
    return (
        f"{tried}. {advice}; explain fewer targets, layers or items in one call; or move network "
        f"and input to a device with more memory, such as the CPU. {str(error).splitlines()[0]}"
    )
