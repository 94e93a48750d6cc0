"""The curves of a map and of what it is held against, known as far as the verdict needs them.

Each point of a curve is a prediction. First come the points without which nothing is known, then
those that decide, then those that make figures sharper, until the budget is spent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from numpy.typing import NDArray

from seg3dcam.evaluate.areas import PartialCurve
from seg3dcam.evaluate.blocks import Blocks, Curve, Deletion

#: How far the area of the map, and those of the others, may be from that of all steps.
OWN_ERROR, OTHER_ERROR = 0.01, 0.02

#: The largest p-value, and the least distance of areas, with which a map is better than controls.
SIGNIFICANT, BETTER = 0.05, 0.05

#: If the class keeps this Dice with everything around it deleted, it needs nothing of that.
NEEDS_NOTHING = 0.95


class Rivals:
    """What maps of one layer's resolution are held against, for any number of maps.

    What is known of their curves stays known, so that the next map costs less.

    Args:
        blocks: which may be deleted.
        baseline, steps, seed: see `context_deletion`.
        controls: name -> (*S), maps that know nothing of the network.
        strict: the names of the controls that a map has to be better than.
        random: random maps.

    Attributes:
        left, drop: Dice, and the relative drop of the score, with everything deleted.
        controls: name -> curve.
        random: the curves of the random maps.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        baseline: str | float,
        steps: int,
        seed: int,
        controls: dict[str, torch.Tensor],
        strict: Sequence[str],
        random: Iterator[torch.Tensor],
    ) -> None:
        self.blocks, self.baseline, self.steps, self.seed = blocks, baseline, steps, seed
        self.strict = strict
        self._active: Deletion | None = None
        deletions = {name: self.deletion(of, baseline) for name, of in controls.items()}
        whole = next(iter(deletions.values()))
        self._lasts: dict[str, float] = {}
        self.left = self.last(whole, baseline)
        self.drop = whole.drops[steps]
        self.controls = {name: self.curve(one, self.left) for name, one in deletions.items()}
        self.random = [self.curve(self.deletion(of, baseline), self.left) for of in random]

    @property
    def cost(self) -> float:
        """The predictions of the whole volume so far."""
        return self.blocks.subject.rerun.cost

    def deletion(self, values: torch.Tensor | NDArray, baseline: str | float) -> Deletion:
        """Return the deletion by a map."""
        return Deletion(self.blocks, values, self.steps, baseline, self.seed)

    def last(self, deletion: Deletion, baseline: str | float) -> float:
        """Return the Dice with everything deleted, which is the same for all maps."""
        if str(baseline) not in self._lasts:
            self._lasts[str(baseline)] = self.dice(deletion, self.steps)
        return self._lasts[str(baseline)]

    def curve(self, deletion: Deletion, last: float) -> PartialCurve:
        """Return the curve of a deletion, known at its ends."""
        return PartialCurve(lambda step: self.dice(deletion, step), deletion.fractions, 1.0, last)

    def dice(self, deletion: Deletion, step: int) -> float:
        """Return a height; of all deletions only the last one keeps its windows."""
        if self._active is not None and self._active is not deletion:
            self._active.rest()
        self._active = deletion
        return deletion.dice(step)


class Trial:
    """A map and its rivals.

    Args:
        rivals: what the map is held against.
        values: the map, (*S).
        others: further baselines, for the map alone.

    Attributes:
        own: the map's curve with the baseline of the rivals.
        baselines: baseline -> curve of the map.
    """

    def __init__(
        self,
        rivals: Rivals,
        values: torch.Tensor | NDArray,
        others: Sequence[str | float] = (),
    ) -> None:
        self.rivals = rivals
        self._deletion = rivals.deletion(values, rivals.baseline)
        self._deletion.drops[rivals.steps] = rivals.drop  # the last step is that of all maps
        self.own = rivals.curve(self._deletion, rivals.left)
        self._others: dict[str, PartialCurve] = {}
        for name in others:
            deletion = rivals.deletion(values, name)
            self._others[str(name)] = rivals.curve(deletion, rivals.last(deletion, name))

    @property
    def baselines(self) -> dict[str, PartialCurve]:
        return {str(self.rivals.baseline): self.own} | self._others

    def run(self, budget: float) -> None:
        """Take the points that say most, until all is known or the budget is spent.

        Args:
            budget: in predictions of the whole volume, those of the rivals so far included. The
                first points of each curve are taken whatever it is.
        """
        self._begin()
        while self.rivals.cost + 1 < budget and (curve := self._next()) is not None:
            curve.take(curve.widest(self.rise))

    def whole_curve(self) -> Curve:
        """Return the map's curve through the steps that are known."""
        return self._deletion.curve(self.own.heights)

    @property
    def rise(self) -> float:
        """By how much any of the curves rises where it should fall."""
        return max(curve.rise for curve in self._all())

    def error(self, curve: PartialCurve) -> float:
        """Return how far an area may be from that of all steps."""
        return curve.error(self.rise)

    @property
    def needs_context(self) -> bool:
        """Whether the prediction depends on anything around the mask."""
        return self.rivals.left < NEEDS_NOTHING

    def as_good(self) -> tuple[int, int]:
        """Return how many random maps are certainly as good as the map, and how many may be."""
        unclear = self._unclear()
        certain = sum(
            curve.area <= self.own.area
            for curve in self.rivals.random
            if all(curve is not other for other in unclear)
        )
        return certain, certain + len(unclear)

    def p_values(self) -> tuple[float, float]:
        """Return the least and the largest p-value of the rank among random maps."""
        least, most = self.as_good()
        of_all = 1 + len(self.rivals.random)
        return (1 + least) / of_all, (1 + most) / of_all

    def margin(self) -> tuple[float, float]:
        """Return between what lies the area by which the map is better than the best control."""
        rivals = [self.rivals.controls[name] for name in self.rivals.strict]
        of_rivals = [min(c.area + sign * self.error(c) for c in rivals) for sign in (-1, 1)]
        own = self.baselines.values()
        of_own = [max(c.area + sign * self.error(c) for c in own) for sign in (-1, 1)]
        return of_rivals[0] - of_own[1], of_rivals[1] - of_own[0]

    @property
    def certain(self) -> bool:
        """Whether more points cannot change the verdict."""
        if not self.needs_context:
            return self.rise <= BETTER
        (least, most), limit = self.p_values(), significant(len(self.rivals.random))
        if least > limit:
            return True
        low, high = self.margin()
        return most <= limit and (low > BETTER or high <= BETTER)

    def _begin(self) -> None:
        """Take the points that every curve needs: also those that fall should be seen to do so."""
        middle = self.rivals.steps // 2
        for quarter in (middle, self.rivals.steps // 4, 3 * self.rivals.steps // 4):
            self.own.take(quarter)
        for curve in (*self._others.values(), *self.rivals.controls.values()):
            curve.take(middle)
        if self.needs_context:
            for curve in self.rivals.random:
                curve.take(middle)

    def _next(self) -> PartialCurve | None:
        """Return the curve of which a point says most, None if all is known well enough."""
        for curves, enough in self._wanted():
            widest = max(curves, key=self.error, default=None)
            if widest is not None and self.error(widest) > enough:
                return widest
        return None

    def _wanted(self) -> Iterator[tuple[list[PartialCurve], float]]:
        """Yield curves that should be known better, the most urgent first, and how well."""
        if self.own.error() > OTHER_ERROR:  # what rises elsewhere does not make it more urgent
            yield [self.own], 0.0
        own = list(self.baselines.values())
        unclear = self._unclear()
        if self.needs_context and not self.certain:
            if self.p_values()[1] > significant(len(self.rivals.random)):
                yield [self.own, *unclear], 0.0
            else:
                yield [*own, *(self.rivals.controls[name] for name in self.rivals.strict)], 0.0
        yield [self.own], OWN_ERROR
        yield [*own, *self.rivals.controls.values(), *unclear], OTHER_ERROR

    def _unclear(self) -> list[PartialCurve]:
        """Return the random maps of which it is not known whether they are as good as the map."""
        return [
            curve
            for curve in self.rivals.random
            if abs(curve.area - self.own.area) <= (self.error(curve) + self.error(self.own))
            and self.error(curve) + self.error(self.own) > 0
        ]

    def _all(self) -> Iterator[PartialCurve]:
        yield from self.baselines.values()
        yield from self.rivals.controls.values()
        yield from self.rivals.random


def significant(draws: int) -> float:
    """Return the largest p-value that counts: 0.05, or the least that so few draws can give.

    >>> significant(99), significant(9)
    (0.05, 0.1)
    """
    return max(SIGNIFICANT, 1 / (1 + draws))
