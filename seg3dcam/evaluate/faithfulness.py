"""Does the prediction depend on what a map shows? Deletion, insertion and context deletion.

The volume is cut into blocks, and the blocks are replaced by a baseline, those of the highest mean
value of the map first. After each step the network predicts again. The score is the Dice of the
class with its own first prediction: a good map makes it fall early.

Deletion itself cannot tell a good map from the predicted mask, since deleting a structure deletes
its segmentation. Context deletion never touches the mask and a margin around it. It asks what else
the prediction depends on, and only this question has another answer than the mask.

All curves should be read beside those of controls (`seg3dcam.evaluate.controls`).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from seg3dcam.checks import Activation, check_whole_number
from seg3dcam.evaluate.blocks import Blocks, Curve, Subject
from seg3dcam.evaluate.rerun import Rerun
from seg3dcam.evaluate.segments import grown
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.windows import WindowPlan


def deletion(
    values: torch.Tensor | NDArray[np.floating],
    x: torch.Tensor,
    network: nn.Module,
    class_index: int,
    block: int = 4,
    steps: int = 25,
    baseline: str | float = "mean",
    sliding_window: WindowPlan | None = None,
    activation: Activation = "softmax",
    seed: int = 0,
    *,
    segments: NDArray[np.integer] | None = None,
    output: OutputSelection = None,
) -> Curve:
    """Delete the blocks of an input from the highest value of a map to the lowest.

    A small area means that the prediction depends on what the map shows. The mask itself has a
    small area, too: see `context_deletion`. The arguments are those of `context_deletion`.

    Source: Petsiuk et al., RISE (BMVC 2018), with the Dice of a segmentation as the score.
    """
    subject = Subject(
        Rerun(network, x, sliding_window=sliding_window, output=output), class_index, activation
    )
    blocks = Blocks.of(subject, block, segments)
    return blocks.deleted(values, steps=steps, baseline=baseline, seed=seed)


def insertion(
    values: torch.Tensor | NDArray[np.floating],
    x: torch.Tensor,
    network: nn.Module,
    class_index: int,
    block: int = 4,
    steps: int = 25,
    baseline: str | float = "mean",
    sliding_window: WindowPlan | None = None,
    activation: Activation = "softmax",
    seed: int = 0,
    *,
    segments: NDArray[np.integer] | None = None,
    output: OutputSelection = None,
) -> Curve:
    """Insert the blocks of an input into the baseline, from the highest value of a map downwards.

    A large area means that what the map shows suffices for the prediction. The arguments are those
    of `context_deletion`.

    Source: Petsiuk et al., RISE (BMVC 2018), with the Dice of a segmentation as the score.
    """
    subject = Subject(
        Rerun(network, x, sliding_window=sliding_window, output=output), class_index, activation
    )
    blocks = Blocks.of(subject, block, segments)
    return blocks.inserted(values, steps=steps, baseline=baseline, seed=seed)


def context_deletion(
    values: torch.Tensor | NDArray[np.floating],
    x: torch.Tensor,
    network: nn.Module,
    class_index: int,
    margin: int = 2,
    block: int = 4,
    steps: int = 25,
    baseline: str | float = "mean",
    sliding_window: WindowPlan | None = None,
    activation: Activation = "softmax",
    seed: int = 0,
    *,
    segments: NDArray[np.integer] | None = None,
    output: OutputSelection = None,
) -> Curve:
    """Delete what lies around the predicted mask, from the highest value of a map to the lowest.

    A small area means that the map points at something outside of the mask that the prediction
    depends on. The mask itself, as a map, is constant there and so deletes at random.

    Args:
        values: the map on the grid of `x`, (*S).
        x: the input, (1, C, *S).
        network: any network that a CAM takes, also an `Ensemble`.
        class_index: the class.
        margin: the mask grown by so many voxels along every axis (by a cube) is never touched,
            and neither is a block that meets it.
        block: size of the blocks in voxels along every axis.
        steps: in how many steps all the other blocks are deleted, about equally many at each.
        baseline: what stands in the place of a deleted block: "mean" of each channel, "blur",
            "noise" of each channel's mean and deviation, "neighbours" that are not deleted, or a
            number.
        sliding_window: the windows, None for one window, the volume itself.
        activation: "softmax" for classes that exclude each other, "sigmoid" for others.
        seed: of the order of blocks that have the same value, and of noise.
        segments: the number of each voxel's segment, (*S), in place of blocks, such as
            `supervoxels(x)`.
        output: which of the network's outputs are the logits, see `BaseCAM`.

    Raises:
        EmptyRegionError: the class is not predicted anywhere.
        EvaluationError: the curve is undefined: the mask leaves fewer than 20 blocks, or the
            baseline is equal to the input there.
        InputError, ConfigError: a map of another shape, or an illegal setting.

    Example:
        >>> from seg3dcam.evaluate import context_deletion
        >>> network = nn.Conv3d(1, 2, 5, padding=2)
        >>> _ = nn.init.zeros_(network.weight), nn.init.constant_(network.bias, -0.5)
        >>> network.weight.data[1, 0, 0, 2, 2] = 1.0  # looks 2 voxels to the left
        >>> x = torch.zeros(1, 1, 24, 24, 24)
        >>> x[..., 8:12, 8:12, 8:12] = 1
        >>> curve = context_deletion(x[0, 0], x, network, 1, margin=0, block=2, baseline=0)
        >>> curve.dice[:2].round(3)
        array([1.   , 0.667])
    """
    check_whole_number("margin", margin, least=0)
    subject = Subject(
        Rerun(network, x, sliding_window=sliding_window, output=output), class_index, activation
    )
    kept = grown(subject.mask.cpu().numpy(), margin)
    blocks = Blocks.of(subject, block, segments, kept=kept)
    return blocks.deleted(values, steps=steps, baseline=baseline, seed=seed)
