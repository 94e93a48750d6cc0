"""Which scalar is explained: a target maps logits (B, K, *S) to one score per item, (B,).

Any callable of that form is a target. Most of these sum a value per voxel over a region:

| target         | value at a voxel                                    |
|----------------|-----------------------------------------------------|
| `ClassLogOdds` | z_c - log sum of exp z_d over the other classes d    |
| `ClassLogit`   | z_c (Seg-Grad-CAM)                                  |
| `ClassProbability` | softmax or sigmoid of z at c: explains the boundary |
| `Contrast`     | z_c - z_d: why this class and not that one?          |
| `Finer`        | z_c - alpha times its rivals' mean, by probability (Finer-CAM) |
| `MaskOutput`   | sum of all z: the original recipe, no single class  |

The others are

| target           | score                                                                |
|------------------|----------------------------------------------------------------------|
| `SoftDice`       | overlap of a class's probability with a given mask                   |
| `WeightedSum`    | sum of weights times targets                                         |
| `DetectionClass` | objectness times class probability in a detector's head, see there   |
| `EveryComponent` | a family: one target for every connected component of a class        |
| `EveryClass`     | a family: one target for every predicted foreground class            |

and the regions are

| region             | voxels                                                          |
|--------------------|-----------------------------------------------------------------|
| `"predicted"`      | where the class is predicted: arg-max, or logit > 0 for sigmoid |
| `"volume"`         | all                                                             |
| a mask             | where it is nonzero: (*S), (B, *S) or (B, 1, *S), or a `Scan`   |
| `Box(start, stop)` | start <= index < stop along each axis                           |
| `Voxel(index)`     | one voxel                                                       |
| `Component(rank)`, `Component(voxel=)` | one connected component of the predicted mask |
| `Boundary(thickness)` | the shell of the predicted mask                              |
| `FalseNegatives(truth)` | the class in the truth, not in the prediction: why missed? |
| `FalsePositives(truth)` | the class in the prediction, not in the truth: why invented? |
| `TruePositives(truth)`  | the class in both                                          |

Indices are voxels of the network's input. The activation says whether classes exclude each other
(softmax) or may overlap (sigmoid). A target uses the model's activation unless one is given.
Without a model it is softmax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seg3dcam.importing import lazy

if TYPE_CHECKING:  # type checkers and editors read the names here
    from seg3dcam.targets.arguments import Activation
    from seg3dcam.targets.base import OwnTarget, Target, name_of
    from seg3dcam.targets.combined import AnyTarget, WeightedSum
    from seg3dcam.targets.connected_components import components
    from seg3dcam.targets.detection import DetectionClass, detection_map
    from seg3dcam.targets.families import EveryClass, EveryComponent, TargetFamily
    from seg3dcam.targets.masks import OnItsGrid
    from seg3dcam.targets.regions import Boundary, Box, Component, Region, Voxel
    from seg3dcam.targets.scores import (
        ClassLogit,
        ClassLogOdds,
        ClassProbability,
        ClassTarget,
        Contrast,
        Finer,
        MaskOutput,
        SoftDice,
        SumOverRegion,
    )
    from seg3dcam.targets.truth_regions import FalseNegatives, FalsePositives, TruePositives
    from seg3dcam.targets.use import (
        as_target,
        as_targets,
        fixed,
        placed,
        region_of,
        score_and_seed,
        uses_truth,
    )
else:  # at run time they are imported when they are first used
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "Activation",
    "AnyTarget",
    "Boundary",
    "Box",
    "ClassLogOdds",
    "ClassLogit",
    "ClassProbability",
    "ClassTarget",
    "Component",
    "Contrast",
    "DetectionClass",
    "EveryClass",
    "EveryComponent",
    "FalseNegatives",
    "FalsePositives",
    "Finer",
    "MaskOutput",
    "OnItsGrid",
    "OwnTarget",
    "Region",
    "SoftDice",
    "SumOverRegion",
    "Target",
    "TargetFamily",
    "TruePositives",
    "Voxel",
    "WeightedSum",
    "as_target",
    "as_targets",
    "components",
    "detection_map",
    "fixed",
    "name_of",
    "placed",
    "region_of",
    "score_and_seed",
    "uses_truth",
]
