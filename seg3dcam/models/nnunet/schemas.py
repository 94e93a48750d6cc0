"""Schemas: what plans.json, dataset.json and a checkpoint of nnU-Net v2 may contain.

These files may come from anybody. Only what has passed these schemas goes on to nnU-Net's own code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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

from seg3dcam.models.spacing import Reader
from seg3dcam.models.weights import tensor_fault

#: nnU-Net's readers of 3D files -> the library from which the voxel size comes, and whether the
#: reader first turns the scan to RAS.
READERS: dict[str, tuple[Reader, bool]] = {
    "SimpleITKIO": ("itk", False),
    "NibabelIO": ("nibabel", False),
    "SimpleITKIOWithReorient": ("itk", True),
    "NibabelIOWithReorient": ("nibabel", True),
}

#: Largest number in a network's arguments; beyond it no computer has enough memory.
_MOST = 8192


class _ForeignContent(BaseModel):
    """Content from a file. Keys that are not named here are left to nnU-Net."""

    model_config = ConfigDict(
        extra="allow", frozen=True, arbitrary_types_allowed=True, serialize_by_alias=True
    )


def _plain(value: Any) -> Any:
    """Return a number as one of Python's own; in a checkpoint it may be one of numpy's."""
    return value.item() if isinstance(value, np.generic) else value


Voxels = Annotated[StrictInt, Field(ge=1, le=2**16)]
Mm = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Axis = Annotated[StrictInt, Field(ge=0, le=2)]
Label = Annotated[StrictInt, Field(ge=0, lt=2**15)]
Order = Annotated[StrictInt, Field(ge=0, le=5)]
Count = Annotated[StrictInt, Field(ge=1, le=_MOST)]

#: The name of a class or function, by which alone nnU-Net finds it.
Name = Annotated[str, Field(pattern=r"^[A-Za-z]\w*$", max_length=200)]

#: The full name of a class, with its module.
ClassPath = Annotated[str, Field(pattern=r"^[A-Za-z]\w*(\.[A-Za-z_]\w*)+$", max_length=400)]


class _Resampling(_ForeignContent):
    """Arguments of a resampling function. Those not named here differ between functions."""

    is_seg: StrictBool = False
    order: Order = 3
    order_z: Order = 0
    force_separate_z: StrictBool | None = None
    num_threads: Annotated[StrictInt, Field(ge=1, le=128)] = 4


class _Architecture(_ForeignContent):
    """The name of a network's class, and its arguments, some of which name classes too."""

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


class Configuration(_ForeignContent):
    """One of the configurations in plans.json, together with the keys that it inherits."""

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


class PlannedConfiguration(Configuration):
    """A configuration of nnU-Net 2.5 or later."""

    architecture: _Architecture

    @model_validator(mode="after")
    def _one_number_for_each_axis(self) -> PlannedConfiguration:
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


class OldConfiguration(Configuration):
    """A configuration from before nnU-Net 2.5, whose keys describe a U-Net."""

    UNet_class_name: Literal["PlainConvUNet", "ResidualEncoderUNet"]
    UNet_base_num_features: Count
    unet_max_num_features: Count
    n_conv_per_stage_encoder: list[Count] = Field(min_length=1)
    n_conv_per_stage_decoder: list[Count]
    num_pool_per_axis: list[StrictInt]
    pool_op_kernel_sizes: list[list[Count]]
    conv_kernel_sizes: list[list[Count]]


class Plans(_ForeignContent):
    """The content of plans.json. Only the configuration that is used is checked further."""

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
        """Return the statistics of each channel's intensities in the training data."""
        known = self.foreground_intensity_properties_per_channel
        return known or self.foreground_intensity_properties_by_modality or {}


def _label(value: Any) -> Any:
    """Return a label as a number; some programs write it as a string of digits."""
    return int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,5}", value) else value


class Dataset(_ForeignContent):
    """The content of dataset.json."""

    labels: dict[
        Annotated[str, Field(min_length=1)],
        Annotated[Label | Annotated[list[Label], Field(min_length=1)], BeforeValidator(_label)],
    ]
    regions_class_order: list[Label] | None = None
    channel_names: dict[str, StrictStr] | list[StrictStr] | None = None
    modality: dict[str, StrictStr] | list[StrictStr] | None = None

    @property
    def channels(self) -> dict[str, str]:
        """Channel number -> name. The older key wins if both are there, as in nnU-Net."""
        names = self.modality if self.modality is not None else self.channel_names
        return names if isinstance(names, dict) else dict(enumerate(names or []))  # type: ignore

    @property
    def has_regions(self) -> bool:
        """Whether some class consists of several labels, so that classes may overlap."""
        return any(isinstance(value, list) and len(value) > 1 for value in self.labels.values())

    @property
    def classes(self) -> dict[str, list[int]]:
        """Name of a class -> its labels, without the label to ignore."""
        named = {k: v for k, v in self.labels.items() if k != "ignore"}
        return {k: v if isinstance(v, list) else [v] for k, v in named.items()}

    @property
    def regions(self) -> dict[str, list[int]]:
        """The classes other than background, in the order of the channels."""
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


class _Arguments(_ForeignContent):
    configuration: StrictStr


class Checkpoint(_ForeignContent):
    """The part of a checkpoint that is needed here."""

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
