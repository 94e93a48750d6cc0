"""What `compare` recommends on the problems, beside the best of all methods and layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from torch import nn

from seg3dcam.cams.catalogue import ALL_METHODS
from seg3dcam.evaluate import compare
from seg3dcam.evaluate.comparing import METHODS

from .problems import Problem
from .score import Field, loaded, maps
from .tables import AUTO

#: The columns of the table.
HEAD = (
    "| problem | seed | recommended | area | best of all | area | *auto* | predictions |\n"
    "|---|---|---|---|---|---|---|---|"
)


def rows(problem: Problem, seeds: Sequence[int]) -> list[str]:
    """Return a row of the table for every volume.

    The best of all is that of all methods which know the class, whether `compare` looks at them by
    default or not. What gives one map for all classes explains none.
    """
    network, found = loaded(problem), []
    for seed in seeds:
        x, _, _ = problem.volume(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = compare(network, x, problem.class_index)
        name = f"| `{problem.name}` | {seed} | "
        if not given.counted:
            none = f"none: {given.words.partition(', so')[0]}"
            row = f"{name}{none} | | | | | {given.cost:.0f} |"
        else:
            won = given.best
            best = "none | |" if won is None else _cells(won.method, won.layer, won.area)
            areas = _areas(problem, network, seed)
            row = f"{name}{best} {_best(areas, knowing)} {areas[AUTO]:.2f} | {given.cost:.0f} |"
            print(f"best that it looks at: {_best(areas, METHODS.__contains__)}")
        print(row, flush=True)
        found.append(row)
    return found


def knowing(method: str) -> bool:
    """Tell whether a method's map depends on the class."""
    formula = ALL_METHODS[method].formula
    return method != "random" and not getattr(formula, "agnostic", False)


def _areas(problem: Problem, network: nn.Module, seed: int) -> dict[tuple[str, str], float]:
    """Return (method, layer) -> area, of all combinations."""
    x, _, _ = problem.volume(seed)
    made = list(maps(network, x, problem.class_index))
    areas = Field(problem, network, seed).areas([values for _, _, values, _ in made])
    return {(method, layer): area for (method, layer, *_), area in zip(made, areas, strict=True)}


def _best(areas: dict[tuple[str, str], float], counts: Callable[[str], bool]) -> str:
    """Return the cells of the smallest area of the methods that count."""
    method, layer = min((pair for pair in areas if counts(pair[0])), key=areas.__getitem__)
    return _cells(method, layer, areas[method, layer])


def _cells(method: str, layer: str, area: float) -> str:
    return f"`{method}` at `{layer}` | {area:.3f} |"
