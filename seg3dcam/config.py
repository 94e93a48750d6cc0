"""Settings from YAML, validated: the model spec and the job.

An unknown key is an error that names the nearest legal one. Paths in a file are relative to it.
"""

from __future__ import annotations

import re
import reprlib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from seg3dcam.documents import read_json as read_json
from seg3dcam.documents import read_yaml as read_yaml
from seg3dcam.errors import ConfigError, InputError, nearest
from seg3dcam.windows import WindowPlan


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Intensity(_Settings):
    """How intensities are brought to the network's range; exactly one key."""

    range: tuple[FiniteFloat, FiniteFloat] | None = Field(
        None, description="these two values become 0 and 1, clipped (CT: Hounsfield units)"
    )
    percentiles: tuple[float, float] | None = Field(
        None, description="these two percentiles of each channel become 0 and 1, clipped (MR)"
    )
    zscore: Literal["all", "nonzero"] | None = Field(
        None, description="mean 0, deviation 1 of each channel, over all or the nonzero voxels"
    )

    @model_validator(mode="after")
    def _one_key(self) -> Intensity:
        given = [key for key in type(self).model_fields if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of range, percentiles, zscore; got {given}")
        bounds = self.range or self.percentiles
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError(f"the lower bound must be below the upper one; got {list(bounds)}")
        if self.percentiles and not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles lie between 0 and 100; got {list(self.percentiles)}")
        return self


Step = Annotated[float, Field(ge=0.01, allow_inf_nan=False)]

#: Voxels along an axis, at most: as many as a NIfTI-1 header can count.
MOST_VOXELS = 32767

#: A class by its name or index; nothing else is taken for one, such as true for 1.
ClassName = StrictStr | StrictInt


class Prepare(_Settings):
    """What is done to a scan before the network sees it, in this order."""

    orientation: str | None = Field(None, description="axis codes: RAS")
    spacing: tuple[Step, Step, Step] | None = Field(None, description="mm per voxel")
    intensity: Intensity | None = None
    crop_foreground: bool = Field(False, description="crop to the voxels above 0")
    pad_divisible: int | None = Field(
        None, ge=1, le=1024, description="pad every axis to a multiple"
    )

    @field_validator("orientation")
    @classmethod
    def _three_axes(cls, codes: str | None) -> str | None:
        axes = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
        if codes is not None and (len(codes) != 3 or {axes.get(c) for c in codes} != {0, 1, 2}):
            raise ValueError("one letter each of R or L, A or P, S or I, such as RAS")
        return codes


class Window(_Settings):
    """The sliding window; see `WindowPlan`."""

    roi_size: int | tuple[int, ...]
    overlap: float = Field(0.25, ge=0, lt=1)
    mode: Literal["gaussian", "constant"] = "gaussian"
    sw_batch_size: int = Field(1, ge=1)
    sigma_scale: FiniteFloat = Field(0.125, gt=0)
    padding_mode: Literal["constant", "reflect", "replicate", "circular"] = "constant"
    cval: FiniteFloat = 0.0
    cache_gb: float = Field(2.0, ge=0, description="activations kept between the two passes")
    convention: Literal["monai", "nnunet"] = Field("monai", description="whose places and gaussian")

    @field_validator("roi_size")
    @classmethod
    def _voxels(cls, size: int | tuple[int, ...]) -> int | tuple[int, ...]:
        sizes = (size,) if isinstance(size, int) else size
        if any((n < 1 and n != -1) or n > MOST_VOXELS for n in sizes):
            raise ValueError(f"voxels from 1 to {MOST_VOXELS}, or -1 for a whole axis")
        return size

    def plan(self) -> WindowPlan:
        """Return the window plan."""
        return WindowPlan(**self.model_dump())


class ModelSpec(_Settings):
    """A network made by a Python factory, with its weights and how it is used."""

    factory: str = Field(pattern=r"^\w+(\.\w+)*:\w+(\.\w+)*$", description="package.module:Class")
    arguments: dict[str, Any] = {}
    weights: str = Field(description=".safetensors, a PyTorch state dict, or 'random'")
    classes: list[str] = Field(min_length=1, description="one name per output channel")
    activation: Literal["softmax", "sigmoid"] = "softmax"
    prepare: Prepare = Field(default_factory=Prepare)
    window: Window | None = None
    output: int | str | None = None

    @field_validator("classes")
    @classmethod
    def _different(cls, classes: list[str]) -> list[str]:
        twice = sorted({name for name in classes if classes.count(name) > 1})
        if twice:
            raise ValueError(f"every class needs a name of its own; {twice} is there twice")
        return classes


class BundleSpec(_Settings):
    """A MONAI bundle; everything is read from its own config and metadata."""

    bundle: str = Field(min_length=1, description="the bundle's folder")
    config: str | None = Field(
        None, description="inference config in the folder; none: configs/inference.json or .yaml"
    )
    inputs: list[str] | None = Field(
        None, description="image keys in the order of the scan's channels; none: the only one"
    )
    classes: list[str] | None = Field(
        None, description="one name per output channel; none: the metadata's"
    )
    set: dict[str, Any] = Field(
        {}, description="values of the config by their ids, such as inferer#roi_size: [64, 64, 64]"
    )


class NnunetSpec(_Settings):
    """A trained nnU-Net v2 model folder; everything is read from its plans and dataset.json."""

    nnunet: str = Field(min_length=1, description="the folder <trainer>__<plans>__<configuration>")
    folds: list[int | Literal["all"]] | None = Field(
        None, min_length=1, description="none: every fold that has the checkpoint"
    )
    checkpoint: str = "checkpoint_final.pth"
    tile_step_size: float = Field(0.5, gt=0, le=1, description="nnU-Net's own name and default")
    mirroring: bool = Field(True, description="average over the flips of the training, if any")


class ExportedSpec(_Settings):
    """A network exported by `torch.export`, and how it is used."""

    exported: str = Field(min_length=1, description="the .pt2 file")
    classes: list[str] = Field(min_length=1, description="one name per output channel")
    activation: Literal["softmax", "sigmoid"] = "softmax"
    prepare: Prepare = Field(default_factory=Prepare)
    window: Window | None = None
    output: int | str | None = None


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


class Job(_Settings):
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
        ["nifti", "png", "html", "slicer"], description="what is written; see `seg3dcam.case`"
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


Settings = TypeVar("Settings", bound=BaseModel)

#: Problems that one message names.
_MOST_PROBLEMS = 12

#: Shortens a value for a message.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def validate(
    content: dict[str, Any],
    kind: type[Settings],
    source: str,
    error_class: type[InputError] = ConfigError,
) -> Settings:
    """Return validated settings.

    Args:
        source: the file's name, for messages.
        error_class: what is raised.

    Raises:
        ConfigError: every problem in one message, an unknown key with the nearest legal ones.

    >>> validate({"roi_siz": 96}, Window, "model.yaml")
    Traceback (most recent call last):
        ...
    seg3dcam.errors.ConfigError: model.yaml:
      roi_siz: unknown key, did you mean 'roi_size'?
      roi_size: missing
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        found = error.errors()
        problems = sorted({_problem(kind, detail) for detail in found[:_MOST_PROBLEMS]})
        more = len(found) - _MOST_PROBLEMS
        shown = problems + ([f"and {more} more"] if more > 0 else [])
        raise error_class(f"{source}:\n  " + "\n  ".join(shown)) from None


def _problem(kind: type[BaseModel], detail: Any) -> str:
    place = _place(kind, detail["loc"])
    where = ".".join(map(str, place)) or "settings"
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key, {nearest(str(detail['loc'][-1]), _keys(kind, place[:-1]))}"
    if detail["type"] == "missing":
        return f"{where}: missing"
    given = detail["input"]
    shown = "" if isinstance(given, dict) else f", got {_shown(given)}"
    return f"{where}: {detail['msg'].removeprefix('Value error, ')}{shown}"


def _shown(value: Any) -> str:
    """Return a short description of a value, whatever it is."""
    if not isinstance(value, str | int | float | list | tuple | None):
        return type(value).__name__
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        return "a number of thousands of digits"


def _place(kind: type[BaseModel], location: tuple[Any, ...]) -> list[Any]:
    """Return a location without pydantic's names for the members of a union."""
    place: list[Any] = []
    for part in location:
        of_union = re.fullmatch(r"str|int|float|constrained-\w+|[\w-]+\[.*\]", str(part))
        if isinstance(part, int) or part in _keys(kind, place) or not of_union:
            place.append(part)
    return place


def _keys(kind: type[BaseModel], path: list[Any]) -> list[str]:
    """Return the legal keys at a place in the settings."""
    for part in path:
        annotation = kind.model_fields[part].annotation if part in kind.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not inner:
            return []
        kind = inner[0]
    return list(kind.model_fields)
