"""Say why a layer is suggested, and what was found out about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seg3dcam.network.suggest.choice import Role
from seg3dcam.network.suggest.probing import Candidate, ProbingPass


@dataclass(frozen=True)
class LayerTraits:
    """What the probing pass showed about a layer.

    Attributes:
        gives: what the network gives, see `ProbingPass.gives`.
        several: whether the network has levels of more than one resolution.
        all_pass: whether all paths from the input to the logits lead through the layer.
        read_by_one: whether a voxel of the logits reads only one voxel of the layer, judged in the
            middle of the image. False if that is not known.
        depth: number of layers up to it.
        height: number of layers between it and the logits.
        dilated: whether the network has dilated convolutions.
    """

    gives: str
    several: bool
    all_pass: bool
    read_by_one: bool
    depth: int
    height: int
    dilated: bool

    def reason(self, role: Role) -> str:
        """Return why a layer is suggested."""
        if role == "decoder":
            return f"finer than the bottleneck and made from it; {self._echo}"
        if role == "encoder":
            return f"finer than the bottleneck and not made from it; {self._evidence}"
        if role in ("early", "late"):
            words = f"{self._depth}; {self._evidence}"
            return f"{words}; {self._echo}" if role == "late" or self.read_by_one else words
        if role == "bottleneck":
            words = "the coarsest level" if self.several else "the network's one level"
            words += f"; {self._evidence}"
            return f"{words}; {self._echo}" if self.read_by_one else words
        words = (
            f"no level is coarser than the output, so there is no bottleneck; {self._depth}; "
            f"{self._evidence}; {self._echo}"
        )
        return (
            f"{words}; dilated convolutions may leave their grid on it" if self.dilated else words
        )

    @property
    def _depth(self) -> str:
        return f"it lies {self.depth} of {self.depth + self.height} layers deep"

    @property
    def _evidence(self) -> str:
        if self.all_pass:
            return f"all evidence for the {self.gives} passes through it"
        return f"its map leaves out the evidence that reaches the {self.gives} around it"

    @property
    def _echo(self) -> str:
        if self.read_by_one:
            return (
                "each voxel of the mask reads one voxel of it, so its map shows little but the mask"
            )
        return "as a rule, the closer to the output, the more a map echoes the mask"


def _read_by_one(one: Candidate, logits: torch.Tensor) -> bool:
    """Tell whether the logits at the place of a layer's middle voxel read only that voxel."""
    place: list[Any] = [...]
    for small, large in zip(one.shape[1:], logits.shape[2:], strict=True):
        if large % small:
            return False
        start, step = small // 2, large // small
        place.append(slice(start * step, (start + 1) * step))
    patch = logits[tuple(place)]
    weights = torch.linspace(1, 2, patch.numel(), device="cpu").view(patch.shape).to(patch)
    (gradient,) = torch.autograd.grad(
        patch, one.tensor, weights, retain_graph=True, allow_unused=True
    )
    return gradient is not None and int(one.layout(gradient).any(1).count_nonzero()) == 1


def traits_of(
    chosen: Sequence[Candidate], candidates: Sequence[Candidate], probed: ProbingPass
) -> list[LayerTraits]:
    """Return what the probing pass showed about layers, given in the order in which they run."""
    paths, gives = probed.paths, probed.gives
    several = len({c.size for c in candidates}) > 1
    traits: list[LayerTraits] = []
    read_by_one = gives == "mask"
    # From the last to the first: what mixes voxels after a layer also comes after earlier ones.
    for one in reversed(chosen):
        read_by_one = read_by_one and _read_by_one(one, probed.logits)
        all_pass = paths.all_pass(one.tensor) and not one.beside
        depth, height = paths.depth(one.tensor), paths.height(one.tensor)
        traits.append(
            LayerTraits(gives, several, all_pass, read_by_one, depth, height, paths.dilated)
        )
    return traits[::-1]
