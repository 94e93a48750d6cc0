"""What a CAM returns: raw signed maps on every grid, and the views that are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from seg3dcam.checks import checked_index
from seg3dcam.engine.evidence import scaled, shown_part
from seg3dcam.engine.layer_map import LayerMap
from seg3dcam.engine.scales import Scale, Status, check_scale, display_range
from seg3dcam.errors import InputError
from seg3dcam.files.writers.nifti import write_nifti
from seg3dcam.geometry import FeatureGrid, interpolate, spacing_of


@dataclass(frozen=True)
class CamResult:
    """The maps of one target, for a batch of inputs.

    Attributes:
        layers: layer name -> `LayerMap`.
        shape: voxels of the input, (*S).
        logits: (B, K, *S), stitched from the windows if there were several.
        score: (B,) what was explained.
        target, method: their names.
        activation: "softmax" or "sigmoid": how logits become a prediction.
        affine: (4, 4) voxel -> RAS mm of the input, (B, 4, 4) if the items lie on different
            grids, None if unknown.
        windows: how many windows the input was cut into.
        region_voxels: (B,) voxels of the target's region, None for a target of your own.
        settings: the method's parameters.
        dropped: layer -> why one of many ("all", `decoder.*`) has no map.
        members: how many networks and flips of an `Ensemble` were averaged.
        draws: the operation with which the network draws random numbers, "" for none: prediction
            and maps then belong to one draw, the same in every pass, and other draws give others.
    """

    layers: Mapping[str, LayerMap]
    shape: tuple[int, ...]
    logits: torch.Tensor
    score: torch.Tensor
    target: str
    method: str
    activation: str = "softmax"
    affine: np.ndarray | None = None
    windows: int = 1
    region_voxels: torch.Tensor | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    members: int = 1
    draws: str = ""

    @cached_property
    def maps(self) -> dict[str, torch.Tensor]:
        """Layer -> raw signed map on the input's grid, (B, *S)."""
        voxels = FeatureGrid.of_voxels(self.shape)
        return {name: interpolate(m.values, m.grid, voxels) for name, m in self.layers.items()}

    @property
    def native(self) -> dict[str, torch.Tensor]:
        """Layer -> raw signed map on the layer's own grid, (B, *s); one window only."""
        if self.members > 1:
            raise InputError(
                f"the maps of {self.members} networks and flips were averaged, and flipped layers "
                "have grids of their own: use .maps"
            )
        if self.windows > 1:
            raise InputError(
                f"the input was cut into {self.windows} windows, each with a grid of its own: "
                "use .maps"
            )
        return {name: layer.values for name, layer in self.layers.items()}

    @property
    def status(self) -> dict[str, Status]:
        """Layer -> "ok", "zero", "nonfinite", "degenerate" or "incomplete"; the worst item's."""
        return {name: layer.status for name, layer in self.layers.items()}

    @property
    def native_spacing(self) -> dict[str, tuple[float, ...]]:
        """Layer -> size of its voxels: in mm where the affine is known, else in input voxels.

        For a batch of items of different spacing, the first item's.
        """
        sizes = {}
        for name, layer in self.layers.items():
            voxel = (1.0,) * len(layer.window_grid.stride)
            affine = self._affine_of(0)
            spacing = voxel if affine is None else spacing_of(affine)
            strides = zip(layer.window_grid.stride, spacing, strict=False)
            sizes[name] = tuple(stride * size for stride, size in strides)
        return sizes

    @property
    def prediction(self) -> torch.Tensor:
        """The predicted labels (B, *S); for sigmoid outputs one mask per class (B, K, *S)."""
        if self.activation == "sigmoid" or self.logits.shape[1] == 1:
            return self.logits > 0
        return self.logits.argmax(1)

    def volume(
        self,
        layer: str | None = None,
        *,
        scale: Scale = "max",
        per_layer: bool = False,
    ) -> torch.Tensor:
        """Return what is drawn, (B, *S): negative evidence cut, layers averaged, scaled.

        Args:
            layer: one layer's name; None fuses all.
            scale: "max" divides by each item's maximum, so that zero stays zero; "minmax" maps
                minimum to 0 and maximum to 1, which lifts a map whose minimum is positive; "raw"
                leaves the values; "signed" keeps the evidence against, in [-1, 1]: divided by the
                largest absolute value, so that both signs share one scale and zero stays zero.
            per_layer: scale every layer before they are averaged, and cut and scale it on its own
                grid before resizing: the original recipe.

        An item whose map is zero, constant or not finite gives zeros; see `status`. A map that
        holds only evidence against the target is shown by "signed" alone.
        """
        check_scale(scale)
        names = [layer] if layer is not None else list(self.layers)
        voxels = FeatureGrid.of_voxels(self.shape)
        views = []
        for name in names:
            native = self._layer(name)
            if per_layer:
                view = interpolate(
                    scaled(shown_part(native.values, scale), scale), native.grid, voxels
                )
            else:
                view = shown_part(self.maps[name], scale)
            views.append(view.masked_fill(~native.items_shown(scale), 0))
        fused = torch.stack(views).mean(0)
        for name in names:
            fused = fused.masked_fill(self._layer(name).items_that_are("nonfinite"), 0)
        return scaled(fused, scale)

    def slice(self, index: int, axis: int = 0, **view: object) -> torch.Tensor:
        """Return one slice of `volume`, (B, H, W): index Z along `axis` 0, 1 or 2.

        Args:
            index: slice number, 0 <= index < number of slices.
            axis: spatial axis that is cut, 0 being Z of (B, C, Z, Y, X).
            view: passed on to `volume`.
        """
        axis = checked_index("axis", axis, len(self.shape))
        index = checked_index("slice", index, self.shape[axis], f" along axis {axis}")
        return self.volume(**view).select(1 + axis, index)  # type: ignore[arg-type]

    def save(
        self,
        path: str | Path,
        *,
        affine: np.ndarray | None = None,
        item: int | None = None,
        layer: str | None = None,
        scale: Scale = "max",
        per_layer: bool = False,
    ) -> Path:
        """Write one item's volume as NIfTI, in patient space; a 2D map as a picture.

        Args:
            path: ends in .nii or .nii.gz; of a 2D map in .png, and
                `seg3dcam.review.pictures.map_2d.save_map` draws it over its input.
            affine: (4, 4) voxel -> RAS mm; default the input's, if it was a MetaTensor.
            item: which item of the batch; not needed for a batch of one.
            layer, scale, per_layer: as in `volume`.

        Raises:
            InputError: no affine is known, or one of several items was not chosen.
            ConfigError: a path that does not end as it must.
            OutputError: the file cannot be written.
        """
        item = self.one_item(item)
        if len(self.shape) == 2:
            from seg3dcam.review.pictures.map_2d import write_map

            return write_map(path, self.volume(layer, scale=scale, per_layer=per_layer)[item])
        affine = self._affine_of(item) if affine is None else affine
        if affine is None:
            raise InputError(
                "where is this volume in the patient? Its input was no MetaTensor with an affine: "
                "give save(..., affine=<4x4 voxel -> RAS mm>), numpy.eye(4) for plain voxels"
            )
        if len(self.shape) != 3:
            raise InputError(f"NIfTI volumes are 3-D; this map has {len(self.shape)} axis")
        return write_nifti(
            path,
            self.volume(layer, scale=scale, per_layer=per_layer)[item],
            affine,
            intent_name=self.method,
            description=f"{self.method} {self.target}",
            display_range=display_range(scale),
        )

    def one_item(self, item: int | None) -> int:
        """Return which item of the batch is meant; InputError if several are possible."""
        count = len(self.score)
        if item is None and count > 1:
            raise InputError(
                f"the batch has {count} items, and a file holds one: give save(..., item=0), up to "
                f"item={count - 1}, each with a path of its own"
            )
        return checked_index("item", 0 if item is None else item, count, " of the batch")

    def _affine_of(self, item: int) -> np.ndarray | None:
        several = self.affine is not None and self.affine.ndim == 3
        return self.affine[item] if several else self.affine  # type: ignore[index]

    def _layer(self, name: str) -> LayerMap:
        if name not in self.layers:
            raise InputError(f"no map of layer {name!r}: there are {list(self.layers)}")
        return self.layers[name]
