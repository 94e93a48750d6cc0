"""Where the scan and the network's input lie to each other, and what moves between the two."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from seg3dcam.cams.result import CamResult
from seg3dcam.checks import is_meta_tensor
from seg3dcam.engine.layer_map import LayerMap
from seg3dcam.errors import ModelError
from seg3dcam.geometry import ras_affine, resample, resample_labels
from seg3dcam.models.seg_model import SegModel
from seg3dcam.progress import Progress
from seg3dcam.scan import Scan
from seg3dcam.targets.ground_truth import check_on_grid

if TYPE_CHECKING:
    from monai.data import MetaTensor


@dataclass(frozen=True, eq=False)
class Placement:
    """A scan and its prepared form, which the network takes; made by `place_scan`.

    Both lie in the same patient space, each with an affine of its own, so that masks, maps and
    predictions go from one grid to the other in a single interpolation.

    Attributes:
        scan: the scan on its own grid, (X, Y, Z).
        prepared: what the model's `prepare` made of it, (C, *S), with the affine of its voxels.
    """

    scan: Scan
    prepared: MetaTensor

    @property
    def network_input(self) -> MetaTensor:
        """The prepared scan as a batch of one, (1, C, *S), with the affine of its voxels."""
        from monai.data import MetaTensor

        data = self.prepared.as_tensor()[None].contiguous()
        # Without a device, MetaTensor moves what it is given to the default device.
        affine = torch.as_tensor(self.affine, device="cpu")
        return MetaTensor(data, affine=affine, device=data.device)

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels of the network's grid, (*S)."""
        return tuple(self.prepared.shape[1:])

    @cached_property
    def affine(self) -> np.ndarray:
        """The affine of the network's grid, (4, 4) float64 voxel -> RAS mm."""
        affine: np.ndarray = self.prepared.affine.numpy().astype(np.float64)
        return affine

    def mask_to_network(self, mask: Any) -> torch.Tensor:
        """Return a mask on the network's grid, each voxel with the nearest value.

        Args:
            mask: a `Scan` or MetaTensor on the scan's grid, (X, Y, Z) or (1, X, Y, Z).

        Raises:
            TargetError: a mask on another grid.
        """
        data = torch.as_tensor(mask.data, device="cpu")
        affine = np.asarray(mask.affine, dtype=np.float64)
        if is_meta_tensor(mask):
            data, affine = mask.as_tensor(), ras_affine(affine, mask.meta.get("space"))
        if data.ndim == len(self.scan.shape) + 1 and len(data) == 1:
            data = data[0]
        check_on_grid("mask", data.shape, affine, self.scan)
        return resample_labels(data, self.scan.affine, self.affine, self.shape)

    def map_to_scan(self, layer: LayerMap) -> torch.Tensor:
        """Return a layer's raw map on the scan's grid, interpolated once; 0 outside the input."""
        return resample(
            layer.values[0].cpu(),
            layer.grid.affine(self.affine),
            self.scan.affine,
            self.scan.shape,
            seen_affine=self.affine,
            seen_shape=self.shape,
        )

    def region_to_scan(self, region: torch.Tensor) -> torch.Tensor:
        """Return a region of the network's grid, (*S), on the scan's grid, (X, Y, Z) bool."""
        moved = resample_labels(region.cpu(), self.affine, self.scan.affine, self.scan.shape)
        return moved.bool()

    def prediction_on_scan(
        self, model: SegModel, result: CamResult, report: Progress
    ) -> torch.Tensor:
        """Return the masks of all classes on the scan's grid, (K, X, Y, Z) bool.

        They are made as the model's own framework makes them. Where it does not say how, the
        logits are interpolated class by class and then compared.

        Args:
            model: the network, with its way back to the scan.
            result: any result of this scan; its logits are used.
            report: called with (step, done, total).

        Raises:
            ModelError: the model's own way back gave something else than such masks.
        """
        logits = result.logits[0].cpu().float()
        with torch.device("cpu"):
            own = model.restore and model.restore(logits, self.scan, self.prepared)
        if own is None:
            return self._compared_on_scan(logits, result.activation == "sigmoid", report)
        if own.dtype != torch.bool or tuple(own.shape[1:]) != self.scan.shape:
            raise ModelError(
                f"{model.name}: its way back to the scan gave {own.dtype} {tuple(own.shape)}; "
                f"masks (K, *{self.scan.shape}) of dtype bool are wanted"
            )
        return own

    def probability_to_scan(self, probability: torch.Tensor) -> torch.Tensor:
        """Return a probability of the network's grid, (*S), on the scan's grid, (X, Y, Z)."""
        moved = resample(probability.cpu(), self.affine, self.scan.affine, self.scan.shape)
        return moved.clamp(0, 1)

    def _compared_on_scan(
        self, logits: torch.Tensor, overlapping: bool, report: Progress
    ) -> torch.Tensor:
        """Interpolate logits (K, *S) to the scan one by one, keeping the best value so far."""
        masks = torch.zeros((len(logits), *self.scan.shape), dtype=torch.bool, device="cpu")
        best = None
        for index, of_class in enumerate(logits):
            report("resampling the prediction", index, len(masks))
            moved = resample(of_class, self.affine, self.scan.affine, self.scan.shape)
            if overlapping or len(masks) == 1:
                masks[index] = moved > 0
            elif best is None:
                best, masks[0] = moved, True
            else:
                wins = moved > best
                masks[:index] &= ~wins
                masks[index] = wins
                best = torch.maximum(best, moved)
        return masks


def place_scan(scan: Scan, model: SegModel, report: Progress) -> Placement:
    """Prepare a scan for a model, and keep where both lie.

    Args:
        scan: what `load_scan` returns.
        model: the network and its preparation.
        report: called with (step, done, total).

    Raises:
        ModelError: a scan with other channels than the network takes.
    """
    model.check_scan(scan)
    report("preparing", 0, 1)
    # Files and transforms work on the CPU, whatever the default device is.
    with torch.device("cpu"):
        return Placement(scan, model.prepare(scan))
