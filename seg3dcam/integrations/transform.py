"""A MONAI dictionary transform that adds the class activation map of an image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from copy import deepcopy
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ensure_tuple_rep
from torch import nn

from seg3dcam.cams.catalogue import CAMS
from seg3dcam.checks import is_meta_tensor
from seg3dcam.engine.scales import Scale
from seg3dcam.errors import ConfigError, InputError, nearest
from seg3dcam.network.layers import LayerSpec


class Camd(MapTransform):
    """Adds the map of an image (C, *S) as a MetaTensor (1, *S) in the same place.

    Use it for post-processing: `Invertd(keys="cam", transform=preprocessing, orig_keys="image",
    nearest_interp=False)` takes the map back to the scan's grid, and `SaveImaged(keys="cam")`
    writes it. (`seg3dcam.explaining.explain` needs one interpolation for this instead of two.)

    Args:
        keys: keys of the images, which are inputs of the network.
        network: the network. The transform refuses to run in a DataLoader's workers, since each of
            them would copy it.
        target_layers: see `BaseCAM`.
        class_idx: a class index or a target, see `CamInferer`.
        cam_name: a key of `METHODS`.
        names: keys of the maps.
        scale: "max" gives maps in [0, 1], "raw" gives positive evidence in its own units.
        settings: further arguments of the method's class, such as `sliding_window=WindowPlan(96)`.

    Raises:
        ConfigError: the method is unknown, or the transform runs in a DataLoader's worker.
        InputError: the image is no MetaTensor, so its place is not known.
    """

    def __init__(
        self,
        keys: KeysCollection,
        network: nn.Module,
        target_layers: LayerSpec = "auto",
        class_idx: Any = None,
        *,
        cam_name: str = "hires_cam",
        names: KeysCollection = "cam",
        scale: Scale = "max",
        allow_missing_keys: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if cam_name not in CAMS:
            raise ConfigError(f"cam_name {cam_name!r}: {nearest(cam_name, CAMS)}")
        self.names = ensure_tuple_rep(names, len(self.keys))
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"names {self.names}: one for each of the keys {self.keys}")
        self.class_idx, self.scale = class_idx, scale
        self.cam = CAMS[cam_name](network, target_layers, **settings)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with a map for every image."""
        if torch.utils.data.get_worker_info() is not None:
            raise ConfigError(
                "Camd holds a network and must not run in a DataLoader's workers: put it into the "
                "postprocessing, or set num_workers=0"
            )
        found = dict(data)
        for key, name in self.key_iterator(found, self.names):
            image = found[key]
            if not is_meta_tensor(image):
                raise InputError(
                    f"{key!r} is a {type(image).__name__}: a map is placed where its image lies, "
                    "so it must be a MetaTensor, as LoadImaged gives it"
                )
            result = self.cam(image[None], self.class_idx)
            with image.device:  # a MetaTensor is made on the default device
                found[name] = MetaTensor(
                    result.volume(scale=self.scale),
                    meta=deepcopy(image.meta),
                    applied_operations=deepcopy(image.applied_operations),  # for Invertd
                )
        return found
