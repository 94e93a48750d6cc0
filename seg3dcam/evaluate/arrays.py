"""Maps and regions as arrays, whatever they are given as."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seg3dcam.errors import EvaluationError, InputError


def plain_array(values: Any) -> NDArray[Any]:
    """Return a tensor of any device and precision, or an array of any memory layout, as an array.

    An array may have been flipped: torch takes no negative strides.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        if values.dtype == torch.bfloat16:  # which NumPy does not have
            values = values.float()
        values = values.numpy()
    return np.asarray(values)


def map_array(values: Any) -> NDArray[np.float64]:
    """Return a map as an array; InputError if it is not made of finite real numbers.

    >>> map_array(np.arange(3)[::-1])
    array([2., 1., 0.])
    """
    array = plain_array(values)
    if array.dtype.kind not in "biuf":
        raise InputError(f"a map is made of real numbers; got {array.dtype}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise InputError(
            f"the map has {int((~np.isfinite(array)).sum())} values that are NaN or infinite"
        )
    return array


def mask_array(region: Any) -> NDArray[np.bool_]:
    """Return where a region, of zeros and others, is not zero."""
    return plain_array(region) != 0


def refuse_constant(array: NDArray[np.float64]) -> None:
    """Raise EvaluationError if a map has one value everywhere: it says nothing of any place."""
    if array.min() == array.max():
        raise EvaluationError(f"undefined: the map is {array.flat[0] + 0.0:g} everywhere")
