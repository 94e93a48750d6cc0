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
from seg3dcam.models.load import SOURCES

if TYPE_CHECKING:
    from seg3dcam.explaining.calibration import Calibration

_MEANING = (
    "ECE: how far probability and frequency differ near the class, 0 is best; held out: each case "
    "at the temperature that the others give"
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
        list[int] | None,
        typer.Option(help="the class's label in the truths; default: its index; repeatable"),
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
    if label and target is None:
        raise ConfigError("--label is that of one class: name the class with --target")
    # What needs PyTorch is imported after the options are found to be legal.
    from seg3dcam.cohort.cases import local_pairs, read_cases
    from seg3dcam.explaining.calibration import calibrate as fitted
    from seg3dcam.job.calibration import write_calibration
    from seg3dcam.job.run import model_on_device

    given = read_cases(source)
    cases = [case for case in given if case.truth is not None]
    if not cases:
        raise ConfigError(f"{source}: no case has a truth, and without one nothing can be fitted")
    loaded = model_on_device(device, model, trust=trust, overrides=changes)
    with progress_bar() as progress:
        found = fitted(
            local_pairs(cases),
            loaded,
            target,
            label=label or None,
            names=[case.name for case in cases],
            progress=progress,
        )
        written = write_calibration(out, found, loaded)
    console.print(_table(found))
    console.print(_MEANING, style="dim", soft_wrap=True)
    if len(cases) < len(given):
        say(f"{len(cases)} of {len(given)} cases have a truth")
    if found.left_out:
        names = some([cases[number].name for number in found.left_out])
        say(f"left out, since neither truth nor prediction has a voxel: {names}")
    say(_words(found, model))
    for what, path in zip(("picture", "record"), written, strict=True):
        print_file(what, path)


def _words(found: Calibration, model: str) -> str:
    """Return what to do."""
    if not found.helps:
        return "the probabilities are as true as a temperature can make them: use none"
    if found.at_an_end:
        return (
            f"the likeliest temperature, {found.temperature:.3g}, is the last that was tried, so a "
            "better one may lie beyond it, and none is found: use none"
        )
    was = "too sure" if found.temperature > 1 else "not sure enough"
    kind, _, place = model.partition(":")
    key = f"`temperature: {found.temperature:.4g}`"
    where = (
        f"Write `{kind}: {place}` and {key} into a YAML file, and give that as the model"
        if kind in SOURCES and place
        else f"Write {key} into the model's YAML"
    )
    worse = f" The ECE of {some([shown(one) for one in found.worse])} grows." if found.worse else ""
    return f"the network was {was}. {where}: masks and maps of `explain` stay as they are.{worse}"


def _table(found: Calibration) -> Table:
    cases = f"{found.cases} case{'s' * (found.cases > 1)}"
    table = Table(title=f"{cases}, {found.voxels} voxels")
    for name in ("class", "ECE at 1", f"at {found.temperature:.4g}", "held out"):
        table.add_column(name, overflow="fold", justify="left" if name == "class" else "right")
    for name, before in found.before.items():
        held = f"{found.held_out[name].ece:.4f}" if found.held_out else ""
        table.add_row(shown(name), f"{before.ece:.4f}", f"{found.after[name].ece:.4f}", held)
    return table
