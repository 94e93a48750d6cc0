"""What a comparison of layers and methods found, ranked, in figures and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seg3dcam.engine.scales import Status
from seg3dcam.evaluate.context import MASK_ALONE
from seg3dcam.evaluate.sanity import Check
from seg3dcam.files import printable

#: Fractions of the blocks that are deleted, and Dice of the class there.
Points = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Candidate:
    """A layer and a method, and what their map is worth.

    Attributes:
        layer, method: their names.
        role: of the layer, see `Suggestion`; "" for one that is not suggested.
        status: of the map, see `CamResult.status`; the first that is not "ok" of several inputs.
        reason: why there is no area; "" where there is one.
        area: of context deletion, the mean over the inputs that count; None without one.
        error: the largest error of the area, if curves fall.
        areas: of every input that counts.
        curves: the whole curve for every input that counts, of the best candidates; else none.
        baselines: baseline -> area, of a possible winner; else none.
        sanity: whether the map gets lost when all weights are random, of a possible winner.
        unchecked: why that could not be checked; "" where it was, or was not tried.
        p_value: of a possible winner, the chance that the best of as many random maps of its
            resolution as there are layers is at least as good; at least this if it did not pass.
        won: whether it is the best that may be trusted.
        fault: why a candidate that was looked at more closely did not win; "" for others.
        kept: what `keep` returned of the map on the first input.
    """

    layer: str
    method: str
    role: str = ""
    status: Status = "ok"
    reason: str = ""
    area: float | None = None
    error: float = 0.0
    areas: tuple[float, ...] = ()
    curves: tuple[Points, ...] = ()
    baselines: Mapping[str, float] = field(default_factory=dict)
    sanity: Check | None = None
    unchecked: str = ""
    p_value: float | None = None
    won: bool = False
    fault: str = ""
    kept: Any = None

    @property
    def name(self) -> str:
        """Layer and method in words."""
        return f"layer {self.layer} with {self.method}"

    @property
    def worth(self) -> float:
        """The area as a number by which candidates are ranked; without one it is infinite."""
        return float("inf") if self.area is None else self.area

    @property
    def rounded(self) -> float:
        """The same to two decimals: smaller differences do not rank candidates."""
        return round(self.worth, 2)


@dataclass(frozen=True)
class Comparison:
    """Layers and methods, ranked by what their maps are worth.

    Attributes:
        candidates: the best first; those without an area come last.
        best: the first that passes; None if none does.
        default: what "auto" and HiResCAM give; None if it was not compared.
        controls: "mask alone", "nearness to the mask" -> area, the mean over the inputs that count.
        left: Dice of the class if everything around it is deleted, of every input.
        counted: the numbers of the inputs that count: those that need something around the mask.
        random: of every draw, the area of the best of as many random maps as there are layers, of
            the winner's resolution; without a winner of the first that was held against them.
        random_error: how far the worst known of these areas may be off, if curves fall.
        random_points: the measured points of random maps on the first input that counts.
        mask_curve: of the mask alone, on the first input that counts; None if none counts.
        class_index: the class.
        order: layer and method of all candidates, in the order in which they were named.
        mask: (*S) bool, the predicted mask of the first input.
        cost: what was predicted, in predictions of the whole volume, all inputs together.
    """

    candidates: tuple[Candidate, ...]
    best: Candidate | None
    default: Candidate | None
    controls: Mapping[str, float]
    left: tuple[float, ...]
    counted: tuple[int, ...]
    random: tuple[float, ...]
    random_error: float
    random_points: tuple[Points, ...]
    mask_curve: Points | None
    class_index: int
    order: tuple[tuple[str, str], ...]
    mask: torch.Tensor
    cost: float

    @property
    def words(self) -> str:
        """The answer in one line."""
        return printable(self._answer)

    @property
    def _answer(self) -> str:
        first = self.candidates[0]
        if not self.counted:
            return (
                "undefined: the prediction needs nothing outside of the mask (with all of it "
                f"deleted the Dice is {min(self.left):.2f}), so no layer and no method can show "
                "what it depends on there"
            )
        if self.best is not None:
            return f"use {self.best.name}: {self._praise(self.best)}{self._instead}{self._inputs}"
        if first.area is None:
            return f"undefined: no map can be used; {first.name}: {first.reason}"
        return (
            f"no layer and method passes: do not use any; the best, {first.name}, gets a context "
            f"deletion of {first.area:.2f} (mask alone {self.controls[MASK_ALONE]:.2f}): "
            f"{first.fault}{self._inputs}"
        )

    def _praise(self, best: Candidate) -> str:
        sane = best.sanity.why if best.sanity else f"random weights not checked: {best.unchecked}"
        return (
            "it points outside the mask at something the prediction depends on (context deletion "
            f"{best.area:.2f}, mask alone {self.controls[MASK_ALONE]:.2f}, random "
            f"{self.random_range}, p = {best.p_value:.2g}; {sane})"
        )

    @property
    def random_range(self) -> str:
        """The least and the largest area of a draw of random maps, and how well they are known."""
        rough = f" ± {self.random_error:.2f}" if self.random_error > 0.02 else ""
        return f"{min(self.random):.2f}-{max(self.random):.2f}{rough}"

    @property
    def _instead(self) -> str:
        one, best = self.default, self.best
        if one is None or best is None or one.name == best.name:
            return ""
        gets = "has no usable map" if one.area is None else f"gets {one.area:.2f}"
        return f"; the default, {one.name}, {gets}"

    @property
    def _inputs(self) -> str:
        if len(self.left) == 1:
            return ""
        idle = len(self.left) - len(self.counted)
        needs = "needs" if idle == 1 else "need"
        rest = f", while {idle} more {needs} nothing outside of the mask" if idle else ""
        count = len(self.counted)
        return (f"; means of {count} inputs" if count > 1 else "; of 1 input") + rest

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each candidate, the best first."""
        return [
            {
                "rank": None if one.area is None else rank,
                "layer": one.layer,
                "level": one.role,
                "method": one.method,
                "context_deletion": one.area,
                "known_to": None if one.area is None else one.error,
                "areas": list(one.areas),
                "status": one.status,
                "randomised": None if one.sanity is None else one.sanity.worst,
                "p": one.p_value,
                "verdict": "best" if one.won else one.reason or one.fault,
            }
            for rank, one in enumerate(self.candidates, 1)
        ]
