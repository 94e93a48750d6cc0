"""Checks of how a MONAI bundle reads its images.

Scans are always read by `load_scan`, whichever reader the bundle names. Arguments by which a reader
would change voxels or their places are refused, since `load_scan` does not do the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from monai.data import ImageReader, ITKReader, NibabelReader
from monai.transforms import LoadImaged
from monai.utils import get_equivalent_dtype

from seg3dcam.errors import ModelError
from seg3dcam.models.bundle.config import Bundle

#: Arguments that may change voxels or places -> the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "as_closest_canonical": (False,),
    "reverse_indexing": (False,),
    "affine_lps_to_ras": (True,),
    "channel_dim": (None,),
    "squeeze_non_spatial_dims": (False,),
    "series_name": ("",),
}

#: Keys in a reader's config that do not affect how it reads.
_SILENT = ("_target_", "_desc_", "_disabled_", "_requires_", "_mode_", "series_meta")


def check_readers(bundle: Bundle, preprocessing: Sequence[Any]) -> None:
    """Raise ModelError where the bundle reads images differently from `load_scan`."""
    for reader in bundle.readers:
        _check_written(bundle, reader)
    for transform in preprocessing:
        if not isinstance(transform, LoadImaged):
            continue
        loader = transform._loader
        for reader in loader.readers:
            if isinstance(reader, NibabelReader | ITKReader):
                _check_arguments(bundle, {**vars(reader), **reader.kwargs})
            if not type(reader).__module__.startswith("monai."):
                _refuse(bundle, "reader", type(reader).__name__)
        bundle.itk |= not loader.auto_select and isinstance(loader.readers[-1], ITKReader)
        if not read_as(transform).is_floating_point:
            _refuse(bundle, "dtype", loader.dtype)


def read_as(transform: LoadImaged) -> torch.dtype:
    """Return the type of the numbers that a LoadImaged returns."""
    kind = get_equivalent_dtype(transform._loader.dtype, torch.Tensor)
    return kind if isinstance(kind, torch.dtype) else torch.float32


def _check_written(bundle: Bundle, reader: Any) -> None:
    """Raise ModelError for a reader, as written in the config, that does more than read."""
    if isinstance(reader, list):
        for entry in reader:
            _check_written(bundle, entry)
    elif isinstance(reader, dict):
        arguments = {key: value for key, value in reader.items() if key not in _SILENT}
        _check_arguments(bundle, arguments)
        if unknown := sorted(set(arguments) - set(_NEUTRAL)):
            _refuse(bundle, unknown[0], arguments[unknown[0]])
        _check_written(bundle, reader.get("_target_"))
    elif reader is not None:
        named = re.fullmatch(r"\$?(monai\.data\.(image_reader\.)?)?(\w+)(\(\))?", str(reader))
        known = {kind.__name__.lower() for kind in ImageReader.__subclasses__()}
        if named is None or named[3].lower() not in known:
            _refuse(bundle, "reader", reader)


def _check_arguments(bundle: Bundle, arguments: dict[str, Any]) -> None:
    for name, neutral in _NEUTRAL.items():
        if name in arguments and arguments[name] not in neutral:
            _refuse(bundle, name, arguments[name])


def _refuse(bundle: Bundle, argument: str, found: Any) -> None:
    raise ModelError(
        f"{bundle.place}: LoadImaged reads with {argument} {found!r}, which nothing here does: "
        "scans are read as they are, in float32. Take it out with --set, and let a transform after "
        "LoadImaged do it, such as Orientationd or CastToTyped; or explain the network in Python: "
        "SegModel(network, prepare=...)"
    )
