"""Find out whether a network draws random numbers, and give it the same ones in every pass.

PyTorch's own draws are seen as operations (`SideEffects`). Draws from NumPy's and Python's
generators are seen only by the generators' state, which another thread may have changed meanwhile.
In that case the network is run again, from seeds of our own, to see who drew.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import torch
from torch import nn

from seg3dcam.network.capture.record import LayersReached
from seg3dcam.network.capture.retry import drawn_late
from seg3dcam.network.facts import NetworkFacts
from seg3dcam.network.random_draws import (
    RandomState,
    SideEffects,
    drawing_from,
    owned_generators,
    parameters_by_memory,
    random_state,
    set_random_state,
)

#: Name for draws that are no operations of PyTorch.
OF_LIBRARIES = "of NumPy or Python"

#: For each trial: the seed, and the seconds after the run in which other threads may draw.
TRIALS = ((1, 0.01), (1, 0.05), (2, 0.01))

#: The largest number of such trials for one network. In each of them, other threads that draw get
#: numbers that follow from our seeds.
MOST_TRIALS = 3


class RepeatedDraws:
    """Starts every pass of a network that draws random numbers from the same random state.

    Args:
        model: the network.
        known: the facts about it; `known.draws` is filled in.
        overwritten: name of a parameter that the network's passes write to -> its values before;
            filled in.
    """

    def __init__(
        self, model: nn.Module, known: NetworkFacts, overwritten: dict[str, torch.Tensor]
    ) -> None:
        self._model = model
        self._known = known
        self._overwritten = overwritten
        self._parameters = parameters_by_memory(model)
        self._owned = owned_generators(model)
        self._start = random_state(self._owned)
        # Whether it is open who drew in the last pass, the network or another thread.
        self._doubtful = False

    def copy_for_trials(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return a copy of an input if trials may be needed, since networks may change their input.

        Return None if no other thread runs, or if there were enough trials already.
        """
        alone = threading.active_count() == 1 or self._known.trials >= MOST_TRIALS
        return None if alone else x.detach().clone()

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Let a backward pass, which may run checkpoints again, draw like the forward pass."""
        with drawing_from(self._start) if self._known.draws else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def same_draws(self) -> Iterator[None]:
        """Start a pass from the same random state as every other pass, if the network draws.

        Whether it draws is found out in its first complete pass.

        Raises:
            FoundLateError: the network draws in this pass, but did not draw in earlier ones.
        """
        self._doubtful = False
        effects = SideEffects(self._parameters, self._overwritten)
        if self._known.draws:
            with drawing_from(self._start), effects:
                yield
            return
        late = self._known.draws == ""
        stopped: LayersReached | None = None
        complete = False
        with contextlib.nullcontext() if late else drawing_from(self._start):
            before = random_state(self._owned)
            try:
                with effects:
                    yield
                complete = True
            except LayersReached as reached:
                stopped = reached
            finally:
                self._learn(before, effects.draw, complete)
        if late and self._known.draws:
            raise drawn_late(self._known.draws)
        if stopped is not None:
            raise stopped

    def _learn(self, before: RandomState, operation: str, complete: bool) -> None:
        """Note what a pass showed about draws.

        Args:
            before: the random state before the pass.
            operation: the operation of PyTorch's that drew, "" for none.
            complete: whether the pass ran to its end; otherwise later operations may still draw.
        """
        now = random_state(self._owned)
        # If another thread drew meanwhile, that was no operation of this thread.
        surely_own = operation or threading.active_count() == 1
        if not before.owned_equals(now) or (surely_own and not before.equals(now)):
            self._known.draws = operation or OF_LIBRARIES
            set_random_state(before)
        elif complete:
            self._known.draws = ""
            self._doubtful = not before.equals_in_libraries(now)

    def settle_who_drew(self, x: torch.Tensor) -> None:
        """If it is open who drew in the last pass, the network or another thread, find it out.

        The network is run again from known states of NumPy's and Python's generators. If the draws
        are its own, the same seed leads to the same state, however long other threads have time to
        draw, and another seed leads to another state, unless somebody has set a seed meanwhile.

        Args:
            x: a copy of the pass's input.

        Raises:
            FoundLateError: as in `same_draws`.
        """
        if not self._doubtful:
            return
        self._known.trials += 1
        late, before = self._known.draws == "", random_state(self._owned)
        ends = []
        for seed, pause in TRIALS:
            with torch.no_grad(), drawing_from(before.seeded(seed)):
                try:
                    self._model(x.clone())
                except Exception:
                    return  # it stays open; the network itself works, as the last pass has shown
                time.sleep(pause)
                ends.append(random_state())
        one, again, other = ends
        drawn = not before.seeded(TRIALS[0][0]).equals_in_libraries(one)
        if drawn and one.equals_in_libraries(again) and not one.equals_in_libraries(other):
            self._known.draws = OF_LIBRARIES
            if late:
                set_random_state(self._start)
                raise drawn_late(OF_LIBRARIES)
