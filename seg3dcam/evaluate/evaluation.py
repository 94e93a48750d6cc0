"""All figures of one map, each with what a map gets that knows nothing of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from seg3dcam.cams.base import BaseCAM
from seg3dcam.checks import Activation
from seg3dcam.errors import EmptyRegionError, EvaluationError, InputError, ModelError
from seg3dcam.evaluate.blocks import Blocks, Curve, Subject
from seg3dcam.evaluate.boxes import max_box_overlap, voxel_average_precision
from seg3dcam.evaluate.complexity import entropy, gini
from seg3dcam.evaluate.confidence import kept_confidence
from seg3dcam.evaluate.controls import mask_alone
from seg3dcam.evaluate.places import Figure, localisation
from seg3dcam.evaluate.rerun import Rerun
from seg3dcam.evaluate.sanity import Check, class_sensitivity, stability
from seg3dcam.geometry import FeatureGrid
from seg3dcam.progress import Progress, silent


@dataclass(frozen=True)
class Measurement:
    """One figure of a map.

    Attributes:
        group: "faithfulness", "sanity", "complexity", or "localisation in ..." a region.
        name: of the measure.
        value: None where it is undefined.
        chance: what random maps of the same resolution get on average; None if not known.
        interval: between these two lie 95 % of the random maps.
        note: in words: what it is held against, whether the map passes, or why it is undefined.
    """

    group: str
    name: str
    value: float | None
    chance: float | None = None
    interval: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Subjects:
    """What a map is measured with.

    Attributes:
        cam: the method, with its network and one target layer.
        class_index: the class.
        values: the map on the input's grid, (*S).
        grid: of the layer, in voxels of the input.
        regions: name -> (*S) bool, where the map is looked for, such as the prediction.
        rerun: of the network and the input.
        randomised: the check by random weights; None where it could not be made.
        activation: "softmax" or "sigmoid".
        spacing: mm from voxel to voxel along every axis, None for voxels.
        baseline: what stands in the place of what is deleted.
        progress: called with (step, done, total).
    """

    cam: BaseCAM
    class_index: int
    values: torch.Tensor
    grid: FeatureGrid
    regions: Mapping[str, torch.Tensor]
    rerun: Rerun
    randomised: Check | None = None
    activation: Activation = "softmax"
    spacing: tuple[float, ...] | None = None
    baseline: str | float = "mean"
    progress: Progress = silent


def measurements(of: Subjects) -> tuple[list[Measurement], dict[str, Curve]]:
    """Return all figures of a map but its context deletion, and the curves that they come from.

    What is undefined is listed with its reason; nothing is raised for it.
    """
    curves: dict[str, Curve] = {}
    found = [*_faithfulness(of, curves), *_sanity(of)]
    for name, region in of.regions.items():
        found += _localisation(of, f"localisation in {name}", region)
    found += _guarded("complexity", "Gini index", lambda: [gini(of.values)])
    found += _guarded("complexity", "entropy", lambda: [entropy(of.values)])
    return found, curves


def _guarded(
    group: str, name: str, measure: Callable[[], list[Any]], note: str = ""
) -> list[Measurement]:
    """Return what `measure` gives, [value] or [value, note], or why it is undefined."""
    try:
        value, *words = measure()
    except (EvaluationError, EmptyRegionError, InputError, ModelError) as error:
        return [Measurement(group, name, None, note=str(error))]
    return [Measurement(group, name, float(value), note=words[0] if words else note)]


def _faithfulness(of: Subjects, curves: dict[str, Curve]) -> Iterator[Measurement]:
    group = "faithfulness"
    settings: Any = {"steps": 25, "baseline": of.baseline, "seed": 0}
    try:
        blocks = Blocks.of(Subject(of.rerun, of.class_index, of.activation), 4)
        alone = mask_alone(blocks.subject.mask)
        for name, curve_of in (("deletion", blocks.deleted), ("insertion", blocks.inserted)):
            of.progress(name, 0, 1)
            curves[name] = curve_of(of.values, **settings)
            curves[f"{name} by the mask alone"] = curve_of(alone, **settings)
            rival = curves[f"{name} by the mask alone"].auc
            note = f"area under Dice; the mask alone gets {rival:.2f}"
            yield Measurement(group, name, curves[name].auc, note=note)
    except (EvaluationError, EmptyRegionError, InputError) as error:
        yield Measurement(group, "deletion and insertion", None, note=str(error))

    def kept() -> list[Any]:
        found = kept_confidence(
            of.values,
            of.rerun.x,
            of.cam.model,
            of.class_index,
            baseline=of.baseline,
            sliding_window=of.rerun.sliding_window,
            activation=of.activation,
            output=of.cam.output,
        )
        more = "more" if found.increase else "not more"
        return [100 * found.drop, f"in %; the class becomes {more} probable where it was predicted"]

    yield from _guarded(group, "drop of probability", kept)


def _sanity(of: Subjects) -> Iterator[Measurement]:
    x = of.rerun.x

    def checked(check: Callable[[], Check]) -> Callable[[], list[Any]]:
        def measure() -> list[Any]:
            found = check()
            passed = "passed" if found.passed else "failed"
            return [found.worst, f"{passed}, at most {found.limit:g}: {found.why}"]

        return measure

    if of.randomised is not None:
        random = of.randomised
        yield from _guarded("sanity", "random weights", checked(lambda: random))
    checks: dict[str, Callable[[], Check]] = {
        "other classes": lambda: class_sensitivity(of.cam, x, of.class_index),
        "noise of 1 %": lambda: stability(of.cam, x, of.class_index),
    }
    for name, check in checks.items():
        of.progress(name, 0, 1)
        yield from _guarded("sanity", name, checked(check))


def _localisation(of: Subjects, group: str, region: torch.Tensor) -> Iterator[Measurement]:
    of.progress(group, 0, 1)
    try:
        found = localisation(of.values, region, spacing=of.spacing, grid=of.grid)
    except (EvaluationError, InputError) as error:
        yield Measurement(group, "all", None, note=str(error))
        return
    for field in fields(found):
        figure: Figure = getattr(found, field.name)
        note = "what a random map may get" if figure.is_chance else ""
        name = field.name.replace("_", " ")
        yield Measurement(group, name, figure.value, figure.chance, figure.interval, note)
    yield from _guarded(group, "best box overlap", lambda: [max_box_overlap(of.values, region)])
    yield from _guarded(
        group, "average precision", lambda: [voxel_average_precision(of.values, region)]
    )
