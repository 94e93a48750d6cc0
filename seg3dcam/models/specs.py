"""What a model's YAML may say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    FiniteFloat,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

from seg3dcam.settings import Settings
from seg3dcam.settings import read_json as read_json
from seg3dcam.settings import read_yaml as read_yaml
from seg3dcam.windows import WindowPlan


class Intensity(Settings):
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


class Prepare(Settings):
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


class Window(Settings):
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


class ModelSpec(Settings):
    """A network made by a Python factory, with its weights and how it is used."""

    factory: str = Field(pattern=r"^\w+(\.\w+)*:\w+(\.\w+)*$", description="package.module:Class")
    arguments: dict[str, Any] = Field({})
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


class BundleSpec(Settings):
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


class NnunetSpec(Settings):
    """A trained nnU-Net v2 model folder; everything is read from its plans and dataset.json."""

    nnunet: str = Field(min_length=1, description="the folder <trainer>__<plans>__<configuration>")
    folds: list[int | Literal["all"]] | None = Field(
        None, min_length=1, description="none: every fold that has the checkpoint"
    )
    checkpoint: str = "checkpoint_final.pth"
    tile_step_size: float = Field(0.5, gt=0, le=1, description="nnU-Net's own name and default")
    mirroring: bool = Field(True, description="average over the flips of the training, if any")


class ExportedSpec(Settings):
    """A network exported by `torch.export`, and how it is used."""

    exported: str = Field(min_length=1, description="the .pt2 file")
    classes: list[str] = Field(min_length=1, description="one name per output channel")
    activation: Literal["softmax", "sigmoid"] = "softmax"
    prepare: Prepare = Field(default_factory=Prepare)
    window: Window | None = None
    output: int | str | None = None
