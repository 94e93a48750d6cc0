"""A prediction on its way back to the scan through the postprocessing of a MONAI bundle.

The masks are those of the file that the bundle itself would write: its transforms run one after the
other, and what its saver does to voxels, resampling and rounding, is done without writing a file.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from monai.data import MetaTensor, NibabelWriter
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Invertd,
    MapLabelValued,
    SaveImaged,
    apply_transform,
)

from seg3dcam.errors import tell
from seg3dcam.geometry import same_grid
from seg3dcam.models.bundle.config import Bundle
from seg3dcam.models.bundle.preprocessing import PLACES
from seg3dcam.models.bundle.transforms import WRITERS, keys_of
from seg3dcam.scan import Scan
from seg3dcam.targets import Activation

#: Transforms that undo each other lead back to the same place within this many mm.
_SAME_MM = 0.01


def restorer(
    bundle: Bundle, postprocessing: Sequence[Any], activation: Activation
) -> Callable[[torch.Tensor, Scan, MetaTensor], torch.Tensor | None] | None:
    """Return the function that turns logits into masks on the scan by the bundle's postprocessing.

    The result is None where the postprocessing does not lead back to the scan.
    """
    savers = [t for t in postprocessing if isinstance(t, SaveImaged) and "pred" in keys_of(t)]
    resamples = any(t.saver.meta_kwargs["resample"] for t in savers)
    if not resamples and not any(isinstance(t, Invertd) for t in postprocessing):
        return None
    transforms = [t for t in postprocessing if not type(t).__name__.startswith(WRITERS)]
    saver = savers[0].saver if savers else None

    def restore(logits: torch.Tensor, scan: Scan, prepared: MetaTensor) -> torch.Tensor | None:
        places = prepared.meta[PLACES]
        data: Any = {key: _placed(torch.zeros(1, 1, 1, 1), *place) for key, place in places.items()}
        data["image"] = _placed(prepared.as_tensor(), *places["image"])
        data["pred"] = _placed(logits.clone(), *places["image"])
        form = _Form(len(logits), activation)
        left: list[Any] = []
        step: Any = None
        try:
            with bundle.own_code(), _quiet_inverse():
                for number, step in enumerate(transforms):
                    after = apply_transform(step, dict(data))
                    if not form.readable_after(step, torch.as_tensor(after["pred"])):
                        left = transforms[number:]
                        break
                    data = after
                step = savers[0] if savers else step
                moved = _as_written(data["pred"], scan, saver, form)
        except Exception as error:
            tell(
                f"bundle {bundle.name}: postprocessing {type(step).__name__} failed "
                f"({error.__cause__ or error}); the prediction is brought to the scan without it, "
                "linearly"
            )
            return None
        if len(left) > 1:
            tell(
                f"bundle {bundle.name}: the prediction is as before "
                f"{type(left[0]).__name__}, which joins classes into one map; what the bundle does "
                f"to that map is not seen: {', '.join(type(t).__name__ for t in left[1:])}"
            )
        return None if moved is None else form.masks(moved)

    return restore


def _placed(values: torch.Tensor, meta: dict[str, Any], operations: list[Any]) -> MetaTensor:
    # The operations are copied, since Invertd removes them from the list.
    return MetaTensor(
        values, meta=copy.deepcopy(meta), applied_operations=copy.deepcopy(operations)
    )


@contextmanager
def _quiet_inverse() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "inverse has been called but no invertible")
        yield


class _Form:
    """What the numbers of a prediction mean while transforms are applied to it.

    Attributes:
        exclusive: whether a voxel belongs to one class only.
        labels: whether the prediction is one channel of class numbers.
        threshold: a class is present where its number is above this.
    """

    def __init__(self, classes: int, activation: Activation) -> None:
        self.classes = classes
        self.exclusive = activation == "softmax" and classes > 1
        self.labels = False
        self.threshold = 0.0  # for logits

    def readable_after(self, transform: Any, found: torch.Tensor) -> bool:
        """Note what a transform makes of a prediction; return False if its classes are lost."""
        if isinstance(transform, MapLabelValued):
            return False
        if isinstance(transform, Activationsd | AsDiscreted):
            self.threshold = 0.5
        if self.classes == 1:
            return len(found) == 1
        if len(found) == self.classes:
            return True
        argmax = isinstance(transform, AsDiscreted) and any(transform.argmax)
        labels = self.labels or self.exclusive or argmax
        low, high = found.min().round(), found.max().round()
        if len(found) == 1 and labels and low >= 0 and high < self.classes:
            self.labels = True
            return True
        return False

    def masks(self, found: torch.Tensor) -> torch.Tensor:
        """Return the masks (K, *S) of a prediction on the scan."""
        if self.labels and len(found) == 1:
            # Linear interpolation makes fractions of labels; the nearest class is meant.
            labels = found[0].round()
            return torch.stack([labels == index for index in range(self.classes)])
        whole = ((found == 0) | (found == 1)).all()
        if self.exclusive and not whole:
            labels = found.argmax(0)
            return torch.stack([labels == index for index in range(self.classes)])
        return found > self.threshold


def _as_written(pred: Any, scan: Scan, saver: Any, form: _Form) -> torch.Tensor | None:
    """Return a prediction as the bundle's saver would write it; None if off the scan's grid."""
    found = torch.as_tensor(pred).as_subclass(torch.Tensor)
    meta = dict(pred.meta) if isinstance(pred, MetaTensor) else {}
    wanted = meta.get("original_affine")
    settings = {} if saver is None else dict(saver.meta_kwargs)
    if saver is not None and settings.get("resample") and meta:
        writer = NibabelWriter(output_dtype=None)
        writer.set_data_array(found, channel_dim=0, squeeze_end_dims=False)
        writer.set_metadata(meta, **settings)
        found, meta = torch.as_tensor(writer.data_obj).movedim(-1, 0), {"affine": writer.affine}
    dtype = None if saver is None else saver.init_kwargs.get("output_dtype")
    if form.labels and dtype is not None:
        # In a file of whole numbers, fractions are cut off.
        found = torch.as_tensor(NibabelWriter.create_backend_obj(found, dtype=dtype).dataobj)
    if tuple(found.shape[1:]) != scan.shape:
        return None
    if wanted is None or same_grid(meta["affine"], wanted, scan.shape, within_mm=_SAME_MM):
        return found
    return None
