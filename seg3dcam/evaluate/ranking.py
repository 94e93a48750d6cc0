"""The steps from the maps of all layers and methods to a ranking and a winner.

1. All areas are measured, those of bad maps only roughly; then the whole curves of the best few.
2. The best are looked at in turn, until one passes: it is better than the mask alone and nearness
   to it by every baseline, and its map gets lost when all weights are random.
3. A map that was chosen among many may be good by chance. So it is held against the best of as many
   random maps as there are layers, drawn again and again, all of its own resolution: coarse random
   maps are good more often than fine ones. Methods of one layer rank voxels much alike, and count
   as one map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from seg3dcam.evaluate.areas import PartialCurve
from seg3dcam.evaluate.comparison import Candidate, Points
from seg3dcam.evaluate.contest import Case, Order, measured
from seg3dcam.evaluate.context import MASK_ALONE, NEARNESS
from seg3dcam.evaluate.sanity import Check
from seg3dcam.evaluate.trial import BETTER, NEEDS_NOTHING, SIGNIFICANT
from seg3dcam.geometry import FeatureGrid

#: Of so many of the best candidates the whole curve is measured, and so many at most are looked at
#: as possible winners.
WHOLE, LOOKED_AT = 4, 8

#: What is kept of a map (*S), given the mask (*S), such as the slices that a picture shows.
Keep = Callable[[torch.Tensor, torch.Tensor], Any]


@dataclass
class Entrant:
    """A candidate on its way through the comparison.

    Attributes:
        candidate: what is known of it so far.
        orders: the order in which its map deletes the blocks of each input.
        grids: the grid of its map in each input.
    """

    candidate: Candidate
    orders: list[Order] = field(default_factory=list)
    grids: list[FeatureGrid] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether it has a map in every input."""
        return not self.candidate.reason


def entrants_of(
    cases: Sequence[Case], roles: Mapping[str, str], methods: Sequence[str], keep: Keep | None
) -> list[Entrant]:
    """Return every layer with every method; maps that cannot be used say why.

    Args:
        roles: layer -> its role.
        keep: see `compare`.
    """
    found: dict[tuple[str, str], Entrant] = {}
    for number, case in enumerate(cases):
        for layer, method, layer_map in case.maps(list(roles), methods, tells=number == 0):
            new = Entrant(Candidate(layer, method, roles.get(layer, "")))
            entrant = found.setdefault((layer, method), new)
            if layer_map.status != "ok":
                words = f"input {number + 1}: " * (len(cases) > 1) + layer_map.reason
                if entrant.usable:
                    entrant.candidate = replace(
                        entrant.candidate, status=layer_map.status, reason=words
                    )
                continue
            values = case.on_voxels(layer_map)
            entrant.orders.append(case.order(values))
            entrant.grids.append(layer_map.grid)
            if number == 0 and keep is not None:
                kept = keep(values, case.mask)
                entrant.candidate = replace(entrant.candidate, kept=kept)
    return list(found.values())


def not_measured(roles: Mapping[str, str], methods: Sequence[str], reason: str) -> list[Entrant]:
    """Return every layer with every method, without a map, and why."""
    return [
        Entrant(Candidate(layer, method, role, reason=reason))
        for method in methods
        for layer, role in roles.items()
    ]


class Ranking:
    """Ranks candidates on several inputs, and finds the one that may be trusted.

    Args:
        cases: the inputs. Those that need nothing outside of the mask do not count.
        others: baselines besides the first.
        draws: how often random maps are drawn.

    Attributes:
        counted: the numbers of the inputs that count.
        controls, random, random_points, mask_curve: see `Comparison`.
    """

    def __init__(self, cases: Sequence[Case], others: Sequence[str | float], draws: int) -> None:
        self.counted = tuple(n for n, case in enumerate(cases) if case.left < NEEDS_NOTHING)
        self._cases = [cases[number] for number in self.counted]
        self._others, self._draws = others, draws
        self._report = cases[0].how.progress
        self.controls: dict[str, float] = {}
        self.random: tuple[float, ...] = ()
        self.random_points: list[Points] = []
        self.mask_curve: Points | None = None

    def ranked(self, entrants: Sequence[Entrant]) -> tuple[Candidate, ...]:
        """Return the candidates, the best first."""
        usable = [entrant for entrant in entrants if entrant.usable]
        if self.counted:
            self._measure_controls()
            self._search(usable)
            usable.sort(key=lambda entrant: entrant.candidate.rounded)
            self._measure_wholly(usable[:WHOLE])
            usable.sort(key=lambda entrant: entrant.candidate.rounded)
            self._look_at(usable)
        won = any(entrant.candidate.won for entrant in entrants)

        def rank(one: Candidate) -> tuple[bool, bool, bool, float]:
            insane = one.sanity is not None and not one.sanity.passed
            return not one.won, bool(one.reason), won and insane, one.rounded

        return tuple(sorted((entrant.candidate for entrant in entrants), key=rank))

    def _curves(self, orders: Sequence[Order], baseline: Any = None) -> list[PartialCurve]:
        """Return the curves of a map in the inputs that count, given its order in all of them."""
        return [
            case.curve(orders[number], baseline)
            for number, case in zip(self.counted, self._cases, strict=True)
        ]

    def _measure_controls(self) -> None:
        orders = [case.controls for case in self._cases]
        for name, of_cases in zip((MASK_ALONE, NEARNESS), zip(*orders, strict=True), strict=True):
            curves = [case.curve(order) for case, order in zip(self._cases, of_cases, strict=True)]
            if name == MASK_ALONE:
                curves[0].complete()
                self.mask_curve = curves[0].points
            self.controls[name] = measured(curves)[0]

    def _search(self, usable: Sequence[Entrant]) -> None:
        """Measure the area of every candidate, that of bad ones roughly."""
        best = float("inf")
        for number, entrant in enumerate(usable):
            self._report("comparing maps", number, len(usable))
            curves = self._curves(entrant.orders)
            area, error = measured(curves, best=best)
            best = min(best, area + error)
            entrant.candidate = replace(
                entrant.candidate,
                area=area,
                error=error,
                areas=tuple(curve.area for curve in curves),
            )

    def _measure_wholly(self, best: Sequence[Entrant]) -> None:
        for number, entrant in enumerate(best):
            self._report("measuring the best maps", number, len(best))
            curves = self._curves(entrant.orders)
            for curve in curves:
                curve.complete()
            entrant.candidate = replace(
                entrant.candidate,
                area=measured(curves)[0],
                error=0.0,
                areas=tuple(curve.area for curve in curves),
                curves=tuple(curve.points for curve in curves),
            )

    def _look_at(self, usable: Sequence[Entrant]) -> None:
        """Look at the best in turn, until one passes or no other can."""
        layers = len({entrant.candidate.layer for entrant in usable})
        for entrant in usable[:LOOKED_AT]:
            entrant.candidate = candidate = self._beyond_the_mask(entrant)
            if candidate.fault:
                return  # all others have larger areas
            candidate = self._by_every_baseline(entrant, self._sane(candidate))
            if not candidate.fault:
                candidate = self._beyond_chance(entrant, candidate, layers)
            entrant.candidate = replace(candidate, won=not candidate.fault)
            if entrant.candidate.won:
                return

    def _beyond_the_mask(self, entrant: Entrant) -> Candidate:
        name, area = min(self.controls.items(), key=lambda control: control[1])
        if entrant.candidate.worth < area - BETTER:
            return entrant.candidate
        fault = f"echo: says nothing beyond the mask; the {name} gets {area:.2f}"
        return replace(entrant.candidate, fault=fault)

    def _sane(self, candidate: Candidate) -> Candidate:
        """Return a candidate with the check of its map on the first input that counts."""
        check = self._cases[0].survives(candidate.method, candidate.layer)
        if not isinstance(check, Check):
            return replace(candidate, unchecked=check)
        fault = "" if check.passed else f"shows what a random network shows: {check.why}"
        return replace(candidate, sanity=check, fault=fault)

    def _by_every_baseline(self, entrant: Entrant, candidate: Candidate) -> Candidate:
        """Return a candidate with its areas by all baselines."""
        if candidate.fault:
            return candidate
        first = str(self._cases[0].how.baseline)
        areas = {first: candidate.worth} | {
            str(other): measured(self._curves(entrant.orders, other))[0] for other in self._others
        }
        name, worst = max(areas.items(), key=lambda baseline: baseline[1])
        least = min(self.controls.values())
        fault = (
            ""
            if worst < least - BETTER
            else f"with the baseline {name} it gets {worst:.2f}, no better than the mask alone"
        )
        return replace(candidate, baselines=areas, fault=fault)

    def _beyond_chance(self, entrant: Entrant, candidate: Candidate, layers: int) -> Candidate:
        """Return a candidate with the chance that the best of random maps is as good.

        A draw is the best of as many random maps of the candidate's resolution as there are layers.
        It ends as soon as so many draws are as good that the others decide nothing.
        """
        tolerated = math.floor(SIGNIFICANT * (self._draws + 1) + 1e-9) - 1
        best, points, as_good = [], [], 0
        for area, of_draw in self._best_of_random(entrant, candidate.worth, layers):
            best.append(area)
            points += of_draw
            as_good += area <= candidate.worth
            if as_good > tolerated:
                break
        if not self.random or as_good <= tolerated:
            self.random, self.random_points = tuple(best), points
        p_value = (1 + as_good) / (1 + self._draws)
        fault = (
            ""
            if p_value <= SIGNIFICANT
            else "no better than the best of as many random maps of its resolution as there are "
            f"layers ({min(best):.2f}-{max(best):.2f}, p = {p_value:.2g} or more)"
        )
        return replace(candidate, p_value=p_value, fault=fault)

    def _best_of_random(
        self, entrant: Entrant, rival: float, layers: int
    ) -> Iterator[tuple[float, list[Points]]]:
        """Yield the area of the best random map of each draw, as far as needed to rank the rival.

        Also yields the points that are known of the draw's curves on the first input.
        """
        orders = [
            case.random_orders(entrant.grids[number], self._draws * layers, self._seed(number))
            for number, case in zip(self.counted, self._cases, strict=True)
        ]
        for draw in range(self._draws):
            self._report("comparing with random maps", draw, self._draws)
            drawn = [
                [case.curve(next(of)) for case, of in zip(self._cases, orders, strict=True)]
                for _ in range(layers)
            ]
            areas = [measured(curves, rival=rival)[0] for curves in drawn]
            yield min(areas), [curves[0].points for curves in drawn]

    def _seed(self, case: int) -> int:
        """Return another seed for each input."""
        first = self._cases[0].how.seed
        return int(np.random.default_rng([abs(first), case]).integers(2**31))
