"""A scan on its way through a MONAI bundle: its preprocessing, and its postprocessing back.

The masks that come back are those of the file that the bundle itself would write: its transforms
run one after the other, and a saver's own resampling and rounding are done, without a file.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor, NibabelWriter
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    MapLabelValued,
    MapTransform,
    RandomizableTrait,
    SaveImaged,
    apply_transform,
)
from monai.transforms.utility.array import Lambda
from monai.transforms.utility.dictionary import ConcatItemsd, Lambdad

from seg3dcam.errors import ModelError, ScanError, tell
from seg3dcam.geometry import SAME_GRID_MM, corner_gap, spacing_of
from seg3dcam.models.bundle.config import Bundle
from seg3dcam.models.bundle.readers import read_as
from seg3dcam.models.spacing import affine_as_read_by
from seg3dcam.scan import Scan
from seg3dcam.targets import Activation

#: Words in the keys of images that are truths, from which nothing is predicted. (A mask may be.)
_TRUTH = ("label", "truth", "gt")

#: Where a prepared scan keeps what else its preparation gave, in its `meta`.
_KEPT = "seg3dcam_bundle"

#: Transforms that undo each other lead back to the same place within this many mm.
_SAME_MM = 0.01

#: Transforms that write files or print have names that begin so; none of them is applied.
_WRITERS = ("Save", "Write", "DataStats")


def loaded_keys(preprocessing: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Return the keys that images are loaded for, and those of truths among them, left out."""
    loaded = [str(k) for t in preprocessing if isinstance(t, LoadImaged) for k in t.keys]
    joined = {k for t in preprocessing if isinstance(t, ConcatItemsd) for k in _keys_of(t)}
    loaded = list(dict.fromkeys(loaded))
    truths = [
        key
        for key in loaded
        if key not in joined and any(word in key.lower().split("_") for word in _words())
    ]
    if len(truths) == len(loaded):
        truths = []
    return [key for key in loaded if key not in truths], truths


def _keys_of(transform: Any) -> set[str]:
    """Return the keys that a transform says it is for; foreign ones may say none."""
    return {str(key) for key in getattr(transform, "keys", None) or ()}


def _words() -> list[str]:
    return [word + end for word in _TRUTH for end in ("", "s")]


def without_truths(
    bundle: Bundle, name: str, transforms: Sequence[Any], truths: Sequence[str]
) -> None:
    """Let transforms do without the truths, as MONAI's own `allow_missing_keys`.

    Raises:
        ModelError: one goes by a truth, such as a crop around what is labelled.
    """
    for transform in transforms:
        if isinstance(transform, MapTransform) and _keys_of(transform) & set(truths):
            transform.allow_missing_keys = True
        for argument in ("source_key", "mask_key", "label_key", "ref_image"):
            key = getattr(transform, argument, None)
            if isinstance(key, str) and key in truths:
                raise ModelError(
                    f"{bundle.place}: {name} has {type(transform).__name__} with {argument} "
                    f"{key!r}, a truth, which is left out on purpose: nothing is predicted from "
                    f"it. Set {argument} to an image (--set), or give {key} as one of the inputs"
                )


def check_not_random(bundle: Bundle, name: str, transforms: Sequence[Any]) -> None:
    """Raise ModelError for transforms that do another thing each time."""
    for transform in transforms:
        if isinstance(transform, RandomizableTrait):
            raise ModelError(
                f"{bundle.place}: {name} has {type(transform).__name__}, which is random: a "
                "prediction would be another one each time. Take it out with --set"
            )


# ---------------------------------------------------------------- there


def prepare(
    bundle: Bundle, transforms: Sequence[Any], keys: Sequence[str], scan: Scan
) -> MetaTensor:
    """Return what the bundle's own preprocessing makes of a scan, (C, *S)."""
    if len(keys) > 1 and len(keys) != len(scan.data):
        raise ScanError(
            f"{scan.title} has {len(scan.data)} channels, the bundle reads {len(keys)} images: "
            f"{', '.join(keys)}"
        )
    affine = _itk_affine(bundle, scan) if bundle.itk else scan.affine
    parts = [scan.data] if len(keys) == 1 else list(scan.data.split(1))
    data: Any = {key: _as_loaded(part, scan, affine) for key, part in zip(keys, parts, strict=True)}
    with bundle.own_code():
        for transform in transforms:
            if isinstance(transform, LoadImaged):
                if not transform._loader.image_only:
                    data |= {f"{key}_meta_dict": data[key].meta for key in keys if key in data}
                data |= {key: data[key].to(read_as(transform)) for key in keys}
                continue  # it is loaded, and its channels come first
            if isinstance(transform, EnsureChannelFirstd) and _keys_of(transform) <= set(keys):
                continue
            data = _applied(bundle, transform, data)
    prepared = data.get("image", data.get(keys[0]))
    if not isinstance(prepared, MetaTensor):
        raise ModelError(
            f"bundle {bundle.name}: preprocessing gives no 'image' that knows where it lies; it "
            f"gives {', '.join(f'{k} ({type(v).__name__})' for k, v in data.items())}"
        )
    if 0 in prepared.shape:
        raise ScanError(f"{scan.name}: nothing is left after the bundle's preprocessing")
    return _in_the_scans_world(prepared, data, affine, scan)


def _in_the_scans_world(
    prepared: MetaTensor, data: dict[str, Any], affine: np.ndarray, scan: Scan
) -> MetaTensor:
    """Return prepared voxels whose affine leads to the scan's mm, not to those of its reader."""
    images = {key: value for key, value in data.items() if isinstance(value, MetaTensor)}
    places = {key: _place(value) for key, value in images.items()} | {"image": _place(prepared)}
    if affine is not scan.affine:
        to_scan = scan.affine @ np.linalg.inv(affine)
        prepared.affine = torch.as_tensor(to_scan) @ prepared.affine.to(torch.float64)
    prepared.meta[_KEPT] = places
    return prepared


def _place(image: MetaTensor) -> tuple[dict[str, Any], list[Any]]:
    """Return where an image lies and what was done to it."""
    return copy.deepcopy(dict(image.meta)), copy.deepcopy(image.applied_operations)


def _as_loaded(voxels: torch.Tensor, scan: Scan, ras: np.ndarray) -> MetaTensor:
    """Return voxels (C, X, Y, Z) as LoadImaged and EnsureChannelFirstd give them."""
    affine = torch.as_tensor(ras, dtype=torch.float64)
    meta = {
        "original_affine": affine.clone(),
        "spatial_shape": np.asarray(scan.shape),
        "original_channel_dim": 0,
        "space": "RAS",
        "filename_or_obj": scan.name,
    }
    return MetaTensor(voxels.clone(), affine=affine, meta=meta)


def _itk_affine(bundle: Bundle, scan: Scan) -> np.ndarray:
    """Return the affine that ITK reads in the scan's header; it takes the spacing from pixdim.

    A bundle with an `ITKReader` resamples by that, so its network sees what ITK reads.
    """
    header = scan.header
    if not isinstance(header, nib.Nifti1Header) or _all_agree(header, scan):
        return scan.affine
    affine = affine_as_read_by(scan, "itk")
    if corner_gap(affine, scan.affine, scan.shape) <= SAME_GRID_MM:
        return scan.affine
    tell(
        f"{scan.name}: the bundle reads it with ITK, which takes its header otherwise than its "
        f"affine says: voxels of {_mm(affine)} at {_place_of(affine)} mm, instead of "
        f"{_mm(scan.affine)} at {_place_of(scan.affine)} mm. The network sees what ITK reads; "
        "results lie where the affine says"
    )
    return affine


def _mm(affine: np.ndarray) -> str:
    return " x ".join(f"{mm:.4g}" for mm in spacing_of(affine)) + " mm"


def _place_of(affine: np.ndarray) -> str:
    return f"({', '.join(f'{mm:.4g}' for mm in affine[:3, 3])})"


def _all_agree(header: nib.Nifti1Header, scan: Scan) -> bool:
    """Tell whether a header has forms, each of which says what the scan's affine says."""
    zooms = np.asarray(header.get_zooms()[:3], dtype=np.float64)
    forms = [header.get_qform(coded=True)[0], header.get_sform(coded=True)[0]]
    said = [form for form in forms if form is not None]
    return (
        bool(said)
        and np.allclose(zooms, scan.spacing, rtol=1e-5)
        and all(corner_gap(form, scan.affine, scan.shape) <= SAME_GRID_MM for form in said)
    )


def _applied(bundle: Bundle, transform: Any, data: dict[str, Any]) -> dict[str, Any]:
    """Apply one transform of the preprocessing, and see that voxels do not move unnoticed."""
    name = type(transform).__name__
    if name.startswith(_WRITERS):
        return data
    foreign = isinstance(transform, Lambda | Lambdad) or not type(transform).__module__.startswith(
        "monai."
    )
    before = {k: v for k, v in data.items() if isinstance(v, MetaTensor)}
    shapes = {k: (v.shape[1:], v.affine.clone()) for k, v in before.items()}
    places = {k: _place(v) for k, v in before.items()} if foreign else {}
    try:
        data = apply_transform(transform, data)
    except Exception as error:
        cause = error.__cause__ or error
        raise ModelError(
            f"bundle {bundle.name}: preprocessing {name} failed on this scan: {cause}"
        ) from error
    if not foreign:
        return data
    if not isinstance(data, dict):
        raise ModelError(
            f"bundle {bundle.name}: preprocessing {name} gives a {type(data).__name__}; a dict of "
            "images is wanted"
        )
    for key, (shape, affine) in shapes.items():
        after = data.get(key)
        if after is None or tuple(after.shape[1:]) == tuple(shape):
            continue
        if torch.equal(torch.as_tensor(getattr(after, "affine", affine)), affine):
            raise ModelError(
                f"bundle {bundle.name}: preprocessing {name} turns {tuple(shape)} voxels of {key} "
                f"into {tuple(after.shape[1:])} and does not say where they lie (the affine is as "
                "before), so nothing can be brought back to the scan"
            )
    return _with_places(data, shapes, places)


def _with_places(
    data: dict[str, Any], shapes: dict[str, Any], places: dict[str, Any]
) -> dict[str, Any]:
    """Return images that foreign code made without a place with the one of what it made them of.

    That is known where all images before lay on one grid, and the new one has its shape.
    """
    grids = list(shapes.values())
    alike = grids and all(
        shape == grids[0][0] and torch.equal(affine, grids[0][1]) for shape, affine in grids
    )
    if not alike:
        return data
    meta, operations = next(iter(places.values()))
    for key, value in data.items():
        plain = isinstance(value, np.ndarray) or (
            isinstance(value, torch.Tensor) and not isinstance(value, MetaTensor)
        )
        if plain and tuple(value.shape[1:]) == tuple(grids[0][0]):
            data[key] = MetaTensor(
                torch.as_tensor(value),
                meta=copy.deepcopy(meta),
                applied_operations=copy.deepcopy(operations),
            )
    return data


# ---------------------------------------------------------------- and back


def restorer(
    bundle: Bundle, postprocessing: Sequence[Any], activation: Activation
) -> Callable[[torch.Tensor, Scan, MetaTensor], torch.Tensor | None] | None:
    """Return the way of the bundle's own postprocessing, from logits to masks on the scan.

    None where the bundle has no way back of its own.
    """
    savers = [t for t in postprocessing if isinstance(t, SaveImaged) and "pred" in _keys_of(t)]
    resamples = any(t.saver.meta_kwargs["resample"] for t in savers)
    if not resamples and not any(isinstance(t, Invertd) for t in postprocessing):
        return None
    transforms = [t for t in postprocessing if not type(t).__name__.startswith(_WRITERS)]
    saver = savers[0].saver if savers else None

    def restore(logits: torch.Tensor, scan: Scan, prepared: MetaTensor) -> torch.Tensor | None:
        places = prepared.meta[_KEPT]
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
    # Invertd takes the operations off the list.
    return MetaTensor(
        values, meta=copy.deepcopy(meta), applied_operations=copy.deepcopy(operations)
    )


@contextmanager
def _quiet_inverse() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "inverse has been called but no invertible")
        yield


class _Form:
    """What a prediction's numbers are while transforms are applied to it.

    Attributes:
        labels: one channel of class numbers, which exclude each other.
        threshold: above it, a class is there.
    """

    def __init__(self, classes: int, activation: Activation) -> None:
        self.classes = classes
        self.exclusive = activation == "softmax" and classes > 1
        self.labels = False
        self.threshold = 0.0  # of logits

    def readable_after(self, transform: Any, found: torch.Tensor) -> bool:
        """Note what a transform makes of a prediction; False: no class can be told any more."""
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
        """Return masks (K, *S) of a prediction on the scan."""
        if self.labels and len(found) == 1:
            # Labels that are interpolated linearly are fractions; they mean the nearest class.
            labels = found[0].round()
            return torch.stack([labels == index for index in range(self.classes)])
        whole = ((found == 0) | (found == 1)).all()
        if self.exclusive and not whole:
            labels = found.argmax(0)
            return torch.stack([labels == index for index in range(self.classes)])
        return found > self.threshold


def _as_written(pred: Any, scan: Scan, saver: Any, form: _Form) -> torch.Tensor | None:
    """Return a prediction as the bundle's saver would write it; None: not on the scan's grid."""
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
        # A file of whole numbers cuts fractions off.
        found = torch.as_tensor(NibabelWriter.create_backend_obj(found, dtype=dtype).dataobj)
    if tuple(found.shape[1:]) != scan.shape:
        return None
    moved = wanted is not None and corner_gap(meta["affine"], wanted, scan.shape) > _SAME_MM
    return None if moved else found
