"""A comparison of layers and methods as files: a picture, a table, and what it recommends."""

from __future__ import annotations

import csv
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from seg3dcam.errors import EvaluationError
from seg3dcam.evaluate.comparison import Candidate, Comparison
from seg3dcam.explaining.assembly import PACKAGES
from seg3dcam.explaining.comparing import ScanComparison
from seg3dcam.files import atomic, write_json
from seg3dcam.job.keys import scan_code
from seg3dcam.models.recommended import Recommendation, write_recommendation
from seg3dcam.review.pictures.comparison import save_comparison

#: The files of a comparison, in the order in which they are written.
PICTURE, TABLE, RECORD = "compare.png", "compare.csv", "compare.json"


def write_comparison(folder: str | Path, found: ScanComparison) -> list[Path]:
    """Write a comparison to a folder; an earlier one is replaced, file by file, the record last.

    No file holds the name of a scan's file, which may be a patient's.

    Raises:
        OutputError: a file cannot be written.
    """
    folder = Path(folder)
    picture = save_comparison(folder / PICTURE, found)
    table = _write_table(folder / TABLE, found.comparison)
    return [picture, table, write_json(folder / RECORD, record_of_comparison(found))]


def record_of_comparison(found: ScanComparison) -> dict[str, Any]:
    """Return what was compared and found, in plain values."""
    one = found.comparison
    return {
        "model": found.model.name,
        "weights_sha256": found.model.fingerprint(),
        "class": found.class_name,
        "class_index": one.class_index,
        "cases": cases_of(found),
        "counted": list(one.counted),
        "left": list(one.left),
        "controls": dict(one.controls),
        "random": list(one.random),
        "random_known_to": one.random_error,
        "best": None if one.best is None else {"layer": one.best.layer, "method": one.best.method},
        "words": one.words,
        "predictions": one.cost,
        "candidates": one.table(),
        "versions": _versions(),
    }


def cases_of(found: ScanComparison) -> list[str]:
    """Return a code for each scan, by which it is known again without its name."""
    return [f"scan {scan_code(scan)[:8]}" for scan in found.scans]


def recommend(path: Path, found: ScanComparison) -> Path:
    """Write the best layer and method beside the model, for its class.

    Args:
        path: the file, see `SegModel.recommended`.

    Raises:
        EvaluationError: no layer and method passes, so none is recommended.
        ConfigError, OutputError: see `write_recommendation`.
    """
    best = found.comparison.best
    if best is None:
        raise EvaluationError(f"nothing to recommend: {found.comparison.words}")
    new = Recommendation(
        class_name=found.class_name,
        class_index=found.comparison.class_index,
        layer=best.layer,
        method=best.method,
        cases=cases_of(found),
        figures=_figures(found.comparison, best),
        versions=_versions(),
    )
    return write_recommendation(path, found.model.fingerprint(), new)


def _figures(comparison: Comparison, best: Candidate) -> dict[str, float]:
    """Return what a recommendation is founded on."""
    figures = {
        "context_deletion": best.area,
        **{name.replace(" ", "_"): area for name, area in comparison.controls.items()},
        "random_low": min(comparison.random),
        "random_high": max(comparison.random),
        "random_known_to": comparison.random_error,
        "p": best.p_value,
        "randomised": None if best.sanity is None else best.sanity.worst,
        "default": None if comparison.default is None else comparison.default.area,
    }
    return {name: round(value, 4) for name, value in figures.items() if value is not None}


def _versions() -> dict[str, str]:
    packages = {package: version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **packages}


def _write_table(path: Path, comparison: Comparison) -> Path:
    rows = comparison.table()
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            areas = " ".join(f"{area:.4f}" for area in row["areas"])
            writer.writerow({**row, "areas": areas})
    return path
