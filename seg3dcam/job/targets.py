"""From a job's settings to the targets that they ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from seg3dcam import targets
from seg3dcam.errors import ConfigError, EmptyRegionError, some
from seg3dcam.job.checks import check_together
from seg3dcam.job.settings import Job
from seg3dcam.models import SegModel
from seg3dcam.scan import Scan
from seg3dcam.targets.ground_truth import check_on_grid, truth_mask
from seg3dcam.targets.named import REGIONS, SCORES


def targets_of(job: Job, model: SegModel, truth: Scan | None = None) -> list[Any] | None:
    """Return the targets of a job; None is every predicted class.

    Args:
        job: the settings.
        model: the network and its classes.
        truth: the label map that `job.truth` names.

    Raises:
        ConfigError: settings that do not go together.
        TargetError: no such class.
    """
    check_together(job)
    score = SCORES[job.score]
    if not score.of_class:
        return [_type(score.type_name)(job.region_name, activation=model.activation)]
    if job.target is None:
        return None
    classes = list(dict.fromkeys(class_indices(job, model)))
    if job.label is not None and len(classes) > 1:
        raise ConfigError("label is that of one class in the truth: name one target")
    return [_target(job, model, index, truth) for index in classes]


def _target(job: Job, model: SegModel, index: int, truth: Scan | None) -> Any:
    """Return the target of one class."""
    named = SCORES[job.score]
    score = _type(named.type_name)
    if named.needs_truth and truth is not None:
        return score(index, _mask(truth, job, index), activation=model.activation)
    if named.needs_other_class and job.against is not None:
        score = partial(score, against=model.class_index(job.against))
    region = REGIONS[job.region_name]
    if region.is_family:
        family = _type(region.type_name)
        return family(index, score, min_voxels=job.min_voxels, activation=model.activation)
    return score(index, region=_region(job, truth), activation=model.activation)


def _region(job: Job, truth: Scan | None) -> Any:
    """Return the region of a job, as targets take it."""
    region = REGIONS[job.region_name]
    if not region.type_name:
        return job.region_name
    if region.needs_truth:
        return _type(region.type_name)(truth, label=job.label)
    return _type(region.type_name)()


def _type(name: str) -> Callable[..., Any]:
    """Return a class of `seg3dcam.targets` by its name."""
    found: Callable[..., Any] = getattr(targets, name)
    return found


def _mask(truth: Scan, job: Job, index: int) -> Scan:
    """Return where a class really is: 1 in the voxels of its label in the truth, 0 elsewhere."""
    label = index if job.label is None else job.label
    mask = truth.data == label
    if not mask.any():
        found = [f"{value:g}" for value in truth.data.unique().tolist()]
        raise EmptyRegionError(
            f"{job.truth} has no voxel of label {label}; it has {some(found, 12)}. Say with "
            "label (--label) which is the class's"
        )
    return replace(truth, data=mask.float())


def check_truth(truth: Scan, scan: Scan, job: Job, model: SegModel) -> None:
    """Raise TargetError early for a truth on another grid, or with labels of another scheme."""
    check_on_grid("truth", truth.shape, truth.affine, scan)
    background = model.activation == "softmax" and len(model.class_names) > 1
    for index in class_indices(job, model) or [int(background)]:
        truth_mask(
            truth.data[0],
            job.label,
            class_index=index,
            class_names=model.class_names,
            background=background,
        )


def class_indices(job: Job, model: SegModel) -> list[int]:
    """Return the indices of the classes that a job names, by name or by index; none: []."""
    named = job.target if isinstance(job.target, list) else [job.target]
    return [model.class_index(name) for name in named if name is not None]
