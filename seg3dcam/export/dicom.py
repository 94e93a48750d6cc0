"""Write explanations as DICOM objects in the patient's own study, beside the explained series.

    save_dicom("dicom", explanations, Look(window="lung"))

<name>_pictures/0001.dcm ..    Secondary Capture: slices in colour, for every viewer
<name>_map.dcm                 Parametric Map: the CAM in float32, 0 to 1, or -1 to 1 if signed
<name>_segments.dcm            Segmentation: the prediction, and the CAM above the threshold

All of them lie in the frame of reference of the source series and name its slices, so that a viewer
can link them. A viewer finds the frames by their positions. Pictures are not compressed, since
every viewer can read them then; a slice of 512 x 512 takes about 1.1 MB.

UIDs follow from the content. A second run with the same result gives the same objects, which the
archive has already. Another result gets other UIDs, since an archive ignores an object whose UID it
knows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from seg3dcam.cams.catalogue import CAMS
from seg3dcam.errors import tell
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.export.dicom_picture import (
    CAUTION,
    PicturePlan,
    draw_picture,
    masks_of,
    plan_picture,
    shown_words,
)
from seg3dcam.export.dicom_source import (
    check_installed,
    checked_series,
    decimals,
    make_uid,
    names_patient,
    one_line,
    references,
    save_object,
    source_item,
)
from seg3dcam.files import unique_names
from seg3dcam.review.look import Look
from seg3dcam.review.writing import write_all

__all__ = ["DicomExport", "save_dicom"]

_NAME = "seg3dcam"
#: DICOM's letters for the patient's sides, at the negative and positive ends of R, A and S.
_SIDES = (("L", "R"), ("P", "A"), ("F", "H"))

#: Series numbers stay below this, since whole numbers in DICOM have 32 bits.
_MOST = 2_000_000_000

Frames = NDArray[np.float32]
Masks = Mapping[str, NDArray[np.bool_]]


def save_dicom(
    folder: str | Path,
    explanations: Explanation | Iterable[Explanation],
    look: Look = Look(),  # noqa: B008 (frozen)
    *,
    case: str = "case",
) -> list[Path]:
    """Write explanations of a DICOM series as Secondary Capture, Parametric Map and Segmentation.

    If there are several layers, their mean is written, as given by `Explanation.volume`. If there
    is no heat, the pictures say so in words, and the segmentation holds only the prediction. A map
    of NaN or infinite values is not written. An empty region gives no segment, and without any
    segment no segmentation is written.

    Args:
        folder: created if it is missing.
        explanations: one or several explanations.
        look: window, threshold, opacity and colours of the pictures. The threshold is also that of
            the segment.
        case: the scan's name in the pictures.

    Returns:
        The files.

    Raises:
        ConfigError: the scan was not loaded from a DICOM series, or was changed afterwards.
        MissingExtraError: highdicom is not installed.
        OutputError: the folder cannot be written.

    Warns (`Seg3dcamWarning`) if a map or a segmentation is not written.
    """
    names: list[str] = []

    def file_name(explanation: Explanation) -> str:
        names.append(explanation.label)
        return unique_names(names)[-1]

    return write_all(DicomExport(folder, look, case), explanations, file_name)


class DicomExport:
    """Writes DICOM objects one explanation at a time; arguments are those of `save_dicom`."""

    def __init__(
        self,
        folder: str | Path,
        look: Look = Look(),  # noqa: B008 (frozen)
        case: str = "case",
    ) -> None:
        self._folder = Path(folder)
        self._look = look
        self._case = case
        self._count = 0
        self._files: list[Path] = []

    def add(self, explanation: Explanation, name: str) -> None:
        """Write the objects of one explanation; `name` becomes part of the file names."""
        check_installed()
        headers = checked_series(explanation)
        heat = _as_frames(explanation.volume(scale=self._look.scale).float().numpy())
        masks = {key: _as_frames(mask) for key, mask in masks_of(explanation).items()}
        plan = _plan(explanation, headers, heat, masks, self._look, self._case, self._count)
        self._files += _write_pictures(plan, heat, masks, self._folder / f"{name}_pictures")
        self._files += _write_map(plan, heat, self._folder / f"{name}_map.dcm")
        segments = _segments(plan, heat, masks)
        del heat, masks  # the next step needs the most memory
        self._files += _write_segments(plan, segments, self._folder / f"{name}_segments.dcm")
        self._count += 1

    def finish(self) -> list[Path]:
        """Return all files."""
        return self._files


# ---------------------------------------------------------------------------------------- plan


@dataclass(frozen=True, eq=False)
class _Plan:
    """What all objects of one explanation share.

    `content` is a hash of everything that they show. `names_patient` tells whether the case's name,
    which is in the pictures, contains the patient's name.
    """

    explanation: Explanation
    headers: Sequence[Any]
    references: Sequence[Any]
    picture: PicturePlan
    look: Look
    content: str
    series_number: int
    names_patient: bool

    @property
    def words(self) -> str:
        """What is shown, and if there is no heat, the reason."""
        notice = self.explanation.notice(scale=self.look.scale)
        shown = ", ".join(shown_words(self.explanation, self.look))
        return f"{shown}; {notice}" if notice else shown

    @property
    def meaning(self) -> str:
        """What the values of the map mean."""
        signs = "above 0 for the target, below 0 against it; " if self.look.signed else ""
        return f"{signs}relative, not a probability"

    def uid(self, *parts: object) -> str:
        return make_uid(self.content, *parts)

    def identity(self, kind: str, number: int) -> dict[str, Any]:
        """Return the arguments of highdicom that identify the only object of a series."""
        return {
            "series_instance_uid": self.uid(kind),
            "sop_instance_uid": self.uid(kind, 0),
            "series_number": self.series_number + number,
            "instance_number": 1,
            "series_description": self.description(kind),
            "manufacturer": _NAME,
            "manufacturer_model_name": _NAME,
            "software_versions": version(_NAME),
        }

    def description(self, kind: str) -> str:
        return one_line(f"research CAM {kind}: {self.words}")


def _plan(
    explanation: Explanation,
    headers: Sequence[Any],
    heat: Frames,
    masks: Masks,
    look: Look,
    case: str,
    count: int,
) -> _Plan:
    picture = plan_picture(explanation, look, case)
    digest = hashlib.sha256(heat.data)
    for mask in masks.values():
        digest.update(mask.data)
    digest.update(picture.blank.data)  # with all the words in it
    shown = (headers[0].SeriesInstanceUID, version(_NAME), look, list(masks), explanation.target)
    digest.update(repr(shown).encode())
    return _Plan(
        explanation=explanation,
        headers=headers,
        references=references(headers, explanation.scan.spacing[2]),
        picture=picture,
        look=look,
        content=digest.hexdigest(),
        series_number=(100 * int(headers[0].get("SeriesNumber") or 0) + 3 * count) % _MOST + 1,
        names_patient=names_patient(case, headers[0]),
    )


def _as_frames(volume: NDArray[Any]) -> NDArray[Any]:
    """Turn (columns, rows, slices) into contiguous (slices, rows, columns)."""
    return np.ascontiguousarray(volume.T)


# ---------------------------------------------------------------------------- Secondary Capture


def _write_pictures(plan: _Plan, heat: Frames, masks: Masks, folder: Path) -> list[Path]:
    """Write one picture per slice."""
    scan = plan.explanation.scan.data[0].numpy()
    silent = bool(plan.explanation.notice(scale=plan.look.scale))
    files = []
    for k, header in enumerate(plan.headers):
        picture = draw_picture(
            plan.picture,
            scan[:, :, k].T,
            None if silent else heat[k],
            {name: mask[k] for name, mask in masks.items()},
            f"slice {k + 1}/{len(plan.headers)}",
        )
        image = _capture(plan, picture, k)
        files.append(save_object(image, header, folder / f"{k + 1:04d}.dcm"))
    return files


def _capture(plan: _Plan, picture: NDArray[np.uint8], k: int) -> Any:
    from highdicom.sc import SCImage

    header = plan.headers[k]
    right, down = nib.aff2axcodes(plan.explanation.affine, _SIDES)[:2]
    image = SCImage(
        pixel_array=picture,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=(right, down),
        study_instance_uid=header.StudyInstanceUID,
        **{
            **plan.identity("pictures", 0),
            "sop_instance_uid": plan.uid("pictures", k),
            "instance_number": k + 1,
        },
    )
    _place(plan, image, header)
    image.ImageType = ["DERIVED", "SECONDARY"]
    image.ConversionType = "WSD"  # made by a workstation
    image.BurnedInAnnotation = "YES" if plan.names_patient else "NO"
    image.DerivationDescription = one_line(f"{plan.words}. {CAUTION}", 1024)
    image.SourceImageSequence = [source_item(header)]
    return image


def _place(plan: _Plan, image: Any, header: Any) -> None:
    """Set the place of a picture, whose first pixel is in the margin, outside of the slice."""
    position = np.array(header.ImagePositionPatient, np.float64)
    right, down = np.array(header.ImageOrientationPatient, np.float64).reshape(2, 3)
    down_mm, right_mm = (float(step) for step in header.PixelSpacing)
    column, row = plan.picture.corner
    corner = position + right * right_mm * column + down * down_mm * row
    zoom = plan.picture.zoom
    image.ImagePositionPatient = decimals(corner)
    image.ImageOrientationPatient = header.ImageOrientationPatient
    image.PixelSpacing = decimals([down_mm / zoom, right_mm / zoom])
    image.FrameOfReferenceUID = plan.references[0].FrameOfReferenceUID
    image.PositionReferenceIndicator = header.get("PositionReferenceIndicator")


# ------------------------------------------------------------------------------- Parametric Map


def _write_map(plan: _Plan, heat: Frames, path: Path) -> list[Path]:
    """Write the CAM itself, unless it holds values that are not finite."""
    if "nonfinite" in plan.explanation.status.values():
        tell(f"no DICOM Parametric Map was written: {plan.explanation.notice()}")
        return []
    from highdicom import VOILUTTransformation
    from highdicom.pm import ParametricMap, RealWorldValueMapping
    from pydicom.sr.codedict import codes

    is_cam = plan.explanation.method in CAMS
    low, high = plan.look.ends
    mapping = RealWorldValueMapping(
        lut_label="CAM",
        lut_explanation=one_line(f"{plan.meaning}: {plan.words}"),
        unit=codes.UCUM.NoUnits,
        value_range=(low, high),
        slope=1.0,
        intercept=0.0,
        quantity_definition=codes.DCM.ClassActivation if is_cam else codes.DCM.Saliency,
    )
    image = ParametricMap(
        source_images=plan.references,
        pixel_array=heat,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[
            VOILUTTransformation(window_center=(low + high) / 2, window_width=high - low)
        ],
        content_label="CAM",
        content_description=one_line(plan.words),
        device_serial_number="none",
        **plan.identity("map", 1),
    )
    return [save_object(image, plan.headers[0], path)]


# --------------------------------------------------------------------------------- Segmentation


def _segments(plan: _Plan, heat: Frames, masks: Masks) -> dict[str, NDArray[np.bool_]]:
    """Return the segments that are not empty: prediction or explained region, and CAM."""
    found = {name: mask for name, mask in masks.items() if name != "truth"}
    if not plan.explanation.notice(scale=plan.look.scale):
        found["CAM"] = (heat >= plan.look.threshold) & (heat > 0)
    return {name: mask for name, mask in found.items() if mask.any()}


def _write_segments(plan: _Plan, segments: Masks, path: Path) -> list[Path]:
    """Write the segmentation of those slices that hold a segment."""
    if not segments:
        tell(
            "no DICOM Segmentation was written: the prediction is empty, and no CAM reaches the "
            "threshold"
        )
        return []
    from highdicom.seg import Segmentation

    of_each = np.stack([mask.any(axis=(1, 2)) for mask in segments.values()])
    filled = np.flatnonzero(of_each.any(axis=0)).tolist()
    image = Segmentation(
        source_images=[plan.references[k] for k in filled],
        pixel_array=np.stack([mask[filled] for mask in segments.values()], axis=-1),
        segmentation_type="BINARY",
        segment_descriptions=_described(plan, list(segments)),
        content_label="CAM",
        content_description=one_line(plan.words),
        device_serial_number="none",
        **plan.identity("segments", 2),
    )
    return [save_object(image, plan.headers[0], path)]


def _described(plan: _Plan, names: Sequence[str]) -> list[Any]:
    """Describe what each segment shows and which algorithm made it."""
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes

    explanation = plan.explanation
    shown = explanation.class_name
    weights = explanation.origin.model.weights_sha256
    #: Name -> label, and the algorithm's name and version.
    table = {
        "prediction": (f"prediction: {shown}", "segmentation network", str(weights)),
        "explained region": (f"explained region: {shown}", _NAME, version(_NAME)),
        "CAM": (
            f"CAM from {plan.look.threshold:.2f}: {shown}",
            f"{_NAME} {explanation.method}",
            version(_NAME),
        ),
    }
    found = []
    for number, name in enumerate(names, start=1):
        label, algorithm, release = table[name]
        made_by = AlgorithmIdentificationSequence(
            name=one_line(algorithm),
            family=codes.DCM.ArtificialIntelligence,
            version=one_line(release),
        )
        described = SegmentDescription(
            segment_number=number,
            segment_label=one_line(label),
            segmented_property_category=codes.SCT.SpatialAndRelationalConcept,
            segmented_property_type=codes.NCIt.ImagingRegionOfInterest,
            algorithm_type="AUTOMATIC",
            algorithm_identification=made_by,
        )
        found.append(described)
    return found
