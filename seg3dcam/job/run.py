"""A job from its settings to the files in its case folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from seg3dcam.cams.catalogue import ALL_METHODS
from seg3dcam.errors import ConfigError, EmptyRegionError
from seg3dcam.explaining.explain import explain_each
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.geometry import anatomical_axis
from seg3dcam.job.case import make_room, note_inputs, write_case, write_empty_case
from seg3dcam.job.checks import check_job
from seg3dcam.job.formats import check_formats
from seg3dcam.job.keys import Keys, case_folder, case_keys, case_name, look_of
from seg3dcam.job.record import is_done, is_somebody_elses, record_of, run_with
from seg3dcam.job.settings import Job
from seg3dcam.job.targets import check_truth, class_indices, targets_of
from seg3dcam.models import SegModel, load_model
from seg3dcam.models.recommended import advice_for
from seg3dcam.progress import Progress, silent
from seg3dcam.scan import Scan, load_labels, load_scan


@dataclass(frozen=True)
class JobResult:
    """Where a job's case is and what was found.

    Attributes:
        folder: the case's folder.
        record: what its `case.json` says of this job: its "files" and "explanations", and the
            "case". Explanations are read back by `load_explanation(folder, name)`.
        was_done: the folder held all of this already, so that nothing was done.
        notes: what the user should know about the folder, such as that it is not the one that the
            job names.
        key: by which the run is known in the record of its case.
    """

    folder: Path
    record: Mapping[str, Any]
    was_done: bool = False
    notes: tuple[str, ...] = ()
    key: str = ""


def run_job(
    job: Job,
    *,
    trust: bool = False,
    force: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> JobResult:
    """Explain one scan as a job says, and write its case; what is done already is skipped.

    Args:
        job: the settings.
        trust: allow the model's own Python code to run.
        force: do again what is done.
        verify: look at the content of every file of what is done, not at its size alone.
        progress: called with (step, done, total); a step of one part has nothing to count.
        say: called with each of the result's notes as soon as it is known, before the scan is
            explained.

    Raises:
        ConfigError: settings that are illegal, or do not go together or with the scan. Most are
            found before anything is loaded.
        ScanError, ModelError, LayerError, TargetError: as `explain` raises them.
        OutputError: the folder cannot be written, or another run is at work in it.

    Example:
        >>> job = Job(scan="ct.nii.gz", model="liver.yaml", target="tumour")
        >>> run_job(job).folder  # doctest: +SKIP
        PosixPath('seg3dcam_out/scan_1a2b3c4d')
    """
    check_before_loading(job)
    model = model_of(job, trust=trust)
    return run_with_model(job, model, force=force, verify=verify, progress=progress, say=say)


def check_before_loading(job: Job) -> None:
    """Raise ConfigError for settings that are illegal or do not go together."""
    check_job(job)
    for method in job.methods:
        ALL_METHODS[method].check_settings(job.settings)
    look_of(job)


def run_with_model(
    job: Job,
    model: SegModel,
    *,
    force: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    inputs: str | None = None,
    of_cohort: bool = False,
) -> JobResult:
    """Do what a job says with its model, which is loaded already.

    Args:
        model: see `model_of`.
        of_cohort: leave out what is not predicted in this scan; where nothing is left, that is
            written down in the case's record. Another scan's case in the job's folder is replaced.
        inputs: a code of the job's files, kept in the record of the run, by which it is known to be
            up to date without reading them.
        job, force, verify, progress, say: as for `run_job`; it raises the same errors.
    """
    progress = progress or silent
    job, advice = advised(job, model)
    if advice and say is not None:
        say(advice)
    progress("reading", 0, 1)
    scan, truth = _loaded_scans(job, model)
    targets = targets_of(job, model, truth)
    keys = case_keys(scan, model, job, truth)
    if of_cohort and job.out is not None:
        make_room(Path(job.out), keys.voxels)
    folder = case_folder(scan, job, keys)
    if is_done(folder, keys.all, verify=verify) and not force:
        if inputs is not None:
            note_inputs(folder, keys.all, inputs)
        said = (advice,) if advice else ()
        record = _record_of_run(folder, keys)
        return JobResult(folder, record, was_done=True, notes=said, key=keys.all)
    notes = tuple(_notes(folder, job, keys))
    if say is not None:
        for note in notes:
            say(note)
    if advice:
        notes = (advice, *notes)
    # Explanations are made one by one while they are written. By then the folder is locked, so that
    # of two runs of one job at once, the second ends before it has computed anything.
    explanations = _explanations(scan, model, targets, truth, job, of_cohort, progress)
    try:
        record = write_case(folder, explanations, job, keys=keys, progress=progress, inputs=inputs)
    except EmptyRegionError as error:
        if not of_cohort:
            raise
        case = case_name(scan, job)
        record = write_empty_case(folder, job, keys=keys, case=case, why=str(error), inputs=inputs)
    return JobResult(folder, record, notes=notes, key=keys.all)


def model_of(job: Job, *, trust: bool = False) -> SegModel:
    """Return a job's network on its device."""
    inputs = {} if job.image_keys is None else {"inputs": job.image_keys}
    return model_on_device(job.device, job.model, trust=trust, overrides=job.set, **inputs)


def advised(job: Job, model: SegModel) -> tuple[Job, str]:
    """Return a job with what is recommended for the model in place of "auto", and words about it.

    So the job's key says which layer and method a case was made by.
    """
    if job.layers != "auto":
        return job, ""
    named = job.methods if "method" in job.model_fields_set else None
    advice = advice_for(model, class_indices(job, model) or None, methods=named)
    changes = {"layer": advice.layer, "method": advice.method if named is None else None}
    job = job.model_copy(update={key: value for key, value in changes.items() if value})
    return job, advice.words


def _loaded_scans(job: Job, model: SegModel) -> tuple[Scan, Scan | None]:
    """Return the scan and the truth, if there is one, both found to fit the job."""
    scan = load_scan(job.scans, frame=job.frame)
    _check_slice(scan, job)
    check_formats(scan, job.formats)
    if job.truth is None:
        return scan, None
    truth = load_labels(job.truth, frame=job.frame)
    check_truth(truth, scan, job, model)
    return scan, truth


def _explanations(
    scan: Scan,
    model: SegModel,
    targets: list[Any] | None,
    truth: Scan | None,
    job: Job,
    skip_empty: bool,
    progress: Progress,
) -> Iterator[Explanation]:
    """Yield the explanations that a job asks for, each with the truth where there is one."""
    for explanation in explain_each(
        scan,
        replace(model, recommended=None),  # the job has the recommended layer already
        targets,
        layers=job.layers,
        method=job.methods,
        verdict="full" if job.verdict else "quick",
        skip_empty=skip_empty,
        progress=progress,
        **job.settings,
    ):
        yield explanation if truth is None else explanation.with_truth(truth, job.label)


def _check_slice(scan: Scan, job: Job) -> None:
    """Raise ConfigError early where the wanted slice lies outside of the scan."""
    if not isinstance(job.slice, int):
        return
    size = scan.shape[anatomical_axis(scan.affine, job.axes[0])]
    if not 0 <= job.slice < size:
        raise ConfigError(
            f"{job.axes[0]} slice {job.slice}: legal are 0 to {size - 1} for {scan.title}"
        )


def model_on_device(device: str, source: str, **settings: Any) -> SegModel:
    """Return a model on the device to compute on.

    Args:
        device: "auto", or the name of one.
        source, settings: see `load_model`.

    Raises:
        ConfigError: an unknown device, or none in this machine.
        ModelError: see `load_model`.
    """
    model = load_model(source, **settings)
    model.module.to(device_of(device))
    return model


def device_of(name: str) -> torch.device:
    """Return the device to compute on.

    Raises:
        ConfigError: unknown, or not in this machine.
    """
    here = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return torch.device("cuda" if here["cuda"] else "mps" if here["mps"] else "cpu")
    kind, _, number = name.partition(":")
    if kind not in here or (number and (kind != "cuda" or not number.isdigit())):
        raise ConfigError(f"device {name!r}: legal are auto, cpu, cuda, cuda:<number> and mps")
    if not here[kind] or (number and int(number) >= torch.cuda.device_count()):
        usable = ", ".join(kind for kind, usable in here.items() if usable)
        raise ConfigError(f"device {name!r} is not in this machine; usable are {usable}")
    return torch.device(name)


def _notes(folder: Path, job: Job, keys: Keys) -> Iterator[str]:
    """Yield what the user should know: that a case goes elsewhere, or replaces an earlier run."""
    if job.out is not None and folder != Path(job.out):
        what = "another scan's case"
        if is_somebody_elses(Path(job.out)):
            what = "a case.json that is none of seg3dcam, or damaged"
        yield f"{job.out} holds {what}: this one goes to {folder}"
    before = record_of(folder)
    if before is not None and any(run.job_key == keys.job for run in before.runs):
        yield f"{folder} holds this job from before: it is done again, and replaced"


def _record_of_run(folder: Path, keys: Keys) -> Mapping[str, Any]:
    """Return what `case.json` says of a run, as `write_case` returns it."""
    record = record_of(folder)
    run = run_with(record, keys.all)
    if record is None or run is None:  # as where the folder was deleted just now
        return {}
    entries = [entry.model_dump() for entry in record.explanations if entry.run == run.key]
    return {"case": record.case, "files": run.files, "explanations": entries}
