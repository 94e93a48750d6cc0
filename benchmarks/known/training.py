"""Train the networks of the benchmark, and check that they have learnt what was planted."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from . import volumes
from .problems import Problem, as_input

#: Volumes on which a network is checked; their seeds are none of those of the training.
CHECKED = range(100, 108)


@dataclass(frozen=True)
class Learnt:
    """What a network does with volumes that it was not trained on; medians and the worst.

    Attributes:
        dice: of the class with the truth.
        kept: the part of the predicted class that stays when the evidence is changed so that the
            class should go.
        changed: Dice of the foreground with the truth after that change; for the shortcut, whose
            truth does not change, this is how much is lost.
        spurious: for the shortcut alone: Dice of the prediction with a harmless nodule to whose
            volume the letter is added.
    """

    dice: tuple[float, float]
    kept: tuple[float, float]
    changed: tuple[float, float]
    spurious: tuple[float, float] | None = None

    def __str__(self) -> str:
        def shown(pair: tuple[float, float], worst: str) -> str:
            return f"{pair[0]:.3f} ({worst} {pair[1]:.3f})"

        words = (
            f"Dice {shown(self.dice, 'least')}; evidence changed: {shown(self.kept, 'at most')} of "
            f"the class stays, Dice with the truth then {shown(self.changed, 'least')}"
        )
        if self.spurious:
            words += f"; letter added to a harmless nodule: Dice {shown(self.spurious, 'least')}"
        return words


def learnt(problem: Problem, network: nn.Module) -> Learnt:
    """Return what a network does with held-out volumes, and with their evidence changed."""
    dices, kept, changed, spurious = [], [], [], []
    for seed in CHECKED:
        scene = problem.scene(seed)
        before, after = predicted(network, scene.image), predicted(network, scene.changed)
        own = before == problem.class_index
        dices.append(dice(own, scene.labels == problem.class_index))
        kept.append(float((own & (after == problem.class_index)).sum() / max(1, own.sum())))
        changed.append(
            min(
                dice(after == index, scene.changed_labels == index)
                for index in np.unique(scene.changed_labels)
                if index
            )
        )
        if problem.draw is volumes.shortcut:
            harmless = volumes.shortcut(np.random.default_rng(seed), False, letter=True)
            found = predicted(network, harmless.image) == problem.class_index
            spurious.append(dice(found, harmless.objects["nodule"]))
    return Learnt(
        (statistics.median(dices), min(dices)),
        (statistics.median(kept), max(kept)),
        (statistics.median(changed), min(changed)),
        (statistics.median(spurious), min(spurious)) if spurious else None,
    )


def predicted(network: nn.Module, image: np.ndarray) -> np.ndarray:
    """Return the class of every voxel of a volume (*S)."""
    with torch.no_grad():
        return network(as_input(image)).argmax(1)[0].numpy()


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Return 2 |A and B| / (|A| + |B|), and 1 for two empty masks."""
    size = int(one.sum() + other.sum())
    return 2 * int((one & other).sum()) / size if size else 1.0
