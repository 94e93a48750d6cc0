"""The writers of a case's formats; `seg3dcam.job.formats` says which is whose.

nifti   prediction.nii.gz              predicted labels (sigmoid: one file per class)
        cam_<target>.nii.gz            0 to 1: negative evidence cut, layers averaged. If
                                       the job is signed, -1 to 1 with nothing cut
        raw_<target>_<layer>.nii.gz    raw signed map of one layer
        region_<target>.nii.gz         the voxels that are explained, where they are not simply
                                       the prediction, such as one lesion
        truth_<target>.nii.gz          where the class really is, if that was given
png     slices/<target>/<plane>_*.png  scan beside overlay
        montage_<target>.png           the slices that matter
        planes_<target>.png            the three planes through the CAM's peak
        profile_<target>.png           CAM and prediction, slice by slice
html    report.html                    all targets, methods and layers, for any browser
slicer  slicer/scene.mrml              the same for 3D Slicer, with its files beside it
        slicer/case.mrb                the scene and its files in one
cine    cine_<target>.webp             a film through the slices
thumb   thumb_<target>.webp            a small picture of the slice through the peak
probability  probability_<class>.nii.gz   the network's probability of every class
nrrd    cam_<target>.nrrd              the CAM as in NIfTI
fused   fused_<target>.nii.gz          scan and CAM in colour, for viewers that cannot blend
dicom   dicom/                         Secondary Capture, Segmentation, Parametric Map

<target> is the explanation's name for files. The predicted labels belong to the scan, not to a
target: `write_prediction` writes them once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from seg3dcam.explaining.explanation import Explanation
from seg3dcam.export.dicom import DicomExport
from seg3dcam.export.fused import write_fused
from seg3dcam.export.probability import ProbabilityMaps
from seg3dcam.export.slicer import SlicerScene
from seg3dcam.files import unique_names
from seg3dcam.files.writers.nifti import write_nifti
from seg3dcam.files.writers.nrrd import write_nrrd
from seg3dcam.job.formats import FORMATS
from seg3dcam.job.keys import look_of
from seg3dcam.job.settings import Job
from seg3dcam.review import (
    Report,
    review_explanation,
    save_cine,
    save_montage,
    save_planes,
    save_profile,
    save_slices,
    save_thumbnail,
)
from seg3dcam.review.look import Look
from seg3dcam.review.writing import JointWriter
from seg3dcam.scan import Scan


def write_format(
    kind: str, folder: Path, explanation: Explanation, name: str, job: Job, case: str
) -> list[Path]:
    """Write one explanation's own files of a format, and return them.

    Args:
        kind: a format that is not joint.
        folder: gets the files.
        name: of the explanation in the names of files.
        case: the name under which the scan is shown.
    """
    write: Callable[..., list[Path]] = globals()[FORMATS[kind].writer]
    return write(folder, explanation, name, job, case)


def joint_writer(kind: str, folder: Path, look: Look, case: str) -> JointWriter:
    """Return what writes a joint format; arguments as those of `write_format`."""
    start: Callable[..., JointWriter] = globals()[FORMATS[kind].writer]
    return start(folder, look, case)


# ------------------------------------------------------------------- files of one explanation


def write_nifti_files(
    folder: Path, explanation: Explanation, name: str, job: Job, case: str
) -> list[Path]:
    """Write the CAM, the raw maps, and the region and truth where there are any."""
    return [
        explanation.save(folder / f"cam_{name}.nii.gz", scale=look_of(job).scale),
        *(
            explanation.save_raw(folder / file, layer)
            for layer, file in raw_files(explanation, name).items()
        ),
        *(
            _write_labels(folder / f"{kind}_{name}.nii.gz", mask.numpy(), explanation.scan, kind)
            for kind, mask in own_masks(explanation).items()
        ),
    ]


def write_png(folder: Path, explanation: Explanation, name: str, job: Job, case: str) -> list[Path]:
    """Write slices of every plane, and the overviews unless one slice alone is wanted."""
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


def write_film(
    folder: Path, explanation: Explanation, name: str, job: Job, case: str
) -> list[Path]:
    """Write a film through the slices."""
    review = review_explanation(
        explanation, look_of(job), axis=job.axes[0], slices="all", case=case
    )
    return [save_cine(folder / f"cine_{name}.webp", review)]


def write_thumbnail(
    folder: Path, explanation: Explanation, name: str, job: Job, case: str
) -> list[Path]:
    """Write a small picture of the slice through the peak."""
    review = review_explanation(explanation, look_of(job), axis=job.axes[0], case=case)
    return [save_thumbnail(folder / f"thumb_{name}.webp", review)]


def write_nrrd_file(
    folder: Path, explanation: Explanation, name: str, job: Job, case: str
) -> list[Path]:
    """Write the CAM as NRRD."""
    volume = explanation.volume(scale=look_of(job).scale).float().numpy()
    return [write_nrrd(folder / f"cam_{name}.nrrd", volume, explanation.affine)]


def write_fused_file(
    folder: Path, explanation: Explanation, name: str, job: Job, case: str
) -> list[Path]:
    """Write scan and CAM in colour."""
    return [write_fused(folder / f"fused_{name}.nii.gz", explanation, look_of(job))]


# ------------------------------------------------------------- files that show all explanations


def start_report(folder: Path, look: Look, case: str) -> Report:
    """Start the page for the browser."""
    return Report(folder / "report.html", look, case)


def start_scene(folder: Path, look: Look, case: str) -> SlicerScene:
    """Start the scene for 3D Slicer."""
    return SlicerScene(folder / "slicer", look, case)


def start_probability(folder: Path, look: Look, case: str) -> ProbabilityMaps:
    """Start the probabilities of the classes."""
    return ProbabilityMaps(folder)


def start_dicom(folder: Path, look: Look, case: str) -> DicomExport:
    """Start the DICOM objects."""
    return DicomExport(folder / "dicom", look, case)


# -------------------------------------------------------------------------- labels and masks


def raw_files(explanation: Explanation, name: str) -> dict[str, str]:
    """Return layer -> name of the file of its raw map."""
    layers = list(explanation.maps)
    return {
        layer: f"raw_{name}_{short}.nii.gz"
        for layer, short in zip(layers, unique_names(layers), strict=True)
    }


def own_masks(explanation: Explanation) -> dict[str, torch.Tensor]:
    """Return the masks that are an explanation's own, beside the predictions, by their kind."""
    masks = {"region": explanation.region, "truth": explanation.truth}
    return {kind: mask for kind, mask in masks.items() if mask is not None}


def write_prediction(folder: Path, explanation: Explanation) -> list[Path]:
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
