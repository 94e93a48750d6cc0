"""Settings from YAML, validated: the model spec and the job.

An unknown key is an error that names the nearest legal one. Paths in a file are relative to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from seg3dcam.errors import ConfigError, nearest
from seg3dcam.windows import WindowPlan


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Intensity(_Settings):
    """How intensities are brought to the network's range; exactly one key."""

    range: tuple[float, float] | None = Field(
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


class Prepare(_Settings):
    """What is done to a scan before the network sees it, in this order."""

    orientation: str | None = Field(None, pattern="^[RLAPSI]{3}$", description="axis codes: RAS")
    spacing: tuple[float, float, float] | None = Field(None, description="mm per voxel")
    intensity: Intensity | None = None
    crop_foreground: bool = Field(False, description="crop to the voxels above 0")
    pad_divisible: int | None = Field(None, ge=1, description="pad every axis to a multiple")


class Window(_Settings):
    """The sliding window; see `WindowPlan`."""

    roi_size: int | tuple[int, ...]
    overlap: float = Field(0.25, ge=0, lt=1)
    mode: Literal["gaussian", "constant"] = "gaussian"
    sw_batch_size: int = Field(1, ge=1)
    sigma_scale: float = Field(0.125, gt=0)
    padding_mode: Literal["constant", "reflect", "replicate", "circular"] = "constant"
    cval: float = 0.0

    def plan(self) -> WindowPlan:
        """Return the window plan."""
        return WindowPlan(**self.model_dump())


class ModelSpec(_Settings):
    """A network made by a Python factory, with its weights and how it is used."""

    factory: str = Field(pattern=r"^[\w.]+:[\w.]+$", description="package.module:Class")
    arguments: dict[str, Any] = {}
    weights: str = Field(description=".safetensors, a PyTorch state dict, or 'random'")
    classes: list[str] = Field(min_length=1, description="one name per output channel")
    activation: Literal["softmax", "sigmoid"] = "softmax"
    prepare: Prepare = Field(default_factory=Prepare)
    window: Window | None = None
    output: int | str | None = None


class Job(_Settings):
    """One run of `seg3dcam explain`; the command line's options override it."""

    scan: str | list[str]
    model: str
    out: str = "seg3dcam_out"
    target: list[str | int] | str | int | None = Field(
        None, description="class names or indices; none explains every predicted class"
    )
    score: Literal["log_odds", "logit", "probability", "mask_output"] = "log_odds"
    layer: list[str] | str = "auto"
    method: str = "hires_cam"
    device: str = "auto"
    axis: Literal["axial", "coronal", "sagittal"] = "axial"
    slice: int | None = None
    pictures: bool = True
    intensity_window: str | tuple[float, float] | None = Field(
        None, description="a preset such as 'soft tissue', or [width, level]; none: percentiles"
    )
    threshold: float = Field(0.2, ge=0, lt=1)
    colormap: str = "inferno"
    trust: bool = False


Settings = TypeVar("Settings", bound=_Settings)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ConfigError: missing, unreadable, not YAML, or not a mapping.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, found {type(content).__name__}")
    return content


def validate(content: dict[str, Any], kind: type[Settings], source: str) -> Settings:
    """Return validated settings.

    Args:
        source: the file's name, for messages.

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
        problems = sorted({_problem(kind, detail) for detail in error.errors()})
        raise ConfigError(f"{source}:\n  " + "\n  ".join(problems)) from None


def _problem(kind: type[_Settings], detail: Any) -> str:
    place = [part for part in detail["loc"] if isinstance(part, int) or part.isidentifier()]
    where = ".".join(map(str, place)) or "settings"
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key, {nearest(str(detail['loc'][-1]), _keys(kind, place[:-1]))}"
    if detail["type"] == "missing":
        return f"{where}: missing"
    given = detail["input"]
    shown = "" if isinstance(given, dict) else f", got {given!r}"
    return f"{where}: {detail['msg'].removeprefix('Value error, ')}{shown}"


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
