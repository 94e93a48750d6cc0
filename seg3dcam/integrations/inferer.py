"""A MONAI inferer that gives class activation maps instead of logits."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import nn

from seg3dcam.cams.catalogue import CAMS
from seg3dcam.cams.result import CamResult
from seg3dcam.checks import is_meta_tensor
from seg3dcam.engine.scales import Scale
from seg3dcam.errors import ConfigError, nearest
from seg3dcam.network.layers import LayerSpec

#: MONAI's names -> ours.
_MONAI_NAMES = {"gradcam": "grad_cam", "gradcampp": "grad_cam_plus_plus"}


class CamInferer(Inferer):
    """Explains instead of predicting; its arguments are named like those of `SaliencyInferer`.

    Args:
        cam_name: a key of `METHODS`, or MONAI's "GradCAM" or "GradCAMpp".
        target_layers: see `BaseCAM`.
        class_idx: a class index (for its log-odds over the predicted mask) or a target; None is the
            method's original recipe, which is not about a class.
        scale: "max" gives maps in [0, 1], "raw" gives positive evidence in its own units.
        settings: further arguments of the method's class, such as `sliding_window=WindowPlan(96)`.

    Example:
        >>> network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv3d(2, 2, 1))
        >>> from seg3dcam.targets import ClassLogit
        >>> inferer = CamInferer("GradCAM", "1", ClassLogit(0, "volume"))
        >>> inferer(torch.rand(2, 1, 8, 8, 8), network).shape
        torch.Size([2, 1, 8, 8, 8])
    """

    def __init__(
        self,
        cam_name: str,
        target_layers: LayerSpec = "auto",
        class_idx: Any = None,
        *,
        scale: Scale = "max",
        **settings: Any,
    ) -> None:
        super().__init__()
        key = _MONAI_NAMES.get(cam_name.lower(), cam_name)
        if cam_name.lower() == "cam":
            raise ConfigError(
                "cam_name 'CAM' needs a classifier's last fully connected layer, which a "
                "segmentation network does not have; take 'GradCAM' or 'hires_cam'"
            )
        if key not in CAMS:
            raise ConfigError(f"cam_name {cam_name!r}: {nearest(cam_name, CAMS)}")
        self.cam_name, self.target_layers, self.class_idx = key, target_layers, class_idx
        self.scale, self.settings = scale, settings

    def __call__(
        self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return the maps (B, 1, *S) of inputs (B, C, *S).

        For a MetaTensor the maps are a MetaTensor, too, with the same place and applied operations,
        so that `Invertd` can take them back to the scan.

        Raises:
            ConfigError: there is more than one input for the network.
        """
        if args or kwargs:
            raise ConfigError("CAMs are of networks with one input; conditions cannot be passed on")
        cam = CAMS[self.cam_name](network, self.target_layers, **self.settings)
        return as_map_of(inputs, cam(inputs, self.class_idx), self.scale)


def as_map_of(inputs: torch.Tensor, result: CamResult, scale: Scale) -> torch.Tensor:
    """Return the volumes of a result, (B, 1, *S), in the place of the inputs."""
    volume = result.volume(scale=scale)[:, None]
    return volume.to(inputs.device) if not is_meta_tensor(inputs) else _like(inputs, volume)


def _like(inputs: MetaTensor, volume: torch.Tensor) -> MetaTensor:
    with inputs.device:  # a MetaTensor is made on the default device
        placed = MetaTensor(
            volume.to(inputs.device),
            meta=deepcopy(inputs.meta),
            applied_operations=deepcopy(inputs.applied_operations),  # for Invertd
        )
    placed.is_batch = inputs.is_batch
    return placed
