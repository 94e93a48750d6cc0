"""`seg3dcam uncertainty`: where is a network unsure about a scan?"""

from __future__ import annotations

from collections.abc import Sequence
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
    overrides,
)
from seg3dcam.cli.printing import out as console
from seg3dcam.cli.printing import print_file, progress_bar, say, shown
from seg3dcam.files import check_writable
from seg3dcam.job.checks import check_apart

if TYPE_CHECKING:
    from seg3dcam.explaining.lesions import LesionUncertainty

#: So many lesions of a class are shown, and none that is smaller (ml); figures.json has more.
_SHOWN, _SMALLEST = 10, 0.01


def uncertainty(
    scan: ScanFiles,
    model: ModelSource,
    flip: Annotated[
        list[int] | None,
        typer.Option(help="axis of the network's input (0, 1, 2) to flip along; repeatable"),
    ] = None,
    dropout: Annotated[int, typer.Option(help="passes with dropout switched on")] = 0,
    out: Annotated[
        str,
        typer.Option(
            help="gets entropy.nii.gz, mutual_information.nii.gz, figures.json; earlier ones go"
        ),
    ] = "seg3dcam_uncertainty",
    frame: FrameName = None,
    device: DeviceName = "auto",
    set: Overrides = None,
    trust: Trust = False,
) -> None:
    """Show where a network is unsure: entropy, and how far folds, flips or dropout disagree."""
    check_writable(out)
    check_apart(Path(out), scan)
    header_form, changes = frame_of(frame), overrides(set)
    # What needs PyTorch is imported after the options are found to be legal.
    from seg3dcam.explaining.uncertainty import uncertainty as measured
    from seg3dcam.job.run import model_on_device
    from seg3dcam.scan import load_scan

    loaded = model_on_device(device, model, trust=trust, overrides=changes)
    with progress_bar() as progress:
        found = measured(
            load_scan(scan, frame=header_form),
            loaded,
            flips=flip or (),
            dropout=dropout,
            progress=progress,
        )
    table = Table(title=f"Members: {found.members}")
    for name in ("class", "mean entropy in its mask", "Dice of each two members"):
        table.add_column(name, overflow="fold")
    for name, entropy in found.mean_entropy.items():
        dice = found.pairwise_dice.get(name)
        table.add_row(
            shown(name),
            "not drawn" if entropy is None else f"{entropy:.3f}",
            "" if dice is None else f"{dice:.3f}",
        )
    console.print(table)
    shown_lesions = [x for x in found.lesions if x.rank < _SHOWN and x.ml >= _SMALLEST]
    if shown_lesions:
        console.print(_of_lesions(shown_lesions, found.members))
    if found.members == 1:
        say("one member alone: --flip or --dropout, or an ensemble, tell how far members disagree")
    for path in found.save(out):
        print_file(path.name.split(".")[0], path)


def _of_lesions(lesions: Sequence[LesionUncertainty], members: int) -> Table:
    table = Table(
        title=f"Lesions: connected parts of what the mean of the members draws; the {_SHOWN} "
        f"largest of a class, from {_SMALLEST} ml on"
    )
    columns = ("class", "R, A, S mm", "ml", "soft Dice", "entropy", "drawn by", "Dice")
    for name in columns:
        table.add_column(name, overflow="fold", justify="left" if name == "class" else "right")
    for lesion in lesions:
        table.add_row(
            shown(lesion.class_name),
            ", ".join(f"{mm:.0f}" for mm in lesion.centre_mm),
            f"{lesion.ml:.2f}",
            "" if lesion.confidence is None else f"{lesion.confidence:.3f}",
            f"{lesion.mean_entropy:.3f}",
            f"{lesion.drawn_by} of {members}",
            "" if lesion.pairwise_dice is None else f"{lesion.pairwise_dice:.3f}",
        )
    return table
