"""The page of a cohort: one file that any browser opens from the disk, with no server.

Thumbnails and reports stay in the folders of their cases, and are loaded when they are looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from seg3dcam.cohort.calibration import ClassReliability, RiskCoverage
from seg3dcam.cohort.table import Summary, row_of
from seg3dcam.files import atomic
from seg3dcam.review.html import asset, filled, in_json, policy

#: The page, in the cohort's folder.
NAME = "index.html"

#: What the page knows of a row.
_COLUMNS = (
    *("case", "class", "method", "status", "verdict", "why", "error", "thumb", "report"),
    *("unusual", "confidence", "predicted_ml", "dice", "cam_outside", "cam_outside_body"),
    "peak_to_prediction_mm",
)

#: Digits of a number in the page.
_DIGITS = 5


def write_page(
    out: Path,
    found: Sequence[Summary],
    curves: Mapping[str, RiskCoverage] | None = None,
    reliable: Mapping[str, ClassReliability] | None = None,
) -> Path:
    """Write `index.html`: a row for each case, class and method, those to look at first on top.

    Args:
        curves: class -> risk and coverage.
        reliable: class -> how true its probabilities are.
    """
    rows = [[_cell(row.get(name)) for name in _COLUMNS] for one in found for row in _rows(one)]
    script, style = asset("seg3dcam.cohort", "page.js"), asset("seg3dcam.cohort", "page.css")
    content = {
        # The pictures of cases lie beside the page; files have no origin that 'self' could name.
        "policy": policy(script, style, "img-src 'self' file:"),
        "style": style,
        "script": script,
        "data": in_json(
            {
                "columns": _COLUMNS,
                "rows": rows,
                "facts": _facts(found),
                "curves": [_curve(label, curve) for label, curve in (curves or {}).items()],
                "reliability": [_reliable(label, one) for label, one in (reliable or {}).items()],
            }
        ),
    }
    path = out / NAME
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(filled(asset("seg3dcam.cohort", "page.html"), content))
    return path


def _curve(label: str, curve: RiskCoverage) -> dict[str, Any]:
    """Return what the page draws of a curve."""
    return {
        "label": label,
        "coverage": [_cell(float(part)) for part in curve.coverage],
        "risk": [_cell(float(part)) for part in curve.risk],
        "words": f"area {curve.area:.3f}, by chance {curve.by_chance:.3f}, at best "
        f"{curve.at_best:.3f}, p = {curve.p_value:.3f}",
    }


def _reliable(label: str, one: ClassReliability) -> dict[str, Any]:
    """Return what the page draws of the probabilities of a class."""
    found = one.reliability
    there = found.count > 0
    return {
        "label": label,
        "probability": [_cell(float(value)) for value in found.probability[there]],
        "frequency": [_cell(float(value)) for value in found.frequency[there]],
        "words": one.words,
    }


def _facts(found: Sequence[Summary]) -> str:
    counts = Counter("done" if one.entries else one.status for one in found)
    return f"{len(found)} cases: " + ", ".join(f"{n} {state}" for state, n in counts.items())


def _rows(one: Summary) -> Iterator[dict[str, Any]]:
    """Yield a row for each explanation, its layers together; one for a case without any."""
    about = {"case": one.case.name, "report": one.report}
    if not one.entries:
        yield about | {"status": one.status, "why": one.reason, "error": one.reason}
    for entry, unusual in one.entries:
        layers = list(entry.layers)
        cells = row_of(entry, layers[0], unusual)
        cells["status"] = _each_once(entry.layers[layer].status for layer in layers)
        cells["verdict"] = _each_once(said.finding for said in entry.verdicts.values())
        yield about | cells | {"thumb": entry.thumb_file}


def _each_once(words: Iterable[str]) -> str | None:
    return ", ".join(dict.fromkeys(words)) or None


def _cell(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
