"""How a scan is prepared for a network by the settings of a YAML, with MONAI's transforms."""

from __future__ import annotations

from collections.abc import Callable

from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    CropForeground,
    DivisiblePad,
    NormalizeIntensity,
    Orientation,
    ScaleIntensityRange,
    ScaleIntensityRangePercentiles,
    Spacing,
    Transform,
)

from seg3dcam.errors import ScanError
from seg3dcam.models.seg_model import as_is
from seg3dcam.models.specs import Intensity, Prepare
from seg3dcam.scan import Scan

_RAS_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))


def build_preparation(spec: Prepare) -> Callable[[Scan], MetaTensor]:
    """Return the function that turns a scan into the network's input.

    The input is a float32 tensor (C, *S) with the affine of the prepared voxels.
    """
    steps: list[Transform] = []
    if spec.orientation:
        steps.append(Orientation(axcodes=spec.orientation, labels=_RAS_LABELS))
    if spec.spacing:
        steps.append(Spacing(pixdim=spec.spacing, mode="bilinear"))
    if spec.intensity:
        steps.append(_intensity(spec.intensity))
    if spec.crop_foreground:
        steps.append(CropForeground(allow_smaller=True))
    if spec.pad_divisible:
        steps.append(DivisiblePad(k=spec.pad_divisible))
    transform = Compose(steps)
    normalises = spec.intensity is not None and spec.intensity.zscore is not None

    def prepare(scan: Scan) -> MetaTensor:
        # MONAI normalises in place, and the scan itself must stay as it is.
        prepared = transform(as_is(scan).clone() if normalises else as_is(scan))
        if 0 in prepared.shape:
            raise ScanError(
                f"{scan.name}: nothing is left after preparation (crop_foreground found no voxel "
                "above 0): do the model's intensity settings fit this scan?"
            )
        return prepared

    return prepare


def _intensity(spec: Intensity) -> Transform:
    if spec.range:
        return ScaleIntensityRange(*spec.range, b_min=0.0, b_max=1.0, clip=True)
    if spec.percentiles:
        return ScaleIntensityRangePercentiles(
            *spec.percentiles, b_min=0.0, b_max=1.0, clip=True, channel_wise=True
        )
    return NormalizeIntensity(nonzero=spec.zscore == "nonzero", channel_wise=True)
