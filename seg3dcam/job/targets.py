"""What a job asks for: from its settings to targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from seg3dcam.errors import ConfigError, EmptyRegionError
from seg3dcam.files import resolved
from seg3dcam.job.settings import Job
from seg3dcam.models import SegModel
from seg3dcam.scan import Scan
from seg3dcam.targets import (
    Boundary,
    ClassLogit,
    ClassLogOdds,
    ClassProbability,
    Contrast,
    EveryComponent,
    FalseNegatives,
    FalsePositives,
    Finer,
    MaskOutput,
    SoftDice,
    TruePositives,
)
from seg3dcam.targets.ground_truth import check_on_grid, truth_mask

#: Score -> target of one class, summed over a region.
SCORES: dict[str, Callable[..., Any]] = {
    "log_odds": ClassLogOdds,
    "logit": ClassLogit,
    "probability": ClassProbability,
    "contrast": Contrast,
    "finer": Finer,
}

#: Region -> what it is, where it needs no truth.
REGIONS: dict[str, Any] = {"predicted": "predicted", "volume": "volume", "boundary": Boundary()}

#: Region -> how it is made of a truth.
OF_TRUTH: dict[str, Callable[..., Any]] = {
    "false_negatives": FalseNegatives,
    "false_positives": FalsePositives,
    "true_positives": TruePositives,
}


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
    if job.score == "mask_output":
        return [MaskOutput(job.region or "volume", activation=model.activation)]  # type: ignore[arg-type]
    if job.target is None:
        return None
    classes = _classes(job, model)
    if job.label is not None and len(classes) > 1:
        raise ConfigError("label is that of one class in the truth: name one target")
    return [_target(job, model, index, truth) for index in classes]


def _target(job: Job, model: SegModel, index: int, truth: Scan | None) -> Any:
    """Return the target of one class."""
    if job.score == "soft_dice" and truth is not None:
        return SoftDice(index, _mask(truth, job, index), activation=model.activation)
    score = SCORES[job.score]
    if job.score == "contrast" and job.against is not None:
        score = partial(score, against=model.class_index(job.against))
    if job.region == "components":
        return EveryComponent(index, score, min_voxels=job.min_voxels, activation=model.activation)
    if job.region in OF_TRUTH:
        region = OF_TRUTH[job.region](truth, label=job.label)
    else:
        region = REGIONS[job.region or "predicted"]
    return score(index, region=region, activation=model.activation)


def _mask(truth: Scan, job: Job, index: int) -> Scan:
    label = index if job.label is None else job.label
    mask = truth.data == label
    if not mask.any():
        found = ", ".join(f"{value:g}" for value in truth.data.unique().tolist()[:12])
        raise EmptyRegionError(
            f"{job.truth} has no voxel of label {label}; it has {found}. Say with label (--label) "
            "which is the class's"
        )
    return replace(truth, data=mask.float())


def check_truth(truth: Scan, scan: Scan, job: Job, model: SegModel) -> None:
    """Raise TargetError early where a truth lies elsewhere, or has labels of another scheme."""
    check_on_grid("truth", truth.shape, truth.affine, scan)
    background = model.activation == "softmax" and len(model.class_names) > 1
    for index in _classes(job, model) or [int(background)]:
        truth_mask(
            truth.data[0],
            job.label,
            class_index=index,
            class_names=model.class_names,
            background=background,
        )


def _classes(job: Job, model: SegModel) -> list[int]:
    """Return the indices of the classes that a job names, each once."""
    named = job.target if isinstance(job.target, list) else [job.target]
    return list(dict.fromkeys(model.class_index(name) for name in named if name is not None))


def check_together(job: Job) -> None:
    """Raise ConfigError where settings do not go together."""
    needs_class = {
        "score": job.score not in ("log_odds", "mask_output"),
        "region": job.region is not None and job.score != "mask_output",
        "against": job.against is not None,
        "label": job.label is not None,
    }
    if job.score == "mask_output" and job.target is not None:
        raise ConfigError("score mask_output is about no class: leave out the target")
    if job.score == "mask_output" and job.region not in (None, "predicted", "volume"):
        raise ConfigError(
            f"score mask_output is about no class, and region {job.region} about one: take "
            "predicted or volume"
        )
    for what, needed in needs_class.items():
        if needed and job.target is None:
            raise ConfigError(
                f"{what} {getattr(job, what)!r} needs a class: name one with --target"
            )
    if (job.score == "contrast") != (job.against is not None):
        raise ConfigError(
            "score contrast and against go together: --score contrast --against <other class>"
        )
    needs_truth = job.score == "soft_dice" or job.region in OF_TRUTH
    if needs_truth and job.truth is None:
        raise ConfigError(
            f"score soft_dice and the regions {', '.join(OF_TRUTH)} compare with a truth: "
            "--truth <label map on the scan's grid>"
        )
    if job.score == "mask_output" and job.truth is not None:
        raise ConfigError("score mask_output is about no class, so there is no truth of it")
    if job.score == "soft_dice" and job.region is not None:
        raise ConfigError("score soft_dice looks at the whole volume: leave out the region")
    if job.min_voxels != 1 and job.region != "components":
        raise ConfigError(
            f"min_voxels {job.min_voxels} is about components: it goes together with --region "
            "components"
        )
    scans = [resolved(scan) for scan in job.scans]
    if job.truth is not None and resolved(job.truth) in scans:
        raise ConfigError(f"truth {job.truth}: that is the scan itself; give a label map")
    if job.label is not None and job.truth is None:
        raise ConfigError("label is that of a class in the truth: give --truth")
