"""Checks of a job that need neither its scan nor its network; nothing here imports PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from seg3dcam.cams.method_cards import method_names
from seg3dcam.errors import ConfigError, nearest
from seg3dcam.files import resolved
from seg3dcam.job.settings import OUT, Job
from seg3dcam.targets.named import REGIONS, SCORES, NamedRegion, NamedScore

#: Arguments of calls that every method takes. A job has them elsewhere, or its model says them.
OF_CALLS = {
    *("self", "targets", "layers", "target_layers", "sliding_window", "output", "activation"),
    *("reshape_transform", "progress", "skip_empty"),
}


def check_job(job: Job) -> None:
    """Raise ConfigError for settings that no scan and no network could make legal."""
    check_methods(job)
    check_places(job)
    check_together(job)


def check_methods(job: Job) -> None:
    """Raise ConfigError for an unknown method, or settings that belong to no method."""
    for method in job.methods:
        if method not in method_names():
            raise ConfigError(f"method {method!r}: {nearest(method, method_names())}")
    if job.settings and len(job.methods) > 1:
        raise ConfigError("settings are those of one method, and several are named")
    for name in job.settings:
        if name in Job.model_fields or name in OF_CALLS:
            raise ConfigError(f"setting {name!r} is none of a method: it has an option of its own")


def check_places(job: Job) -> None:
    """Raise ConfigError where results and the files of scan or truth would share a folder."""
    out = resolved(job.out or OUT)
    scans = [resolved(scan) for scan in job.scans]
    truth = [resolved(job.truth)] if job.truth else []
    if any(source.is_relative_to(out) for source in [*scans, *truth]):
        raise ConfigError(
            f"out {job.out or OUT}: the scan or the truth lies in this folder; choose another"
        )
    check_apart(Path(job.out or OUT), job.scans)


def check_apart(out: Path, scans: Iterable[str]) -> None:
    """Raise ConfigError where results would be written into a folder that holds a scan."""
    for scan in map(resolved, scans):
        if scan.is_dir() and resolved(out).is_relative_to(scan):
            raise ConfigError(f"out {out}: it lies in the scan's own folder; choose another")


def check_together(job: Job) -> None:
    """Raise ConfigError where target, score, region and truth do not go together."""
    score = SCORES[job.score]
    region = None if job.region is None else REGIONS[job.region]
    if not score.of_class:
        _check_of_no_class(job, region)
    _check_class(job, score)
    if score.needs_other_class != (job.against is not None):
        raise ConfigError(
            "score contrast and against go together: --score contrast --against <other class>"
        )
    _check_truth(job, score, region)
    if region is not None and not score.over_region:
        raise ConfigError(f"score {job.score} looks at the whole volume: leave out the region")
    if job.min_voxels != 1 and not (region and region.is_family):
        raise ConfigError(
            f"min_voxels {job.min_voxels} is about components: it goes together with --region "
            "components"
        )


def _check_of_no_class(job: Job, region: NamedRegion | None) -> None:
    """Raise ConfigError where a score of the whole output is asked for something of a class."""
    said = f"score {job.score} is about no class"
    if job.target is not None:
        raise ConfigError(f"{said}: leave out the target")
    if region is not None and region.of_class:
        legal = " or ".join(name for name, region in REGIONS.items() if not region.of_class)
        raise ConfigError(f"{said}, and region {job.region} about one: take {legal}")
    if job.truth is not None:
        raise ConfigError(f"{said}, so there is no truth of it")


def _check_class(job: Job, score: NamedScore) -> None:
    """Raise ConfigError where a class has to be named and is not."""
    needs_class = {
        "score": score.needs_named_class,
        "region": job.region is not None and score.of_class,
        "against": job.against is not None,
        "label": job.label is not None,
    }
    for what, needed in needs_class.items():
        if needed and job.target is None:
            raise ConfigError(
                f"{what} {getattr(job, what)!r} needs a class: name one with --target"
            )


def _check_truth(job: Job, score: NamedScore, region: NamedRegion | None) -> None:
    """Raise ConfigError where a truth is needed and missing, or is the scan itself."""
    if job.truth is None and (score.needs_truth or (region and region.needs_truth)):
        scores = ", ".join(name for name, score in SCORES.items() if score.needs_truth)
        regions = ", ".join(name for name, region in REGIONS.items() if region.needs_truth)
        raise ConfigError(
            f"score {scores} and the regions {regions} compare with a truth: "
            "--truth <label map on the scan's grid>"
        )
    if job.truth is not None and resolved(job.truth) in map(resolved, job.scans):
        raise ConfigError(f"truth {job.truth}: that is the scan itself; give a label map")
    if job.label is not None and job.truth is None:
        raise ConfigError("label is that of a class in the truth: give --truth")
