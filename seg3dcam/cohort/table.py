"""A row for each case, class, layer and method of a cohort."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from seg3dcam.cohort.plan import PlannedCase
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
    "peak_to_prediction_mm",
    "peak_to_truth_mm",
    "evidence_against",
)

COLUMNS = (
    *("case", "class", "layer", "method", "status"),
    *("verdict", "verdict_words", "resolution_mm"),
    *_FOUND,
    "error",
)


def write_tables(out: Path, plan: Sequence[PlannedCase]) -> tuple[Path, ...]:
    """Write `cohort.csv`, and `cohort.parquet` where pyarrow is installed.

    Args:
        plan: all cases, in the order of the rows, with their states by now.
    """
    rows = [row for one in plan for row in _rows(out, one)]
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
    table = pyarrow.table({name: [row[name] for row in rows] for name in COLUMNS})
    with atomic(path) as temporary:
        parquet.write_table(table, temporary)
    yield path


def _rows(out: Path, one: PlannedCase) -> Iterator[dict[str, Any]]:
    """Yield the rows of a case; those of runs with other weights or files are left out."""
    empty = dict.fromkeys(COLUMNS) | {"case": one.name}
    record = record_of(out / one.name) if one.state == "done" else None
    if record is None:
        yield empty | {"status": one.state, "error": one.error or None}
        return
    current = {run.key for run in record.runs if run.inputs == one.code}
    for entry in record.explanations:
        for layer, about in entry.layers.items() if entry.run in current else ():
            yield empty | _of_layer(entry, layer) | {"status": about.status}


def _of_layer(entry: Entry, layer: str) -> dict[str, Any]:
    found = getattr(entry, "found", None) or {}
    verdict = entry.verdicts.get(layer)
    return {
        "class": entry.label,
        "layer": layer,
        "method": None if entry.method is None else entry.method.name,
        "verdict": None if verdict is None else verdict.finding,
        "verdict_words": None if verdict is None else verdict.words,
        "resolution_mm": max(entry.layers[layer].spacing_mm),
        **{name: found.get(name) for name in _FOUND},
    }
