"""A trained nnU-Net v2 folder as a model: its own preparation, windows, folds and way back.

nnU-Net reads a scan as (z, y, x), permutes the axes (`transpose_forward`), crops to the box of
nonzero voxels, and resamples it by shape. All of that is one affine from the prepared voxels to the
scan's, so maps go to the scan in a single interpolation; masks go back by nnU-Net's own steps.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor

from seg3dcam.errors import ModelError, OutOfMemoryError, ScanError, tell
from seg3dcam.files import digest_of_all
from seg3dcam.models.base import SegModel
from seg3dcam.models.nnunet import parts as parts_of
from seg3dcam.models.nnunet.files import (
    READERS,
    Checkpoint,
    Dataset,
    check_channels,
    check_folder,
    folds_of,
    read_checkpoint,
    read_dataset,
    read_plans,
)
from seg3dcam.models.spacing import affine_as_read_by, spacing_as_read_by, tell_difference
from seg3dcam.models.specs import NnunetSpec
from seg3dcam.network.ensemble import Ensemble
from seg3dcam.scan import Scan
from seg3dcam.windows import WindowPlan

#: What a prepared scan remembers of its preparation, in its `meta`: nnU-Net's own notes, and how
#: its reader turns the axes.
_NOTES, _TURN = "nnunet_properties", "nnunet_turn"

_AS_IT_LIES = np.array([[0, 1], [1, 1], [2, 1]])


def build(spec: NnunetSpec, path: Path, trust: bool) -> SegModel:
    """Read a folder that nnU-Net v2 has trained into.

    Args:
        path: the folder of the spec is relative to this file.
        trust: allow a checkpoint that holds more than tensors and numbers, and networks from
            outside of dynamic_network_architectures.

    Raises:
        ModelError: a file is missing, damaged or does not fit the others.
        ConfigError: plans.json or dataset.json holds what it should not, by key.
        MissingExtraError: nnU-Net is not installed.
    """
    folder = path.parent / spec.nnunet
    check_folder(folder, spec.checkpoint)
    folds = folds_of(folder, spec)
    checkpoints = [read_checkpoint(file, trust) for file in folds.values()]
    first, plans_file = checkpoints[0], folder / "plans.json"
    dataset = read_dataset(folder / "dataset.json")
    plans, configuration = read_plans(plans_file, first.init_args.configuration)
    _check_stage(configuration.previous_stage, folder)
    check_channels(plans, configuration, dataset, plans_file)
    with _quietly():
        parts = parts_of.assemble(plans_file, plans, configuration, dataset, first, trust)
        networks = [
            parts_of.network(
                parts, checkpoint, len(dataset.channels), f"{file.parent.name}/{file.name}", trust
            )
            for checkpoint, file in zip(checkpoints, folds.values(), strict=True)
        ]
    trained = _Trained(parts, dataset.model_dump(exclude_unset=True), plans.image_reader_writer)
    patch = tuple(configuration.patch_size)
    slices = len(patch) == 2
    flips = _flips(first, len(patch), folder) if spec.mirroring else ()
    mirror_axes = [axis + slices for axis in flips]
    alone = len(networks) == 1 and not mirror_axes and not slices
    return SegModel(
        module=(networks[0] if alone else Ensemble(networks, mirror_axes, slices=slices)).eval(),
        class_names=_class_names(dataset),
        activation="sigmoid" if dataset.has_regions else "softmax",
        prepare=trained.prepare,
        restore=trained.restore,
        window=WindowPlan(
            (1, *patch) if slices else patch,
            overlap=1 - spec.tile_step_size,
            convention="nnunet",
        ),
        in_channels=len(dataset.channels),
        name=f"nnU-Net {plans.dataset_name} {first.init_args.configuration}",
        spec={
            "dataset": plans.dataset_name,
            "sha256": digest_of_all([plans_file, folder / "dataset.json"]),
            "plans": plans.plans_name,
            "configuration": first.init_args.configuration,
            "trainer": first.trainer_name,
            "folds": list(folds),
            "checkpoint": spec.checkpoint,
            "epochs": [checkpoint.current_epoch for checkpoint in checkpoints],
            "mirror_axes": mirror_axes,
            "tile_step_size": spec.tile_step_size,
            "channels": {str(number): name for number, name in dataset.channels.items()},
        },
    )


def _check_stage(previous: str | None, folder: Path) -> None:
    if previous is not None:
        raise ModelError(
            f"{folder}: this configuration is the second stage of a cascade, which sees the "
            f"prediction of {previous} too: explain that one, or a 3d_fullres model"
        )


def _flips(checkpoint: Checkpoint, axes: int, folder: Path) -> tuple[int, ...]:
    """Return the axes of the patch along which the prediction is averaged over flips."""
    flips = checkpoint.inference_allowed_mirroring_axes
    if flips and max(flips) >= axes:
        raise ModelError(
            f"{folder}: inference_allowed_mirroring_axes {flips} of the checkpoint name more axes "
            f"than the {axes} of patch_size in plans.json"
        )
    return flips


def _class_names(dataset: Dataset) -> tuple[str, ...]:
    """Return one name for each output channel: labels by value, regions in their order."""
    if dataset.has_regions:
        return tuple(dataset.regions)
    of_label: dict[int, list[str]] = {}
    for name, labels in dataset.classes.items():
        of_label.setdefault(labels[0], []).append(name)
    return tuple(" or ".join(of_label[label]) for label in sorted(of_label))


@dataclass(frozen=True)
class _Trained:
    """How a scan goes to the network and its logits come back, by nnU-Net's own steps."""

    parts: parts_of.Parts
    dataset: dict[str, Any]
    reader: str

    def prepare(self, scan: Scan) -> MetaTensor:
        """Return what nnU-Net's preprocessor makes of a scan, (C, *S), and where it lies."""
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
                np.ascontiguousarray(data.transpose(0, 3, 2, 1)),  # sums go in memory's order
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
            # Resized by shape: the outer faces of both grids coincide.
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
        """Raise OutOfMemoryError where a resampled scan or a window is larger than the memory."""
        target, patch = self.parts.configuration.spacing, self.parts.configuration.patch_size
        there = [spacing[2 - axis] for axis in self.parts.manager.transpose_forward][-len(target) :]
        channels, *voxels = shape
        grown = math.prod(float(n) for n in voxels)
        for now, then in zip(there, target, strict=True):
            grown *= now / then
        needed = (4 * channels + 16) * max(grown, float(math.prod(patch)))
        if not needed < _memory():
            raise OutOfMemoryError(
                f"{scan.name}: to resample it from {_mm(there)} to {_mm(target)} (spacing in "
                f"plans.json) and see it in windows of {' x '.join(map(str, patch))} voxels "
                f"(patch_size) takes {needed / 1e9:.3g} GB, more than the memory. Is the scan's "
                "voxel size right, and are the plans?"
            )


def _as_read(scan: Scan, reader: str) -> tuple[np.ndarray | None, Sequence[float]]:
    """Return how a reader turns a scan's axes, None where it does not, and its voxel size then."""
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
    """Return the voxel size after nibabel has turned an image: of pixdim, or now of the affine."""
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    empty = np.broadcast_to(np.uint8(0), tuple(shape))
    image = kind(empty, header.get_best_affine(), header)
    return [float(mm) for mm in image.as_reoriented(turn).header.get_zooms()[:3]]


def _memory() -> float:
    """Return the machine's memory in bytes, or what hardly one has where it does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 2.0**40


def _mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{mm:.4g}" for mm in spacing) + " mm"


@contextlib.contextmanager
def _by_nnunet(scan: Scan, what: str) -> Iterator[None]:
    """Let nnU-Net work quietly; what it raises becomes a ScanError."""
    try:
        with _quietly():
            yield
    except Exception as error:  # whatever its code leads to
        raise ScanError(
            f"{scan.name}: nnU-Net's {what} fails: {error!r}. Do plans.json and dataset.json fit "
            "the installed nnU-Net?"
        ) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what nnU-Net prints from the user; it cannot be told not to."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected old nnU-Net plans format")
        warnings.filterwarnings("ignore", "Network class .* not found. Attempting to locate")
        yield
