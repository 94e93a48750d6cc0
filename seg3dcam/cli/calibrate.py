"""`seg3dcam calibrate`: at which temperature are a network's probabilities true?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from seg3dcam.cli.options import DeviceName, ModelSource, Overrides, Trust, overrides
from seg3dcam.cli.printing import out as console
from seg3dcam.cli.printing import print_file, progress_bar, say, shown
from seg3dcam.errors import ConfigError, some
from seg3dcam.files import check_writable

if TYPE_CHECKING:
    from seg3dcam.explaining.calibration import Calibration

_MEANING = (
    "ECE: how far probability and frequency differ, 0 is best, near the true and the drawn class; "
    "held out: each case at the temperature that the others give"
)


def calibrate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="scans with truths, as seg3dcam cohort takes them: a table with columns scan and "
            "truth, an nnU-Net folder imagesTs beside labelsTs, a datalist of MONAI",
        ),
    ],
    model: ModelSource,
    target: Annotated[
        str | None,
        typer.Option(help="class name or index; default: all classes together"),
    ] = None,
    label: Annotated[
        int | None, typer.Option(help="the class's label in the truths; default: its index")
    ] = None,
    out: Annotated[
        str, typer.Option(help="gets calibration.png and .json; an earlier one is replaced")
    ] = "seg3dcam_calibration",
    device: DeviceName = "auto",
    set: Overrides = None,
    trust: Trust = False,
) -> None:
    """Fit the temperature at which the network's probabilities are true, on cases with truths."""
    check_writable(out)
    changes = overrides(set)
    if label is not None and target is None:
        raise ConfigError("--label is that of one class: name the class with --target")
    # What needs PyTorch is imported after the options are found to be legal.
    from seg3dcam.cohort.cases import local_pairs, read_cases
    from seg3dcam.explaining.calibration import calibrate as fitted
    from seg3dcam.job.calibration import write_calibration
    from seg3dcam.job.run import model_on_device

    cases = [case for case in read_cases(source) if case.truth is not None]
    if not cases:
        raise ConfigError(f"{source}: no case has a truth, and without one nothing can be fitted")
    loaded = model_on_device(device, model, trust=trust, overrides=changes)
    with progress_bar() as progress:
        found = fitted(
            local_pairs(cases),
            loaded,
            target,
            label=label,
            names=[case.name for case in cases],
            progress=progress,
        )
        written = write_calibration(out, found, loaded)
    console.print(_table(found))
    console.print(_MEANING, style="dim", soft_wrap=True)
    if found.left_out:
        names = some([cases[number].name for number in found.left_out])
        say(f"left out, since neither truth nor prediction has a voxel: {names}")
    say(_words(found))
    for what, path in zip(("picture", "record"), written, strict=True):
        print_file(what, path)


def _words(found: Calibration) -> str:
    if found.at_an_end:
        return (
            f"no temperature makes these probabilities true: the best, {found.temperature:.3g}, is "
            "the last that was tried; use none"
        )
    was = "too sure" if found.temperature > 1 else "not sure enough"
    return (
        f"temperature {found.temperature:.4g}: the network was {was}. Write `temperature: "
        f"{found.temperature:.4g}` into the model's YAML; masks and maps stay as they are"
    )


def _table(found: Calibration) -> Table:
    table = Table(title=f"{found.cases} cases, {found.voxels} voxels")
    for name in ("class", "ECE", f"at {found.temperature:.4g}", "held out"):
        table.add_column(name, overflow="fold", justify="left" if name == "class" else "right")
    for name, before in found.before.items():
        held = f"{found.held_out[name].ece:.4f}" if found.held_out else ""
        table.add_row(shown(name), f"{before.ece:.4f}", f"{found.after[name].ece:.4f}", held)
    return table
