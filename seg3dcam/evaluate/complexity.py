"""How concentrated a map is: whether a reader has little or much to look at.

A concentrated map is easier to read, and not for that reason right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seg3dcam.errors import EvaluationError
from seg3dcam.evaluate.arrays import map_array


def gini(values: torch.Tensor | NDArray[np.floating]) -> float:
    """Return Gini's coefficient of the absolute values of a map.

    It is 0 where all voxels have the same value, 1/3 for uniform noise, and near 1 if few voxels
    hold everything.

    Raises:
        EvaluationError: the map is zero everywhere.

    Source: Hurley and Rickard, Comparing measures of sparsity (2009); for maps, Chalasani et al.
    (ICML 2020).

    >>> gini(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    0.75
    """
    shares = np.sort(_shares(values))
    count = len(shares)
    weights = 2 * np.arange(1, count + 1) - count - 1
    return float((weights * shares).sum() / count)


def entropy(values: torch.Tensor | NDArray[np.floating]) -> float:
    """Return the entropy of a map's absolute values, from 0 for one voxel to 1 for all alike.

    It is Shannon's, of each voxel's part of the sum, divided by the logarithm of their number.

    Raises:
        EvaluationError: the map is zero everywhere, or has one voxel.

    Source: Bhatt et al., Evaluating and aggregating feature-based model explanations (IJCAI 2020).

    >>> entropy(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    0.5
    """
    shares = _shares(values)
    if len(shares) == 1:
        raise EvaluationError("undefined: the map has one voxel")
    some = shares[shares > 0]
    return float(-(some * np.log(some)).sum() / np.log(len(shares)))


def _shares(values: Any) -> NDArray[np.float64]:
    """Return each voxel's part of the sum of absolute values, flat."""
    array = np.abs(map_array(values)).reshape(-1)
    total = array.sum()
    if not total > 0:
        raise EvaluationError("undefined: the map is zero everywhere")
    return array / total
