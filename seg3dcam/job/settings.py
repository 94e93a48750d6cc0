"""What one run of `seg3dcam explain` is asked for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from seg3dcam.models.specs import (
    ClassName,
)
from seg3dcam.settings import Settings
from seg3dcam.settings import read_json as read_json
from seg3dcam.settings import read_yaml as read_yaml

Score = Literal["log_odds", "logit", "probability", "contrast", "finer", "soft_dice", "mask_output"]

RegionName = Literal[
    "predicted",
    "volume",
    "boundary",
    "components",
    "false_negatives",
    "false_positives",
    "true_positives",
]


Format = Literal["nifti", "png", "cine", "html", "slicer", "nrrd", "fused", "dicom"]

Axis = Literal["axial", "coronal", "sagittal"]


class Job(Settings):
    """One run of `seg3dcam explain`; the command line's options override it."""

    scan: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[dict[str, str], Field(min_length=1)]
    ) = Field(description="a file or folder; one file per channel; or image key: file of a bundle")
    frame: Literal["sform", "qform"] | None = Field(
        None,
        description="which form of a NIfTI header says where scan and truth lie; none: the sform "
        "if there is one",
    )
    model: str = Field(description="a YAML file, bundle:DIR or nnunet:FOLDER")
    set: dict[str, Any] = Field(
        {}, description="values of a bundle's config by their ids, such as inferer#overlap: 0.5"
    )
    out: str | None = Field(
        None, min_length=1, description="a folder; none: one for the case in seg3dcam_out"
    )
    target: list[ClassName] | ClassName | None = Field(
        None, description="class names or indices; none explains every predicted class"
    )
    score: Score = "log_odds"
    region: RegionName | None = Field(
        None, description="voxels that the score sums over; none: the score's own"
    )
    against: ClassName | None = Field(None, description="the other class of score contrast")
    truth: str | None = Field(
        None, description="label map on the scan's grid, a NIfTI file: drawn and measured"
    )
    label: int | None = Field(None, description="the class's label in the truth; none: its index")
    min_voxels: int = Field(1, ge=1, description="of a component, in the network's voxels")
    layer: list[str] | str = "auto"
    method: list[str] | str = "hires_cam"
    settings: dict[str, Any] = Field({}, description="of the method, such as window: 4 of xres_cam")
    device: str = "auto"
    case: str | None = Field(
        None,
        max_length=200,
        description="the scan's name in pictures, reports and case.json; none: a code made of its "
        "voxels, since the name of a file may name the patient",
    )
    format: list[Format] = Field(
        ["nifti", "png", "html", "slicer"], description="what is written; see `seg3dcam.job.case`"
    )
    axis: list[Axis] | None = Field(
        None, description="planes of the slices' pictures, each with its own; none: axial"
    )
    slice: int | Literal["all"] | None = Field(
        None, description="one slice alone, by its voxel index, or all; none: those that matter"
    )
    intensity_window: str | tuple[float, float] | None = Field(
        None, description="a preset such as 'soft tissue', or [width, level]; none: by the scan"
    )
    threshold: float = Field(0.2, ge=0, lt=1)
    colormap: str | None = Field(
        None, description="of matplotlib or OpenCV; none: inferno, or blue_orange where signed"
    )
    signed: bool = Field(
        False, description="show evidence against the target too, in every format, from -1 to 1"
    )

    @field_validator("target", "layer", "method", "format", "axis", mode="before")
    @classmethod
    def _not_none_at_all(cls, given: Any) -> Any:
        if isinstance(given, list) and not given:
            raise ValueError("an empty list: name one or more, or leave the key out")
        return given

    @field_validator("format", "axis", mode="before")
    @classmethod
    def _one_alone(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_plane_of_one_slice(self) -> Job:
        if isinstance(self.slice, int) and len(self.axes) > 1:
            raise ValueError(f"slice {self.slice} is one of a plane: give one axis, such as axial")
        return self

    @property
    def scans(self) -> list[str]:
        """The scan's files, or its folder, in the order of the channels."""
        if isinstance(self.scan, str):
            return [self.scan]
        return list(self.scan.values() if isinstance(self.scan, dict) else self.scan)

    @property
    def image_keys(self) -> list[str] | None:
        """The image keys of a bundle that the scan's files are for, None where none are named."""
        return list(self.scan) if isinstance(self.scan, dict) else None

    @property
    def formats(self) -> list[Format]:
        """What is written, each once."""
        return list(dict.fromkeys(self.format))

    @property
    def axes(self) -> list[Axis]:
        """The planes of the pictures, each once."""
        return list(dict.fromkeys(self.axis or ["axial"]))

    @property
    def methods(self) -> list[str]:
        """The methods' keys, each once."""
        given = [self.method] if isinstance(self.method, str) else self.method
        return list(dict.fromkeys(given))

    @property
    def layers(self) -> list[str] | str:
        """Target layers; one alone may be a word such as "auto"."""
        return (
            self.layer[0] if isinstance(self.layer, list) and len(self.layer) == 1 else self.layer
        )
