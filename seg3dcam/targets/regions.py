"""Regions: which voxels a target sums over.

A region sees a `View`, the prediction of one class, and answers with a mask (B, *S). The words
"predicted" and "volume" and plain masks are regions too, see `as_region`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from scipy import ndimage

from seg3dcam.checks import is_meta_tensor
from seg3dcam.errors import TargetError, nearest


@runtime_checkable
class OnItsGrid(Protocol):
    """A mask that knows where it lies: a `Scan`, or a MONAI MetaTensor."""

    @property
    def data(self) -> torch.Tensor: ...
    @property
    def affine(self) -> Any: ...


#: Zero and nonzero, or labels: (*S), (B, *S) or (B, 1, *S) on the network's grid, or a scan.
Mask: TypeAlias = torch.Tensor | np.ndarray | OnItsGrid

#: Brings a mask onto the network's grid: a plain tensor (*S) with the same labels.
Move: TypeAlias = Callable[[Any], torch.Tensor]


# ------------------------------------------------------------------------------- the prediction


@dataclass(frozen=True, eq=False)
class View:
    """What a region may look at: logits, and what in them the target is about.

    - `logits`: (B, K, *S), without a graph.
    - `index`: the class; None for any foreground.
    - `overlapping`: a sigmoid's classes may overlap, a softmax's exclude each other.
    """

    logits: torch.Tensor
    index: int | None
    overlapping: bool

    @property
    def grid(self) -> tuple[int, ...]:
        """(B, *S)."""
        return (len(self.logits), *self.logits.shape[2:])

    def predicted(self) -> torch.Tensor:
        """Return where the class is predicted, (B, *S) bool: arg-max, or logit > 0 for sigmoid."""
        return torch.stack([self._predicted(item) for item in self.logits])

    def _predicted(self, logits: torch.Tensor) -> torch.Tensor:
        if self.overlapping:
            return (logits > 0).any(0) if self.index is None else logits[self.index] > 0
        return ~_is_largest(logits, 0) if self.index is None else _is_largest(logits, self.index)

    def described(self, item: int) -> str:
        """Say which classes are predicted in an item, and in how many voxels."""
        logits = self.logits[item]
        if self.overlapping:
            counts = [int((channel > 0).sum()) for channel in logits]
        else:
            counts = torch.bincount(logits.argmax(0).flatten()).tolist()
        listed = ", ".join(f"class {c} in {n} voxels" for c, n in enumerate(counts) if n)
        return f"Predicted: {listed or 'no class anywhere'}"

    def described_at(self, item: int, voxel: tuple[int, ...]) -> str:
        """Say which classes are predicted at a voxel."""
        logits = torch.stack([channel[voxel] for channel in self.logits[item]])
        here = [int(logits.argmax())]
        if self.overlapping:
            here = torch.nonzero(logits > 0).flatten().tolist()
        return " and ".join(f"class {c}" for c in here) or "no class"


def _is_largest(logits: torch.Tensor, index: int) -> torch.Tensor:
    """Return where the arg-max of logits (K, *S) is a class, (*S) bool; of equals the first wins.

    Many times faster than `argmax`, which is slow along the first axis, and needs less memory.
    """
    own = logits[index]
    largest = torch.ones_like(own, dtype=torch.bool)
    for other, rival in enumerate(logits):
        if other != index:  # negated, so that NaN is not left out unnoticed
            largest &= ~(rival >= own if other < index else rival > own)
    return largest


# ---------------------------------------------------------------------------------- mask to tensor


def nonzero(mask: Mask, view_grid: Sequence[int]) -> torch.Tensor:
    """Return a given mask as (B, *S) bool."""
    values = _plain(mask, "mask")
    if values.is_floating_point() and not torch.isfinite(values).all():
        raise TargetError("the mask holds values that are NaN or infinite; legal are numbers")
    return _fitted(values != 0, view_grid, "mask")


def labels(truth: Mask, view_grid: Sequence[int]) -> torch.Tensor:
    """Return a label map as (B, *S): bool, or whole numbers."""
    values = _plain(truth, "truth")
    check_labels(values)
    return _fitted(values, view_grid, "truth")


def check_labels(values: torch.Tensor) -> None:
    """Refuse a truth that holds anything but whole numbers."""
    if not values.is_floating_point():
        return
    whole = (values == values.round()) & torch.isfinite(values)
    if not whole.all():
        raise TargetError(
            f"the truth holds {int((~whole).sum())} values that are no whole numbers, such as "
            f"{values[~whole].flatten()[0].item():g}; legal are labels or a boolean mask. Was a "
            "label map interpolated? Resample it with the nearest neighbour"
        )


def _plain(mask: Mask, what: str) -> torch.Tensor:
    if isinstance(mask, np.ndarray):
        if mask.dtype.kind not in "biuf":
            raise TargetError(f"the {what} is an array of {mask.dtype}; legal are numbers or bool")
        # torch wants native byte order and cannot compare wide unsigned integers.
        wide = mask.dtype.kind == "u" and mask.dtype.itemsize > 1
        native = np.int64 if wide else mask.dtype.newbyteorder("=")
        return torch.from_numpy(np.array(mask, dtype=native))
    if not isinstance(mask, torch.Tensor):
        raise TargetError(
            f"the {what} is a {type(mask).__name__} on a grid of its own. explain() brings it onto "
            "the network's grid; without explain(), give a tensor or array on that grid, (*S)"
        )
    values = mask.as_tensor() if is_meta_tensor(mask) else mask
    if values.is_complex():
        raise TargetError(f"the {what} is a tensor of {values.dtype}; legal are numbers or bool")
    wide = values.dtype in (torch.uint16, torch.uint32, torch.uint64)
    return values.detach().to(torch.int64) if wide else values.detach()


def _fitted(values: torch.Tensor, view_grid: Sequence[int], what: str) -> torch.Tensor:
    batch, *shape = view_grid
    full = (batch, *shape)
    fitted = values
    if values.shape == (batch, 1, *shape):
        fitted = values[:, 0]
    elif values.shape == tuple(shape):
        fitted = values.expand(full)
    if fitted.shape != full:
        raise TargetError(
            f"the {what} has shape {tuple(values.shape)}; legal for these logits are "
            f"{tuple(shape)}, {full} and {(batch, 1, *shape)}"
        )
    return fitted


# --------------------------------------------------------------------------------- mask to mask


def components(mask: torch.Tensor, connectivity: int = 1) -> tuple[torch.Tensor, list[int]]:
    """Number the connected components of one mask by size.

    Args:
        mask: (*S) bool.
        connectivity: along how many axes at once neighbours may differ; 1 joins across faces.

    Returns:
        Ranks (*S), int32 and on the CPU: 0 in the largest component, -1 outside of all; and the
        components' sizes in voxels, largest first. Of two equal ones the first in memory leads.

    Raises:
        TargetError: there is no such connectivity in so many axes.

    >>> components(torch.tensor([1, 0, 1, 1, 0, 1]).bool())
    (tensor([ 1, -1,  0,  0, -1,  2], dtype=torch.int32), [2, 1, 1])
    """
    axes = max(mask.ndim, 1)  # a classifier's one place is labelled as a line of one voxel
    if not 1 <= connectivity <= axes:
        raise TargetError(f"connectivity {connectivity}: legal with {axes} axes are 1 to {axes}")
    inside = np.atleast_1d(mask.cpu().numpy())
    where = _extent(inside)  # a lesion is small: the rest of the volume is not searched
    found, count = ndimage.label(
        inside[where], structure=ndimage.generate_binary_structure(axes, connectivity)
    )
    sizes = np.bincount(found.ravel(), minlength=count + 1)[1:]
    order = np.argsort(-sizes, kind="stable")
    rank_of = np.full(count + 1, -1, dtype=np.int32)
    rank_of[order + 1] = np.arange(count, dtype=np.int32)
    ranks = np.full(inside.shape, -1, dtype=np.int32)
    ranks[where] = rank_of[found]
    return torch.from_numpy(ranks.reshape(mask.shape)), sizes[order].tolist()


def _extent(mask: np.ndarray) -> tuple[slice, ...]:
    """Return the smallest box around what is true in a mask."""
    where = []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        filled = np.flatnonzero(mask.any(axis=others))
        where.append(slice(filled[0], filled[-1] + 1) if len(filled) else slice(0, 0))
    return tuple(where)


def _grown(mask: torch.Tensor, steps: int) -> torch.Tensor:
    """Return what lies within some steps across faces of a mask (B, *S)."""
    for _ in range(steps):
        grown = mask.clone()
        for axis in range(1, mask.ndim):
            last = mask.shape[axis] - 1
            grown.narrow(axis, 1, last).logical_or_(mask.narrow(axis, 0, last))
            grown.narrow(axis, 0, last).logical_or_(mask.narrow(axis, 1, last))
        mask = grown
    return mask


# ----------------------------------------------------------------------------------------- regions


class RegionKind:
    """What every region offers."""

    uses_truth: ClassVar[bool] = False  # labels leak into the map
    follows_prediction: ClassVar[bool] = False  # other logits, other voxels

    @property
    def name(self) -> str:
        """What stands after "over" in a target's name."""
        return f"the {self}"

    def masks(self, view: View) -> torch.Tensor:
        """Return the voxels, (B, *S) bool; an item's may be empty."""
        raise NotImplementedError

    def instead(self, view: View, item: int) -> str:
        """Say what is there, where an item's mask is empty, and what to do."""
        return (
            f"{view.described(item)}. To explain it all the same, give a region: 'volume', a mask, "
            "Box or Voxel"
        )


@dataclass(frozen=True)
class Predicted(RegionKind):
    """Where the class is predicted; of a classifier its one place, predicted or not."""

    follows_prediction = True

    def masks(self, view: View) -> torch.Tensor:
        if len(view.grid) == 1:
            return torch.ones(view.grid, dtype=torch.bool, device=view.logits.device)
        return view.predicted()

    def __str__(self) -> str:
        return "predicted mask"


@dataclass(frozen=True)
class Volume(RegionKind):
    """All voxels."""

    def masks(self, view: View) -> torch.Tensor:
        return torch.ones(view.grid, dtype=torch.bool, device=view.logits.device)

    def __str__(self) -> str:
        return "whole volume"


@dataclass(frozen=True, eq=False)
class Given(RegionKind):
    """Where a mask of the caller's is nonzero."""

    mask: Mask

    def masks(self, view: View) -> torch.Tensor:
        return nonzero(self.mask, view.grid)

    def __str__(self) -> str:
        return "given mask"


@dataclass(frozen=True)
class Box(RegionKind):
    """The voxels with start <= index < stop along each axis."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def mask(self, shape: Sequence[int]) -> torch.Tensor:
        """Return the box as a boolean mask of `shape`."""
        fits = len(self.start) == len(self.stop) == len(shape) and all(
            0 <= low < high <= size
            for low, high, size in zip(self.start, self.stop, shape, strict=False)
        )
        if not fits:
            raise TargetError(
                f"box {list(self.start)} to {list(self.stop)} (exclusive) does not lie in a "
                f"volume of {tuple(shape)} voxels"
            )
        mask = torch.zeros(tuple(shape), dtype=torch.bool, device="cpu")
        mask[tuple(map(slice, self.start, self.stop))] = True
        return mask

    def masks(self, view: View) -> torch.Tensor:
        return self.mask(view.grid[1:]).expand(view.grid)

    def __str__(self) -> str:
        return f"box {list(self.start)} to {list(self.stop)}"


def Voxel(index: Sequence[int]) -> Box:  # noqa: N802 (reads as the region that it is)
    """Return the region of one voxel.

    >>> Voxel((1, 0)).mask((2, 2)).tolist()
    [[False, False], [True, False]]
    """
    return Box(tuple(index), tuple(i + 1 for i in index))


@dataclass(frozen=True)
class Component(RegionKind):
    """One connected component of the predicted mask: one lesion.

    Args:
        rank: the component by size, 0 is the largest; of two equal ones the first in memory leads.
        voxel: instead of a rank, a voxel in the component.
        connectivity: along how many axes at once neighbours may differ: 1 joins across faces, 2
            across edges, 3 across corners.

    >>> from seg3dcam.targets import ClassLogit
    >>> logits = torch.tensor([[[3.0, -1.0, 1.0, 2.0]]])  # predicted in voxel 0, and in 2 and 3
    >>> ClassLogit(0, Component(0))(logits), ClassLogit(0, Component(voxel=(0,)))(logits)
    (tensor([3.]), tensor([3.]))
    """

    rank: int | None = None
    voxel: tuple[int, ...] | None = None
    connectivity: int = 1

    follows_prediction = True

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.voxel is None):
            given = "neither" if self.rank is None else "both"
            raise TargetError(
                f"a component is named by its rank or by a voxel in it; {given} given. Write "
                "Component(rank=0) for the largest one or Component(voxel=(z, y, x))"
            )
        if self.rank is not None:
            check_whole("a component's rank", self.rank, 0)
        if self.voxel is not None:
            voxel = np.asarray(self.voxel)
            if voxel.ndim != 1 or (voxel.size and voxel.dtype.kind not in "iu"):
                raise TargetError(f"voxel {self.voxel!r}: legal is a whole number per axis")
            object.__setattr__(self, "voxel", tuple(voxel.astype(int).tolist()))
        check_whole("connectivity", self.connectivity, 1)

    def masks(self, view: View) -> torch.Tensor:
        if self.voxel is not None:
            Voxel(self.voxel).mask(view.grid[1:])  # refuses what lies outside of the volume
        return torch.stack([self._mask(item) for item in view.predicted()])

    def _mask(self, predicted: torch.Tensor) -> torch.Tensor:
        ranks, _ = components(predicted, self.connectivity)
        rank = int(ranks[self.voxel]) if self.rank is None else self.rank
        return ranks.eq(rank) if rank != -1 else torch.zeros_like(ranks, dtype=torch.bool)

    def instead(self, view: View, item: int) -> str:
        ranks, sizes = components(view.predicted()[item], self.connectivity)
        if not sizes:
            return super().instead(view, item)
        if self.voxel is None:
            return (
                f"The predicted mask has {listed_sizes(sizes)}, so ranks 0 to {len(sizes) - 1} are "
                f"legal. {view.described(item)}"
            )
        places = torch.nonzero(ranks >= 0)
        away = (places - places.new_tensor(self.voxel)).double().norm(dim=1)
        near = tuple(places[int(away.argmin())].tolist())
        rank = int(ranks[near])
        return (
            f"At voxel {list(self.voxel)} {view.described_at(item, self.voxel)} is predicted; the "
            f"nearest component has rank {rank} and {sizes[rank]} voxels, the nearest of them is "
            f"{list(near)}, {float(away.min()):.3g} voxels away. {view.described(item)}"
        )

    @property
    def name(self) -> str:
        joined = f" (connectivity {self.connectivity})" if self.connectivity > 1 else ""
        if self.voxel is None:
            return f"component {self.rank}{joined} of the predicted mask"
        return f"the component{joined} of the predicted mask at voxel {list(self.voxel)}"


def listed_sizes(sizes: Sequence[int]) -> str:
    """Say how many components there are, and how large.

    >>> listed_sizes([7, 2])
    '2 components of 7, 2 voxels'
    """
    shown = ", ".join(map(str, sizes[:10])) + (", ..." if len(sizes) > 10 else "")
    return f"{len(sizes)} component{'s' * (len(sizes) != 1)} of {shown} voxels"


@dataclass(frozen=True)
class Boundary(RegionKind):
    """The shell of the predicted mask: voxels within `thickness` steps on either side of its edge.

    A dilation without an erosion, by steps across faces. Where the mask meets the border of the
    volume there is no edge.

    >>> from seg3dcam.targets import ClassLogit
    >>> logits = torch.tensor([[[-1.0, -1.0, 1.0, 1.0, 1.0]]])
    >>> ClassLogit(0, Boundary()).regions(logits)
    tensor([[False,  True,  True, False, False]])
    """

    thickness: int = 1

    follows_prediction = True

    def __post_init__(self) -> None:
        check_whole("a boundary's thickness", self.thickness, 1)

    def masks(self, view: View) -> torch.Tensor:
        inside = view.predicted()
        # An erosion is a growth of what is outside; both grow only within the volume.
        return _grown(inside, self.thickness) & _grown(~inside, self.thickness)

    def instead(self, view: View, item: int) -> str:
        if view.predicted()[item].all():
            return (
                "The mask fills the whole volume, so it has no boundary. "
                f"{super().instead(view, item)}"
            )
        return super().instead(view, item)

    def __str__(self) -> str:
        return f"boundary (thickness {self.thickness}) of the predicted mask"


@dataclass(frozen=True, eq=False)
class AgainstTruth(RegionKind):
    """The prediction compared with ground truth.

    Args:
        truth: whole numbers, where a voxel of the class holds the class's index; or a boolean
            mask of the class. (*S), (B, *S) or (B, 1, *S) on the network's grid, or a `Scan` on
            its own, which `explain` brings there.
        label: the number of the class in `truth`, where it is not the class's index. A sigmoid
            output has no background channel, so its indices are not labels, and `label` is needed;
            except for one channel and a truth of 0 and 1.

    Labels leak into a map over such a region (`uses_truth`): it cannot serve as evidence that the
    model looks in the right place.
    """

    truth: Mask
    label: int | None = None

    uses_truth = True
    follows_prediction = True
    title: ClassVar[str]

    def __post_init__(self) -> None:
        if not isinstance(self.truth, torch.Tensor | np.ndarray | OnItsGrid):
            raise TargetError(
                f"truth {self.truth!r}: legal are a label map or boolean mask as tensor or array, "
                "or a Scan"
            )
        if self.label is not None:
            check_whole("label", self.label)

    def compared(self, truth: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """Return the region of two boolean masks."""
        raise NotImplementedError

    def masks(self, view: View) -> torch.Tensor:
        predicted = view.predicted()
        return self.compared(self._is_class(view).to(predicted.device), predicted)

    def _is_class(self, view: View) -> torch.Tensor:
        """Return where the truth is the target's class, (B, *S) bool."""
        truth = labels(self.truth, view.grid)
        if truth.dtype == torch.bool:
            if self.label is not None:
                raise TargetError(
                    f"label {self.label} of a truth that is a boolean mask: a mask has no labels. "
                    "Leave label out, or give a label map"
                )
            return truth
        if self.label is None and view.index is None:
            return truth != 0  # any foreground
        return truth.eq(self._label(truth, view))

    def _label(self, truth: torch.Tensor, view: View) -> int:
        if self.label is not None:
            return self.label
        if view.index is not None and not view.overlapping:
            return view.index
        if view.logits.shape[1] == 1 and ((truth == 0) | (truth == 1)).all():
            return 1
        raise TargetError(
            f"channel {view.index} of a sigmoid output need not be label {view.index} of the "
            f"truth, which holds {_listed_labels(truth)}. Name the label, as in label=1, or give "
            "a boolean mask of the class"
        )

    def instead(self, view: View, item: int) -> str:
        truth, predicted = self._is_class(view)[item].cpu(), view.predicted()[item].cpu()
        what = "foreground" if view.index is None else f"class {view.index}"
        return (
            f"The truth has {what} in {int(truth.sum())} voxels and the network predicts it in "
            f"{int(predicted.sum())}, {int((truth & predicted).sum())} of them in common. The "
            f"truth holds {_listed_labels(labels(self.truth, view.grid)[item])}. "
            f"{view.described(item)}. If the file has another number for the class, give label="
        )

    def __str__(self) -> str:
        return self.title + ("" if self.label is None else f" (label {self.label} of the truth)")


def _listed_labels(truth: torch.Tensor) -> str:
    values, counts = (part.tolist() for part in truth.unique(return_counts=True))
    if truth.dtype == torch.bool:
        return "a boolean mask"
    shown = [f"label {int(v)} in {n} voxels" for v, n in zip(values, counts, strict=True)]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


class FalseNegatives(AgainstTruth):
    """Where the truth is the class and the prediction is not: why was it missed?

    >>> from seg3dcam.targets import ClassLogit
    >>> logits = torch.tensor([[[-1.0, -1.0, 1.0, 1.0]]])
    >>> missed = FalseNegatives(torch.tensor([0, 1, 1, 0]))
    >>> ClassLogit(0, missed).regions(logits)
    tensor([[False,  True, False, False]])
    """

    title = "false negatives"

    def compared(self, truth: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        return truth & ~predicted


class FalsePositives(AgainstTruth):
    """Where the prediction is the class and the truth is not: why was it invented?

    >>> from seg3dcam.targets import ClassLogit
    >>> logits = torch.tensor([[[-1.0, -1.0, 1.0, 1.0]]])
    >>> ClassLogit(0, FalsePositives(torch.tensor([0, 1, 1, 0]))).regions(logits)
    tensor([[False, False, False,  True]])
    """

    title = "false positives"

    def compared(self, truth: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        return predicted & ~truth


class TruePositives(AgainstTruth):
    """Where both the truth and the prediction are the class.

    >>> from seg3dcam.targets import ClassLogit
    >>> logits = torch.tensor([[[-1.0, -1.0, 1.0, 1.0]]])
    >>> ClassLogit(0, TruePositives(torch.tensor([0, 1, 1, 0]))).regions(logits)
    tensor([[False, False,  True, False]])
    """

    title = "true positives"

    def compared(self, truth: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        return truth & predicted


@dataclass(frozen=True, eq=False)
class FixedRegion(RegionKind):
    """The voxels that a region had at some logits, under its name."""

    fixed: torch.Tensor
    origin: RegionKind

    @property
    def uses_truth(self) -> bool:  # type: ignore[override]
        return self.origin.uses_truth

    @property
    def name(self) -> str:
        return self.origin.name

    def masks(self, view: View) -> torch.Tensor:
        if self.fixed.shape != view.grid:
            raise TargetError(
                f"the region was fixed for logits of {len(self.fixed)} items of "
                f"{tuple(self.fixed.shape[1:])} voxels; these have {view.grid[0]} of "
                f"{view.grid[1:]}. Fix the target at logits of this shape"
            )
        return self.fixed


class FixedComponent(FixedRegion):
    """A component of some logits; all of them share one map of ranks, (B, *S) int."""

    origin: Component

    def masks(self, view: View) -> torch.Tensor:
        return super().masks(view).eq(self.origin.rank or 0)


#: What may be given as a region.
Region: TypeAlias = Literal["predicted", "volume"] | RegionKind | Mask

_WORDS: dict[str, RegionKind] = {"predicted": Predicted(), "volume": Volume()}


def as_region(given: Region) -> RegionKind:
    """Return a region of a word, a mask or a region.

    Raises:
        TargetError: neither of these.
    """
    if isinstance(given, RegionKind):
        return given
    if isinstance(given, str):
        if given not in _WORDS:
            raise TargetError(
                f"region {given!r}: {nearest(given, _WORDS)} A mask, Box, Voxel, Component, "
                "Boundary, FalseNegatives, FalsePositives or TruePositives works too"
            )
        return _WORDS[given]
    if isinstance(given, torch.Tensor | np.ndarray | OnItsGrid):
        return Given(given)
    raise TargetError(
        f"region {given!r}: legal are 'predicted', 'volume', a mask as tensor, array or Scan, Box, "
        "Voxel, Component, Boundary, FalseNegatives, FalsePositives and TruePositives"
    )


def placed_region(region: Region, move: Move) -> Region:
    """Return the region with its mask or truth brought onto the network's grid."""
    if isinstance(region, AgainstTruth):
        if isinstance(region.truth, OnItsGrid):  # here, since a coarser grid may miss a fraction
            check_labels(torch.as_tensor(region.truth.data, device="cpu"))
        return replace(region, truth=placed_mask(region.truth, move))
    return region if isinstance(region, str | RegionKind) else placed_mask(region, move)


def placed_mask(mask: Mask, move: Move) -> Mask:
    """Return a mask brought onto the network's grid, if it knows where it lies."""
    return move(mask) if isinstance(mask, OnItsGrid) else mask


def check_whole(what: str, value: Any, least: int | None = None) -> None:
    """Refuse what is not a whole number, or smaller than `least`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or (least is not None and value < least):
        legal = "a whole number" + ("" if least is None else f" from {least}")
        raise TargetError(f"{what} is {legal}; got {value!r}")
