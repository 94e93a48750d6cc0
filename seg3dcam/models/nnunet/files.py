"""What a trained nnU-Net v2 folder holds: which files, and what of them is legal.

Everything in these files is a stranger's. Each kind of file is read at one place, is checked
against a schema there, and only what has passed goes on to nnU-Net's own code.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

from seg3dcam.errors import ConfigError, ModelError, nearest, tell
from seg3dcam.models.specs import NnunetSpec
from seg3dcam.models.state import tensor_fault
from seg3dcam.settings import read_json, validate

#: Readers of 3-D files -> the library that says the voxel size, and whether the reader turns the
#: scan to RAS first.
READERS: dict[str, tuple[Literal["itk", "nibabel"], bool]] = {
    "SimpleITKIO": ("itk", False),
    "NibabelIO": ("nibabel", False),
    "SimpleITKIOWithReorient": ("itk", True),
    "NibabelIOWithReorient": ("nibabel", True),
}

#: A number in a network's arguments that is larger asks for what no computer holds.
_MOST = 8192


# ---------------------------------------------------------------- schemas


class _Foreign(BaseModel):
    """A stranger's content: keys that are not named here are nnU-Net's own affair."""

    model_config = ConfigDict(
        extra="allow", frozen=True, arbitrary_types_allowed=True, serialize_by_alias=True
    )


def _plain(value: Any) -> Any:
    """Return a number of numpy's, as which a checkpoint may hold it, as one of Python's."""
    return value.item() if isinstance(value, np.generic) else value


Voxels = Annotated[StrictInt, Field(ge=1, le=2**16)]
Mm = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Axis = Annotated[StrictInt, Field(ge=0, le=2)]
Label = Annotated[StrictInt, Field(ge=0, lt=2**15)]
Order = Annotated[StrictInt, Field(ge=0, le=5)]
Count = Annotated[StrictInt, Field(ge=1, le=_MOST)]

#: A class or function that nnU-Net finds by its name alone.
Name = Annotated[str, Field(pattern=r"^[A-Za-z]\w*$", max_length=200)]

#: A class by its module's full name.
ClassPath = Annotated[str, Field(pattern=r"^[A-Za-z]\w*(\.[A-Za-z_]\w*)+$", max_length=400)]


class _Resampling(_Foreign):
    """Arguments of a resampling function; what is not named here depends on the function."""

    is_seg: StrictBool = False
    order: Order = 3
    order_z: Order = 0
    force_separate_z: StrictBool | None = None
    num_threads: Annotated[StrictInt, Field(ge=1, le=128)] = 4


class _Architecture(_Foreign):
    """A network by its class, and its arguments, some of which are classes too."""

    network_class_name: ClassPath
    arch_kwargs: dict[str, Any]
    requires_import: list[str] = Field(alias="_kw_requires_import")

    @model_validator(mode="after")
    def _classes_are_named(self) -> _Architecture:
        for key in self.requires_import:
            if key not in self.arch_kwargs:
                raise ValueError(f"_kw_requires_import names {key!r}, which arch_kwargs lacks")
            if not isinstance(self.arch_kwargs[key], str | None):
                raise ValueError(f"arch_kwargs.{key} is to be imported, so it must be a class name")
        return self

    @field_validator("arch_kwargs")
    @classmethod
    def _within_reason(cls, given: dict[str, Any]) -> dict[str, Any]:
        inner: list[Any] = [given]
        for value in inner:
            if isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
            elif isinstance(value, int | float) and not abs(value) <= _MOST:
                raise ValueError(f"no number of a network is beyond {_MOST}")
        return given


class Configuration(_Foreign):
    """One entry of the configurations in plans.json, with what it inherits."""

    patch_size: list[Voxels] = Field(min_length=2, max_length=3)
    spacing: list[Mm] = Field(min_length=2, max_length=3)
    preprocessor_name: Name
    normalization_schemes: list[Name] = Field(min_length=1)
    use_mask_for_norm: list[StrictBool] = Field(min_length=1)
    resampling_fn_data: Name
    resampling_fn_data_kwargs: _Resampling
    resampling_fn_seg: Name
    resampling_fn_seg_kwargs: _Resampling
    resampling_fn_probabilities: Name
    resampling_fn_probabilities_kwargs: _Resampling
    previous_stage: StrictStr | None = None

    @model_validator(mode="after")
    def _as_many_axes(self) -> Configuration:
        if len(self.spacing) < len(self.patch_size):
            raise ValueError(
                f"patch_size has {len(self.patch_size)} axes, spacing {len(self.spacing)}"
            )
        return self


class _PlannedConfiguration(Configuration):
    """Since nnU-Net 2.5."""

    architecture: _Architecture

    @model_validator(mode="after")
    def _one_number_for_each_axis(self) -> _PlannedConfiguration:
        axes = len(self.patch_size)
        for key in ("kernel_sizes", "strides"):
            stages = self.architecture.arch_kwargs.get(key)
            for stage in stages if isinstance(stages, list) else ():
                if isinstance(stage, list) and len(stage) != axes:
                    raise ValueError(
                        f"architecture.arch_kwargs.{key}: {stage} must have {axes} numbers, as "
                        "patch_size has"
                    )
        return self


class _OldConfiguration(Configuration):
    """Before nnU-Net 2.5: a U-Net by keys of its own."""

    UNet_class_name: Literal["PlainConvUNet", "ResidualEncoderUNet"]
    UNet_base_num_features: Count
    unet_max_num_features: Count
    n_conv_per_stage_encoder: list[Count] = Field(min_length=1)
    n_conv_per_stage_decoder: list[Count]
    num_pool_per_axis: list[StrictInt]
    pool_op_kernel_sizes: list[list[Count]]
    conv_kernel_sizes: list[list[Count]]


class Plans(_Foreign):
    """plans.json; of its configurations only the one that is used is looked at."""

    dataset_name: StrictStr
    plans_name: StrictStr
    image_reader_writer: StrictStr
    transpose_forward: list[Axis]
    transpose_backward: list[Axis]
    configurations: dict[str, dict[str, Any]]
    label_manager: Name = "LabelManager"
    foreground_intensity_properties_per_channel: dict[str, dict[str, Any]] | None = None
    foreground_intensity_properties_by_modality: dict[str, dict[str, Any]] | None = None

    @field_validator("image_reader_writer")
    @classmethod
    def _reads_volumes(cls, reader: str) -> str:
        if reader not in READERS:
            raise ValueError(
                f"{reader!r} reads no volumes that lie in a patient; legal are {', '.join(READERS)}"
            )
        return reader

    @model_validator(mode="after")
    def _there_and_back(self) -> Plans:
        there, back = self.transpose_forward, self.transpose_backward
        if sorted(there) != [0, 1, 2] or [there[axis] for axis in back] != [0, 1, 2]:
            raise ValueError(
                f"transpose_forward {there} must be an order of the axes 0, 1, 2, and "
                f"transpose_backward {back} its way back"
            )
        return self

    def intensities(self) -> Mapping[str, Mapping[str, Any]]:
        """Return what is known of each channel's intensities in the training."""
        known = self.foreground_intensity_properties_per_channel
        return known or self.foreground_intensity_properties_by_modality or {}


def _label(value: Any) -> Any:
    """Return a label, which some programs write as a string of digits."""
    return int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,5}", value) else value


class Dataset(_Foreign):
    """dataset.json."""

    labels: dict[
        Annotated[str, Field(min_length=1)],
        Annotated[Label | Annotated[list[Label], Field(min_length=1)], BeforeValidator(_label)],
    ]
    regions_class_order: list[Label] | None = None
    channel_names: dict[str, StrictStr] | list[StrictStr] | None = None
    modality: dict[str, StrictStr] | list[StrictStr] | None = None

    @property
    def channels(self) -> dict[str, str]:
        """Channel numbers and names; the older key counts, as in nnU-Net."""
        names = self.modality if self.modality is not None else self.channel_names
        return names if isinstance(names, dict) else dict(enumerate(names or []))  # type: ignore

    @property
    def has_regions(self) -> bool:
        """Whether a class consists of several labels, so that classes may overlap."""
        return any(isinstance(value, list) and len(value) > 1 for value in self.labels.values())

    @property
    def classes(self) -> dict[str, list[int]]:
        """Every name but the ignored one -> its labels."""
        named = {k: v for k, v in self.labels.items() if k != "ignore"}
        return {k: v if isinstance(v, list) else [v] for k, v in named.items()}

    @property
    def regions(self) -> dict[str, list[int]]:
        """The classes that are more than background, in the order of the channels."""
        return {name: labels for name, labels in self.classes.items() if any(labels)}

    @model_validator(mode="before")
    @classmethod
    def _numbers_in_regions(cls, content: Any) -> Any:
        labels = content.get("labels")
        values = list(labels.values()) if isinstance(labels, dict) else []
        if any(isinstance(v, str) for v in values) and any(isinstance(v, list) for v in values):
            raise ValueError("labels: where one is a list, all must be numbers, no strings")
        return content

    @model_validator(mode="after")
    def _labels_fit(self) -> Dataset:
        if not self.channels:
            raise ValueError("channel_names: missing")
        if self.labels.get("background") != 0:
            raise ValueError("labels: background must be there, and be 0")
        ignored = self.labels.get("ignore")
        highest = max(label for labels in self.classes.values() for label in labels)
        if ignored is not None and ignored != highest + 1:
            raise ValueError(f"labels: ignore must be the highest label, {highest + 1}")
        if self.has_regions and len(self.regions_class_order or []) != len(self.regions):
            raise ValueError(
                "regions_class_order: one label for each region is needed, in the order of "
                f"{', '.join(self.regions)}"
            )
        return self


def _is_weight(tensor: torch.Tensor) -> torch.Tensor:
    if fault := tensor_fault(tensor):
        raise ValueError(f"it is {fault}; legal are dense tensors of real numbers")
    return tensor


class _Arguments(_Foreign):
    configuration: StrictStr


class Checkpoint(_Foreign):
    """What is needed of a checkpoint."""

    network_weights: dict[StrictStr, Annotated[torch.Tensor, AfterValidator(_is_weight)]]
    trainer_name: Name
    init_args: _Arguments
    inference_allowed_mirroring_axes: tuple[Annotated[Axis, BeforeValidator(_plain)], ...] = ()
    current_epoch: Annotated[StrictInt | None, BeforeValidator(_plain)] = None

    @field_validator("inference_allowed_mirroring_axes", mode="before")
    @classmethod
    def _none_is_none(cls, axes: Any) -> Any:
        return () if axes is None else axes

    @field_validator("inference_allowed_mirroring_axes")
    @classmethod
    def _each_once(cls, axes: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(axes)) < len(axes):
            raise ValueError("each axis once")
        return axes


# ---------------------------------------------------------------- the folder


def check_folder(folder: Path, checkpoint: str) -> None:
    """Raise ModelError unless this looks like what nnU-Net trains into."""
    try:
        is_folder = folder.is_dir()
    except OSError as error:  # a name too long
        raise ModelError(f"{folder}: cannot be looked at: {error.strerror}") from error
    if not is_folder:
        hint = " is no folder: unzip it first" if folder.is_file() else ": no such folder"
        raise ModelError(f"{folder}{hint}")
    if (folder / "plans.json").is_file() and (folder / "dataset.json").is_file():
        return
    if folder.name.startswith("fold_") and (folder.parent / "plans.json").is_file():
        fold = folder.name.removeprefix("fold_")
        raise ModelError(
            f"{folder} is one fold of a model: give nnunet:{folder.parent}, and folds: [{fold}]"
        )
    inner = sorted(
        str(f.parent) for depth in ("*", "*/*") for f in folder.glob(f"{depth}/plans.json")
    )
    if inner and not (folder / "plans.json").is_file():
        raise ModelError(
            f"{folder} is no trained model, but holds some; name one of them: "
            + ", ".join(f"nnunet:{place}" for place in inner)
        )
    missing = [n for n in ("plans.json", "dataset.json") if not (folder / n).is_file()]
    raise ModelError(
        f"{folder}: {' and '.join(missing)} missing. A trained nnU-Net is a folder such as "
        "Dataset009_Spleen/nnUNetTrainer__nnUNetPlans__3d_fullres, with plans.json, dataset.json "
        f"and fold_0/{checkpoint}"
    )


def folds_of(folder: Path, spec: NnunetSpec) -> dict[int | str, Path]:
    """Return fold -> checkpoint of the folds that are asked for, or of all."""
    present: dict[int | str, Path] = {}
    others, strange = set(), []
    for place in sorted(folder.glob("fold_*"), key=lambda place: (len(place.name), place.name)):
        fold = place.name.removeprefix("fold_")
        if not re.fullmatch("0|[1-9][0-9]*|all", fold):
            strange += [place.name] if place.is_dir() else []
            continue
        if (place / spec.checkpoint).is_file():
            present[fold if fold == "all" else int(fold)] = place / spec.checkpoint
        others |= {file.name for file in place.glob("checkpoint_*.pth")}
    if not present:
        hint = f"; there is {', '.join(sorted(others))}: set checkpoint" if others else ""
        raise ModelError(f"{folder}: no fold_*/{spec.checkpoint}{hint}")
    if spec.folds is None:
        if strange:
            tell(f"{folder}: {', '.join(strange)} left out: a fold is fold_ and its number, or all")
        several = len(present) > 1 and "all" in present
        return {k: v for k, v in present.items() if not (several and k == "all")}
    absent = [fold for fold in spec.folds if fold not in present]
    if absent:
        raise ModelError(
            f"{folder}: no {spec.checkpoint} of fold {', '.join(map(str, absent))}; there is one "
            f"of {', '.join(map(str, present))}"
        )
    return {fold: present[fold] for fold in spec.folds}


# ---------------------------------------------------------------- plans.json and dataset.json


def read_dataset(file: Path) -> Dataset:
    """Return dataset.json, checked.

    Raises:
        ConfigError: what is wrong in it, by key.
    """
    return validate(read_json(file), Dataset, str(file))


def read_plans(file: Path, name: str) -> tuple[Plans, Configuration]:
    """Return plans.json and its configuration of this name, checked.

    Raises:
        ConfigError: what is wrong in it, by key.
        ModelError: it lacks the configuration.
    """
    plans = validate(read_json(file), Plans, str(file))
    if name not in plans.configurations:
        raise ModelError(
            f"{file}: no configuration {name!r}, which the checkpoint was trained with: "
            f"{nearest(name, plans.configurations)}"
        )
    content = _inherited(plans.configurations, name, file)
    kind = _PlannedConfiguration if "architecture" in content else _OldConfiguration
    return plans, validate(content, kind, f"{file}: configurations.{name}")


def check_channels(
    plans: Plans, configuration: Configuration, dataset: Dataset, file: Path
) -> None:
    """Raise ConfigError unless plans.json says for every channel how it is normalized."""
    problems = []
    for index in range(len(dataset.channels)):
        known = plans.intensities().get(str(index))
        if known is None:
            problems.append(f"foreground_intensity_properties_per_channel.{index}: missing")
        for key in ("normalization_schemes", "use_mask_for_norm"):
            if index >= len(getattr(configuration, key)):
                problems.append(f"{key}: missing for channel {index}")
        if "CTNormalization" in configuration.normalization_schemes[index : index + 1]:
            problems += [
                f"foreground_intensity_properties_per_channel.{index}.{key}: a finite number is "
                "needed for CTNormalization"
                for key in ("mean", "std", "percentile_00_5", "percentile_99_5")
                if not _is_finite((known or {}).get(key))
            ]
    if problems:
        raise ConfigError(
            f"{file}: dataset.json has {len(dataset.channels)} channel(s):\n  "
            + "\n  ".join(problems[:12])
        )


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _inherited(configurations: dict[str, dict[str, Any]], name: str, file: Path) -> dict[str, Any]:
    """Return a configuration with what it inherits from others."""
    line: list[str] = []
    merged: dict[str, Any] = {}
    following: Any = name
    while True:
        line.append(following)
        merged = {**configurations[following], **merged}
        if "inherits_from" not in configurations[following]:
            return {key: value for key, value in merged.items() if key != "inherits_from"}
        following = configurations[following]["inherits_from"]
        if following in line or not isinstance(following, str) or following not in configurations:
            raise ConfigError(
                f"{file}: configurations.{line[-1]}.inherits_from: another configuration, and "
                f"none that inherits from this one; got {following!r}"
            )


# ---------------------------------------------------------------- checkpoints


def read_checkpoint(file: Path, trust: bool) -> Checkpoint:
    """Return what is needed of a checkpoint.

    Raises:
        ModelError: it is damaged, is no checkpoint of nnU-Net v2, or holds code and is not trusted.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how old the file is
            content = _unpickled(file, trust)
    except ModelError:
        raise
    except Exception as error:  # the unpickler raises whatever a damaged file leads it to
        raise ModelError(f"{file}: cannot be read as a checkpoint: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{file}: no checkpoint of nnU-Net v2: it holds one {type(content).__name__}"
        )
    held = {key: content[key] for key in Checkpoint.model_fields if key in content}
    return validate(held, Checkpoint, f"{file}: no checkpoint of nnU-Net v2", ModelError)


def _unpickled(file: Path, trust: bool) -> Any:
    """Read a checkpoint without running code, unless trusted; nnU-Net itself would run it."""
    try:
        with torch.serialization.safe_globals(_numbers()):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if trust:
            return torch.load(file, map_location="cpu", weights_only=False)
        foreign = re.search(r"(?:GLOBAL|class|global) ([\w.]+)", str(error))
        found = f" ({foreign[1]})" if foreign else ""
        raise ModelError(
            f"{file}: it holds more than tensors and numbers{found}, and reading that could run "
            "code. If you know where it comes from, allow it with --trust (trust=True)"
        ) from error


def _numbers() -> list[Any]:
    """Return what numpy's scalars are pickled as: nnU-Net logs some."""
    core = getattr(np, "_core", None) or np.core
    dtypes = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    return [core.multiarray.scalar, np.dtype, *dtypes]
