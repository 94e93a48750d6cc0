"""What `compare` recommends on the problems, beside the best of all methods and layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from seg3dcam.evaluate import compare

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

    Areas of all combinations are known to 0.02, that of the recommended one exactly.
    """
    network, found = loaded(problem), []
    for seed in seeds:
        x, _, _ = problem.volume(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = compare(network, x, problem.class_index)
        name = f"| `{problem.name}` | {seed} | "
        if not given.counted:
            row = f"{name}none: {given.words.partition(', so')[0]} | | | | | {given.cost:.0f} |"
        else:
            made = list(maps(network, x, problem.class_index))
            areas = Field(problem, network, seed).areas([values for _, _, values, _ in made])
            best = min(range(len(made)), key=areas.__getitem__)
            of = {pair[:2]: area for pair, area in zip(made, areas, strict=True)}
            won = given.best
            row = (
                name
                + ("none | " if won is None else f"`{won.method}` at `{won.layer}` | ")
                + ("" if won is None else f"{won.area:.3f}")
                + f" | `{made[best][0]}` at `{made[best][1]}` | {areas[best]:.3f} | "
                f"{of[AUTO]:.2f} | {given.cost:.0f} |"
            )
        print(row, flush=True)
        found.append(row)
    return found
