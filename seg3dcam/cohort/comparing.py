"""Two cohorts of the same cases: where do two models, or two checkpoints, differ?

    found = compare_cohorts("explained_a", "explained_b")
    found.pairs[0]  # the explanation that differs most
    found.tests[0]  # a figure of all pairs, tested

Masks and maps are read from the volumes of both, so both need the format "nifti".
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from seg3dcam.cohort.plan import CURRENT, OWN
from seg3dcam.errors import ConfigError, InputError, some
from seg3dcam.files import atomic, check_writable, read_small
from seg3dcam.geometry import same_grid
from seg3dcam.job.read_back import WrittenMap, written_map
from seg3dcam.job.record import Entry, Record, record_of
from seg3dcam.progress import Progress, silent

#: Figures that are tested in pairs -> what they are called.
TESTED = {
    "dice": "Dice with the truth",
    "predicted_ml": "volume, ml",
    "cam_inside_prediction": "part of the map inside the mask",
    "cam_outside_body": "part of the map outside of the body",
    "peak_to_prediction_mm": "peak to the mask, mm",
    "confidence": "confidence",
}

#: A larger file of ours, in bytes, is none.
_LARGEST = 10_000_000

#: With fewer pairs nothing is tested: no p-value could be below 0.05.
FEWEST = 6


@dataclass(frozen=True)
class Pair:
    """One explanation in both cohorts.

    Attributes:
        case, label, method: which it is.
        status: "both", or "only in A" or "only in B" where the other model draws no such thing.
        mask_dice: Dice of both masks.
        map_overlap: the part of both maps that lies in the same place, from 0 to 1: the sum of the
            smaller one at every voxel, each map divided by its own sum.
        map_correlation: Pearson's correlation of both maps, voxel by voxel.
        peaks_apart_mm: from one peak to the other.
        differs: 0 for equal masks and maps, 1 for such that have nothing in common.
        note: why something could not be compared.
    """

    case: str
    label: str
    method: str
    status: str
    mask_dice: float | None = None
    map_overlap: float | None = None
    map_correlation: float | None = None
    peaks_apart_mm: float | None = None
    differs: float = 1.0
    note: str = ""


@dataclass(frozen=True)
class PairedTest:
    """A figure of all pairs of a class and method, and Wilcoxon's signed-rank test of it.

    Attributes:
        label, method: of the pairs.
        figure: in words.
        pairs: how many have the figure in both cohorts.
        median_a, median_b: in each cohort.
        median_change: the median of B - A.
        p_value: two-sided; None with fewer than six pairs.
        p_holm: the same after Holm's correction for all tests of this comparison.
    """

    label: str
    method: str
    figure: str
    pairs: int
    median_a: float
    median_b: float
    median_change: float
    p_value: float | None
    p_holm: float | None = None


@dataclass(frozen=True)
class CohortComparison:
    """How two cohorts differ.

    Attributes:
        pairs: those that differ most first.
        tests: figures of all pairs.
        only_a, only_b: cases that only one cohort has.
    """

    pairs: tuple[Pair, ...]
    tests: tuple[PairedTest, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


def compare_cohorts(
    a: str | Path,
    b: str | Path,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> CohortComparison:
    """Compare two cohorts of the same cases, explanation by explanation.

    Args:
        a, b: the output folders of two cohorts.
        out: gets pairs.csv and tests.csv; None writes nothing.
        progress: called with ("comparing", done, total).

    Raises:
        ConfigError: one is no folder of this machine with a cohort, or they have no case in common.

    Example:
        >>> found = compare_cohorts("explained_a", "explained_b")  # doctest: +SKIP
        >>> found.pairs[0].case, found.pairs[0].differs  # doctest: +SKIP
        ('case_07', 0.81)
    """
    folder = None if out is None else check_writable(out)
    cases_a, cases_b = explained_cases(Path(a)), explained_cases(Path(b))
    names = [name for name in cases_a if name in cases_b]
    if not names:
        raise ConfigError(
            f"{a} and {b} have no case in common: {some(list(cases_a))}; {some(list(cases_b))}"
        )
    pairs: list[Pair] = []
    both: dict[tuple[str, str], list[tuple[Entry, Entry]]] = defaultdict(list)
    for number, name in enumerate(names):
        (progress or silent)("comparing", number, len(names))
        here, there = _Case(Path(a) / name, cases_a[name]), _Case(Path(b) / name, cases_b[name])
        for key in dict.fromkeys([*here.entries, *there.entries]):
            pairs.append(_pair(name, key, here, there))
            if pairs[-1].status == "both":
                both[key].append((here.entries[key], there.entries[key]))
    found = CohortComparison(
        tuple(sorted(pairs, key=lambda pair: (math.isnan(pair.differs), -pair.differs))),
        tuple(_corrected([test for key, of in both.items() for test in _tests(key, of)])),
        tuple(name for name in cases_a if name not in cases_b),
        tuple(name for name in cases_b if name not in cases_a),
    )
    if folder is not None:
        _write(folder / "pairs.csv", Pair, found.pairs)
        _write(folder / "tests.csv", PairedTest, found.tests)
    return found


def explained_cases(out: Path) -> dict[str, Record]:
    """Return the cases that a cohort holds as done, each with what its last run says of it.

    Runs of other weights or files, whose volumes may still be there, are left out.
    """
    try:
        current = json.loads(read_small(out / OWN / CURRENT, _LARGEST))
    except (OSError, ValueError, RecursionError, InputError):
        current = None
    if not isinstance(current, dict):
        raise ConfigError(
            f"{out} holds no cohort: give the folder that `seg3dcam cohort` wrote, or a copy of it "
            "on this machine where it wrote to an address"
        )
    found = {}
    for name, code in current.items():
        record = record_of(out / name)
        if record is not None:
            keys = {run.key for run in record.runs if run.inputs == code}
            entries = [entry for entry in record.explanations if entry.run in keys]
            found[name] = record.model_copy(update={"explanations": entries})
    if not found:
        raise ConfigError(f"{out}: no case of this cohort is done")
    return found


class _Case(NamedTuple):
    """A case's folder and record."""

    folder: Path
    record: Record

    @property
    def entries(self) -> dict[tuple[str, str], Entry]:
        """The explanations by label and method."""
        return {
            (entry.label, entry.method.name if entry.method else ""): entry
            for entry in self.record.explanations
        }

    def map_of(self, key: tuple[str, str]) -> WrittenMap:
        return written_map(self.folder, self.record, self.entries[key])


def _pair(name: str, key: tuple[str, str], here: _Case, there: _Case) -> Pair:
    for one, other in ((here, "only in B"), (there, "only in A")):
        if key not in one.entries:
            return Pair(name, *key, other)
    try:
        first, second = here.map_of(key), there.map_of(key)
    except InputError as error:
        return Pair(name, *key, "both", differs=math.nan, note=str(error))
    if first.cam.shape != second.cam.shape or not same_grid(
        first.affine, second.affine, first.cam.shape
    ):
        note = "the two scans lie on different grids"
        return Pair(name, *key, "both", differs=math.nan, note=note)
    dice = _dice(first.mask, second.mask)
    overlap = _overlap(first.cam.numpy(), second.cam.numpy())
    alike = [value for value in (dice, overlap) if value is not None]
    return Pair(
        name,
        *key,
        "both",
        dice,
        overlap,
        _correlation(first.cam.numpy(), second.cam.numpy()),
        _apart(here.entries[key], there.entries[key]),
        1 - sum(alike) / len(alike) if alike else 0.0,
    )


def _dice(one: torch.Tensor, other: torch.Tensor) -> float | None:
    size = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / size if size else None


def _overlap(one: NDArray[np.float32], other: NDArray[np.float32]) -> float | None:
    sums = one.sum(dtype=np.float64), other.sum(dtype=np.float64)
    if not all(sums):
        return None if not any(sums) else 0.0
    return float(np.minimum(one / sums[0], other / sums[1]).sum(dtype=np.float64))


def _correlation(one: NDArray[np.float32], other: NDArray[np.float32]) -> float | None:
    if not (np.ptp(one) and np.ptp(other)):
        return None
    return float(np.corrcoef(one.ravel().astype(float), other.ravel().astype(float))[0, 1])


def _apart(one: Entry, other: Entry) -> float | None:
    first, second = one.found.get("peak_mm"), other.found.get("peak_mm")
    return math.dist(first, second) if first and second else None


def _tests(key: tuple[str, str], pairs: Sequence[tuple[Entry, Entry]]) -> Iterator[PairedTest]:
    """Yield the figures of all pairs of a class and method."""
    for name, words in TESTED.items():
        values = [(one.figure(name), other.figure(name)) for one, other in pairs]
        known = np.array([pair for pair in values if None not in pair], dtype=np.float64)
        if len(known) == 0:
            continue
        change = known[:, 1] - known[:, 0]
        p_value = None
        if len(known) >= FEWEST:
            p_value = float(stats.wilcoxon(change).pvalue) if change.any() else 1.0
        yield PairedTest(
            *key,
            words,
            len(known),
            float(np.median(known[:, 0])),
            float(np.median(known[:, 1])),
            float(np.median(change)),
            p_value,
        )


def _corrected(tests: Sequence[PairedTest]) -> list[PairedTest]:
    """Return tests with Holm's correction, in their order."""
    ordered = sorted((t.p_value, n) for n, t in enumerate(tests) if t.p_value is not None)
    corrected: dict[int, float] = {}
    least = 0.0
    for rank, (p_value, number) in enumerate(ordered):
        least = max(least, min(1.0, p_value * (len(ordered) - rank)))
        corrected[number] = least
    return [
        PairedTest(**asdict(test) | {"p_holm": corrected.get(number)})
        for number, test in enumerate(tests)
    ]


def _write(path: Path, kind: type[Any], rows: Sequence[Any]) -> None:
    columns = [field.name for field in fields(kind)]
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        written: list[Mapping[str, Any]] = [asdict(row) for row in rows]
        writer.writerows(written)
