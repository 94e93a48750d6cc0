"""The settings of a job, which is one run of `seg3dcam explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, StrictInt, StrictStr, field_validator, model_validator

from seg3dcam.checks import Frame
from seg3dcam.geometry.planes import Axis
from seg3dcam.job.formats import FORMATS
from seg3dcam.settings import Settings
from seg3dcam.targets.named import REGIONS, SCORES

if TYPE_CHECKING:  # type checkers cannot read names from tables
    ScoreName = str
    RegionName = str
    FormatName = str
else:
    ScoreName = Literal[tuple(SCORES)]
    RegionName = Literal[tuple(REGIONS)]
    FormatName = Literal[tuple(FORMATS)]

#: A class by its name or index. Other values, such as true, are not turned into an index.
ClassName = StrictStr | StrictInt

#: Where cases go by default, each in a folder of its own.
OUT = "seg3dcam_out"

_DEFAULT_FORMATS = [name for name, format in FORMATS.items() if format.by_default]


def _listed(words: dict[str, str], default: str = "") -> str:
    """Return names with the words that say what they are, the default marked."""
    words = words | {default: "default"} if default else words
    return ", ".join(f"{name} ({said})" if said else name for name, said in words.items())


def _formats_in_words() -> str:
    more = ", ".join(name for name in FORMATS if name not in _DEFAULT_FORMATS)
    return f"{', '.join(_DEFAULT_FORMATS)} (these by default), {more}"


class Job(Settings):
    """One run of `seg3dcam explain`. The command has an option for every setting."""

    scan: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[dict[str, str], Field(min_length=1)]
    ) = Field(
        description="NIfTI file or folder of a DICOM series; several files are one scan's channels"
    )
    model: str = Field(
        description="a YAML file, bundle:DIR (a MONAI bundle) or nnunet:FOLDER (a trained nnU-Net)"
    )
    frame: Frame | None = Field(
        None,
        description="sform or qform: which says where a NIfTI scan lies; default: the sform if it "
        "has one",
    )
    set: dict[str, Any] = Field({}, description="value of a bundle's config by its id")
    target: list[ClassName] | ClassName | None = Field(
        None, description="class name or index; default: every predicted class"
    )
    score: ScoreName = Field(
        next(iter(SCORES)), description=_listed(dict.fromkeys(SCORES, ""), next(iter(SCORES)))
    )
    region: RegionName | None = Field(
        None,
        description="voxels that count: "
        + _listed({name: r.words for name, r in REGIONS.items()}, next(iter(REGIONS))),
    )
    against: ClassName | None = Field(None, description="the other class of --score contrast")
    truth: str | None = Field(
        None,
        description="label map on the scan's grid: drawn, measured; needed by "
        + ", ".join(name for name, s in (SCORES | REGIONS).items() if s.needs_truth),
    )
    label: int | None = Field(
        None, description="the class's label in the truth; default: its index"
    )
    min_voxels: int = Field(
        1, ge=1, description="leave out smaller components, in the network's voxels"
    )
    layer: list[str] | str = Field(
        "auto",
        description="target layer, also with *, all or auto (what `compare` recommends, else the "
        "bottleneck); default: auto",
    )
    method: list[str] | str = Field(
        "hires_cam",
        description="any that `seg3dcam methods` lists; default: what goes with auto, or hires_cam",
    )
    settings: dict[str, Any] = Field({}, description="one setting of the method")
    verdict: bool = Field(
        False,
        description="test every map by context deletion and random weights, which takes some tens "
        "of predictions each",
    )
    out: str | None = Field(
        None,
        min_length=1,
        description=f"output folder; default: one for the case in {OUT}",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 or mps")
    case: str | None = Field(
        None,
        max_length=200,
        description="the scan's name in pictures and reports; default: a code, no file name",
    )
    format: list[FormatName] = Field(
        _DEFAULT_FORMATS, description=f"what is written: {_formats_in_words()}"
    )
    axis: list[Axis] | None = Field(
        None,
        description="axial (default), coronal, sagittal: planes of the slices' PNGs, the first "
        "also of montage and film",
    )
    slice: int | Literal["all"] | None = Field(
        None,
        description="PNG of one slice only, by its voxel index along --axis (axial); or all: of "
        "every slice; default: those that matter",
    )
    intensity_window: str | tuple[float, float] | None = Field(
        None,
        description="grey values: 'soft tissue', lung, bone, brain, abdomen or WIDTH,LEVEL; "
        "default: soft tissue for a CT, else percentiles",
    )
    threshold: float = Field(0.2, ge=0, lt=1, description="CAM below is not drawn; default: 0.2")
    colormap: str | None = Field(
        None, description="any name of matplotlib or OpenCV; default: inferno"
    )
    signed: bool = Field(
        False, description="show evidence against the target too, in colours of its own"
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
        """The image keys of a bundle, one for each file of the scan; None where none are named."""
        return list(self.scan) if isinstance(self.scan, dict) else None

    @property
    def formats(self) -> list[FormatName]:
        """The formats to write, each once."""
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
    def region_name(self) -> str:
        """The region that is explained; the score's own one where the job names none."""
        return self.region or SCORES[self.score].default_region

    @property
    def layers(self) -> list[str] | str:
        """Target layers; one alone may be a word such as "auto"."""
        return (
            self.layer[0] if isinstance(self.layer, list) and len(self.layer) == 1 else self.layer
        )
