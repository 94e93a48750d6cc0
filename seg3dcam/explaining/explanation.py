"""What an explanation is: the maps of one target on the scan's own grid, and its views."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from seg3dcam.checks import checked_index
from seg3dcam.engine.evidence import Evidence, scaled, shown_part
from seg3dcam.engine.scales import ALL_AGAINST, NO_HEAT, Scale, Status, display_range
from seg3dcam.errors import InputError, TargetError
from seg3dcam.evaluate.verdict import Verdict, together
from seg3dcam.explaining.provenance import Provenance
from seg3dcam.files.names import visible
from seg3dcam.files.writers.nifti import write_nifti
from seg3dcam.geometry import Axis, anatomical_axis, peak_voxel, to_world
from seg3dcam.scan import Scan, load_labels
from seg3dcam.targets.ground_truth import check_on_grid, truth_mask


class ClassProbability(Protocol):
    """The network's probabilities of a scan, made when they are asked for."""

    def __call__(self, class_index: int) -> torch.Tensor:
        """Return that of a class, (X, Y, Z) float32; 0 where the network saw nothing."""
        ...

    def seen(self) -> torch.Tensor:
        """Return the voxels that the network saw, (X, Y, Z) bool."""
        ...


@dataclass(frozen=True)
class Explanation:
    """One target's maps on the scan's own grid.

    Attributes:
        scan: the scan, with its affine and header.
        maps: layer -> raw signed map (X, Y, Z), at least float32; 0 where the network saw nothing.
        status: layer -> "ok", "zero", "nonfinite", "degenerate" or "incomplete".
        prediction: (K, X, Y, Z) bool, one mask per class of the network.
        class_names: one for each of the K classes.
        target, method: their names.
        class_index: the class that the target is about; None for a target of your own.
        score: the value of the target, which the maps explain.
        native_spacing: layer -> mm between voxels of the layer's own grid, which is the true
            resolution of its map.
        label: class and region in a few words; it tells the targets of one class apart.
        provenance: everything that is needed to make the maps again, ready for JSON; `origin` has
            the same in typed fields.
        truth: where the class really is, (X, Y, Z) bool; None where that is not known.
        region: the voxels that the score sums over, (X, Y, Z) bool, where they are a region of
            their own: a lesion, a boundary, a given mask. None for the class's predicted mask and
            for the whole volume.
        has_background: True where the classes exclude each other and class 0 is the background
            (softmax); False where every class has a channel of its own (sigmoid).
        over_mask: whether the score sums over the class's predicted mask, where there is no
            `region`; False for the whole volume.
        only_against: the layers of status "zero" whose whole map is evidence against the target,
            which the signed view shows.
        of_component: whether the region is a whole lesion: one connected component of the class's
            predicted mask.
        verdicts: layer -> what may be said of its map.
        confidence: how sure the network is of the class or lesion, 0 to 1, by its own
            probabilities, see `soft_dice_confidence`; None for a target of your own.
        probability: see `ClassProbability`; None for an explanation that was read back.

    Raises:
        InputError: maps, prediction, truth or region do not lie on the scan's grid.
    """

    scan: Scan
    maps: Mapping[str, torch.Tensor]
    status: Mapping[str, Status]
    prediction: torch.Tensor
    class_names: Sequence[str]
    target: str
    method: str
    class_index: int | None
    score: float
    native_spacing: Mapping[str, tuple[float, ...]]
    label: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    truth: torch.Tensor | None = None
    region: torch.Tensor | None = None
    has_background: bool = True
    over_mask: bool = True
    only_against: Collection[str] = ()
    of_component: bool = False
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    confidence: float | None = None
    probability: ClassProbability | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuse volumes on another grid, which every writer would draw in a wrong place."""
        shape = tuple(self.scan.shape)
        volumes = {f"map of {name}": values.shape for name, values in self.maps.items()}
        volumes["prediction"] = self.prediction.shape[1:]
        masks = {"truth": self.truth, "region": self.region}
        volumes.update({name: mask.shape for name, mask in masks.items() if mask is not None})
        for what, found in volumes.items():
            if tuple(found) != shape:
                raise InputError(
                    f"{what}: {tuple(found)} voxels, but the scan has {shape}; both must lie on "
                    "the scan's own grid. Resample it to the scan"
                )

    def __repr__(self) -> str:
        """Say in a few lines what was explained; tensors are not shown."""
        layers = ", ".join(f"{name} ({self.status[name]})" for name in self.maps)
        said = self.verdict()
        # Names come from a model's files, and what they hold must not control a terminal.
        return visible(
            f"Explanation of {self.label or self.target!r} by {self.method}, score "
            f"{self.score:.4g}\n  of {self.scan!r}\n  at {layers}"
            + ("" if said is None else f"\n  {said.words}")
        )

    @property
    def affine(self) -> np.ndarray:
        """The scan's affine, (4, 4) voxel -> RAS mm."""
        return self.scan.affine

    @cached_property
    def origin(self) -> Provenance:
        """What the explanation came from, with a field for each entry of `provenance`."""
        return Provenance.read(self.provenance)

    @property
    def class_name(self) -> str:
        """The name of the class that the target is about, or of the target."""
        return self.target if self.class_index is None else self.class_names[self.class_index]

    @property
    def mask(self) -> torch.Tensor | None:
        """Where the target's class is predicted, (X, Y, Z) bool; None for a target of your own."""
        return None if self.class_index is None else self.prediction[self.class_index]

    @property
    def explained(self) -> torch.Tensor | None:
        """The voxels that the score sums over, (X, Y, Z) bool; None if all, or if not known."""
        return self.mask if self.region is None and self.over_mask else self.region

    @property
    def measured(self) -> torch.Tensor | None:
        """The voxels that are measured and outlined: the region, or else the class's mask."""
        return self.mask if self.region is None else self.region

    @property
    def measured_as(self) -> Literal["prediction", "explained region"]:
        """The name of `measured`: a region that is no lesion may lie outside of the prediction."""
        predicted = self.region is None or self.of_component
        return "prediction" if predicted else "explained region"

    @property
    def shown_layers(self) -> tuple[str | None, ...]:
        """What `volume` can show: None for all layers together and, of several, each one alone."""
        return (None, *self.maps) if len(self.maps) > 1 else (None,)

    def layer_name(self, layer: str | None = None) -> str:
        """Say in words which layer a volume is of: "model.1", or "mean of 3 layers"."""
        if layer is not None:
            return layer
        return next(iter(self.maps)) if len(self.maps) == 1 else f"mean of {len(self.maps)} layers"

    def notice(self, layer: str | None = None, scale: Scale = "max") -> str:
        """Say in words why `volume` shows no heat at a scale; "" where it shows some.

        >>> NO_HEAT["zero"]
        'no CAM: no voxel speaks for the target, or contributions cancel to rounding noise'
        """
        names = list(self.maps) if layer is None else [layer]
        found = [self.status[name] for name in names]
        if "nonfinite" in found:
            return NO_HEAT["nonfinite"]
        if len(self.left_out(layer, scale)) < len(names):
            return ""
        if any(name in self.only_against for name in names):
            return f"no CAM: {ALL_AGAINST}; the signed view shows it"
        return NO_HEAT[found[0]]

    def left_out(self, layer: str | None = None, scale: Scale = "max") -> list[str]:
        """Return those layers of a volume whose map cannot be shown at a scale."""
        return [
            name
            for name in (self.maps if layer is None else [layer])
            if self.status[name] != "ok" and not (scale == "signed" and name in self.only_against)
        ]

    def evidence(self, layer: str | None = None) -> Evidence | None:
        """Measure the evidence for and against the target in the whole scan; None without a CAM.

        The sums are in the units of the raw maps, over all layers with a usable map. Evidence
        against the target counts at every scale, also where the usual view hides it.
        """
        if self.notice(layer, "signed"):
            return None
        silent = self.left_out(layer, "signed")
        names = self.maps if layer is None else [layer]
        return Evidence.together([self._evidence[name] for name in names if name not in silent])

    @cached_property
    def _evidence(self) -> dict[str, Evidence]:
        """The evidence in each layer's map, measured once: writers ask for it at every slice."""
        return {name: Evidence.of(values) for name, values in self.maps.items()}

    def caution(self, layer: str | None = None) -> str:
        """Say in words that most or all evidence speaks against the target; else ""."""
        found = self.evidence(layer)
        return "" if found is None else found.caution

    def verdict(self, layer: str | None = None) -> Verdict | None:
        """Return what may be said of a layer's map, or of the mean of all; None if not known."""
        if layer is not None:
            return self.verdicts.get(layer)
        return together({name: v for name, v in self.verdicts.items() if name in self.maps})

    def with_truth(self, labels: Scan | str | Path, label: int | None = None) -> Explanation:
        """Return the explanation with the truth of its class, from a label map on the scan's grid.

        Args:
            labels: a file that `load_labels` reads, or a scan of whole numbers.
            label: the class's label there; None: see `seg3dcam.targets.ground_truth.truth_mask`.

        Raises:
            TargetError: the labels lie on another grid or follow another scheme, or the target is
                about no class.
        """
        if self.class_index is None:
            raise TargetError(f"{self.target} is about no class, so there is no truth of it")
        labels = labels if isinstance(labels, Scan) else load_labels(labels, frame=self.scan.frame)
        check_on_grid("truth", labels.shape, labels.affine, self.scan)
        mask = truth_mask(
            labels.data[0],
            label,
            class_index=self.class_index,
            class_names=self.class_names,
            background=self.has_background,
        )
        return replace(self, truth=mask)

    def volume(self, layer: str | None = None, *, scale: Scale = "max") -> torch.Tensor:
        """Return what is drawn, (X, Y, Z) in [0, 1]: evidence against it cut, layers averaged.

        Args:
            layer: one layer's name; None averages all.
            scale: "max", "minmax", "raw" or, for evidence against it too, in [-1, 1], "signed";
                see `CamResult.volume`.
        """
        names = list(self.maps) if layer is None else [layer]
        for name in names:
            if name not in self.maps:
                raise InputError(f"no map of layer {name!r}: there are {list(self.maps)}")
        if self.notice(layer, scale):
            return torch.zeros_like(self.maps[names[0]])
        silent = self.left_out(layer, scale)
        usable = [self.maps[name] for name in names if name not in silent]
        # Added one by one: a stack of maps on the scan's grid would hold them all once more.
        fused = shown_part(usable[0], scale)
        for other in usable[1:]:
            fused += shown_part(other, scale)
        return scaled((fused / len(names) if len(names) > 1 else fused)[None], scale)[0]

    def slice(self, index: int, axis: Axis = "axial") -> torch.Tensor:
        """Return one slice of `volume` along the scan's axis nearest to an anatomical one.

        Args:
            index: voxel index along that axis of the scan's own array.
        """
        dim = anatomical_axis(self.affine, axis)
        index = checked_index(f"{axis} slice", index, self.scan.shape[dim])
        return self.volume().select(dim, index)

    def peak(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return the voxel and the RAS position in mm of the map's maximum."""
        voxel = peak_voxel(self.volume())
        return voxel, to_world(self.affine, voxel)

    def save(self, path: str | Path, *, layer: str | None = None, scale: Scale = "max") -> Path:
        """Write the volume as NIfTI with the scan's own geometry.

        Args:
            path: ends in .nii or .nii.gz.
            scale: "max" writes [0, 1]; "signed" [-1, 1], with the evidence against; "raw" writes
                positive evidence in its own units.
        """
        return self._write(path, self.volume(layer, scale=scale), display_range(scale))

    def save_raw(self, path: str | Path, layer: str) -> Path:
        """Write a layer's raw signed map as NIfTI with the scan's own geometry."""
        return self._write(path, self.maps[layer], None)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the HTML report."""
        from seg3dcam.review.report import notebook_view

        return notebook_view(self)

    def _write(
        self, path: str | Path, volume: torch.Tensor, shown: tuple[float, float] | None
    ) -> Path:
        """Write a volume as NIfTI; viewers show the values of `shown` in all their colours."""
        return write_nifti(
            path,
            volume,
            self.affine,
            reference=self.scan.header,
            intent_name=self.class_name,
            description=f"{self.method} {self.target}",
            display_range=shown,
        )
