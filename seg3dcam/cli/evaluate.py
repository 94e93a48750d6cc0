"""`seg3dcam evaluate`: is a map true? All figures of the maps of a scan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from seg3dcam.cli.options import (
    DeviceName,
    FrameName,
    ModelSource,
    Overrides,
    ScanFiles,
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
    from seg3dcam.evaluate.evaluation import Measurement
    from seg3dcam.explaining.evaluating import MapEvaluation


def evaluate(
    scan: ScanFiles,
    model: ModelSource,
    target: Annotated[
        list[str] | None,
        typer.Option(help="class name or index; default: every predicted class; repeatable"),
    ] = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="target layer; default: auto; repeatable")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="any that `seg3dcam methods` lists; default: hires_cam; repeatable"),
    ] = None,
    truth: Annotated[
        str | None, typer.Option(help="label map on the scan's grid, to look for the map in")
    ] = None,
    label: Annotated[
        int | None, typer.Option(help="the class's label in the truth; default: its index")
    ] = None,
    baseline: Annotated[
        str,
        typer.Option(
            help="what stands in place of what is deleted: mean, blur, noise, neighbours or a "
            "number; the verdict is tested by mean and blur, too"
        ),
    ] = "mean",
    out: Annotated[
        str,
        typer.Option(
            help="gets curves.png, evaluation.csv and .json; an earlier evaluation is replaced"
        ),
    ] = "seg3dcam_evaluation",
    frame: FrameName = None,
    device: DeviceName = "auto",
    set: Overrides = None,
    trust: Trust = False,
) -> None:
    """Measure whether maps are true: deletion, localisation and sanity, each beside chance."""
    check_writable(out)
    if label is not None and truth is None:
        raise ConfigError("--label names a label of the truth: give the truth, too, with --truth")
    check_apart(Path(out), [*scan, *([] if truth is None else [truth])])
    header_form, changes = frame_of(frame), overrides(set)
    # What needs PyTorch is imported after the options are found to be legal.
    from seg3dcam.explaining.evaluating import evaluate_scan
    from seg3dcam.job.evaluation import truths_of, write_evaluation
    from seg3dcam.job.run import model_on_device
    from seg3dcam.scan import load_scan

    loaded = model_on_device(device, model, trust=trust, overrides=changes)
    loaded_scan = load_scan(scan, frame=header_form)
    truths = truths_of(truth, label, loaded_scan, loaded, target, header_form)
    with progress_bar() as progress:
        found = list(
            evaluate_scan(
                loaded_scan,
                loaded,
                target,
                layers="auto" if layer is None else layer if len(layer) > 1 else layer[0],
                method=method,
                truth=truths,
                baseline=number_or_word(baseline),
                progress=progress,
            )
        )
        progress("writing", 0, 1)
        written = write_evaluation(out, found)
    for one in found:
        console.print(_table(one))
        say(one.verdict.words)
    for what, path in zip(("picture", "table", "record"), written, strict=True):
        print_file(what, path)


def _table(one: MapEvaluation) -> Table:
    """Return a row for each figure of a map."""
    title = f"{shown(one.class_name)}, {one.method}, layer {shown(one.layer)}"
    table = Table(title=title, show_lines=False)
    for name in ("measure", "value", "by chance", "what it means"):
        table.add_column(name, overflow="fold")
    group = ""
    for m in one.measurements:
        if m.group != group:
            group = m.group
            table.add_section()
            table.add_row(f"[bold]{shown(group)}[/bold]")
        table.add_row(shown(m.name), _value(m), _chance(m), shown(m.note))
    return table


def _value(m: Measurement) -> str:
    return "undefined" if m.value is None else f"{m.value:.3g}"


def _chance(m: Measurement) -> str:
    if m.chance is None or m.interval is None:
        return ""
    low, high = m.interval
    return f"{m.chance:.2g} ({low:.2g}-{high:.2g})"
