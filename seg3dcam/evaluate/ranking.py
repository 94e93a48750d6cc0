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
from seg3dcam.evaluate.contest import Case, Order, measured, settled
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
        orders: the order in which its map deletes the blocks of each input that counts.
        grids: the grid of its map in each of them.
    """

    candidate: Candidate
    orders: list[Order] = field(default_factory=list)
    grids: list[FeatureGrid] = field(default_factory=list)

    def begin(self) -> None:
        """Forget what an earlier ranking among fewer candidates has found."""
        one = self.candidate
        self.candidate = Candidate(
            one.layer, one.method, one.role, one.status, one.reason, kept=one.kept
        )

    @property
    def usable(self) -> bool:
        """Whether it has a map in every input that counts."""
        return not self.candidate.reason


def entrants_of(
    cases: Sequence[Case],
    counted: Sequence[int],
    roles: Mapping[str, str],
    methods: Sequence[str],
    keep: Keep | None,
) -> list[Entrant]:
    """Return every layer with every method; maps that cannot be used say why.

    Args:
        counted: the numbers of the cases that count. A map of another one is made only to be kept.
        roles: layer -> its role.
        keep: see `compare`.
    """
    found: dict[tuple[str, str], Entrant] = {}
    for number, case in enumerate(cases):
        counts, kept = number in counted, keep if number == 0 else None
        if not counts and kept is None:
            continue
        for layer, method, layer_map in case.maps(list(roles), methods, tells=number == 0):
            new = Entrant(Candidate(layer, method, roles.get(layer, "")))
            entrant = found.setdefault((layer, method), new)
            if layer_map.status != "ok":
                if counts and entrant.usable:
                    words = f"input {number + 1}: " * (len(cases) > 1) + layer_map.reason
                    entrant.candidate = replace(
                        entrant.candidate, status=layer_map.status, reason=words
                    )
                continue
            values = case.on_voxels(layer_map)
            if counts:
                entrant.orders.append(case.order(values))
                entrant.grids.append(layer_map.grid)
            if kept is not None:
                shown = kept(values, case.mask)
                entrant.candidate = replace(entrant.candidate, kept=shown)
    return [e for e in found.values() if e.orders or not e.usable]


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
        controls, random, random_error, random_points, mask_curve: see `Comparison`.
    """

    def __init__(self, cases: Sequence[Case], others: Sequence[str | float], draws: int) -> None:
        self.counted = tuple(n for n, case in enumerate(cases) if case.left < NEEDS_NOTHING)
        self._cases = [cases[number] for number in self.counted]
        self._others, self._draws = others, draws
        self._report = cases[0].how.progress
        self._others_controls: dict[str, dict[str, float]] = {}
        self.controls: dict[str, float] = {}
        self.random: tuple[float, ...] = ()
        self.random_error = 0.0
        self.random_points: list[Points] = []
        self.mask_curve: Points | None = None

    def ranked(self, entrants: Sequence[Entrant]) -> tuple[Candidate, ...]:
        """Return the candidates, the best first; of equally good ones the one named first.

        Where more were found later, all are ranked again. Predictions are not made again.
        """
        for entrant in entrants:
            entrant.begin()
        self.random, self.random_error, self.random_points = (), 0.0, []
        usable = [entrant for entrant in entrants if entrant.usable]
        if self.counted:
            self.controls = self._controls_by(None)
            self._search(usable)
            for number, entrant in enumerate(sorted(usable, key=_rounded)[:WHOLE]):
                self._report("measuring the best maps", number, WHOLE)
                self._measure_wholly(entrant)
            self._look_at(usable)
        won = any(entrant.candidate.won for entrant in entrants)

        def rank(one: Candidate) -> tuple[bool, bool, bool, float]:
            insane = one.sanity is not None and not one.sanity.passed
            return not one.won, bool(one.reason), won and insane, one.rounded

        return tuple(sorted((entrant.candidate for entrant in entrants), key=rank))

    def _curves(self, orders: Sequence[Order], baseline: Any = None) -> list[PartialCurve]:
        """Return the curves of a map in the inputs that count, given its order in all of them."""
        return [
            case.curve(order, baseline) for order, case in zip(orders, self._cases, strict=True)
        ]

    def _controls_by(self, baseline: str | float | None) -> dict[str, float]:
        """Return the area of each control, by the first baseline (None) or another one."""
        found, orders = {}, [case.controls for case in self._cases]
        for name, of_cases in zip((MASK_ALONE, NEARNESS), zip(*orders, strict=True), strict=True):
            curves = self._curves(of_cases, baseline)
            if baseline is None and name == MASK_ALONE:
                curves[0].complete()
                self.mask_curve = curves[0].points
            found[name] = settled(curves)
        return found

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

    def _measure_wholly(self, entrant: Entrant) -> None:
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
        layers, waiting = len({e.candidate.layer for e in usable}), list(usable)
        for _ in range(min(LOOKED_AT, len(usable))):
            entrant = self._best_of(waiting)
            waiting = [other for other in waiting if other is not entrant]
            candidate = self._beyond_the_mask(entrant.candidate)
            if candidate.fault:
                entrant.candidate = candidate
                return  # all others have larger areas
            candidate = self._by_every_baseline(entrant, self._sane(candidate))
            if not candidate.fault:
                candidate = self._beyond_chance(entrant, candidate, layers)
            entrant.candidate = replace(candidate, won=not candidate.fault)
            if entrant.candidate.won:
                return

    def _best_of(self, waiting: Sequence[Entrant]) -> Entrant:
        """Return the best, with its curves measured wholly; of equal ones the first named."""
        while not (best := min(waiting, key=_rounded)).candidate.curves:
            self._measure_wholly(best)
        return best

    def _beyond_the_mask(self, candidate: Candidate) -> Candidate:
        name, least = min(self.controls.items(), key=lambda control: control[1])
        if candidate.worth < least - BETTER:
            return candidate
        return replace(candidate, fault=f"echo: {_beaten_by(name, least)}")

    def _sane(self, candidate: Candidate) -> Candidate:
        """Return a candidate with the check of its map on the first input that counts."""
        check = self._cases[0].survives(candidate.method, candidate.layer)
        if not isinstance(check, Check):
            return replace(candidate, unchecked=check)
        fault = "" if check.passed else f"shows what a random network shows: {check.why}"
        return replace(candidate, sanity=check, fault=fault)

    def _by_every_baseline(self, entrant: Entrant, candidate: Candidate) -> Candidate:
        """Return a candidate with its areas by all baselines, each held against controls."""
        areas = {str(self._cases[0].how.baseline): candidate.worth}
        for other in self._others:
            if candidate.fault:
                break
            if str(other) not in self._others_controls:
                self._others_controls[str(other)] = self._controls_by(other)
            areas[str(other)] = area = settled(self._curves(entrant.orders, other))
            # A verdict holds all areas against the controls by the first baseline.
            both = (self.controls, self._others_controls[str(other)])
            name, least = min(
                (control for controls in both for control in controls.items()),
                key=lambda control: control[1],
            )
            if area >= least - BETTER:
                fault = f"with the baseline {other} it gets {area:.2f}, and "
                candidate = replace(candidate, fault=fault + _beaten_by(name, least))
        return replace(candidate, baselines=areas)

    def _beyond_chance(self, entrant: Entrant, candidate: Candidate, layers: int) -> Candidate:
        """Return a candidate with the chance that the best of random maps is as good.

        A draw is the best of as many random maps of the candidate's resolution as there are layers.
        It ends as soon as so many draws are as good that the others decide nothing.
        """
        tolerated = math.floor(SIGNIFICANT * (self._draws + 1) + 1e-9) - 1
        best, points, as_good, error = [], [], 0, 0.0
        for area, left, of_draw in self._best_of_random(entrant, candidate.worth, layers):
            best.append(area)
            points += of_draw
            error, as_good = max(error, left), as_good + (area <= candidate.worth)
            if as_good > tolerated:
                break
        if not self.random or as_good <= tolerated:
            self.random, self.random_error, self.random_points = tuple(best), error, points
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
    ) -> Iterator[tuple[float, float, list[Points]]]:
        """Yield the area of the best random map of each draw, as far as needed to rank the rival.

        Also yields how far areas of the draw may be off, and the points that are known of its
        curves on the first input.
        """
        orders = [
            case.random_orders(grid, self._draws * layers, self._seed(number))
            for number, case, grid in zip(self.counted, self._cases, entrant.grids, strict=True)
        ]
        for draw in range(self._draws):
            self._report("comparing with random maps", draw, self._draws)
            drawn = [
                [case.curve(next(of)) for case, of in zip(self._cases, orders, strict=True)]
                for _ in range(layers)
            ]
            areas, errors = zip(*(measured(curves, rival=rival) for curves in drawn), strict=True)
            yield min(areas), max(errors), [curves[0].points for curves in drawn]

    def _seed(self, case: int) -> int:
        """Return another seed for each input."""
        first = self._cases[0].how.seed
        return int(np.random.default_rng([abs(first), case]).integers(2**31))


def _rounded(entrant: Entrant) -> float:
    return entrant.candidate.rounded


def _beaten_by(control: str, area: float) -> str:
    """Return what a map does not say, since a control is as good."""
    if control == MASK_ALONE:
        return f"says nothing beyond the mask, which alone gets {area:.2f}"
    return f"says nothing beyond the {control}, which alone gets {area:.2f}"
