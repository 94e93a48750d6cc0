"""A scan on its way through the preprocessing of a MONAI bundle.

The bundle's own transforms run one after the other, as they would on the scan's file.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import EnsureChannelFirstd, LoadImaged, apply_transform
from monai.transforms.utility.array import Lambda
from monai.transforms.utility.dictionary import Lambdad

from seg3dcam.errors import ModelError, ScanError, tell
from seg3dcam.geometry import same_grid, spacing_of
from seg3dcam.models.bundle.config import Bundle
from seg3dcam.models.bundle.readers import read_as
from seg3dcam.models.bundle.transforms import WRITERS, keys_of
from seg3dcam.models.spacing import affine_as_read_by, in_mm
from seg3dcam.scan import Scan

#: The key in the `meta` of a prepared scan under which postprocessing finds where each image lies
#: and what was done to it.
PLACES = "seg3dcam_bundle"


def prepare(
    bundle: Bundle, transforms: Sequence[Any], keys: Sequence[str], scan: Scan
) -> MetaTensor:
    """Return the network's input (C, *S), which the bundle's own preprocessing makes of a scan."""
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
                continue  # the scan is loaded already, with its channels first
            if isinstance(transform, EnsureChannelFirstd) and keys_of(transform) <= set(keys):
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
    """Let the affine of prepared voxels lead to the scan's own mm, not to those of ITK's reader."""
    images = {key: value for key, value in data.items() if isinstance(value, MetaTensor)}
    places = {key: _place(value) for key, value in images.items()} | {"image": _place(prepared)}
    if affine is not scan.affine:
        to_scan = scan.affine @ np.linalg.inv(affine)
        prepared.affine = torch.as_tensor(to_scan) @ prepared.affine.to(torch.float64)
    prepared.meta[PLACES] = places
    return prepared


def _place(image: MetaTensor) -> tuple[dict[str, Any], list[Any]]:
    """Return copies of an image's metadata and of the list of transforms applied to it."""
    return copy.deepcopy(dict(image.meta)), copy.deepcopy(image.applied_operations)


def _as_loaded(voxels: torch.Tensor, scan: Scan, affine: np.ndarray) -> MetaTensor:
    """Return voxels (C, X, Y, Z) as LoadImaged and EnsureChannelFirstd give them."""
    ras = torch.as_tensor(affine, dtype=torch.float64)
    meta = {
        "original_affine": ras.clone(),
        "spatial_shape": np.asarray(scan.shape),
        "original_channel_dim": 0,
        "space": "RAS",
        "filename_or_obj": scan.name,
    }
    return MetaTensor(voxels.clone(), affine=ras, meta=meta)


def _itk_affine(bundle: Bundle, scan: Scan) -> np.ndarray:
    """Return the affine that ITK reads from the scan's header, with the voxel size of pixdim.

    A bundle with an `ITKReader` resamples by this affine, so its network sees the scan as ITK does.
    """
    header = scan.header
    if not isinstance(header, nib.Nifti1Header) or _all_agree(header, scan):
        return scan.affine
    affine = affine_as_read_by(scan, "itk")
    if same_grid(affine, scan.affine, scan.shape):
        return scan.affine
    tell(
        f"{scan.name}: the bundle reads it with ITK, which takes its header otherwise than its "
        f"affine says: voxels of {in_mm(spacing_of(affine))} at {_place_of(affine)} mm, instead of "
        f"{in_mm(scan.spacing)} at {_place_of(scan.affine)} mm. The network sees what ITK reads; "
        "results lie where the affine says"
    )
    return affine


def _place_of(affine: np.ndarray) -> str:
    return f"({', '.join(f'{mm:.4g}' for mm in affine[:3, 3])})"


def _all_agree(header: nib.Nifti1Header, scan: Scan) -> bool:
    """Tell whether pixdim and every form of a header agree with the scan's affine."""
    zooms = np.asarray(header.get_zooms()[:3], dtype=np.float64)
    forms = [header.get_qform(coded=True)[0], header.get_sform(coded=True)[0]]
    said = [form for form in forms if form is not None]
    return (
        bool(said)
        and np.allclose(zooms, scan.spacing, rtol=1e-5)
        and all(same_grid(form, scan.affine, scan.shape) for form in said)
    )


def _applied(bundle: Bundle, transform: Any, data: dict[str, Any]) -> dict[str, Any]:
    """Apply one transform of the preprocessing, and check that it says where voxels have moved."""
    name = type(transform).__name__
    if name.startswith(WRITERS):
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
    """Give a place to images that foreign code returned as plain arrays or tensors.

    The place is known where all images before lay on one grid and the returned one has its shape.
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
