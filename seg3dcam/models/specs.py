"""Settings that several kinds of model have in common, as a model's YAML gives them.

Each kind's own settings are the class `Spec` in its module; `load` lists the modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, FiniteFloat, field_validator, model_validator

from seg3dcam.checks import Activation, PaddingMode, WindowConvention, WindowMode
from seg3dcam.settings import Settings

if TYPE_CHECKING:
    from seg3dcam.windows import WindowPlan

#: Most voxels that an axis can have: as many as a NIfTI-1 header can count.
MOST_VOXELS = 32767

#: Bounds of a temperature; beyond them probabilities say nothing.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 100.0

#: A voxel's size along one axis, in mm.
Step = Annotated[float, Field(ge=0.01, allow_inf_nan=False)]


class Intensity(Settings):
    """How intensities are brought to the range of the network. Exactly one key is given."""

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
    """The sliding window; `WindowPlan` explains each setting."""

    roi_size: int | tuple[int, ...]
    overlap: float = Field(0.25, ge=0, lt=1)
    mode: WindowMode = "gaussian"
    sw_batch_size: int = Field(1, ge=1)
    sigma_scale: FiniteFloat = Field(0.125, gt=0)
    padding_mode: PaddingMode = "constant"
    cval: FiniteFloat = 0.0
    cache_gb: float = Field(2.0, ge=0, description="activations kept between the two passes")
    convention: WindowConvention = Field("monai", description="whose places and gaussian")

    @field_validator("roi_size")
    @classmethod
    def _voxels(cls, size: int | tuple[int, ...]) -> int | tuple[int, ...]:
        sizes = (size,) if isinstance(size, int) else size
        if any((n < 1 and n != -1) or n > MOST_VOXELS for n in sizes):
            raise ValueError(f"voxels from 1 to {MOST_VOXELS}, or -1 for a whole axis")
        return size

    def plan(self) -> WindowPlan:
        """Return the window plan."""
        from seg3dcam.windows import WindowPlan  # which needs PyTorch and MONAI

        return WindowPlan(**self.model_dump())


class ModelSpec(Settings):
    """What a model of any kind may say."""

    temperature: float | None = Field(
        None,
        ge=LEAST_TEMPERATURE,
        le=MOST_TEMPERATURE,
        description="logits are divided by it before they become probabilities, see `calibrate`",
    )


class NetworkUse(ModelSpec):
    """How a network is used. A YAML says it where the network's own files do not."""

    classes: list[str] = Field(min_length=1, description="one name per output channel")
    activation: Activation = "softmax"
    prepare: Prepare = Field(default_factory=Prepare)
    window: Window | None = None
    output: int | str | None = None

    def window_plan(self) -> WindowPlan | None:
        """Return the window plan, or None where the network takes the whole scan at once."""
        return self.window.plan() if self.window else None
