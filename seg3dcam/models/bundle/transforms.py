"""The transforms of a MONAI bundle: the keys they are for, and which of them cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.transforms import LoadImaged, MapTransform, RandomizableTrait
from monai.transforms.utility.dictionary import ConcatItemsd

from seg3dcam.errors import ModelError
from seg3dcam.models.bundle.config import Bundle

#: Words in the keys of ground truths, from which nothing is predicted. A mask may be an input.
_TRUTH = ("label", "labels", "truth", "truths", "gt", "gts")

#: The names of transforms that write files or print begin so. None of them is applied.
WRITERS = ("Save", "Write", "DataStats")


def loaded_keys(preprocessing: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Return the keys of the images that are loaded, and apart from them the keys of truths."""
    loaded = [str(k) for t in preprocessing if isinstance(t, LoadImaged) for k in t.keys]
    joined = {k for t in preprocessing if isinstance(t, ConcatItemsd) for k in keys_of(t)}
    loaded = list(dict.fromkeys(loaded))
    truths = [
        key
        for key in loaded
        if key not in joined and any(word in key.lower().split("_") for word in _TRUTH)
    ]
    if len(truths) == len(loaded):
        truths = []
    return [key for key in loaded if key not in truths], truths


def keys_of(transform: Any) -> set[str]:
    """Return the keys that a transform is for. One that is not MONAI's own may not name any."""
    return {str(key) for key in getattr(transform, "keys", None) or ()}


def without_truths(
    bundle: Bundle, name: str, transforms: Sequence[Any], truths: Sequence[str]
) -> None:
    """Let transforms run without the truths, by MONAI's own `allow_missing_keys`.

    Raises:
        ModelError: a transform needs a truth, such as a crop around the labelled voxels.
    """
    for transform in transforms:
        if isinstance(transform, MapTransform) and keys_of(transform) & set(truths):
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
    """Raise ModelError for a transform that acts at random."""
    for transform in transforms:
        if isinstance(transform, RandomizableTrait):
            raise ModelError(
                f"{bundle.place}: {name} has {type(transform).__name__}, which is random: a "
                "prediction would be another one each time. Take it out with --set"
            )
