"""A scan on its way through nnU-Net's preparation, and its prediction on the way back.

nnU-Net reads a scan as (z, y, x), permutes the axes (`transpose_forward`), crops to the box of
nonzero voxels, and resamples by shape. All of this is one affine from the prepared voxels to those
of the scan, so maps need a single interpolation. Masks go back by nnU-Net's own steps.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor

from seg3dcam.errors import OutOfMemoryError, ScanError, tell
from seg3dcam.models.nnunet.parts import Parts, quietly
from seg3dcam.models.nnunet.schemas import READERS
from seg3dcam.models.spacing import (
    affine_as_read_by,
    in_mm,
    spacing_as_read_by,
    tell_difference,
)
from seg3dcam.scan import Scan

#: Keys in the `meta` of a prepared scan: nnU-Net's own notes on its preparation, and how its reader
#: has turned the axes.
_NOTES, _TURN = "nnunet_properties", "nnunet_turn"

#: nibabel's orientation of axes that are not turned.
_AS_IT_LIES = np.array([[0, 1], [1, 1], [2, 1]])


@dataclass(frozen=True)
class Pipeline:
    """How a scan goes to the network and its logits come back, by nnU-Net's own steps.

    Attributes:
        dataset: the content of dataset.json.
        reader: the name of nnU-Net's class by which the model reads its scans.
    """

    parts: Parts
    dataset: dict[str, Any]
    reader: str

    def prepare(self, scan: Scan) -> MetaTensor:
        """Return the network's input (C, *S) with its affine, by nnU-Net's preprocessor."""
        data, affine = scan.data.numpy(), scan.affine
        turn, spacing = _as_read(scan, self.reader)
        if turn is not None:
            affine = affine @ nib.orientations.inv_ornt_aff(turn, scan.shape)
            data = np.stack([nib.apply_orientation(channel, turn) for channel in data])
        properties: dict[str, Any] = {"spacing": [float(mm) for mm in spacing[::-1]]}
        self._check_memory(scan, data.shape, spacing)
        with _by_nnunet(scan, "preparation"):
            preprocessor = self.parts.configuration.preprocessor_class(verbose=False)
            prepared, _, properties = preprocessor.run_case_npy(
                np.ascontiguousarray(data.transpose(0, 3, 2, 1)),  # sums depend on memory's order
                None,
                properties,
                self.parts.manager,
                self.parts.configuration,
                self.dataset,
            )
        if 0 in prepared.shape:
            raise ScanError(f"{scan.name}: nothing is left after nnU-Net's preparation")
        affine = affine @ self._to_read(properties, prepared.shape[1:])
        return MetaTensor(
            torch.from_numpy(np.ascontiguousarray(prepared, dtype=np.float32)),
            affine=torch.as_tensor(affine),
            meta={_NOTES: properties, _TURN: turn},
        )

    def _to_read(self, properties: Mapping[str, Any], shape: Sequence[int]) -> np.ndarray:
        """Return the affine from prepared voxels to voxels (x, y, z) of the scan as read."""
        matrix = np.eye(4)
        cropped = properties["shape_after_cropping_and_before_resampling"]
        for new, axis in enumerate(self.parts.manager.transpose_forward):
            # Resizing by shape makes the outer faces of both grids coincide.
            scale = cropped[new] / shape[new]
            first = properties["bbox_used_for_cropping"][new][0]
            matrix[2 - axis, :] = 0
            matrix[2 - axis, new] = scale
            matrix[2 - axis, 3] = first + 0.5 * scale - 0.5
        return matrix

    def restore(self, logits: torch.Tensor, scan: Scan, prepared: MetaTensor) -> torch.Tensor:
        """Return the masks (K, X, Y, Z) on the scan's grid, by nnU-Net's own steps."""
        properties = prepared.meta[_NOTES]
        spacing = [properties["spacing"][axis] for axis in self.parts.manager.transpose_forward]
        target = list(self.parts.configuration.spacing)
        target = target if len(target) == len(spacing) else [spacing[0], *target]
        with _by_nnunet(scan, "way back"):
            resampled = self.parts.configuration.resampling_fn_probabilities(
                logits, properties["shape_after_cropping_and_before_resampling"], target, spacing
            )
            resampled = torch.as_tensor(resampled)
            if self.parts.labels.has_regions:
                masks = self.parts.labels.apply_inference_nonlin(resampled) > 0.5
            else:
                best = resampled.argmax(0)
                masks = torch.stack([best == index for index in range(len(resampled))])
        whole = torch.zeros((len(masks), *properties["shape_before_cropping"]), dtype=torch.bool)
        if not self.parts.labels.has_regions:
            whole[0] = True  # what was cropped away is background
        box: Any = (..., *(slice(*ends) for ends in properties["bbox_used_for_cropping"]))
        whole[box] = masks
        back = [1 + axis for axis in self.parts.manager.transpose_backward]
        whole = whole.permute(0, *back).permute(0, 3, 2, 1)  # (z, y, x) as read -> (x, y, z)
        turn = prepared.meta[_TURN]
        if turn is not None:
            undo = nib.orientations.ornt_transform(_AS_IT_LIES, turn)
            turned = [nib.apply_orientation(mask, undo) for mask in whole.numpy()]
            whole = torch.from_numpy(np.stack(turned))
        return whole.contiguous()

    def _check_memory(self, scan: Scan, shape: Sequence[int], spacing: Sequence[float]) -> None:
        """Raise OutOfMemoryError if the resampled scan or a window does not fit into the memory."""
        target, patch = self.parts.configuration.spacing, self.parts.configuration.patch_size
        there = [spacing[2 - axis] for axis in self.parts.manager.transpose_forward][-len(target) :]
        channels, *voxels = shape
        grown = math.prod(float(n) for n in voxels)
        for now, then in zip(there, target, strict=True):
            grown *= now / then
        needed = (4 * channels + 16) * max(grown, float(math.prod(patch)))
        if not needed < _memory():
            raise OutOfMemoryError(
                f"{scan.name}: to resample it from {in_mm(there)} to {in_mm(target)} (spacing in "
                f"plans.json) and see it in windows of {' x '.join(map(str, patch))} voxels "
                f"(patch_size) takes {needed / 1e9:.3g} GB, more than the memory. Is the scan's "
                "voxel size right, and are the plans?"
            )


def _as_read(scan: Scan, reader: str) -> tuple[np.ndarray | None, Sequence[float]]:
    """Return how a reader turns a scan's axes, None if it does not, and the voxel size after it."""
    library, reorients = READERS[reader]
    spacing = spacing_as_read_by(scan, library)
    if not reorients:
        tell_difference(scan, spacing, reader)
        return None, spacing
    turn = nib.io_orientation(affine_as_read_by(scan, library))
    if library == "nibabel" and isinstance(scan.header, nib.Nifti1Header):
        turned = _reoriented_by_nibabel(scan.header, scan.shape, turn)
    else:
        turned = [spacing[axis] for axis in np.argsort(turn[:, 0])]
    tell_difference(scan, [turned[int(axis)] for axis in turn[:, 0]], reader)
    if not np.array_equal(turn, nib.io_orientation(scan.affine)):
        tell(
            f"{scan.name}: {reader}, by which the model reads its scans, follows another form of "
            "the header than the scan's affine does, and turns other axes than that would. The "
            "prediction is the model's own; maps lie by the affine. Repair the header"
        )
    return turn, turned


def _reoriented_by_nibabel(
    header: nib.Nifti1Header, shape: Sequence[int], turn: np.ndarray
) -> Sequence[float]:
    """Return the voxel size that nibabel gives for an image once it has turned it."""
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    empty = np.broadcast_to(np.uint8(0), tuple(shape))
    image = kind(empty, header.get_best_affine(), header)
    return [float(mm) for mm in image.as_reoriented(turn).header.get_zooms()[:3]]


def _memory() -> float:
    """Return the machine's memory in bytes, or 1 TiB where it is unknown."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 2.0**40


@contextlib.contextmanager
def _by_nnunet(scan: Scan, what: str) -> Iterator[None]:
    """Run nnU-Net's code without its printing, and raise any error of it as a ScanError."""
    try:
        with quietly():
            yield
    except Exception as error:  # its code may raise anything
        raise ScanError(
            f"{scan.name}: nnU-Net's {what} fails: {error!r}. Do plans.json and dataset.json fit "
            "the installed nnU-Net?"
        ) from error
