"""The problems by name: what was planted, how its volumes are drawn, and its trained network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from . import volumes
from .networks import build
from .volumes import Scene

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Problem:
    """A network and volumes whose evidence is known.

    Attributes:
        name: its key in `PROBLEMS`, and the name of the weights' file.
        planted: what decides the class, in a sentence.
        classes: the names of the classes, background first.
        class_index: the class that is explained.
        draw: draws a scene, from random numbers and whether the class shall be in it.
        at_chance: the part of the volumes of the training in which the class is.
        repeats: how often the phases after the first one are gone through.
        first_steps: steps of the training in which the reach of the evidence is a class, too.
        deletions: 0, or the `power` with which half of the volumes of the training have parts
            deleted, see `deletions.with_deletions`.
    """

    name: str
    planted: str
    classes: tuple[str, ...]
    draw: Callable[[np.random.Generator, bool], Scene]
    class_index: int = 1
    at_chance: float = 0.5
    first_steps: int = 240
    repeats: int = 1
    deletions: float = 0

    @property
    def weights(self) -> Path:
        return WEIGHTS / f"{self.name}.safetensors"

    def load(self) -> nn.Module:
        """Return the trained network, in eval mode, in float32."""
        network = build(len(self.classes))
        state = {name: value.float() for name, value in load_file(self.weights).items()}
        network.load_state_dict(state, strict=False)
        return network.eval()

    def scene(self, seed: int) -> Scene:
        """Return a volume with the class in it. Seeds below a million are not trained on."""
        return self.draw(np.random.default_rng(seed), True)

    def volume(self, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a volume with the class in it, as tensors.

        Returns:
            x: (1, 1, *S) float32.
            truth: (*S) int64, the class of every voxel.
            evidence: (*S) bool, what decides the class, apart from the object itself.
        """
        scene = self.scene(seed)
        return (
            as_input(scene.image),
            torch.from_numpy(scene.labels),
            torch.from_numpy(scene.evidence),
        )


def as_input(image: np.ndarray) -> torch.Tensor:
    """Return a volume (*S) as an input (1, 1, *S)."""
    return torch.from_numpy(image)[None, None].float()


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            "remote_cue",
            "a ball is of class 1 if a checkered cube lies anywhere 12 voxels or more away",
            ("background", "with cue", "without cue"),
            volumes.remote_cue,
            first_steps=360,
        ),
        Problem(
            "context",
            "of two equal balls the one on the side of a striped organ is of class 1",
            ("background", "on the organ's side", "on the other side"),
            volumes.context,
            at_chance=0.8,
            first_steps=360,
        ),
        Problem(
            "shortcut",
            "a nodule is called a lesion because of a letter burnt into the corner",
            ("background", "lesion"),
            volumes.shortcut,
            first_steps=360,
        ),
        Problem(
            "absence",
            "a ball is of class 1 if a landmark is seen to be missing from its place",
            ("background", "landmark missing", "landmark there"),
            volumes.absence,
            first_steps=480,
            repeats=5,
            deletions=3,
        ),
        Problem(
            "side_by_side",
            "of two balls that touch each is of class 1 if a checkered cube lies on its own side",
            ("background", "with cue", "without cue"),
            volumes.side_by_side,
            at_chance=0.7,
            first_steps=360,
            deletions=1,
        ),
    )
}
