"""A calibration as files: a picture and a record."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from seg3dcam.explaining.calibration import Calibration
from seg3dcam.explaining.reliability import Reliability
from seg3dcam.files import write_json
from seg3dcam.models import SegModel
from seg3dcam.review.pictures.reliability import save_reliability

#: The files of a calibration, in the order in which they are written.
PICTURE, RECORD = "calibration.png", "calibration.json"


def write_calibration(folder: str | Path, found: Calibration, model: SegModel) -> list[Path]:
    """Write a calibration to a folder; an earlier one is replaced, the record last.

    Raises:
        OutputError: a file cannot be written.
    """
    folder = Path(folder)
    picture = save_reliability(folder / PICTURE, found)
    return [picture, write_json(folder / RECORD, _record(found, model))]


def _record(found: Calibration, model: SegModel) -> dict[str, Any]:
    """Return what was found, in plain values."""
    return {
        "model": model.name,
        "weights_sha256": model.fingerprint(),
        "temperature": found.temperature,
        "helps": found.helps and not found.at_an_end,
        "target": found.target,
        "labels": list(found.labels),
        "cases": found.cases,
        "left_out": list(found.left_out),
        "voxels": found.voxels,
        "loss": {
            "before": found.loss_before,
            "after": found.loss_after,
            "held_out": found.loss_held_out,
        },
        "classes": {
            name: {
                "before": _plain(found.before[name]),
                "after": _plain(found.after[name]),
                "held_out": _plain(found.held_out[name]) if found.held_out else None,
            }
            for name in found.before
        },
    }


def _plain(one: Reliability) -> dict[str, Any]:
    count, expected, found = one.lists
    ece = None if math.isnan(one.ece) else one.ece
    return {"ece": ece, "count": count, "expected": expected, "found": found}
