"""CAMs of chosen cases, every few epochs: the part that handlers and callbacks share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from seg3dcam.cams.catalogue import ALL_METHODS
from seg3dcam.checks import is_meta_tensor, is_whole
from seg3dcam.errors import (
    ConfigError,
    EmptyRegionError,
    InputError,
    OutputError,
    ScanError,
    Seg3dcamWarning,
)
from seg3dcam.explaining.explain import explain_each
from seg3dcam.files import check_writable, unique_names
from seg3dcam.models.seg_model import SegModel
from seg3dcam.network.layers import LayerSpec
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.review import review_explanation, save_montage
from seg3dcam.scan import load_scan
from seg3dcam.targets import Activation
from seg3dcam.windows import WindowPlan


@dataclass
class EpochCams:
    """Explains chosen cases during training, and writes a folder for every epoch and case.

    A case gets `epoch_0005/case_0/cam_<target>.nii.gz`, in the place of the network's input in the
    patient, and a picture of its slices, `cam_<target>.png`. A repeated run replaces these files.
    The network, its statistics and all random states are put back, so training goes on exactly as
    it would without CAMs.

    Temporary problems do not stop a training: a class that is not predicted yet, an empty image, a
    full disk or a lack of memory only gives a warning. A wrong setting is an error at once.

    Args:
        out: folder for all results.
        targets: class names, indices or targets, one or a list, see `explain_each`; None explains
            every class that is predicted. A class index stands for the log-odds of the class over
            its predicted mask.
        target_layers, sliding_window, output, activation: see `BaseCAM`. The windows must be those
            of the validation.
        method: a key of `METHODS`.
        cases: numbers of validation cases, counted from 0 in the order of the validation.
        interval: number of epochs from one explanation to the next.
        class_names: one for each channel, for the names of files.

    Raises:
        ConfigError: the method is unknown, or the interval or a case is no whole number.

    Example:
        >>> import tempfile
        >>> network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv3d(2, 2, 1))
        >>> cams = EpochCams(tempfile.mkdtemp(), targets=[0], target_layers="1", interval=5)
        >>> cams.wants(epoch=5, case=0), cams.wants(epoch=6, case=0), cams.wants(epoch=5, case=1)
        (True, False, False)
    """

    out: str | Path
    targets: Any = None
    target_layers: LayerSpec = "auto"
    method: str = "hires_cam"
    cases: Iterable[int] = (0,)
    interval: int = 1
    class_names: Sequence[str] = ()
    activation: Activation = "softmax"
    sliding_window: WindowPlan | None = None
    output: OutputSelection = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        self.cases = frozenset(self.cases)
        if self.targets is not None and not isinstance(self.targets, list | tuple):
            self.targets = [self.targets]
        if self.method not in ALL_METHODS:
            raise ConfigError(f"method {self.method!r}: legal are {', '.join(ALL_METHODS)}")
        if not is_whole(self.interval) or self.interval < 1:
            raise ConfigError(f"interval {self.interval!r}: a whole number of epochs from 1 up")
        if not all(is_whole(case) and case >= 0 for case in self.cases):
            raise ConfigError(
                f"cases {sorted(self.cases, key=str)}: numbers of validation cases from 0 up"
            )
        check_writable(self.out)

    def wants(self, epoch: int, case: int) -> bool:
        """Tell whether a case is to be explained in an epoch."""
        return epoch % self.interval == 0 and case in self.cases

    def write(
        self, network: nn.Module, image: torch.Tensor, *, epoch: int, case: int
    ) -> list[Path]:
        """Explain one image (C, D, H, W) and return the pictures that were written.

        Args:
            image: the network's input. A MetaTensor has its own place; any other tensor is put on a
                grid of 1 mm.
        """
        try:
            return self._write(network, image, epoch, case)
        except (EmptyRegionError, ScanError, OutputError, torch.OutOfMemoryError) as error:
            warnings.warn(
                f"no CAM of case {case} in epoch {epoch}: {error}", Seg3dcamWarning, stacklevel=2
            )
            return []

    def _write(self, network: nn.Module, image: torch.Tensor, epoch: int, case: int) -> list[Path]:
        if image.ndim != 4:
            raise InputError(
                "an image to be explained is (C, D, H, W), one item of a batch, without a batch; "
                f"got {tuple(image.shape)}" + (": give batch[0]" if image.ndim == 5 else "")
            )
        with torch.inference_mode(False):
            with torch.device("cpu"):  # a MetaTensor's affine is made on the default device
                voxels = image.detach().clone().cpu().float()
                scan = load_scan(voxels, None if is_meta_tensor(voxels) else np.eye(4))
            model = SegModel(
                network,
                class_names=self.class_names,
                activation=self.activation,
                window=self.sliding_window,
                output=self.output,
            )
            explanations = explain_each(
                scan,
                model,
                self.targets,
                layers=self.target_layers,
                method=self.method,
                **self.settings,
            )
            folder = Path(self.out) / f"epoch_{epoch:04d}" / f"case_{case}"
            pictures, names = [], []
            for explanation in explanations:
                names.append(explanation.label)
                name = unique_names(names)[-1]
                explanation.save(folder / f"cam_{name}.nii.gz")
                review = review_explanation(explanation, case=f"case {case}, epoch {epoch}")
                pictures.append(save_montage(folder / f"cam_{name}.png", review))
        return pictures


class ValidationCases:
    """Counts the cases of a validation and explains those that are chosen.

    The handler and the callback share this.

    Args:
        batch_transform: a function from the batch to the images, (B, C, *S) or a list of (C, *S).
        out, settings: see `EpochCams`.
    """

    def __init__(
        self, batch_transform: Callable[[Any], Any], out: str | Path, **settings: Any
    ) -> None:
        self._cams, self._batch_transform = EpochCams(out, **settings), batch_transform
        self._next = 0

    def begin(self) -> None:
        """Begin a validation: count the cases from 0."""
        self._next = 0

    def explain(
        self, network: nn.Module, batch: Any, *, epoch: int, first_process: bool
    ) -> Iterator[Path]:
        """Explain the chosen cases of a batch, and yield their pictures.

        Args:
            first_process: whether this is the first process of a distributed training; the others
                explain nothing.
        """
        for image in images_of(self._batch_transform(batch)):
            case, self._next = self._next, self._next + 1
            if first_process and self._cams.wants(epoch, case):
                yield from self._cams.write(network, image, epoch=epoch, case=case)


def images_of(batch: Any) -> list[torch.Tensor]:
    """Return the images (C, *S) of a batch.

    The batch may be a tensor (B, C, *S), a dict with "image", a list of such dicts (as decollated
    by MONAI), or a tuple or list whose first element holds the images.

    Raises:
        InputError: the batch is none of these.

    >>> [tuple(image.shape) for image in images_of({"image": torch.zeros(2, 1, 4, 4, 4)})]
    [(1, 4, 4, 4), (1, 4, 4, 4)]
    """
    if isinstance(batch, torch.Tensor):
        if is_meta_tensor(batch):
            return [batch[number] for number in range(len(batch))]
        return list(batch)
    if isinstance(batch, Mapping) and "image" in batch:
        return images_of(batch["image"])
    if isinstance(batch, list | tuple) and batch:
        if isinstance(batch[0], Mapping) and all("image" in item for item in batch):
            return [item["image"] for item in batch]
        if isinstance(batch, list) and all(
            isinstance(item, torch.Tensor) and item.ndim == 4 for item in batch
        ):
            return batch
        return images_of(batch[0])
    raise InputError(
        f"no images found in a batch of type {type(batch).__name__}: it is no tensor (B, C, *S), "
        "has no 'image', and no such first element. Give batch_transform=, a function from the "
        "batch to the images"
    )
