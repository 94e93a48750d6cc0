"""Average the logits of several networks: folds of a cross-validation, or flips at test time.

ensemble = Ensemble([fold_0, fold_1], mirror_axes=(0, 1, 2))
GradCAM(ensemble, "decoder.2")(x, target=1)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from seg3dcam.errors import ModelError
from seg3dcam.geometry import FeatureGrid


@dataclass(frozen=True)
class Member:
    """One network of an ensemble, seen through one flip.

    Attributes:
        network: takes (B, C, *S); with `slices` it takes (B, C, H, W).
        flips: spatial axes along which the input is reversed, and the output is reversed back.
        slices: whether the network is 2D and takes the slices of a volume one by one, as windows
            (1, H, W).
    """

    network: nn.Module
    flips: tuple[int, ...] = ()
    slices: bool = False

    def into(self, x: torch.Tensor) -> torch.Tensor:
        """Return the network's input for a window of a volume, (B, C, *S).

        Raises:
            ModelError: a 2D network got a window of more than one slice.
        """
        x = _flipped(x, self.flips)
        if not self.slices:
            return x
        if x.ndim != 5 or x.shape[2] != 1:
            raise ModelError(
                f"a 2D network takes a volume slice by slice, in windows (1, H, W); "
                f"got {tuple(x.shape[2:])}"
            )
        return x.squeeze(2)

    def back(self, values: torch.Tensor) -> torch.Tensor:
        """Return the network's output (B, C, *s), moved back to the window of the volume."""
        if values.ndim == 2:  # a classifier's scores (B, K) have no place
            return values
        return _flipped(values.unsqueeze(2) if self.slices else values, self.flips)

    def grid(self, grid: FeatureGrid, roi: Sequence[int]) -> FeatureGrid:
        """Return the grid of a layer in the window of the volume.

        Args:
            grid: grid of the layer in the network's own input.
            roi: size of the window in voxels.
        """
        shape, stride, offset = grid.shape, grid.stride, list(grid.offset)
        if self.slices:
            shape, stride, offset = (1, *shape), (1.0, *stride), [0.0, *offset]
        for axis in self.flips:
            offset[axis] = roi[axis] - 1 - stride[axis] * (shape[axis] - 1) - offset[axis]
        return FeatureGrid(shape, stride, tuple(offset), grid.measured)

    def seen(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the network's own input, given the shape (B, C, *S) of a window."""
        window = self.slices and len(shape) == 5
        return tuple(n for axis, n in enumerate(shape) if not (window and axis == 2))


class Ensemble(nn.Module):
    """Averages the logits of several networks of one architecture, each seen through flips.

    A CAM of an ensemble explains the averaged prediction: every member gets the gradient of the
    ensemble's score, and the members' maps are flipped back and averaged.

    Args:
        networks: one or several networks, whose layers have the same names.
        mirror_axes: spatial axes of the volume. All combinations of flips along them are averaged.
        slices: whether the networks are 2D and take a volume slice by slice along its first axis.

    Raises:
        ModelError: there is no network, or an axis is not 0, 1 or 2.

    >>> ensemble = Ensemble([nn.Conv3d(1, 2, 3, padding=1)], mirror_axes=(0, 2))
    >>> [member.flips for member in ensemble.members]
    [(), (0,), (2,), (0, 2)]
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        mirror_axes: Sequence[int] = (),
        *,
        slices: bool = False,
    ) -> None:
        super().__init__()
        if not networks:
            raise ModelError("an ensemble needs at least one network")
        if any(axis not in (0, 1, 2) for axis in mirror_axes):
            raise ModelError(f"mirror axes {tuple(mirror_axes)}: legal are 0, 1 and 2")
        self.networks = nn.ModuleList(networks)
        self.flips = [
            axes
            for count in range(len(mirror_axes) + 1)
            for axes in itertools.combinations(tuple(mirror_axes), count)
        ]
        self.slices = slices

    @property
    def members(self) -> list[Member]:
        """Every network through every flip."""
        return [Member(n, flips, self.slices) for n in self.networks for flips in self.flips]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean logits (B, K, *S) of a window (B, C, *S)."""
        members = self.members
        return torch.stack([m.back(m.network(m.into(x))) for m in members]).mean(0)


def members_of(model: nn.Module) -> list[Member]:
    """Return the members of an ensemble; any other network is its only member."""
    model = _without_wrappers(model)
    members = model.members if isinstance(model, Ensemble) else [Member(model)]
    return [replace(member, network=unwrap(member.network)) for member in members]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside DataParallel, DistributedDataParallel and torch.compile.

    For an `Ensemble`, the first network is returned, since all of them have the same layers.

    Raises:
        ModelError: the model is no `nn.Module`, or one that takes no hooks: TorchScript, or an
            exported program that was not unflattened.
    """
    model = _without_wrappers(model)
    return unwrap(model.networks[0]) if isinstance(model, Ensemble) else model


def _without_wrappers(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise ModelError(
                "a TorchScript model takes no hooks: build the network in Python and load the "
                "script's weights into it (network.load_state_dict(script.state_dict()))"
            )
        flat = any(cls.__name__ == "_StatefulGraphModule" for cls in type(model).__mro__)
        if flat or isinstance(model, torch.export.ExportedProgram):
            raise ModelError(
                "an exported program runs as one graph, whose layers take no hooks: give "
                "torch.export.unflatten(program), or the network that it was exported from"
            )
        if not isinstance(model, nn.Module):
            raise ModelError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _flipped(values: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    return values.flip([2 + axis for axis in axes]) if axes else values
