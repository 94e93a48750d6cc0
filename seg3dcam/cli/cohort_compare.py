"""`seg3dcam cohort-compare`: where do two models differ on the same cases?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from seg3dcam.cli.printing import out as console
from seg3dcam.cli.printing import print_file, progress_bar, say, shown
from seg3dcam.errors import some

if TYPE_CHECKING:
    from seg3dcam.cohort.comparing import CohortComparison

#: The table on the terminal has so many rows; the file has all.
MOST_ROWS = 12


def cohort_compare(
    a: Annotated[str, typer.Argument(metavar="A", help="output folder of a cohort")],
    b: Annotated[str, typer.Argument(metavar="B", help="that of another model, same cases")],
    out: Annotated[
        str, typer.Option(help="gets pairs.csv and tests.csv; an earlier comparison is replaced")
    ] = "seg3dcam_cohort_compare",
) -> None:
    """Compare two cohorts of the same cases: where do masks and maps of two models differ?"""
    from seg3dcam.cohort import compare_cohorts

    with progress_bar() as progress:
        found = compare_cohorts(a, b, out=out, progress=progress)
    console.print(_pairs(found))
    console.print(_tests(found))
    for only, which in ((found.only_a, a), (found.only_b, b)):
        if only:
            say(f"only in {which}: {some(list(only))}")
    for name in ("pairs", "tests"):
        print_file(name, Path(out) / f"{name}.csv")


def _pairs(found: CohortComparison) -> Table:
    table = Table(title="What differs most")
    for name in ("case", "class", "masks (Dice)", "maps (overlap)", "peaks apart", "note"):
        table.add_column(name, overflow="fold")
    for pair in found.pairs[:MOST_ROWS]:
        table.add_row(
            shown(pair.case),
            shown(pair.label),
            _number(pair.mask_dice),
            _number(pair.map_overlap),
            "" if pair.peaks_apart_mm is None else f"{pair.peaks_apart_mm:.0f} mm",
            shown(pair.note or ("" if pair.status == "both" else pair.status)),
        )
    if len(found.pairs) > MOST_ROWS:
        table.add_row(f"and {len(found.pairs) - MOST_ROWS} more", *[""] * 5)
    return table


def _tests(found: CohortComparison) -> Table:
    table = Table(title="All cases: medians, Wilcoxon's signed-rank test, Holm's correction")
    for name in ("class", "figure", "pairs", "A", "B", "B - A", "p", "p (Holm)"):
        table.add_column(name, overflow="fold")
    for test in found.tests:
        table.add_row(
            shown(test.label),
            test.figure,
            str(test.pairs),
            *(f"{value:.3g}" for value in (test.median_a, test.median_b, test.median_change)),
            _number(test.p_value, 3),
            _number(test.p_holm, 3),
        )
    return table


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
