"""Which cases to look at first: those whose explanation is unlike that of the others.

Every explanation is compared with those of the same class and method in the other cases. A figure
counts by how many spreads it lies beyond the cohort's median; the spread is that of the middle half
of the cases, so that a few unusual ones do not hide themselves.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import rel_entr

from seg3dcam.job.record import Entry

#: With fewer explanations of a class, none is said to be unusual.
FEWEST = 8

#: Median absolute deviation of a normal distribution -> its standard deviation.
_TO_SPREAD = 1.4826

#: A figure counts so many spreads at most: one that is far off must not hide all others.
_MOST = 10.0

#: A figure is named as a reason from so many spreads on.
NAMED = 3.0

#: A class counts as rare if it is predicted in a smaller part of the cases.
_RARE = 0.1


@dataclass(frozen=True)
class Figure:
    """A figure by which explanations are compared.

    Attributes:
        words: what it says of a case, with places for the value and the cohort's median.
        write: writes such a number.
        floor: the smallest spread, in the figure's own units: what is less apart is alike.
        sign: 1 where large values are unusual, -1 where small ones are.
    """

    words: str
    write: Callable[[float], str]
    floor: float
    sign: int = 1


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %"


def _mm(length: float) -> str:
    return f"{length:.0f} mm"


def _two_digits(number: float) -> str:
    return f"{number:.2f}"


#: Key of what was found -> how it is compared.
FIGURES = {
    "cam_outside_body": Figure("{0} of the map outside of the body (usual: {1})", _percent, 0.02),
    "cam_outside": Figure("{0} of the map outside of the mask (usual: {1})", _percent, 0.03),
    "peak_to_prediction_mm": Figure("peak {0} from the mask (usual: {1})", _mm, 5.0),
    "confidence": Figure("confidence {0} (usual: {1})", _two_digits, 0.05, sign=-1),
}


@dataclass(frozen=True)
class Unusual:
    """How unlike the others an explanation is.

    Attributes:
        score: 0 for one like the others; None where there are too few to compare with.
        reasons: in words, the strongest first.
    """

    score: float | None
    reasons: tuple[str, ...] = ()


def triage(entries: Mapping[tuple[str, str], Entry], cases: int) -> dict[tuple[str, str], Unusual]:
    """Return how unlike those of other cases each explanation is.

    Args:
        entries: (case, name of the explanation) -> what its case says of it.
        cases: how many were explained, with those in which there was nothing to explain.
    """
    alike: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for key, entry in entries.items():
        alike[group_of(entry), entry.method.name if entry.method else ""].append(key)
    found: dict[tuple[str, str], Unusual] = {}
    for keys in alike.values():
        having = len({case for case, _ in keys})
        compared = _compared([entries[key] for key in keys], having, cases)
        found |= zip(keys, compared, strict=True)
    return found


def group_of(entry: Entry) -> str:
    """Return what an explanation is compared as: of lesions of a class, each as one of all."""
    return re.sub(r" component \d+$", "", entry.label) if entry.of_component else entry.label


def _compared(entries: Sequence[Entry], having: int, cases: int) -> list[Unusual]:
    """Return how unlike each other explanations of one class and method are.

    Args:
        having: how many cases have one.
        cases: how many cases there are.
    """
    share = having / max(1, cases)
    if share < _RARE and cases >= FEWEST:
        rare = f"the class is found in {having} of {cases} cases"
        return [Unusual(_MOST * (1 - share / _RARE), (rare,)) for _ in entries]
    if len(entries) < FEWEST:
        return [Unusual(None) for _ in entries]
    beyond: list[NDArray[np.float64]] = []
    words: list[list[str]] = []
    for name, figure in FIGURES.items():
        values = np.array([_number(entry.figure(name)) for entry in entries])
        beyond.append(_beyond(figure.sign * values, figure.floor))
        usual = float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan
        write = figure.write
        words.append([figure.words.format(write(value), write(usual)) for value in values])
    apart = _apart([entry.pattern for entry in entries])
    beyond.append(_beyond(apart, 0.05))
    words.append(["the map lies elsewhere than in the other cases"] * len(entries))
    silent = np.array([all(layer.status != "ok" for layer in e.layers.values()) for e in entries])
    beyond.append(_MOST * (silent & (silent.mean() < 0.5)))
    words.append(["there is no map"] * len(entries))
    spreads = np.stack(beyond)
    found = []
    for number, score in enumerate(np.sqrt((spreads**2).sum(0))):
        order = np.argsort(-spreads[:, number], kind="stable")
        named = [words[which][number] for which in order if spreads[which, number] >= NAMED]
        found.append(Unusual(round(float(score), 3), tuple(named)))
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _beyond(values: NDArray[np.float64], floor: float) -> NDArray[np.float64]:
    """Return by how many spreads values lie above their median; 0 for those below or unknown."""
    if not np.isfinite(values).any():
        return np.zeros(len(values))
    median = np.nanmedian(values)
    spread = max(floor, _TO_SPREAD * float(np.nanmedian(np.abs(values - median))))
    return np.clip(np.nan_to_num((values - median) / spread), 0, _MOST)


def _apart(patterns: Sequence[Sequence[float] | None]) -> NDArray[np.float64]:
    """Return how far each pattern is from the mean of the others, 0 to 1; NaN for none.

    It is the Jensen-Shannon distance of patterns that are blurred by a cell, so that cells side by
    side count as near.
    """
    found = np.full(len(patterns), math.nan)
    known = [number for number, pattern in enumerate(patterns) if pattern is not None]
    if len(known) < FEWEST:
        return found
    side = round(len(patterns[known[0]] or ()) ** (1 / 3))
    blurred = np.stack(
        [
            ndimage.gaussian_filter(
                np.reshape(np.asarray(patterns[n], np.float64), (side,) * 3), 1, mode="constant"
            ).ravel()
            for n in known
        ]
    )
    total = blurred.sum(0)
    for number, one in zip(known, blurred, strict=True):
        found[number] = _jensen_shannon(one / one.sum(), (total - one) / (total - one).sum())
    return found


def _jensen_shannon(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the Jensen-Shannon distance of two distributions, 0 to 1.

    SciPy's own gives NaN where rounding makes the divergence of equal ones negative.
    """
    middle = (one + other) / 2
    divergence = float((rel_entr(one, middle) + rel_entr(other, middle)).sum()) / 2 / math.log(2)
    return math.sqrt(max(0.0, divergence))
