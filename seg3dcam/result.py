"""What a CAM returns: raw signed maps on every grid, and the views that are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from seg3dcam.checks import checked_index
from seg3dcam.errors import InputError
from seg3dcam.geometry import FeatureGrid, interpolate, spacing_of

Status = Literal["ok", "zero", "nonfinite", "degenerate", "incomplete"]
Scale = Literal["max", "minmax", "raw", "signed"]

#: Below this fraction of what a map would be without cancellation, it is rounding noise; for
#: activations of low precision, ten times their machine epsilon.
CANCELLED = 1e-6

#: A map that varies by less than this fraction of its maximum is the same everywhere.
CONSTANT = 1e-5

#: Where what speaks for a target sums to a smaller part than this of what speaks against it, heat
#: hides more than ten times what it shows.
MOSTLY_AGAINST = 0.1

#: What is said of a map that has no positive value: there is nothing that the usual view shows.
ALL_AGAINST = "all evidence speaks against the target"


@dataclass(frozen=True)
class LayerMap:
    """The raw, signed map of one layer.

    Attributes:
        values: (B, *grid.shape), before ReLU and scaling, at least float32.
        grid: where its voxels lie in the input: the layer's grid, or the input's own voxels where
            windows do not fit on one layer grid.
        window_grid: the layer's grid within one window.
        ceiling: (B,) the maximum that the map would have if nothing cancelled: the method applied
            to absolute values.
        precision: dtype of the activations.
        undefined: (B,) bool, True where the method has no meaning, such as a division by a sum of
            activations that InstanceNorm makes zero; None: nowhere.
        flags: what the reader of the map must know.
        missing: which part of the score's changes the gradients that made the map do not follow,
            since a branch of the network has no gradient; 0: none, or no gradient was needed.
    """

    values: torch.Tensor
    grid: FeatureGrid
    window_grid: FeatureGrid
    ceiling: torch.Tensor
    precision: torch.dtype = torch.float32
    undefined: torch.Tensor | None = None
    flags: tuple[str, ...] = ()
    missing: float = 0.0

    @cached_property
    def item_status(self) -> tuple[Status, ...]:
        """Each item's status.

        "ok"; "zero": no voxel speaks for the target (see `only_against`), or contributions cancel
        to rounding noise;
        "nonfinite": NaN or infinity; "degenerate": the same value everywhere, or a method that is
        undefined for these activations; "incomplete": made of gradients that do not follow the
        score, since a branch of the network has none.
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
        """Tell of each item whose status is "zero" whether its map is evidence, all of it against.

        The usual view of it is empty, the signed view is not.
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


@dataclass(frozen=True)
class CamResult:
    """The maps of one target, for a batch of inputs.

    Attributes:
        layers: layer name -> `LayerMap`.
        shape: voxels of the input, (*S).
        logits: (B, K, *S), stitched from the windows if there were several.
        score: (B,) what was explained.
        target, method: their names.
        activation: "softmax" or "sigmoid": how logits become a prediction.
        affine: (4, 4) voxel -> RAS mm of the input, (B, 4, 4) if the items lie on different
            grids, None if unknown.
        windows: how many windows the input was cut into.
        region_voxels: (B,) voxels of the target's region, None for a target of your own.
        settings: the method's parameters.
        dropped: layer -> why one of many ("all", `decoder.*`) has no map.
        members: how many networks and flips of an `Ensemble` were averaged.
        draws: the operation with which the network draws random numbers, "" for none: prediction
            and maps then belong to one draw, the same in every pass, and other draws give others.
    """

    layers: Mapping[str, LayerMap]
    shape: tuple[int, ...]
    logits: torch.Tensor
    score: torch.Tensor
    target: str
    method: str
    activation: str = "softmax"
    affine: np.ndarray | None = None
    windows: int = 1
    region_voxels: torch.Tensor | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    members: int = 1
    draws: str = ""

    @cached_property
    def maps(self) -> dict[str, torch.Tensor]:
        """Layer -> raw signed map on the input's grid, (B, *S)."""
        voxels = FeatureGrid.of_voxels(self.shape)
        return {name: interpolate(m.values, m.grid, voxels) for name, m in self.layers.items()}

    @property
    def native(self) -> dict[str, torch.Tensor]:
        """Layer -> raw signed map on the layer's own grid, (B, *s); one window only."""
        if self.members > 1:
            raise InputError(
                f"the maps of {self.members} networks and flips were averaged, and flipped layers "
                "have grids of their own: use .maps"
            )
        if self.windows > 1:
            raise InputError(
                f"the input was cut into {self.windows} windows, each with a grid of its own: "
                "use .maps"
            )
        return {name: layer.values for name, layer in self.layers.items()}

    @property
    def status(self) -> dict[str, Status]:
        """Layer -> "ok", "zero", "nonfinite", "degenerate" or "incomplete"; the worst item's."""
        return {name: layer.status for name, layer in self.layers.items()}

    @property
    def native_spacing(self) -> dict[str, tuple[float, ...]]:
        """Layer -> size of its voxels: in mm where the affine is known, else in input voxels.

        For a batch of items of different spacing, the first item's.
        """
        sizes = {}
        for name, layer in self.layers.items():
            voxel = (1.0,) * len(layer.window_grid.stride)
            affine = self._affine_of(0)
            spacing = voxel if affine is None else spacing_of(affine)
            strides = zip(layer.window_grid.stride, spacing, strict=False)
            sizes[name] = tuple(stride * size for stride, size in strides)
        return sizes

    @property
    def prediction(self) -> torch.Tensor:
        """The predicted labels (B, *S); for sigmoid outputs one mask per class (B, K, *S)."""
        if self.activation == "sigmoid" or self.logits.shape[1] == 1:
            return self.logits > 0
        return self.logits.argmax(1)

    def volume(
        self,
        layer: str | None = None,
        *,
        scale: Scale = "max",
        per_layer: bool = False,
    ) -> torch.Tensor:
        """Return what is drawn, (B, *S): negative evidence cut, layers averaged, scaled.

        Args:
            layer: one layer's name; None fuses all.
            scale: "max" divides by each item's maximum, so that zero stays zero; "minmax" maps
                minimum to 0 and maximum to 1, which lifts a map whose minimum is positive; "raw"
                leaves the values; "signed" keeps the evidence against, in [-1, 1]: divided by the
                largest absolute value, so that both signs share one scale and zero stays zero.
            per_layer: scale every layer before they are averaged, and cut and scale it on its own
                grid before resizing: the original recipe.

        An item whose map is zero, constant or not finite gives zeros; see `status`. One that holds
        nothing but evidence against the target is shown by "signed" alone.
        """
        _check_scale(scale)
        names = [layer] if layer is not None else list(self.layers)
        voxels = FeatureGrid.of_voxels(self.shape)
        views = []
        for name in names:
            native = self._layer(name)
            if per_layer:
                view = interpolate(
                    scaled(shown_part(native.values, scale), scale), native.grid, voxels
                )
            else:
                view = shown_part(self.maps[name], scale)
            views.append(view.masked_fill(~native.items_shown(scale), 0))
        fused = torch.stack(views).mean(0)
        for name in names:
            fused = fused.masked_fill(self._layer(name).items_that_are("nonfinite"), 0)
        return scaled(fused, scale)

    def slice(self, index: int, axis: int = 0, **view: object) -> torch.Tensor:
        """Return one slice of `volume`, (B, H, W): index Z along `axis` 0, 1 or 2.

        Args:
            index: slice number, 0 <= index < number of slices.
            axis: spatial axis that is cut, 0 being Z of (B, C, Z, Y, X).
            view: passed on to `volume`.
        """
        axis = checked_index("axis", axis, len(self.shape))
        index = checked_index("slice", index, self.shape[axis], f" along axis {axis}")
        return self.volume(**view).select(1 + axis, index)  # type: ignore[arg-type]

    def save(
        self,
        path: str | Path,
        *,
        affine: np.ndarray | None = None,
        item: int | None = None,
        layer: str | None = None,
        scale: Scale = "max",
        per_layer: bool = False,
    ) -> Path:
        """Write one item's volume as NIfTI, in patient space; a 2D map as a picture.

        Args:
            path: ends in .nii or .nii.gz; of a 2D map in .png, and
                `seg3dcam.review.map_2d.save_map` draws it over its input.
            affine: (4, 4) voxel -> RAS mm; default the input's, if it was a MetaTensor.
            item: which item of the batch; not needed for a batch of one.
            layer, scale, per_layer: as in `volume`.

        Raises:
            InputError: no affine is known, or one of several items was not chosen.
            ConfigError: a path that does not end as it must.
            OutputError: the file cannot be written.
        """
        from seg3dcam.export.nifti import write_nifti

        item = self.one_item(item)
        if len(self.shape) == 2:
            from seg3dcam.review.map_2d import write_map

            return write_map(path, self.volume(layer, scale=scale, per_layer=per_layer)[item])
        affine = self._affine_of(item) if affine is None else affine
        if affine is None:
            raise InputError(
                "where is this volume in the patient? Its input was no MetaTensor with an affine: "
                "give save(..., affine=<4x4 voxel -> RAS mm>), numpy.eye(4) for plain voxels"
            )
        if len(self.shape) != 3:
            raise InputError(f"NIfTI volumes are 3-D; this map has {len(self.shape)} axis")
        return write_nifti(
            path,
            self.volume(layer, scale=scale, per_layer=per_layer)[item],
            affine,
            intent_name=self.method,
            description=f"{self.method} {self.target}",
            display_range=display_range(scale),
        )

    def one_item(self, item: int | None) -> int:
        """Return which item of the batch is meant; InputError where that is open."""
        count = len(self.score)
        if item is None and count > 1:
            raise InputError(
                f"the batch has {count} items, and a file holds one: give save(..., item=0), up to "
                f"item={count - 1}, each with a path of its own"
            )
        return checked_index("item", 0 if item is None else item, count, " of the batch")

    def _affine_of(self, item: int) -> np.ndarray | None:
        several = self.affine is not None and self.affine.ndim == 3
        return self.affine[item] if several else self.affine  # type: ignore[index]

    def _layer(self, name: str) -> LayerMap:
        if name not in self.layers:
            raise InputError(f"no map of layer {name!r}: there are {list(self.layers)}")
        return self.layers[name]


def scaled(maps: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Scale each item (B, *S) on its own, in place; a constant or zero one becomes zeros.

    >>> scaled(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), "minmax").tolist()
    [[0.0, 1.0], [0.0, 0.0]]
    >>> scaled(torch.tensor([[-4.0, 1.0]]), "signed").tolist()
    [[-1.0, 0.25]]
    """
    _check_scale(scale)
    if scale == "raw":
        return maps
    flat = maps.flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    bottom = low if scale == "minmax" else torch.zeros_like(low)
    top = torch.maximum(high, -low) if scale == "signed" else high
    constant = high - low <= CONSTANT * top.abs()
    height = torch.where(constant, 1, top - bottom)
    shape = (-1, *[1] * (maps.ndim - 1))
    maps -= bottom.view(shape)
    return maps.div_(height.view(shape)).masked_fill_(constant.view(shape), 0)


def shown_part(values: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Return a copy of raw values without what a scale does not show: the evidence against."""
    return values.clone() if scale == "signed" else values.clamp(min=0)


def display_range(scale: Scale) -> tuple[float, float] | None:
    """Return the values that viewers show in the first and the last colour; None: any."""
    return {"raw": None, "signed": (-1.0, 1.0)}.get(scale, (0.0, 1.0))


class Evidence(NamedTuple):
    """What raw maps hold for their target and against it: sums and largest values, all as sizes.

    >>> Evidence.of(torch.tensor([0.5, -4.0, -1.0]))
    Evidence(sum_for=0.5, sum_against=5.0, most_for=0.5, most_against=4.0)
    """

    sum_for: float
    sum_against: float
    most_for: float
    most_against: float

    @classmethod
    def of(cls, values: torch.Tensor) -> Evidence:
        """Measure a raw map of any shape."""
        flat = values.detach().cpu().numpy()  # by numpy: in float64, without a copy of the map
        sum_for = float(flat.sum(dtype=np.float64, where=flat > 0))
        sum_against = sum_for - float(flat.sum(dtype=np.float64))
        return cls(sum_for, sum_against, max(0.0, float(flat.max())), max(0.0, -float(flat.min())))

    @classmethod
    def together(cls, parts: Sequence[Evidence]) -> Evidence:
        """Return that of several maps, at least one."""
        sums_for, sums_against, most_for, most_against = zip(*parts, strict=True)
        return cls(sum(sums_for), sum(sums_against), max(most_for), max(most_against))

    @property
    def against(self) -> float | None:
        """The part of the absolute sum that speaks against the target; None of a zero map."""
        total = self.sum_for + self.sum_against
        return self.sum_against / total if total > 0 else None

    @property
    def caution(self) -> str:
        """Say in words that a map is mostly, or all, evidence against its target; else nothing.

        A weak background against the target outweighs a small lesion in a large scan by its sum
        alone, and is no reason to distrust the heat of the lesion, which is the strongest value.

        >>> Evidence.of(torch.tensor([0.5, -4.0, -2.0])).caution.partition(":")[0]
        'mostly evidence against the target'
        >>> Evidence.of(torch.tensor([0.5, *[-0.1] * 100])).caution
        ''
        >>> Evidence.of(torch.tensor([0.0, -4.0, -2.0])).caution
        'all evidence speaks against the target: at most 4, in sum 6'
        """
        few = self.sum_for < MOSTLY_AGAINST * self.sum_against
        if not (few and self.most_for < self.most_against):
            return ""
        if self.sum_for == 0:
            return (
                f"{ALL_AGAINST}: at most {_three_digits(self.most_against)}, in sum "
                f"{_three_digits(self.sum_against)}"
            )
        return (
            "mostly evidence against the target: at most "
            f"{_three_digits(self.most_for)} for it, in sum {_three_digits(self.sum_for)}, and "
            f"{_three_digits(self.most_against)} against it, in sum "
            f"{_three_digits(self.sum_against)}"
        )


def _three_digits(number: float) -> str:
    """Write 9120 and not 9.12e+03."""
    return f"{float(f'{number:.3g}'):g}"


def _check_scale(scale: str) -> None:
    if scale not in ("max", "minmax", "raw", "signed"):
        raise InputError(f"scale {scale!r}: legal are 'max', 'minmax', 'raw' and 'signed'")


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
