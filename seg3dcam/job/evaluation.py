"""An evaluation of a scan's maps as files: a picture of the curves, a table, and a record."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from seg3dcam.checks import Frame
from seg3dcam.errors import ConfigError
from seg3dcam.explaining.evaluating import MapEvaluation
from seg3dcam.files import atomic, plain, write_json
from seg3dcam.models.seg_model import SegModel
from seg3dcam.review.pictures.curves import save_curves
from seg3dcam.scan import Scan, load_labels
from seg3dcam.targets.ground_truth import check_on_grid, truth_mask

#: The files of an evaluation, in the order in which they are written.
PICTURE, TABLE, RECORD = "curves.png", "evaluation.csv", "evaluation.json"

_COLUMNS = (
    "class",
    "target",
    "layer",
    "method",
    "group",
    "measure",
    "value",
    "chance",
    "low",
    "high",
    "note",
)


def write_evaluation(folder: str | Path, found: Sequence[MapEvaluation]) -> list[Path]:
    """Write an evaluation to a folder; an earlier one is replaced, file by file, the record last.

    Raises:
        OutputError: a file cannot be written.
    """
    folder = Path(folder)
    picture = save_curves(folder / PICTURE, found)
    table = _write_table(folder / TABLE, [row for one in found for row in _rows(one)])
    record = plain([_record(one) for one in found])
    return [picture, table, write_json(folder / RECORD, record)]


def _write_table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def truths_of(
    path: str | None,
    label: int | None,
    scan: Scan,
    model: SegModel,
    targets: Sequence[str] | None,
    frame: Frame | None,
) -> dict[int, Scan]:
    """Return class index -> where it really is, for the classes that a label map has.

    Args:
        path: the label map; None for none.
        label: the class's label there; None: its index.
        targets: the classes that are evaluated, by name or index; None for all.

    Raises:
        ConfigError: a label for several classes.
        TargetError: the labels lie on another grid or follow another scheme.
    """
    if path is None:
        return {}
    if label is not None and len(targets or ()) != 1:
        raise ConfigError("label is that of one class in the truth: name one target")
    labels = load_labels(path, frame=frame)
    check_on_grid("truth", labels.shape, labels.affine, scan)
    background = model.activation == "softmax" and len(model.class_names) > 1
    classes = range(int(background), len(model.class_names))
    chosen = classes if targets is None else [model.class_index(name) for name in targets]
    masks = {
        index: truth_mask(
            labels.data[0],
            label,
            class_index=index,
            class_names=model.class_names,
            background=background,
        )
        for index in chosen
    }
    return {index: replace(labels, data=mask[None].float()) for index, mask in masks.items()}


def _rows(one: MapEvaluation) -> list[dict[str, Any]]:
    """Return a row for each figure of a map, the verdict first."""
    what = {
        "class": one.class_name,
        "target": one.target,
        "layer": one.layer,
        "method": one.method,
    }
    verdict = {"group": "verdict", "measure": one.verdict.finding, "note": one.verdict.words}
    rows: list[dict[str, Any]] = [what | verdict]
    for m in one.measurements:
        low, high = m.interval or (None, None)
        figures = {"value": m.value, "chance": m.chance, "low": low, "high": high}
        rows.append(what | {"group": m.group, "measure": m.name, "note": m.note} | figures)
    return rows


def _record(one: MapEvaluation) -> dict[str, Any]:
    return {
        "class": one.class_name,
        "target": one.target,
        "layer": one.layer,
        "method": one.method,
        "verdict": asdict(one.verdict),
        "measurements": [asdict(m) for m in one.measurements],
        "curves": {
            name: {"fractions": c.fractions.tolist(), "dice": c.dice.tolist(), "auc": c.auc}
            for name, c in one.curves.items()
        },
    }
