"""A row for each case, class, method and layer of a cohort."""

from __future__ import annotations

import csv
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seg3dcam.cohort.plan import PlannedCase
from seg3dcam.cohort.triage import Unusual, triage
from seg3dcam.files import atomic
from seg3dcam.job.record import Entry, record_of

#: The names of the tables, without their endings.
NAME = "cohort"

#: Columns of what `case.json` calls "found".
_FOUND = (
    "predicted_ml",
    "truth_ml",
    "dice",
    "cam_inside_prediction",
    "cam_inside_truth",
    "cam_outside",
    "cam_outside_body",
    "peak_to_prediction_mm",
    "peak_to_truth_mm",
    "evidence_against",
    "confidence",
)

COLUMNS = (
    *("case", "class", "layer", "method", "status"),
    *("verdict", "verdict_words", "resolution_mm"),
    *_FOUND,
    "ece",
    *("unusual", "why", "error", "seconds"),
)

#: Columns of words; the others hold numbers.
_TEXTS = {
    *("case", "class", "layer", "method", "status", "verdict", "verdict_words", "why", "error")
}

_REPORT = re.compile(r"report(_\d+)?\.html")


@dataclass(frozen=True)
class Summary:
    """A case with what was found in it.

    Attributes:
        case: its state by now.
        entries: its explanations, each with how unlike those of the other cases it is.
        report: its page, relative to its folder; None without one.
        empty: why there was nothing to explain in it; None where there was, or where it failed.
    """

    case: PlannedCase
    entries: tuple[tuple[Entry, Unusual], ...]
    report: str | None
    empty: str | None = None

    @property
    def status(self) -> str:
        """Of a case without explanations: "empty", "failed" or "to do"."""
        return "empty" if self.case.state == "done" else self.case.state

    @property
    def reason(self) -> str | None:
        """Why it has no explanations; None where it is still to do."""
        return self.empty or self.case.error or None

    def of_method(self, key: str) -> list[Entry]:
        """Return the explanations by one method."""
        return [entry for entry, _ in self.entries if entry.method and entry.method.name == key]


def summaries(out: Path, plan: Sequence[PlannedCase]) -> list[Summary]:
    """Return every case with what was found in it; runs with other weights are left out.

    Args:
        plan: all cases, with their states by now.
    """
    read = [(one, *_read(out, one)) for one in plan]
    of_all = {(one.name, e.name): e for one, entries, _, _ in read for e in entries}
    unusual = triage(of_all, sum(one.state == "done" for one, *_ in read))
    return [
        Summary(one, tuple((e, unusual[one.name, e.name]) for e in entries), report, empty)
        for one, entries, report, empty in read
    ]


def _read(out: Path, one: PlannedCase) -> tuple[list[Entry], str | None, str | None]:
    """Return a case's explanations, its report, and why it has none."""
    record = record_of(out / one.name) if one.state == "done" else None
    if record is None:
        return [], None, None
    current = {run.key: run for run in record.runs if run.inputs == one.code}
    files = [name for run in current.values() for name in run.files]
    report = next((name for name in files if _REPORT.fullmatch(name)), None)
    empty = next((run.empty for run in current.values() if run.empty), None)
    entries = [entry for entry in record.explanations if entry.run in current]
    for entry in entries:
        if entry.pattern is not None:
            # A list of Python's numbers takes eight times the memory.
            entry.pattern = array("f", entry.pattern)
    return entries, report, empty


def write_tables(out: Path, found: Sequence[Summary]) -> tuple[Path, ...]:
    """Write `cohort.csv`, and `cohort.parquet` where pyarrow is installed."""
    rows = [row for one in found for row in _rows(one)]
    table = out / f"{NAME}.csv"
    with atomic(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return (table, *_written_as_parquet(out / f"{NAME}.parquet", rows))


def _written_as_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Iterator[Path]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return
    kinds = {name: pyarrow.string() if name in _TEXTS else pyarrow.float64() for name in COLUMNS}
    table = pyarrow.table(
        {name: [row[name] for row in rows] for name in COLUMNS}, schema=pyarrow.schema(kinds)
    )
    # A file, since Arrow takes a name with a colon for an address.
    with atomic(path) as temporary, temporary.open("wb") as file:
        parquet.write_table(table, file)
    yield path


def _rows(one: Summary) -> Iterator[dict[str, Any]]:
    """Yield the rows of a case; one that has not been explained has one."""
    empty = dict.fromkeys(COLUMNS) | {"case": one.case.name, "seconds": one.case.seconds}
    if not one.entries:
        yield empty | {"status": one.status, "error": one.reason}
    for entry, unusual in one.entries:
        for layer, about in entry.layers.items():
            yield empty | row_of(entry, layer, unusual) | {"status": about.status}


def row_of(entry: Entry, layer: str, unusual: Unusual) -> dict[str, Any]:
    """Return the cells of a layer's map."""
    verdict = entry.verdicts.get(layer)
    return {
        "class": entry.label,
        "layer": layer,
        "method": None if entry.method is None else entry.method.name,
        "verdict": None if verdict is None else verdict.finding,
        "verdict_words": None if verdict is None else verdict.words,
        "resolution_mm": max(entry.layers[layer].spacing_mm),
        **{name: entry.figure(name) for name in _FOUND},
        "ece": None if (found := entry.reliable()) is None else found.ece,
        "unusual": unusual.score,
        "why": "; ".join(unusual.reasons) or None,
    }
