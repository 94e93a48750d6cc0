"""`seg3dcam compare`: which layer and which method may be trusted for a model?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from seg3dcam.cli.options import (
    DeviceName,
    FrameName,
    ModelSource,
    Overrides,
    Trust,
    frame_of,
    number_or_word,
    overrides,
)
from seg3dcam.cli.printing import out as console
from seg3dcam.cli.printing import print_file, progress_bar, say, shown
from seg3dcam.errors import ConfigError
from seg3dcam.files import check_writable
from seg3dcam.job.checks import check_apart

if TYPE_CHECKING:
    from seg3dcam.evaluate.comparison import Comparison

#: The table on the terminal has so many rows; the files have all.
MOST_ROWS = 12

_MEANING = (
    "context deletion: Dice left while what lies around the mask is deleted in the order of the "
    "map, from 0 to 1; the lower, the more the prediction depends on what the map shows"
)


def compare(
    scan: Annotated[
        list[str],
        typer.Argument(
            help="NIfTI file or DICOM folder; several are several cases; channels of one case are "
            "joined by commas"
        ),
    ],
    model: ModelSource,
    target: Annotated[
        str | None,
        typer.Option(help="class name or index; default: the only one besides the background"),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="default: all that `seg3dcam layers` lists; repeatable"),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="default: those of one backward pass, and integrated_gradients if no layer is "
            "good enough; repeatable"
        ),
    ] = None,
    out: Annotated[
        str,
        typer.Option(help="gets compare.png, .csv and .json; an earlier comparison is replaced"),
    ] = "seg3dcam_compare",
    recommend: Annotated[
        bool,
        typer.Option("--recommend", help="write the winner beside the model: `--layer auto` is it"),
    ] = False,
    margin: Annotated[int, typer.Option(help="voxels around the mask that are never deleted")] = 2,
    block: Annotated[int, typer.Option(help="voxels of a block along every axis")] = 4,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="what stands in place of what is deleted: mean, blur, noise, neighbours or a "
            "number; the winner passes by all that are given; default: mean and blur; repeatable"
        ),
    ] = None,
    frame: FrameName = None,
    device: DeviceName = "auto",
    set: Overrides = None,
    trust: Trust = False,
) -> None:
    """Rank layers and methods: which of them may be trusted for this model and class?"""
    check_writable(out)
    files = [_channels(word) for word in scan]
    check_apart(Path(out), [file for case in files for file in case])
    header_form, changes = frame_of(frame), overrides(set)
    asked = {"baselines": [number_or_word(word) for word in baseline]} if baseline else {}
    # What needs PyTorch is imported after the options are found to be legal.
    from seg3dcam.evaluate.comparing import not_good_enough
    from seg3dcam.explaining.comparing import compare_scans
    from seg3dcam.job.comparison import recommend as write_recommended
    from seg3dcam.job.comparison import write_comparison
    from seg3dcam.job.run import model_on_device
    from seg3dcam.scan import load_scan

    loaded = model_on_device(device, model, trust=trust, overrides=changes)
    place = loaded.recommended
    if recommend and place is not None:
        check_writable(place.parent)
    with progress_bar() as progress:
        found = compare_scans(
            [load_scan(case, frame=header_form) for case in files],
            loaded,
            target,
            layers=layer,
            methods=method,
            margin=margin,
            block=block,
            **asked,
            progress=progress,
        )
        progress("writing", 0, 1)
        written = write_comparison(out, found)
    console.print(_table(f"Layers and methods for {shown(found.class_name)}", found.comparison))
    console.print(_MEANING, style="dim", soft_wrap=True)
    say(found.comparison.words)
    if not method and found.comparison.counted and not_good_enough(found.comparison.candidates):
        say(_not_looked_at(found.comparison))
    for what, path in zip(("picture", "table", "record"), written, strict=True):
        print_file(what, path)
    if recommend and place is not None:
        print_file("recommended", write_recommended(place, found))


def _channels(word: str) -> list[str]:
    """Return the files of one case: a file or folder, or several joined by commas."""
    if "," not in word or Path(word).exists():
        return [word]
    parts = word.split(",")
    if not all(parts):
        raise ConfigError(f"scan {word!r}: files joined by commas, as t1.nii.gz,t2.nii.gz")
    return parts


def _not_looked_at(found: Comparison) -> str:
    """Return words about the methods that may find more than those that were compared."""
    from seg3dcam.evaluate.comparing import FURTHER

    compared = {one.method for one in found.candidates}
    others = [f"--method {one}" for one in ("score_cam", FURTHER) if one not in compared]
    return "methods that take more predictions may find more: " + ", ".join(others)


def _table(title: str, found: Comparison) -> Table:
    """Return a row for each of the best candidates, and the controls below."""
    table = Table(title=title)
    table.add_column("layer", overflow="fold")  # a name that is cut off cannot be used
    table.add_column("level")
    table.add_column("method", overflow="fold")
    table.add_column("context deletion", justify="right")
    table.add_column("verdict", overflow="fold")
    rows = found.table()
    for row in rows[:MOST_ROWS]:
        table.add_row(
            shown(row["layer"]), row["level"], row["method"], _area(row), shown(row["verdict"])
        )
    if len(rows) > MOST_ROWS:
        table.add_row(f"and {len(rows) - MOST_ROWS} more", "", "", "", "")
    if found.controls:
        table.add_section()
    for name, area in found.controls.items():
        table.add_row(name, "", "", f"{area:.2f}", "")
    if found.random:
        table.add_row("random maps, the best of a draw", "", "", found.random_range, "")
    return table


def _area(row: dict[str, Any]) -> str:
    """Return an area, with its error where it is known only roughly."""
    if row["context_deletion"] is None:
        return "-"
    rough = f" ± {row['known_to']:.2f}" if row["known_to"] > 0.02 else ""
    return f"{row['context_deletion']:.2f}{rough}"
