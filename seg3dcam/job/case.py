"""A case on disk: everything that one scan's explanation leaves behind, in one folder.

nifti   prediction.nii.gz              predicted labels (sigmoid: one file per class)
        cam_<target>.nii.gz            0 to 1: negative evidence cut, layers averaged; of a
                                       signed job -1 to 1: nothing cut
        raw_<target>_<layer>.nii.gz    raw signed map of one layer
        region_<target>.nii.gz         the voxels that are explained, where they are a region of
                                       their own, as one lesion
        truth_<target>.nii.gz          where the class really is, if that was given
png     slices/<target>/<plane>_*.png  scan beside overlay
        montage_<target>.png           the slices that matter
        planes_<target>.png            the three planes through the CAM's peak
        profile_<target>.png           CAM and prediction, slice by slice
cine    cine_<target>.webp             a film through the slices
html    report.html                    all targets, methods and layers, for any browser
slicer  slicer/scene.mrml              the same for 3D Slicer, with its files beside it
        slicer/case.mrb                the scene and its files in one
nrrd    cam_<target>.nrrd
fused   fused_<target>.nii.gz          scan and CAM in colour, for viewers that cannot blend
dicom   dicom/                         Secondary Capture, Segmentation, Parametric Map
always  case.json                      what was done and found; written last

A target is named by its class, and by its region and method where there are several; `case.json`
says which name is whose, and the size and SHA-256 of every file. A run that differs, in its target
or in any setting, adds its files; where they would have the name of another file, a number comes
behind it. No file's name or content tells the scan's own file name, which may be a patient's: see
`Job.case`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from seg3dcam.engine.passes import Progress, silent
from seg3dcam.errors import ConfigError, InputError, OutputError
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.explaining.findings import findings
from seg3dcam.export.dicom import DicomExport
from seg3dcam.export.fused import write_fused
from seg3dcam.export.slicer import SlicerScene
from seg3dcam.files import plain, unique_names
from seg3dcam.files.writers.nifti import write_nifti
from seg3dcam.files.writers.nrrd import write_nrrd
from seg3dcam.geometry import anatomical_axis
from seg3dcam.job.folder import described, locked, move, placed_as, remove, staging
from seg3dcam.job.keys import Keys, case_name, keys_of_explanation, look_of, settings_of
from seg3dcam.job.record import (
    Record,
    Run,
    damaged,
    is_somebody_elses,
    listed_files,
    provenance_of,
    record_of,
    unfinished,
    without_job,
    write_record,
)
from seg3dcam.job.settings import Job
from seg3dcam.review import (
    Report,
    review_explanation,
    save_cine,
    save_montage,
    save_planes,
    save_profile,
    save_slices,
)
from seg3dcam.review.look import Look
from seg3dcam.scan import Scan


class _Joint(Protocol):
    """A writer that shows several explanations together; it keeps none of their volumes."""

    def add(self, explanation: Explanation, name: str) -> None:
        """Take one more."""

    def finish(self) -> list[Path]:
        """Write what shows all, and return every file."""


def write_case(
    folder: str | Path,
    explanations: Iterable[Explanation],
    job: Job,
    *,
    keys: Keys | None = None,
    progress: Progress = silent,
) -> Mapping[str, Any]:
    """Write one run of a case; what other runs left in its folder stays.

    A run of the same job is replaced. Explanations may be made while they are iterated over; no
    other process can write to the folder meanwhile.

    Args:
        keys: see `seg3dcam.job.keys`; None: as far as the explanations tell them.
        progress: called with (step, done, total) before each format is written.

    Returns:
        what `case.json` says of this run: its "files" and "explanations", and the "case".

    Raises:
        OutputError: the folder cannot be written, holds another scan's case or a `case.json` of
            something else, or another run is at work in it. Runs of other jobs are as they were.
        InputError: there are no explanations.
    """
    folder = Path(folder)
    with locked(folder, listed_files) as lock, staging(folder) as staged:
        before = record_of(folder)
        if before is None and is_somebody_elses(folder):
            raise OutputError(
                f"{folder} holds a case.json of something else: choose another folder"
            )
        new = _written(staged, explanations, job, keys, before, progress)
        if before is not None and before.voxels_sha256 != new.keys.voxels:
            raise OutputError(f"{folder} holds another scan's case: choose another folder")
        others = without_job(before, new.keys.job)
        replaced = _files_of(before) - _files_of(others)
        names = placed_as(folder, staged, new.files, replaced)
        files = described(staged, names)
        # A run that dies from here on leaves new files, which the next one removes; what it
        # replaces stays listed, old or new, as a run that has to be done again.
        lock.announce(final for final in names.values() if not os.path.lexists(folder / final))
        if before is not None and replaced:
            write_record(folder, unfinished(before, new.keys.job))
        move(folder, staged, names)
        run, entries = new.run(names, job), new.entries(names)
        record = Record(
            seg3dcam=version("seg3dcam"),
            case=new.case,
            voxels_sha256=new.keys.voxels,
            key=run["key"],
            job=run["job"],
            runs=[*(others.runs if others else []), Run(**run)],
            files={**(others.files if others else {}), **files},
            explanations=[*(others.explanations if others else []), *entries],
        )
        _check_there(folder, record, run["files"])
        write_record(folder, record)
        remove(folder, replaced - set(names.values()))
    return {"case": new.case, "files": run["files"], "explanations": entries}


def write_apart(folder: str | Path, name: str, write: Callable[[Path], object]) -> list[Path]:
    """Write files that belong together to a folder of their own, where nothing else is lost.

    What another call wrote under this name stays, and a number is added to the name; where it is
    the very same, it is not written twice.

    Args:
        folder: gets the new folder.
        name: of the new folder.
        write: writes the files to a folder that it is given.

    Returns:
        The files, in the order of their names.

    Raises:
        OutputError: they cannot be written, or another run is at work in `folder`.
    """
    folder = Path(folder)
    with locked(folder, listed_files) as lock, staging(folder) as staged:
        write(staged / name)
        files = sorted(file for file in staged.rglob("*") if file.is_file())
        names = placed_as(folder, staged, files, replaceable=())
        lock.announce(final for final in names.values() if not os.path.lexists(folder / final))
        move(folder, staged, names)
        lock.announce(())
    return [folder / final for final in names.values()]


def _files_of(record: Record | None) -> set[str]:
    return set() if record is None else {name for run in record.runs for name in run.files}


def _check_there(folder: Path, record: Record, files: Iterable[str]) -> None:
    """Raise OutputError where files went while the run went on."""
    if gone := damaged(folder, record, files):
        raise OutputError(
            f"{folder}: {', '.join(gone[:3])}{', ...' * (len(gone) > 3)} went while the run went "
            "on: something else deletes or writes there. Choose another folder, or run it again"
        )


@dataclass
class _Written:
    """What one run has written, in a folder of its own.

    Attributes:
        staged: that folder.
        keys, case: known from the first explanation on.
        found: entries of `case.json`, with names of files in `staged`.
        files, scan, prediction: all files, and of them the scan's and the prediction's.
    """

    staged: Path
    keys: Keys = field(default_factory=lambda: Keys("", "", ""))
    case: str = ""
    found: list[dict[str, Any]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    scan: list[Path] = field(default_factory=list)
    prediction: list[Path] = field(default_factory=list)

    def run(self, names: Mapping[str, str], job: Job) -> dict[str, Any]:
        """Return what `case.json` says of the run; `names` in `staged` -> names in the case."""
        final = {self.staged / name: final for name, final in names.items()}
        return {
            "key": self.keys.all,
            "job_key": self.keys.job,
            "job": settings_of(job),
            "files": [final[file] for file in dict.fromkeys(self.files)],
            "scan_files": [final[file] for file in self.scan],
            "prediction_files": [final[file] for file in self.prediction],
        }

    def entries(self, names: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return what `case.json` says of the explanations, with the names that files have now."""
        return [
            entry
            | {"raw_files": {layer: names[file] for layer, file in entry["raw_files"].items()}}
            | {kind: entry[kind] and names[entry[kind]] for kind in ("region_file", "truth_file")}
            for entry in self.found
        ]


def _written(
    staged: Path,
    explanations: Iterable[Explanation],
    job: Job,
    keys: Keys | None,
    before: Record | None,
    progress: Progress,
) -> _Written:
    """Write every file of a run to its own folder."""
    new = _Written(staged)
    joint: dict[str, _Joint] = {}
    names: list[str] = []
    for explanation in explanations:
        if not names:
            new.case = case_name(explanation.scan, job)
            new.keys = keys or keys_of_explanation(explanation, job)
            kinds = [kind for kind in job.formats if kind in _JOINT]
            joint = {kind: _JOINT[kind](staged, look_of(job), new.case) for kind in kinds}
            if "nifti" in job.formats:
                new.prediction = _write_prediction(staged, explanation)
                new.files += new.prediction
        words = explanation.label + f" {explanation.method}" * (len(job.methods) > 1)
        taken = _names_of_others(without_job(before, new.keys.job), explanation)
        name = unique_names([*taken, *names, words])[-1]
        names.append(name)
        for number, kind in enumerate(job.formats):
            progress(f"writing {name}: {kind}", number, len(job.formats))
            if kind in _SINGLE:
                new.files += _SINGLE[kind](staged, explanation, name, job, new.case)
            if kind in joint:
                joint[kind].add(explanation, name)
        new.found.append(_entry(explanation, name, job, new.keys))
    if not new.found:
        raise InputError("there is no explanation to write")
    for number, (last, writer) in enumerate(joint.items()):
        progress(f"writing {last}", number, len(joint))
        new.files += writer.finish()
        if isinstance(writer, SlicerScene):
            new.scan = writer.scan_files
    return new


def _names_of_others(others: Record | None, explanation: Explanation) -> list[str]:
    """Return the names of other explanations, but of the very same one in other formats."""

    def told(provenance: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in provenance.items() if key != "versions"}

    now = told(plain(explanation.provenance))
    entries = [] if others is None else others.explanations
    return list(dict.fromkeys(e.name for e in entries if told(plain(provenance_of(e))) != now))


def _entry(explanation: Explanation, name: str, job: Job, keys: Keys) -> dict[str, Any]:
    """Return what `case.json` says of an explanation, with names of files in the run's folder."""
    volumes = "nifti" in job.formats
    entry = {
        "label": explanation.label,
        "name": name,
        "run": keys.all,
        **explanation.provenance,
        "has_background": explanation.has_background,
        "over_mask": explanation.over_mask,
        "only_against": list(explanation.only_against),
        "of_component": explanation.of_component,
        "found": findings(explanation, scale=look_of(job).scale),
        "raw_files": _raw_files(explanation, name) if volumes else {},
        "region_file": None,
        "truth_file": None,
    }
    for kind in _masks(explanation) if volumes else ():
        entry[f"{kind}_file"] = f"{kind}_{name}.nii.gz"
    return plain(entry)


def _masks(explanation: Explanation) -> dict[str, torch.Tensor]:
    """Return the masks of an explanation's own, beside the predictions, by their kind."""
    masks = {"region": explanation.region, "truth": explanation.truth}
    return {kind: mask for kind, mask in masks.items() if mask is not None}


def _raw_files(explanation: Explanation, name: str) -> dict[str, str]:
    """Return layer -> name of the file of its raw map."""
    layers = list(explanation.maps)
    return {
        layer: f"raw_{name}_{short}.nii.gz"
        for layer, short in zip(layers, unique_names(layers), strict=True)
    }


def _write_nifti(
    folder: Path, explanation: Explanation, name: str, job: Job, case: str
) -> list[Path]:
    return [
        explanation.save(folder / f"cam_{name}.nii.gz", scale=look_of(job).scale),
        *(
            explanation.save_raw(folder / file, layer)
            for layer, file in _raw_files(explanation, name).items()
        ),
        *(
            _write_labels(folder / f"{kind}_{name}.nii.gz", mask.numpy(), explanation.scan, kind)
            for kind, mask in _masks(explanation).items()
        ),
    ]


def _write_prediction(folder: Path, explanation: Explanation) -> list[Path]:
    """Write labels where classes exclude each other, one mask per class where they may overlap."""
    masks, scan = explanation.prediction.numpy(), explanation.scan
    if not explanation.has_background and len(masks) > 1:
        names = unique_names(explanation.class_names)
        volumes = {f"prediction_{n}": m for n, m in zip(names, masks, strict=True)}
    else:
        values = np.arange(len(masks)) if len(masks) > 1 else np.ones(1)
        labels = np.zeros(scan.shape, dtype=np.uint8 if len(masks) < 256 else np.int16)
        for value, mask in zip(values, masks, strict=True):
            labels[mask] = value
        volumes = {"prediction": labels}
    return [
        _write_labels(folder / f"{name}.nii.gz", volume, scan, name)
        for name, volume in volumes.items()
    ]


def _write_labels(path: Path, labels: np.ndarray, scan: Scan, name: str) -> Path:
    """Write whole numbers on the scan's grid."""
    dtype = np.dtype(np.uint8) if labels.dtype == bool else labels.dtype
    return write_nifti(
        path, labels, scan.affine, reference=scan.header, intent_name=name, dtype=dtype
    )


def _write_png(
    folder: Path, explanation: Explanation, name: str, job: Job, case: str
) -> list[Path]:
    which = "relevant" if job.slice is None else job.slice
    review = review_explanation(explanation, look_of(job), axis=job.axes[0], case=case)
    files: list[Path] = []
    for axis in job.axes:
        files += save_slices(folder / "slices" / name, review.along(axis, which))
    if not isinstance(job.slice, int):
        files += [
            save_montage(folder / f"montage_{name}.png", review),
            save_planes(folder / f"planes_{name}.png", review),
            save_profile(folder / f"profile_{name}.png", review),
        ]
    return files


def _write_cine(
    folder: Path, explanation: Explanation, name: str, job: Job, case: str
) -> list[Path]:
    review = review_explanation(
        explanation, look_of(job), axis=job.axes[0], slices="all", case=case
    )
    return [save_cine(folder / f"cine_{name}.webp", review)]


def _write_nrrd(
    folder: Path, explanation: Explanation, name: str, job: Job, case: str
) -> list[Path]:
    volume = explanation.volume(scale=look_of(job).scale).float().numpy()
    return [write_nrrd(folder / f"cam_{name}.nrrd", volume, explanation.affine)]


def _write_fused(
    folder: Path, explanation: Explanation, name: str, job: Job, case: str
) -> list[Path]:
    return [write_fused(folder / f"fused_{name}.nii.gz", explanation, look_of(job))]


#: Formats with files for each explanation, and formats with files that show all of them.
_SINGLE: dict[str, Callable[[Path, Explanation, str, Job, str], list[Path]]] = {
    "nifti": _write_nifti,
    "png": _write_png,
    "cine": _write_cine,
    "nrrd": _write_nrrd,
    "fused": _write_fused,
}
_JOINT: dict[str, Callable[[Path, Look, str], _Joint]] = {
    "html": lambda folder, look, case: Report(folder / "report.html", look, case),
    "slicer": lambda folder, look, case: SlicerScene(folder / "slicer", look, case),
    "dicom": lambda folder, look, case: DicomExport(folder / "dicom", look, case),
}


def check_slice(scan: Scan, job: Job) -> None:
    """Raise ConfigError early where the wanted slice lies outside of the scan."""
    if not isinstance(job.slice, int):
        return
    size = scan.shape[anatomical_axis(scan.affine, job.axes[0])]
    if not 0 <= job.slice < size:
        raise ConfigError(
            f"{job.axes[0]} slice {job.slice}: legal are 0 to {size - 1} for {scan.title}"
        )


def check_formats(scan: Scan, job: Job) -> None:
    """Raise ConfigError early where a format cannot be written for this scan."""
    if "dicom" in job.formats and scan.series is None:
        raise ConfigError(
            "format dicom: its objects belong to a patient and a study, which only a DICOM series "
            "names: give the series' folder as the scan, or leave this format out"
        )
