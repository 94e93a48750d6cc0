"""The tables of `docs/known_answers.md`, from the figures of a run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .networks import LAYERS

#: What "auto" and the default method come to on these networks.
AUTO = ("hires_cam", "down_4")

#: A map of the decoder's last level, which can be no more than an echo of the mask.
ECHO = ("hires_cam", "upcat_1")

#: Rows that every table of details has: the default, a decoder's echo, and what knows no class.
ALWAYS = (AUTO, ECHO, ("eigen_cam", "down_1"))

BEST = 5


def picked(scores: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return method and layer of the best scores, the most often passed first, and `ALWAYS`."""
    ranked = sorted(scores, key=lambda s: (-sum(s["passed"]), statistics.median(s["areas"])))
    best = [(s["method"], s["layer"]) for s in ranked[:BEST]]
    return best + [pair for pair in ALWAYS if pair not in best]


def overview(figures: Mapping[str, Any]) -> str:
    """Return the median areas of every method (rows) at every layer (columns) as a table.

    Bold is what passes on all volumes, and a number in brackets on how many it does otherwise.
    """
    scores = {(s["method"], s["layer"]): s for s in figures["scores"]}
    methods = list(dict.fromkeys(method for method, layer in scores if layer != "input"))
    lines = [
        "| | " + " | ".join(f"`{layer}`" for layer in LAYERS) + " |",
        "|---|" + "---|" * len(LAYERS),
    ]
    for method in methods:
        cells = [_cell(scores.get((method, layer))) for layer in LAYERS]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    of_input = [s for s in figures["scores"] if s["layer"] == "input"]
    lines += [
        "",
        "The input itself: " + ", ".join(f"`{s['method']}` {_cell(s)}" for s in of_input) + ".",
    ]
    return "\n".join(lines)


def top(figures: Mapping[str, Any]) -> str:
    """Return the best rows, what is always shown, and the controls, with everything measured."""
    scores = {(s["method"], s["layer"]): s for s in figures["scores"]}
    volumes = len(figures["seeds"])
    lines = [
        "| map | context deletion | with blur | passes | mass in the evidence | in the object | "
        "in the rival | ROC-AUC of the evidence | highest voxel in it | ranks after "
        "randomisation |",
        "|---" * 10 + "|",
    ]
    for entry in figures["details"]:
        score = scores[entry["method"], entry["layer"]]
        name = f"`{entry['method']}` at `{entry['layer']}`"
        if (entry["method"], entry["layer"]) == AUTO:
            name += " (*auto*)"
        blurred = [value for value in score["blurred"] if value is not None]
        inside = [
            _median([parts.get(region, 0.0) for parts in score["inside"]])
            for region in ("evidence", "object", "rival")
        ]
        randomised = entry["randomised"]
        lines.append(
            f"| {name} | {_range(score['areas'])} | {_range(blurred) if blurred else '–'} | "
            f"{sum(score['passed'])}/{volumes} | {' | '.join(inside)} | "
            f"{_median(entry['roc_auc'])} | "
            f"{sum(value > 0.5 for value in entry['pointing'])}/{volumes} | "
            + (
                "–"
                if randomised is None
                else f"{randomised[0]:.2f}, {'passes' if randomised[1] else 'fails'}"
            )
            + " |"
        )
    for name in figures["controls"][0]:
        lines.append(f"| *{name}* | {_range([c[name] for c in figures['controls']])} |" + " |" * 8)
    # A resolution is drawn on the volumes where one of its maps is good enough to be ranked.
    for shape in dict.fromkeys(shape for volume in figures["random"] for shape in volume):
        areas = [area for volume in figures["random"] for area in volume.get(shape, [])]
        lines.append(f"| *random, {shape} voxels* | {_range(areas)} |" + " |" * 8)
    return "\n".join(lines)


def written(page: Path, name: str, text: str) -> None:
    """Put a text between the two comments of a page that bear its name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{page}: no place for {name!r}, which is between {begin!r} and {end!r}")
    page.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    passed, volumes = sum(score["passed"]), len(score["areas"])
    value = f"{statistics.median(score['areas']):.2f}"
    if passed == volumes:
        return f"**{value}**"
    return f"{value} ({passed})" if passed else value


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f}" if values else "–"


def _range(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"
