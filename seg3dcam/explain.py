"""A scan in, an explanation on the scan's own grid out.

scan = load_scan("ct.nii.gz")
model = load_model("model.yaml")
explain(scan, model, "tumour").save("cam.nii.gz")
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor

from seg3dcam.attributions import ATTRIBUTIONS
from seg3dcam.cam import BaseCAM, each_by
from seg3dcam.cams import CAMS
from seg3dcam.engine.passes import Progress, check_resolution, silent
from seg3dcam.errors import ConfigError, InputError, ModelError, TargetError, nearest
from seg3dcam.geometry import (
    peak_voxel,
    ras_affine,
    resample,
    resample_labels,
    spacing_of,
    to_world,
)
from seg3dcam.layers import LayerSpec
from seg3dcam.models.base import SegModel
from seg3dcam.result import CamResult, Scale, Status, scaled
from seg3dcam.scan import Scan, load_labels, load_scan
from seg3dcam.targets import (
    ClassLogOdds,
    EveryClass,
    TargetFamily,
    as_targets,
    name_of,
    placed,
    uses_truth,
)
from seg3dcam.targets.regions import Predicted, Volume, as_region
from seg3dcam.targets.use import region_of
from seg3dcam.truth import check_on_grid, truth_mask

Axis = Literal["axial", "coronal", "sagittal"]

#: What may be given as a target: a class name or index, a target, or a family of targets.
Target = Callable[[torch.Tensor], torch.Tensor]
TargetSpec = str | int | Target | TargetFamily

#: Status -> why there is no heat, in words.
NO_HEAT = {
    "zero": "no CAM: no voxel speaks for the target, or contributions cancel to rounding noise",
    "nonfinite": "no CAM: the map holds NaN or infinite values",
    "degenerate": "no CAM: the map is the same everywhere, or undefined for these activations",
}

#: Every method by its key.
ALL_METHODS = {**CAMS, **ATTRIBUTIONS}


@dataclass(frozen=True)
class Explanation:
    """One target's maps on the scan's own grid.

    Attributes:
        scan: the scan, with its affine and header.
        maps: layer -> raw signed map (X, Y, Z), at least float32; 0 where the network saw nothing.
        status: layer -> "ok", "zero", "nonfinite" or "degenerate".
        prediction: (K, X, Y, Z) bool, one mask per class of the network.
        class_names: one for each of the K classes.
        target, method: their names.
        class_index: the class that the target is about, None for a target of your own.
        score: what was explained.
        label: class and region in a few words, different for every target of a class.
        native_spacing: layer -> mm between voxels of the layer's own grid: the map's true
            resolution.
        provenance: everything needed to make the map again, ready for JSON.
        truth: where the class really is, (X, Y, Z) bool; None where that is not known.
        region: the voxels that the score sums over, (X, Y, Z) bool, where they are neither the
            class's mask nor the whole volume: a lesion, a boundary, a given mask. Else None.
        has_background: class 0 is the background and the classes exclude each other (softmax);
            False: every class has a channel of its own (sigmoid).

    Raises:
        InputError: maps, prediction, truth or region that do not lie on the scan's grid.
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

    @property
    def affine(self) -> np.ndarray:
        """The scan's affine, (4, 4) voxel -> RAS mm."""
        return self.scan.affine

    @property
    def class_name(self) -> str:
        """The name of the class that the target is about, or of the target."""
        return self.target if self.class_index is None else self.class_names[self.class_index]

    @property
    def mask(self) -> torch.Tensor | None:
        """Where the target's class is predicted, (X, Y, Z) bool; None for a target of your own."""
        return None if self.class_index is None else self.prediction[self.class_index]

    @property
    def shown_layers(self) -> tuple[str | None, ...]:
        """What `volume` can show: None, all layers averaged; of several also each by itself."""
        return (None, *self.maps) if len(self.maps) > 1 else (None,)

    def layer_name(self, layer: str | None = None) -> str:
        """Say in words which layer a volume is of: "model.1", or "mean of 3 layers"."""
        if layer is not None:
            return layer
        return next(iter(self.maps)) if len(self.maps) == 1 else f"mean of {len(self.maps)} layers"

    def notice(self, layer: str | None = None) -> str:
        """Say in words why a volume shows no heat; nothing where it does.

        >>> NO_HEAT["zero"]
        'no CAM: no voxel speaks for the target, or contributions cancel to rounding noise'
        """
        found = [self.status[name] for name in (self.maps if layer is None else [layer])]
        if "nonfinite" in found:
            return NO_HEAT["nonfinite"]
        return "" if "ok" in found else NO_HEAT[found[0]]

    def with_truth(self, labels: Scan | str | Path, label: int | None = None) -> Explanation:
        """Return the same with the truth of its class, from a label map on the scan's grid.

        Args:
            labels: a NIfTI file, or a scan of whole numbers.
            label: the class's label there; None: see `seg3dcam.truth.truth_mask`.

        Raises:
            TargetError: labels on another grid or of another scheme, or a target that is about
                no class.
        """
        if self.class_index is None:
            raise TargetError(f"{self.target} is about no class, so there is no truth of it")
        labels = labels if isinstance(labels, Scan) else load_labels(labels)
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
            scale: "max", "minmax" or "raw", see `CamResult.volume`.
        """
        names = list(self.maps) if layer is None else [layer]
        for name in names:
            if name not in self.maps:
                raise InputError(f"no map of layer {name!r}: there are {list(self.maps)}")
        if self.notice(layer):
            return torch.zeros_like(self.maps[names[0]])
        usable = [self.maps[name] for name in names if self.status[name] == "ok"]
        fused = usable[0].clamp(min=0)
        for other in usable[1:]:
            fused += other.clamp(min=0)
        return scaled((fused / len(names) if len(names) > 1 else fused)[None], scale)[0]

    def slice(self, index: int, axis: Axis = "axial") -> torch.Tensor:
        """Return one slice of `volume` along the scan's axis nearest to an anatomical one.

        Args:
            index: voxel index along that axis of the scan's own array.
        """
        dim = anatomical_axis(self.affine, axis)
        if not 0 <= index < self.scan.shape[dim]:
            raise InputError(
                f"{axis} slice {index}: legal are 0 to {self.scan.shape[dim] - 1} for this scan"
            )
        return self.volume().select(dim, index)

    def peak(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return the voxel and the RAS position in mm of the map's maximum."""
        voxel = peak_voxel(self.volume())
        return voxel, to_world(self.affine, voxel)

    def save(self, path: str | Path, *, layer: str | None = None, scale: Scale = "max") -> Path:
        """Write the volume as NIfTI with the scan's own geometry.

        Args:
            path: ends in .nii or .nii.gz.
            scale: "max" writes [0, 1]; "raw" writes positive evidence in its own units.
        """
        return self._write(path, self.volume(layer, scale=scale), scale != "raw")

    def save_raw(self, path: str | Path, layer: str) -> Path:
        """Write a layer's raw signed map as NIfTI with the scan's own geometry."""
        return self._write(path, self.maps[layer], False)

    def _repr_html_(self) -> str:
        """What a notebook shows: the HTML report."""
        from seg3dcam.review.report import notebook_view

        return notebook_view(self)

    def _write(self, path: str | Path, volume: torch.Tensor, unit_range: bool) -> Path:
        from seg3dcam.export.nifti import write_nifti

        return write_nifti(
            path,
            volume,
            self.affine,
            reference=self.scan.header,
            intent_name=self.class_name,
            description=f"{self.method} {self.target}",
            display_range=(0, 1) if unit_range else None,
        )


def explain(
    scan: Scan | str | Path | Sequence[str | Path] | torch.Tensor,
    model: SegModel,
    target: TargetSpec,
    *,
    layers: LayerSpec = "auto",
    method: str = "hires_cam",
    progress: Progress | None = None,
    **settings: Any,
) -> Explanation:
    """Explain one target of a whole scan, on the scan's own grid.

    Args:
        scan: what `load_scan` takes.
        model: what `load_model` returns, or a `SegModel` around your own network.
        target: a class name or index (its log-odds over the predicted mask), or a target. Masks
            and truths of a target may be given as `Scan`; they must lie on the scan's grid.
        layers: target layers, see `BaseCAM`.
        method: a key of `METHODS`, or of `seg3dcam.attributions.ATTRIBUTIONS`.
        progress: called with (step, done, total).
        settings: more arguments of the method's class, such as `window=` of `XResCAM`.

    Raises:
        ScanError, ModelError, LayerError, TargetError: see `seg3dcam.errors`.

    Example:
        >>> from seg3dcam.targets import ClassLogit
        >>> network = torch.nn.Sequential(
        ...     torch.nn.Conv3d(1, 2, 3, stride=2, padding=1), torch.nn.ReLU(),
        ...     torch.nn.Upsample(scale_factor=2))
        >>> _ = torch.nn.init.ones_(network[0].weight)
        >>> scan = load_scan(np.random.default_rng(0).random((8, 8, 8)), affine=np.eye(4))
        >>> found = explain(scan, SegModel(network), ClassLogit(0, "volume"), layers="0")
        >>> found.maps["0"].shape
        torch.Size([8, 8, 8])
    """
    found = list(
        explain_each(
            scan, model, [target], layers=layers, method=method, progress=progress, **settings
        )
    )
    if len(found) != 1:
        raise TargetError(
            f"{target!r} stands for {len(found)} targets: explain_each() explains them all"
        )
    return found[0]


def explain_each(
    scan: Scan | str | Path | Sequence[str | Path] | torch.Tensor,
    model: SegModel,
    targets: Sequence[TargetSpec] | None = None,
    *,
    layers: LayerSpec = "auto",
    method: str | Sequence[str] = "hires_cam",
    progress: Progress | None = None,
    **settings: Any,
) -> Iterator[Explanation]:
    """Explain several targets of a scan, by one method or several; the prediction is made once.

    Targets, layers and the methods that take gradients share their forward passes. Maps are
    brought to the scan's grid one by one, as the result is iterated over: target by target, and
    for each target method by method.

    Args:
        targets: class names, indices, targets and families of targets, such as
            `targets.EveryComponent`; None is every predicted foreground class.
        method: a key of `METHODS` or `ATTRIBUTIONS`, or several.
        settings: of the method; several methods take none.

    The other arguments are those of `explain`.
    """
    kinds = [_kind(key) for key in ([method] if isinstance(method, str) else method)]
    if not kinds:
        raise ConfigError(f"no method given: name one, such as 'hires_cam' ({method!r})")
    _check_model(model, settings)
    targets = _listed(targets)
    scan = load_scan(scan)
    model.check_scan(scan)
    report = progress or silent
    report("preparing", 0, 1)
    prepared = model.prepare(scan)
    x = prepared.as_tensor()[None].contiguous()
    cams = [
        kind(
            model.module,
            layers,
            sliding_window=model.window,
            output=model.output,
            activation=model.activation,
            progress=progress,
            **settings,
        )
        for kind in kinds
    ]
    chosen: list[tuple[int | None, Target]] = []

    def choose(logits: torch.Tensor) -> list[Target]:
        model.check_logits(logits)
        check_resolution(logits, x.shape[2:])
        for index, target in _chosen(model, targets, logits):
            moved = placed(target, lambda mask: on_network_grid(mask, scan, prepared))
            chosen.append((index, moved))
        if not chosen:
            raise TargetError("the targets stand for none at this prediction: there is no target")
        return [target for _, target in chosen]

    table = each_by(cams, x, choose)
    report("resampling", 0, 1)
    prediction = _prediction_on(scan, prepared, table[0][0])
    fingerprint = model.fingerprint()
    return (
        _explanation(scan, prepared, model, prediction, index, target, result, fingerprint)
        for (index, target), row in zip(chosen, table, strict=True)
        for result in row
    )


def anatomical_axis(affine: np.ndarray, axis: Axis) -> int:
    """Return the array axis nearest to the one that a plane cuts: axial cuts along S.

    >>> anatomical_axis(np.diag([1.0, 1.0, 3.0, 1.0]), "axial")
    2
    """
    world = {"sagittal": 0, "coronal": 1, "axial": 2}
    if axis not in world:
        raise InputError(f"axis {axis!r}: {nearest(axis, world)}")
    return int(np.flatnonzero(nib.io_orientation(affine)[:, 0] == world[axis])[0])


def _chosen(
    model: SegModel, targets: Sequence[TargetSpec] | None, logits: torch.Tensor
) -> list[tuple[int | None, Target]]:
    """Return (class index or None, target) for everything that is to be explained."""
    named = [
        ClassLogOdds(model.class_index(int(t) if isinstance(t, np.integer) else t))
        if isinstance(t, str | int | np.integer)
        else t
        for t in ([EveryClass()] if targets is None else targets)
    ]
    return [(_class_of(t), t) for t in as_targets(named, logits, model.activation)]


def _class_of(target: Target) -> int | None:
    """Return the class that a target is about, None for a target of the user's own."""
    index = getattr(target, "index", None)
    return int(index) if isinstance(index, int | np.integer) else None


def _label(model: SegModel, index: int | None, target: Target) -> str:
    """Return class and region in a few words, such as "lesion component 0"."""
    if index is None:
        return name_of(target)
    against = getattr(target, "against", None)
    region: Any = getattr(target, "region", "predicted")
    over = "" if isinstance(region, str) and region == "predicted" else as_region(region).name
    words = [
        model.class_name(index),
        "" if against is None else f"against {model.class_name(against)}",
        over.removeprefix("the ").removesuffix(" of the predicted mask"),
    ]
    return " ".join(word for word in words if word)


#: Settings of a call on tensors, and where a whole scan's are given.
_ELSEWHERE = {
    "activation": "SegModel(network, activation=...)",
    "output": "SegModel(network, output=...)",
    "sliding_window": "SegModel(network, window=...)",
    "target_layers": "explain(..., layers=...)",
}


def _check_model(model: Any, settings: Mapping[str, Any]) -> None:
    """Refuse what is no `SegModel`, and settings that belong to it."""
    if not isinstance(model, SegModel):
        raise ModelError(
            f"the model is a {type(model).__name__}; a scan needs a SegModel, which says how scans "
            "are prepared and what classes there are. Wrap your network: SegModel(network, "
            "class_names=[...]), or load_model('model.yaml')"
        )
    for name in settings:
        if name in _ELSEWHERE:
            raise ConfigError(f"{name} is no setting of a method: give it by {_ELSEWHERE[name]}")


def _listed(targets: Any) -> list[TargetSpec] | None:
    """Return the targets as a list, None for every predicted class."""
    if targets is None:
        return None
    if isinstance(targets, str) or not isinstance(targets, Iterable):
        raise TargetError(
            f"targets {targets!r}: give a list, such as [{targets!r}]; explain() takes one alone"
        )
    listed = list(targets)
    if not listed:
        raise TargetError(
            "the list of targets is empty: name at least one, or give None for every predicted "
            "class"
        )
    return listed


def _kind(key: str) -> type[BaseCAM]:
    if key not in ALL_METHODS:
        raise ConfigError(f"method {key!r}: {nearest(key, ALL_METHODS)}")
    return ALL_METHODS[key]


def on_network_grid(mask: Any, scan: Scan, prepared: MetaTensor) -> torch.Tensor:
    """Bring a mask on the scan's grid to the one that the network saw."""
    data, affine = torch.as_tensor(mask.data), np.asarray(mask.affine, dtype=np.float64)
    if isinstance(mask, MetaTensor):
        data, affine = mask.as_tensor(), ras_affine(affine, mask.meta.get("space"))
    if data.ndim == len(scan.shape) + 1 and len(data) == 1:
        data = data[0]
    check_on_grid("mask", data.shape, affine, scan)
    to_affine = prepared.affine.numpy().astype(np.float64)
    return resample_labels(data, scan.affine, to_affine, prepared.shape[1:])


def _prediction_on(scan: Scan, prepared: MetaTensor, result: CamResult) -> torch.Tensor:
    """Return the masks of all classes on the scan's grid: logits are moved, then compared."""
    affine = prepared.affine.numpy()
    masks = torch.zeros((result.logits.shape[1], *scan.shape), dtype=torch.bool)
    best = None
    for index, logits in enumerate(result.logits[0].cpu().float()):
        moved = resample(logits, affine, scan.affine, scan.shape)
        if result.activation == "sigmoid" or len(masks) == 1:
            masks[index] = moved > 0
        elif best is None:
            best, masks[0] = moved, True
        else:
            wins = moved > best
            masks[:index] &= ~wins
            masks[index] = wins
            best = torch.maximum(best, moved)
    return masks


def _region_on(
    scan: Scan, prepared: MetaTensor, target: Target, logits: torch.Tensor
) -> torch.Tensor | None:
    """Return the voxels of a target on the scan's grid, where they are a region of its own."""
    region: Any = getattr(target, "region", "predicted")
    if isinstance(as_region(region), Predicted | Volume):
        return None
    found = region_of(target, logits)
    if found is None:
        return None
    affine = prepared.affine.numpy().astype(np.float64)
    return resample_labels(found[0].cpu(), affine, scan.affine, scan.shape).bool()


def _explanation(
    scan: Scan,
    prepared: MetaTensor,
    model: SegModel,
    prediction: torch.Tensor,
    class_index: int | None,
    target: Target,
    result: CamResult,
    fingerprint: str,
) -> Explanation:
    affine = prepared.affine.numpy().astype(np.float64)
    result = replace(result, affine=affine)
    named = re.sub(r"\bclass (\d+)", lambda m: model.class_name(int(m[1])), result.target)
    result = replace(result, target=named)
    maps = {
        name: resample(
            layer.values[0].cpu(),
            layer.grid.affine(affine),
            scan.affine,
            scan.shape,
            seen_affine=affine,
            seen_shape=tuple(prepared.shape[1:]),
        )
        for name, layer in result.layers.items()
    }
    return Explanation(
        scan=scan,
        maps=maps,
        status=result.status,
        prediction=prediction,
        class_names=[model.class_name(index) for index in range(len(prediction))],
        target=result.target,
        method=result.method,
        class_index=class_index,
        score=float(result.score[0]),
        native_spacing=result.native_spacing,
        label=_label(model, class_index, target),
        region=_region_on(scan, prepared, target, result.logits),
        has_background=result.activation == "softmax" and len(prediction) > 1,
        provenance=_provenance(scan, prepared, model, class_index, target, result, fingerprint),
    )


def _provenance(
    scan: Scan,
    prepared: MetaTensor,
    model: SegModel,
    class_index: int | None,
    target: Target,
    result: CamResult,
    fingerprint: str,
) -> dict[str, Any]:
    plan = model.window
    return {
        "scan": {
            "shape": scan.shape,
            "spacing_mm": spacing_of(scan.affine),
            "affine": scan.affine,
        },
        "prepared": {
            "shape": tuple(prepared.shape[1:]),
            "affine": prepared.affine.numpy(),
        },
        "model": {
            "name": model.name,
            "weights_sha256": fingerprint,
            "classes": list(model.class_names),
            "activation": model.activation,
            "windows": result.windows,
            "window": None if plan is None else asdict(plan),
            "spec": dict(model.spec),
        },
        "target": {
            "name": result.target,
            "class": None if class_index is None else model.class_name(class_index),
            "class_index": class_index,
            "region_voxels": None if result.region_voxels is None else int(result.region_voxels[0]),
            "reduction": "sum",
            "uses_truth": uses_truth(target),
            "score": float(result.score[0]),
        },
        "method": {"name": result.method, "settings": result.settings},
        "layers": {
            name: {
                "status": layer.status,
                "shape": layer.window_grid.shape,
                "stride": layer.window_grid.stride,
                "offset": layer.window_grid.offset,
                "offset_measured": layer.window_grid.measured,
                "map": {
                    "shape": layer.grid.shape,
                    "stride": layer.grid.stride,
                    "offset": layer.grid.offset,
                },
                "spacing_mm": result.native_spacing[name],
                "raw_min": float(layer.values.min()),
                "raw_max": float(layer.values.max()),
                "positive_fraction": float((layer.values > 0).float().mean()),
                "ceiling": float(layer.ceiling[0]),
                "flags": list(layer.flags),
                "dtype": str(layer.values.dtype).removeprefix("torch."),
            }
            for name, layer in result.layers.items()
        },
        "dropped_layers": dict(result.dropped),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("seg3dcam", "torch", "monai", "nibabel")},
        },
    }
