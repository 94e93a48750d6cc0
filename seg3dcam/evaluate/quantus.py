"""Those measures of Quantus that mean something for a map of a segmentation of any rank.

So a map can be compared with papers that report them. Most of Quantus changes an image and asks a
classifier again, which a segmentation network is not. Its measures of localisation and complexity
need the map and a region alone.

Quantus is needed: pip install 'seg3dcam[quantus]'. It requires opencv-python, which brings the same
module as opencv-python-headless and needs a graphics library; on a server without one take
pip install --no-deps quantus, which is enough for what is here.

Source: Hedstroem et al., Quantus (JMLR 2023).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seg3dcam.errors import ConfigError, EvaluationError, MissingExtraError, nearest
from seg3dcam.evaluate.arrays import refuse_constant
from seg3dcam.evaluate.places import checked_places, on_one_grid


@dataclass(frozen=True)
class Measure:
    """How a measure of Quantus is asked.

    Attributes:
        needs_region: whether it compares the map with a region.
        settings: of Quantus' class, where its default means nothing for a signed map.
    """

    needs_region: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


#: Quantus' name -> how it is asked. What is not named in `settings` is Quantus' own default.
MEASURES: dict[str, Measure] = {
    "Sparseness": Measure(),
    "Complexity": Measure(),
    "EffectiveComplexity": Measure(),
    "PointingGame": Measure(needs_region=True),
    # Without abs, a signed map has sums near 0, and parts of them above 1.
    "RelevanceMassAccuracy": Measure(needs_region=True, settings={"abs": True}),
    "RelevanceRankAccuracy": Measure(needs_region=True),
    "AttributionLocalisation": Measure(needs_region=True),
    "AUC": Measure(needs_region=True),
}

_INSTEAD = "seg3dcam.evaluate.deletion and context_deletion score the Dice of a segmentation"

#: Quantus' name -> why it is not asked.
REFUSED: dict[str, str] = {
    "RegionPerturbation": f"it fails on volumes; {_INSTEAD}",
    "Selectivity": f"it fails on volumes; {_INSTEAD}",
    "IROF": f"it fails on volumes, since it segments colour images; {_INSTEAD}",
    "ROAD": f"for volumes it answers 0.0, whatever the map; {_INSTEAD}",
    "Focus": "it needs mosaics of several images",
    "TopKIntersection": "its k is a number of voxels, so that it depends on the size of the scan; "
    "RelevanceRankAccuracy takes as many voxels as the region has",
}


def quantus_measures(
    values: torch.Tensor | NDArray[np.floating],
    region: torch.Tensor | NDArray[np.bool_] | None = None,
    *,
    names: Sequence[str] | None = None,
) -> dict[str, float]:
    """Return what Quantus says of a map.

    Args:
        values: the map, (*S), with any number of axes.
        region: (*S), zero and nonzero; for measures of localisation.
        names: as Quantus names them, see `MEASURES`; None for all that need no more than is given.

    Returns:
        name -> value. Absolute values are taken where Quantus does so by itself, and for
        "RelevanceMassAccuracy".

    Raises:
        MissingExtraError: Quantus is not installed.
        ConfigError: there is no such measure, or it means nothing here.
        EvaluationError: undefined: the region is missing, empty or fills everything, or the map is
            constant.

    Example:
        >>> from seg3dcam.evaluate import quantus_measures
        >>> values = torch.zeros(4, 4, 4)
        >>> values[1:3] = 1
        >>> quantus_measures(values, values > 0, names=["AUC"])  # doctest: +SKIP
        {'AUC': 1.0}
    """
    chosen = _chosen(names, region)
    array, mask = _checked(values, region)
    quantus = _quantus()
    batch, segment = array[None, None], mask[None, None].astype(np.float64)
    found = {}
    for name in chosen:
        measure = MEASURES[name]
        settings: dict[str, Any] = {"disable_warnings": True, "display_progressbar": False}
        settings |= measure.settings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as a division by the size of an empty slice
            (value,) = getattr(quantus, name)(**settings)(
                model=None,
                x_batch=np.zeros_like(batch),
                y_batch=np.zeros(1, dtype=np.int64),
                a_batch=batch.copy(),  # Quantus adds to it in place
                s_batch=segment if measure.needs_region else None,
                channel_first=True,
            )
        found[name] = float(value)
    return found


def _chosen(names: Sequence[str] | None, region: Any) -> list[str]:
    if names is None:
        return [name for name, m in MEASURES.items() if region is not None or not m.needs_region]
    for name in names:
        if name in REFUSED:
            raise ConfigError(f"Quantus' {name} means nothing here: {REFUSED[name]}")
        if name not in MEASURES:
            raise ConfigError(
                f"Quantus' {name!r} is not asked here, where there is no classifier: "
                f"{nearest(name, MEASURES)}"
            )
        if MEASURES[name].needs_region and region is None:
            raise EvaluationError(f"undefined: Quantus' {name} compares a map with a region")
    return list(names)


def _checked(values: Any, region: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    if region is not None:
        return checked_places(values, region)
    array, nowhere = on_one_grid(values, np.zeros(tuple(values.shape)))
    refuse_constant(array)
    return array, nowhere


def _quantus() -> Any:
    try:
        import quantus
    except ImportError as error:
        raise MissingExtraError(
            "Quantus' measures need Quantus: pip install 'seg3dcam[quantus]'"
        ) from error
    return quantus
