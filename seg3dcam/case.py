"""A case on disk: everything that one scan's explanation leaves behind, in one folder.

nifti   prediction.nii.gz              predicted labels (sigmoid: one file per class)
        cam_<target>.nii.gz            0 to 1: negative evidence cut, layers averaged; of a
                                       signed job -1 to 1: nothing cut
        raw_<target>_<layer>.nii.gz    raw signed map of one layer
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
says which name is whose. No file's name
or content tells the scan's own file name, which may be a patient's: see `Job.case`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from seg3dcam.config import Job
from seg3dcam.engine.passes import Progress, silent
from seg3dcam.errors import ConfigError
from seg3dcam.explanation import Explanation, anatomical_axis
from seg3dcam.export.dicom import DicomExport
from seg3dcam.export.fused import write_fused
from seg3dcam.export.nifti import write_nifti
from seg3dcam.export.nrrd import write_nrrd
from seg3dcam.export.slicer import SlicerScene
from seg3dcam.files import check_writable, unique_names, write_json
from seg3dcam.findings import findings
from seg3dcam.look import Look
from seg3dcam.models import SegModel
from seg3dcam.review import (
    Report,
    review_explanation,
    save_cine,
    save_montage,
    save_planes,
    save_profile,
    save_slices,
)
from seg3dcam.scan import Scan

#: Settings that do not change what is written.
_WHERE = {"scan", "model", "out", "device", "truth"}


def scan_code(scan: Scan) -> str:
    """Return a hash of the scan's voxels and place."""
    digest = hashlib.sha256(np.ascontiguousarray(scan.data.numpy()).data)
    digest.update(np.ascontiguousarray(scan.affine).data)
    return digest.hexdigest()


def case_name(scan: Scan, job: Job) -> str:
    """Return the scan's name for everybody's eyes: what the job says, else a code."""
    return job.case or f"scan {scan_code(scan)[:8]}"


def case_key(scan: Scan, model: SegModel, job: Job) -> str:
    """Return a hash of scan, weights and settings: same key, same results."""
    digest = hashlib.sha256(scan_code(scan).encode())
    if job.truth is not None:
        digest.update(Path(job.truth).read_bytes())
    use = [
        model.name,
        model.fingerprint(),
        list(model.class_names),
        model.activation,
        model.spec,
        version("seg3dcam"),
        repr(model.window),
        str(model.output),
        _settings(job),
    ]
    digest.update(json.dumps(use, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _settings(job: Job) -> dict[str, Any]:
    """Return what decides on the results, with the colours that are drawn."""
    settings = {k: v for k, v in job.model_dump().items() if k not in _WHERE}
    return settings | {"colormap": look_of(job).colormap}


def is_done(folder: str | Path, key: str) -> bool:
    """Tell whether a folder holds a complete case with this key."""
    record = _record(Path(folder))
    files = record.get("files", [])
    return record.get("key") == key and all((Path(folder) / name).is_file() for name in files)


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
    key: str = "",
    progress: Progress = silent,
) -> Mapping[str, Any]:
    """Write a case; what an earlier run of the same folder left is replaced.

    Args:
        progress: called with (step, done, total) before each format is written.

    Returns:
        what `case.json` holds.

    Raises:
        OutputError: the folder cannot be written; `case.json` is then absent.
    """
    folder = Path(folder)
    check_writable(folder)
    _remove_earlier(folder)
    files: list[Path] = []
    cases: list[dict[str, Any]] = []
    names: list[str] = []
    joint: dict[str, _Joint] = {}
    case = ""
    for explanation in explanations:
        if not cases:
            case = case_name(explanation.scan, job)
            joint = {f: _JOINT[f](folder, look_of(job), case) for f in job.formats if f in _JOINT}
            if "nifti" in job.formats:
                files += _write_prediction(folder, explanation)
        several = len(job.methods) > 1
        names.append(f"{explanation.label} {explanation.method}" if several else explanation.label)
        name = unique_names(names)[-1]
        for number, kind in enumerate(job.formats):
            progress(f"writing {name}: {kind}", number, len(job.formats))
            if kind in _SINGLE:
                files += _SINGLE[kind](folder, explanation, name, job, case)
            if kind in joint:
                joint[kind].add(explanation, name)
        figures = findings(explanation, scale=look_of(job).scale)
        cases.append(
            {"label": explanation.label, "name": name, **explanation.provenance, "found": figures}
        )
    for number, (last, writer) in enumerate(joint.items()):
        progress(f"writing {last}", number, len(joint))
        files += writer.finish()
    record = {
        "seg3dcam": version("seg3dcam"),
        "case": case,
        "key": key,
        "job": _settings(job),
        "files": [str(file.relative_to(folder)) for file in dict.fromkeys(files)],
        "explanations": cases,
    }
    write_json(folder / "case.json", record)
    return record


def _write_nifti(
    folder: Path, explanation: Explanation, name: str, job: Job, case: str
) -> list[Path]:
    layers = unique_names(list(explanation.maps))
    return [
        explanation.save(folder / f"cam_{name}.nii.gz", scale=look_of(job).scale),
        *(
            explanation.save_raw(folder / f"raw_{name}_{short}.nii.gz", layer)
            for short, layer in zip(layers, explanation.maps, strict=True)
        ),
    ]


def _write_prediction(folder: Path, explanation: Explanation) -> list[Path]:
    """Write labels where classes exclude each other, one mask per class where they may overlap."""
    masks, scan = explanation.prediction.numpy(), explanation.scan
    if not explanation.has_background and len(masks) > 1:
        names = unique_names(explanation.class_names)
        volumes = {f"prediction_{n}": m.astype(np.uint8) for n, m in zip(names, masks, strict=True)}
    else:
        values = np.arange(len(masks)) if len(masks) > 1 else np.ones(1)
        labels = np.zeros(scan.shape, dtype=np.uint8 if len(masks) < 256 else np.int16)
        for value, mask in zip(values, masks, strict=True):
            labels[mask] = value
        volumes = {"prediction": labels}
    return [
        write_nifti(
            folder / f"{name}.nii.gz",
            volume,
            scan.affine,
            reference=scan.header,
            intent_name=name,
            dtype=volume.dtype,
        )
        for name, volume in volumes.items()
    ]


def _write_png(
    folder: Path, explanation: Explanation, name: str, job: Job, case: str
) -> list[Path]:
    which: Literal["relevant"] | int = "relevant" if job.slice is None else job.slice
    first, *others = job.axes
    review = review_explanation(explanation, look_of(job), axis=first, slices=which, case=case)
    files = save_slices(folder / "slices" / name, review)
    for axis in others:
        files += save_slices(folder / "slices" / name, review.along(axis, which))
    if job.slice is None:
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
    if job.slice is None:
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


def look_of(job: Job) -> Look:
    """Return how scan and CAM are shown; ConfigError where that is illegal."""
    colormap = "" if job.colormap is None else job.colormap
    return Look(job.intensity_window, job.threshold, colormap=colormap, signed=job.signed)


def _record(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def _remove_earlier(folder: Path) -> None:
    """Remove what an earlier case.json lists, and it first: a run that dies leaves none."""
    record = _record(folder)
    files = record.get("files") if "seg3dcam" in record else None  # else it is somebody else's
    listed = [str(name) for name in files] if isinstance(files, list) else []
    (folder / "case.json").unlink(missing_ok=True)
    for name in listed:
        file = folder / name
        if file.resolve().is_relative_to(folder.resolve()) and file.is_file():
            file.unlink()
            for parent in file.relative_to(folder).parents[:-1]:
                with suppress(OSError):  # not empty: it holds a file of somebody else's
                    (folder / parent).rmdir()
