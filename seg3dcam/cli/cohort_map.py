"""`seg3dcam cohort-map`: where do the CAMs of many patients lie?"""

from __future__ import annotations

from typing import Annotated

import typer

from seg3dcam.cli.printing import print_file, progress_bar, say


def cohort_map(
    cohort: Annotated[str, typer.Argument(help="output folder of a cohort")],
    target: Annotated[str, typer.Option(help="what was explained, as column class has it")],
    method: Annotated[
        str | None, typer.Option(help="whose CAMs; needed where there are several")
    ] = None,
    out: Annotated[str | None, typer.Option(help="default: the cohort's folder group")] = None,
    space: Annotated[
        str | None,
        typer.Option(
            help="volume whose grid the maps have, or icbm152, the brain template of the demo; "
            "default: a scan's"
        ),
    ] = None,
    transforms: Annotated[
        str | None,
        typer.Option(
            help="table (.csv) of case and transform, the file of a matrix from mm of the scan to "
            "mm of the space (RAS); default: the scans lie in the space"
        ),
    ] = None,
    z: Annotated[
        list[str] | None,
        typer.Option(help="case that gets a map of how unlike the others it is; repeatable"),
    ] = None,
    radius: Annotated[float, typer.Option(help="mm around a peak that count")] = 5.0,
) -> None:
    """Put the CAMs of a cohort together in one space: their mean, their peaks, one against all."""
    from seg3dcam.cohort.group import group_map

    with progress_bar() as progress:
        found = group_map(
            cohort,
            target,
            method=method,
            out=out,
            space=space,
            transforms=transforms,
            z=z or (),
            radius_mm=radius,
            progress=progress,
        )
    for name, why in found.left_out.items():
        say(f"{name} is left out: {why}")
    say(f"{len(found.cases)} cases")
    for what, path in {"mean": found.mean, "peaks": found.peaks, "seen": found.seen}.items():
        print_file(what, path)
    for path in found.z.values():
        print_file("z", path)
