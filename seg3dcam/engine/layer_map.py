"""The raw, signed map of one layer, and whether it can be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from seg3dcam.engine.evidence import CONSTANT, Evidence
from seg3dcam.engine.scales import ALL_AGAINST, Scale, Status
from seg3dcam.geometry import FeatureGrid, interpolate

#: A map below this fraction of its ceiling is rounding noise. For activations of low precision the
#: fraction is ten times their machine epsilon.
CANCELLED = 1e-6


@dataclass(frozen=True)
class LayerMap:
    """The raw, signed map of one layer.

    Attributes:
        values: (B, *grid.shape), before ReLU and scaling, at least float32.
        grid: where its voxels lie in the input: the layer's grid, or the input's own voxels where
            windows do not fit on one layer grid.
        window_grid: the layer's grid within one window.
        ceiling: (B,) the maximum that the map would have if no contributions cancelled each other:
            that of the method applied to absolute values.
        precision: dtype of the activations.
        undefined: (B,) bool, True where the method has no meaning, such as a division by a sum of
            activations that InstanceNorm makes zero; None: nowhere.
        flags: what the reader of the map must know.
        missing: the part of the score's changes that the gradients of the map do not follow, since
            a branch of the network has none; 0 where nothing is missed or no gradient is needed.
        unchecked: why it is not known whether anything is missed; "" where it is.
        head: rank correlation with the map of a network whose last layer is random, None if that
            was not looked at.
    """

    values: torch.Tensor
    grid: FeatureGrid
    window_grid: FeatureGrid
    ceiling: torch.Tensor
    precision: torch.dtype = torch.float32
    undefined: torch.Tensor | None = None
    flags: tuple[str, ...] = ()
    missing: float = 0.0
    unchecked: str = ""
    head: float | None = None

    @cached_property
    def item_status(self) -> tuple[Status, ...]:
        """Each item's status.

        - "ok": the map can be shown.
        - "zero": no voxel speaks for the target (see `only_against`), or contributions cancel to
          rounding noise.
        - "nonfinite": the map holds NaN or infinity.
        - "degenerate": it has the same value everywhere, or the method is undefined for these
          activations.
        - "incomplete": it is made of gradients that do not follow the score, since a branch of the
          network has none.
        """
        noise = max(CANCELLED, 10 * torch.finfo(self.precision).eps)
        undefined = [False] * len(self.values) if self.undefined is None else self.undefined
        return tuple(
            _status_of(values, float(ceiling), noise, bool(no_meaning), self.missing > 0)
            for values, ceiling, no_meaning in zip(
                self.values, self.ceiling, undefined, strict=True
            )
        )

    @property
    def status(self) -> Status:
        """The worst item's status."""
        order: tuple[Status, ...] = ("nonfinite", "zero", "degenerate", "incomplete", "ok")
        return next(status for status in order if status in self.item_status)

    @property
    def reason(self) -> str:
        """Say in words and numbers why the map explains nothing; nothing where it does."""
        low, high = float(self.values.min()), float(self.values.max())
        undefined = self.undefined is not None and bool(self.undefined.any())
        runs = f"(the raw map runs from {low:.3g} to {high:.3g})"
        if self.status == "zero" and any(self.only_against):
            return f"{ALL_AGAINST} {runs}"
        return {
            "ok": "",
            "zero": f"no voxel speaks for the target, or contributions cancel {runs}",
            "nonfinite": "NaN or infinity in the map",
            "degenerate": "the method divides by sums of activations that are zero, as after "
            "InstanceNorm: choose another method, or a layer behind a ReLU"
            if undefined
            else f"the same value everywhere ({high:.3g})",
            "incomplete": f"its gradient misses {self.missing:.0%} of how the score changes, since "
            "a branch behind the layer has none (quantised weights, detach(), no_grad(), argmax, "
            "rounding or a backward pass of its own). A method without gradients sees all: "
            "score_cam, ablation_cam, or the network in full precision",
        }[self.status]

    @property
    def caution(self) -> str:
        """Say in words which items' maps are mostly evidence against the target; else nothing."""
        several = len(self.values) > 1
        words = (
            (f"item {number}: " if several else "", Evidence.of(values).caution)
            for number, (values, status) in enumerate(
                zip(self.values, self.item_status, strict=True)
            )
            if status == "ok"
        )
        return "; ".join(item + said for item, said in words if said)

    @cached_property
    def only_against(self) -> tuple[bool, ...]:
        """Whether each item's status is "zero" because all its evidence is against the target.

        The usual view of such a map is empty, the signed view is not.
        """
        turned = replace(self, values=-self.values).item_status
        return tuple(
            status == "zero" and other == "ok"
            for status, other in zip(self.item_status, turned, strict=True)
        )

    def items_that_are(self, status: Status) -> torch.Tensor:
        """Return (B, 1, ...) bool, to be used as a mask on a batch of maps."""
        return self._mask([s == status for s in self.item_status])

    def items_shown(self, scale: Scale) -> torch.Tensor:
        """Return the mask of the items whose map a scale shows, as `items_that_are`."""
        shown = self.items_that_are("ok")
        return shown | self._mask(self.only_against) if scale == "signed" else shown

    def _mask(self, items: Sequence[bool]) -> torch.Tensor:
        found = torch.tensor(items, device=self.values.device)
        return found.view(-1, *[1] * (self.values.ndim - 1))


def _status_of(
    values: torch.Tensor, ceiling: float, noise: float, undefined: bool, incomplete: bool
) -> Status:
    if not torch.isfinite(values).all():
        return "nonfinite"
    if undefined:
        return "degenerate"
    low, high = float(values.min()), float(values.max())
    if high <= 0 or high <= noise * ceiling:
        return "zero"
    if high - low <= max(noise, CONSTANT) * high:
        return "degenerate"
    return "incomplete" if incomplete else "ok"


def added(one: LayerMap, other: LayerMap, shape: Sequence[int]) -> LayerMap:
    """Return the sum of two maps of one layer.

    Where they have grids of their own, as flipped networks do, it lies on the input's voxels.

    Args:
        shape: voxels of the input, (*S).
    """
    grid = one.grid if one.grid == other.grid else FeatureGrid.of_voxels(shape)
    values = [interpolate(m.values, m.grid, grid) for m in (one, other)]
    undefined = [m.undefined for m in (one, other) if m.undefined is not None]
    return replace(
        one,
        values=values[0] + values[1],
        grid=grid,
        ceiling=one.ceiling + other.ceiling,
        undefined=torch.stack(undefined).any(0) if undefined else None,
        flags=tuple(dict.fromkeys((*one.flags, *other.flags))),
        missing=max(one.missing, other.missing),
        unchecked=one.unchecked or other.unchecked,
        head=None if one.head is None or other.head is None else max(one.head, other.head),
    )


def joined(items: Sequence[LayerMap]) -> LayerMap:
    """Return the maps of a batch, given those of its items."""
    if len(items) == 1:
        return items[0]
    undefined = [item.undefined for item in items if item.undefined is not None]
    return replace(
        items[0],
        values=torch.cat([item.values for item in items]),
        ceiling=torch.cat([item.ceiling for item in items]),
        undefined=torch.cat(undefined) if undefined else None,
        flags=tuple(dict.fromkeys(flag for item in items for flag in item.flags)),
    )
